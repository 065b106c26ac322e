"""Group commit: batching, isolation of failures, deadlines, and behaviour when the database fails, hangs or returns."""

import asyncio
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
from sqlalchemy import Connection, event, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from scripts.tools.ports import free_port
from sso_service.database import database_at, group_commit
from sso_service.database.directory import AccessQuery, Provisioning, ProvisionRequest, provision
from sso_service.database.group_commit import GroupCommit, Transaction
from sso_service.database.ledger import Redemption, Redemptions, Verdict
from sso_service.database.schema import consumed_nonces
from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown, Overloaded, Unavailable
from tests.support.data import ACCOUNT
from tests.support.databases import on_postgresql, on_sqlite

pytestmark = pytest.mark.anyio

SHORT = 0.4
"""A deadline in seconds that is short enough to wait for in a test."""

Step = Callable[[Connection, Sequence[int]], object]


Work = Callable[[Connection, Sequence[int]], list[int]]


class _NoteWrites(GroupCommit[int, int]):
    kind = "test"
    transaction: ClassVar[Transaction] = "writing"

    def __init__(self, work: Work, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._work = work

    def run_batch(self, connection: Connection, ops: Sequence[int]) -> list[int]:
        return self._work(connection, ops)


class _NoteReads(_NoteWrites):
    transaction = "reading"


class Harness:
    """A group commit whose operation `n` inserts the note `n` and returns `10 * n`.

    `batches` holds the operations of each transaction. If `step` is set, it runs at the end of each.
    """

    def __init__(self, database: Database, *, threads: int = 16, reads: bool = False, **options: Any) -> None:
        self.database = database
        self.batches: list[list[int]] = []
        self.step: Step | None = None
        self.threads = ThreadPoolExecutor(threads)
        self.reads = reads
        self.commits = (_NoteReads if reads else _NoteWrites)(self._work, database, self.threads, **options)

    def submit(self, op: int) -> "asyncio.Task[int]":
        return asyncio.create_task(self.commits.submit(op))

    async def submit_all(self, ops: Sequence[int]) -> list[int | BaseException]:
        return await asyncio.gather(*map(self.submit, ops), return_exceptions=True)

    def _work(self, connection: Connection, ops: Sequence[int]) -> list[int]:
        self.batches.append(list(ops))
        for op in ops if not self.reads else ():
            connection.execute(text("INSERT INTO notes VALUES (:n)"), {"n": op})
        if self.step is not None:
            self.step(connection, ops)
        return [10 * op for op in ops]


class BlockingStep:
    """A step that blocks inside the transaction, when it first runs, until it is released."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._released = threading.Event()

    def __call__(self, *_: object) -> None:
        self._entered.set()
        assert self._released.wait(10)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10)

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def harnesses(database: Database) -> Iterator[Callable[..., Harness]]:
    """Create group commits on the database, which has an empty table of notes."""
    execute(database, "CREATE TABLE notes (n INTEGER PRIMARY KEY)")
    made: list[Harness] = []

    def make(**options: Any) -> Harness:
        made.append(Harness(database, **options))
        return made[-1]

    yield make
    for harness in made:
        harness.threads.shutdown()


@pytest.fixture
def harness(harnesses: Callable[..., Harness]) -> Harness:
    return harnesses()


@pytest.fixture
def statements(database: Database) -> list[str]:
    """Every statement that is sent to the database from now on."""
    seen: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def record(_c: object, _r: object, statement: str, *_: object) -> None:
        seen.append(statement)

    return seen


def execute(database: Database, *statements: str) -> None:
    with database.connect() as connection, database.writing(connection):
        for statement in statements:
            connection.exec_driver_sql(statement)


def notes(database: Database) -> list[int]:
    with database.connect() as connection:
        return list(connection.execute(text("SELECT n FROM notes ORDER BY n")).scalars())


def superuser(database: Database) -> "psycopg.Connection[Any]":
    """A connection to PostgreSQL that bypasses the code under test."""
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True)


def trigger(database: Database, body: str, *, at_commit: bool) -> None:
    """Run `body` (PL/pgSQL) for each note, either immediately or when its transaction commits."""
    deferred = "DEFERRABLE INITIALLY DEFERRED" if at_commit else ""
    function = f"RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$"
    with superuser(database) as connection:
        connection.execute("CREATE SEQUENCE attempts")
        connection.execute(f"CREATE FUNCTION fault() {function}".encode())
        connection.execute(
            f"CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON notes {deferred} "
            "FOR EACH ROW EXECUTE FUNCTION fault()".encode()
        )


# --- Batching --------------------------------------------------------------------------------------------------------


async def test_operations_that_arrive_during_a_transaction_share_the_next_one(
    harness: Harness, statements: list[str]
) -> None:
    harness.step = block = BlockingStep()
    first = harness.submit(0)
    await block.entered()
    rest = [harness.submit(op) for op in range(1, 101)]
    await asyncio.sleep(0)
    block.release()
    assert await asyncio.gather(first, *rest) == [10 * op for op in range(101)]
    assert harness.batches == [[0], list(range(1, 101))]
    assert statements.count("COMMIT") == 2
    assert notes(harness.database) == list(range(101))


async def test_operations_of_one_event_loop_iteration_share_a_transaction(
    harness: Harness, statements: list[str]
) -> None:
    assert await harness.submit_all(range(10)) == [10 * op for op in range(10)]
    assert harness.batches == [list(range(10))]
    assert statements.count("COMMIT") == 1


async def test_a_transaction_is_limited_to_the_maximum_batch_size(harness: Harness) -> None:
    many = 2 * group_commit.MAX_BATCH + 1
    await harness.submit_all(range(many))
    assert [len(batch) for batch in harness.batches] == [group_commit.MAX_BATCH, group_commit.MAX_BATCH, 1]
    assert [op for batch in harness.batches for op in batch] == list(range(many))


async def test_no_operation_completes_before_the_commit(harness: Harness) -> None:
    block = BlockingStep()

    @event.listens_for(harness.database.engine, "before_cursor_execute")
    def hold_commit(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement == "COMMIT":
            block()

    answer = harness.submit(1)
    await block.entered()
    done, _ = await asyncio.wait([answer], timeout=0.05)
    assert not done
    with harness.database.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM notes").scalar_one() == 0
    block.release()
    assert await answer == 10


async def test_equal_claims_in_one_batch_are_redeemed_only_once(database: Database) -> None:
    with database.connect() as connection, database.writing(connection):
        jane = provision(database, connection, [ProvisionRequest("jane@example.com", "J", "D", ACCOUNT, 1)])[0]
    access = AccessQuery(jane.user_id, ACCOUNT)
    same, other = Redemption(b"s" * 16, access, 1), Redemption(b"o" * 16, access, 1)
    with ThreadPoolExecutor() as threads:
        commits = Redemptions(database, threads)
        batch = [same, same, other, same, other]
        verdicts = [r.verdict for r in await asyncio.gather(*map(commits.submit, batch))]
    redeemed, refused = Verdict.REDEEMED, Verdict.CONSUMED
    assert verdicts == [redeemed, refused, redeemed, refused, refused]


async def test_a_person_who_occurs_twice_in_one_batch_is_created_once(database: Database) -> None:
    people = [
        ProvisionRequest(email, "A", "B", ACCOUNT, 1) for email in ("a@x.test", "b@x.test", "a@x.test", "a@x.test")
    ]
    with ThreadPoolExecutor() as threads:
        commits = Provisioning(database, threads)
        provisioned = await asyncio.gather(*map(commits.submit, people))
    assert [p.created for p in provisioned] == [True, True, False, False]
    assert len({p.user_id for p in provisioned}) == 2


# --- Isolation of failures -------------------------------------------------------------------------------------------


async def test_an_operation_that_raises_does_not_fail_its_batch(harness: Harness) -> None:
    def refuse_seven(_: Connection, ops: Sequence[int]) -> None:
        if 7 in ops:
            raise ValueError("seven")

    harness.step = refuse_seven
    results = await harness.submit_all(range(10))
    assert isinstance(results.pop(7), ValueError)
    assert results == [10 * op for op in range(10) if op != 7]
    assert notes(harness.database) == [op for op in range(10) if op != 7]
    assert harness.batches == [list(range(10)), *([op] for op in range(10))]


async def test_an_operation_that_violates_a_constraint_does_not_fail_its_batch(harness: Harness) -> None:
    execute(harness.database, "INSERT INTO notes VALUES (3)")
    results = await harness.submit_all(range(6))
    assert isinstance(results.pop(3), IntegrityError)
    assert results == [0, 10, 20, 40, 50]
    assert notes(harness.database) == list(range(6))


async def test_a_batch_that_fails_before_its_commit_is_rolled_back(harness: Harness, statements: list[str]) -> None:
    def fail(connection: Connection, _: Sequence[int]) -> None:
        connection.exec_driver_sql("SELECT * FROM missing_table")

    harness.step = fail
    [failure] = await harness.submit_all([1])
    assert isinstance(failure, DBAPIError | Unavailable)
    assert "COMMIT" not in statements
    assert notes(harness.database) == []
    harness.step = None
    assert await harness.submit(1) == 10


# --- Outcomes of COMMIT ----------------------------------------------------------------------------------------------


@contextmanager
def commit_that_fails(database: Database, *, after: bool) -> Iterator[list[str]]:
    """Lose the connection at COMMIT, either before or after it is executed. Yields the COMMITs so far."""
    sent: list[str] = []

    def fail(cursor: Any, statement: str, *_: object) -> None:
        if statement != "COMMIT":
            return
        sent.append(statement)
        if after:
            cursor.execute(statement)
        cursor.connection.close()
        raise database.engine.dialect.loaded_dbapi.OperationalError("the connection was lost")

    event.listen(database.engine, "do_execute", fail)
    yield sent
    event.remove(database.engine, "do_execute", fail)


@pytest.mark.parametrize("after", [False, True], ids=["before-execution", "after-execution"])
async def test_a_commit_that_loses_its_connection_is_unknown_and_not_retried(harness: Harness, after: bool) -> None:
    with commit_that_fails(harness.database, after=after) as sent:
        results = await harness.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert len(sent) == len(harness.batches) == 1
    assert notes(harness.database) == (list(range(5)) if after else [])
    assert await harness.submit(9) == 90


@on_postgresql
async def test_a_server_crash_during_the_commit_leaves_the_outcome_unknown(
    harness: Harness, statements: list[str]
) -> None:
    trigger(harness.database, "PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(1)", at_commit=True)
    results = await harness.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(harness.batches) == 1
    execute(harness.database, "DROP TRIGGER fault ON notes")
    assert await harness.submit(9) == 90
    assert notes(harness.database) == [9]


@on_postgresql
async def test_a_server_crash_before_the_commit_is_unavailable_and_writes_nothing(
    harness: Harness, statements: list[str]
) -> None:
    def terminate(connection: Connection, ops: Sequence[int]) -> None:
        if 0 in ops:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(1)")

    harness.step = terminate
    [failure] = await harness.submit_all([0])
    assert isinstance(failure, Unavailable)
    assert "COMMIT" not in statements
    assert await harness.submit(9) == 90
    assert notes(harness.database) == [9]


@on_postgresql
@pytest.mark.parametrize(
    "error",
    ["RAISE EXCEPTION 'test'", "RAISE EXCEPTION 'test' USING ERRCODE = '57014'", "RAISE unique_violation"],
    ids=["error", "cancel", "constraint"],
)
async def test_an_error_during_the_commit_leaves_the_outcome_unknown(
    harness: Harness, statements: list[str], error: str
) -> None:
    trigger(harness.database, error, at_commit=True)
    results = await harness.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(harness.batches) == 1


@on_postgresql
async def test_a_warning_during_the_commit_leaves_the_outcome_unknown(harness: Harness, statements: list[str]) -> None:
    trigger(harness.database, "RAISE WARNING 'test'", at_commit=True)
    results = await harness.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(harness.batches) == 1
    execute(harness.database, "DROP TRIGGER fault ON notes")
    assert await harness.submit(9) == 90


@on_postgresql
@pytest.mark.parametrize(("level", "at_commit"), [("NOTICE", True), ("WARNING", False)])
async def test_notices_and_earlier_warnings_do_not_affect_the_commit(
    harness: Harness, level: str, at_commit: bool
) -> None:
    trigger(harness.database, f"RAISE {level} 'test'", at_commit=at_commit)
    assert await harness.submit_all([1, 2]) == [10, 20]


@on_postgresql
async def test_a_commit_that_skips_its_synchronous_standby_is_unknown(harness: Harness) -> None:
    waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

    def cancel(connection: "psycopg.Connection[Any]") -> None:
        end = time.monotonic() + 10
        while not connection.execute(waiting).fetchall():
            assert time.monotonic() < end

    with superuser(harness.database) as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'missing'")
        connection.execute("SELECT pg_reload_conf()")
        try:
            answer = harness.submit(1)
            await asyncio.to_thread(cancel, connection)
            with pytest.raises(OutcomeUnknown, match="synchronous replication"):
                await answer
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


async def test_a_commit_that_turns_into_a_rollback_is_not_a_success(harness: Harness) -> None:
    def fail_silently(connection: Connection, _: Sequence[int]) -> None:
        if harness.database.is_sqlite:
            connection.exec_driver_sql("ROLLBACK")
            return
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT 1 / 0")

    harness.step = fail_silently
    results = await harness.submit_all([1, 2])
    assert notes(harness.database) == []
    assert all(isinstance(result, OutcomeUnknown | Unavailable) for result in results), results


@on_postgresql
@pytest.mark.parametrize("at_commit", [False, True], ids=["before-commit", "at-commit"])
@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_transaction_that_the_server_aborts_for_a_conflict_is_retried(
    harness: Harness, code: str, at_commit: bool
) -> None:
    once = f"IF nextval('attempts') <= 1 THEN RAISE EXCEPTION 'retry' USING ERRCODE = '{code}'; END IF"
    trigger(harness.database, once, at_commit=at_commit)
    assert await harness.submit(1) == 10
    assert harness.batches == [[1], [1]]
    assert await harness.submit_all([2, 3]) == [20, 30]
    assert notes(harness.database) == [1, 2, 3]


@on_postgresql
async def test_a_batch_that_the_server_aborts_is_retried_one_by_one(harness: Harness) -> None:
    once = "IF nextval('attempts') <= 1 THEN RAISE EXCEPTION 'retry' USING ERRCODE = '40001'; END IF"
    trigger(harness.database, once, at_commit=True)
    assert await harness.submit_all([1, 2, 3]) == [10, 20, 30]
    assert notes(harness.database) == [1, 2, 3]


@on_postgresql
async def test_retries_of_an_aborted_transaction_are_limited(harness: Harness) -> None:
    trigger(harness.database, "RAISE EXCEPTION 'retry' USING ERRCODE = '40001'", at_commit=True)
    with pytest.raises(Unavailable):
        await harness.submit(1)
    assert 1 < len(harness.batches) < 10


@on_postgresql
async def test_a_real_deadlock_is_retried(harness: Harness) -> None:
    execute(harness.database, "INSERT INTO notes VALUES (100), (200)")
    touch = "UPDATE notes SET n = n WHERE n = {}"
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    with superuser(harness.database) as rival, superuser(harness.database) as watcher, ThreadPoolExecutor() as threads:
        rival.execute("BEGIN")
        rival.execute(touch.format(200).encode())

        def collide(connection: Connection, _: Sequence[int]) -> None:
            connection.exec_driver_sql("SET LOCAL deadlock_timeout = '10ms'")
            connection.exec_driver_sql(touch.format(100))
            if len(harness.batches) == 1:
                blocked = threads.submit(rival.execute, touch.format(100).encode())
                blocked.add_done_callback(lambda _: rival.execute("COMMIT"))
                while not watcher.execute(waiting).fetchall():
                    pass
            connection.exec_driver_sql(touch.format(200))

        harness.step = collide
        assert await harness.submit(1) == 10
    assert harness.batches[:2] == [[1], [1]]  # on a slow machine they may collide again


@pytest.mark.parametrize("after", [False, True], ids=["before-execution", "after-execution"])
async def test_a_read_that_loses_its_connection_at_commit_is_unavailable(
    harnesses: Callable[..., Harness], after: bool
) -> None:
    harness = harnesses(reads=True)
    with commit_that_fails(harness.database, after=after):
        results = await harness.submit_all([1, 2])
    assert [type(result) for result in results] == [Unavailable] * 2
    assert await harness.submit(3) == 30


# --- Deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reads", "expected"), [(False, OutcomeUnknown), (True, Unavailable)])
async def test_a_deadline_in_flight_does_not_block_later_operations(
    harnesses: Callable[..., Harness], reads: bool, expected: type[Exception]
) -> None:
    harness = harnesses(reads=reads, deadline=SHORT)
    harness.step = block = BlockingStep()
    start = time.monotonic()
    stuck = harness.submit(1)
    await block.entered()
    harness.step = None
    try:
        with pytest.raises(expected):
            await stuck
        assert SHORT <= time.monotonic() - start < SHORT + 1
        if not (harness.database.is_sqlite and not reads):  # SQLite has a single writer, which is still busy
            assert await harness.submit(2) == 20
    finally:
        block.release()
    assert await harness.submit(3) == 30
    assert harness.batches[0] == [1]
    assert sum(batch.count(1) for batch in harness.batches) == 1


@pytest.mark.parametrize("reads", [False, True])
async def test_an_operation_that_waits_until_its_deadline_never_runs(
    harnesses: Callable[..., Harness], reads: bool
) -> None:
    harness = harnesses(reads=reads, deadline=SHORT, threads=1)
    block = BlockingStep()
    occupied = harness.threads.submit(block)
    start = time.monotonic()
    results = await harness.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert SHORT <= time.monotonic() - start < SHORT + 1
    block.release()
    occupied.result()
    assert await harness.submit(4) == 40
    assert harness.batches == [[4]]


@pytest.mark.slow
async def test_each_operation_has_its_own_deadline(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(deadline=2 * SHORT, threads=1)
    block = BlockingStep()
    harness.threads.submit(block)
    early = harness.submit(1)
    await asyncio.sleep(SHORT)
    late = harness.submit(2)
    with pytest.raises(Unavailable):
        await early
    assert not late.done()
    block.release()
    assert await late == 20
    assert harness.batches == [[2]]


@on_postgresql
@pytest.mark.parametrize("fault", ["sleeps", "is-stopped"])
async def test_later_operations_succeed_after_a_server_hangs(harnesses: Callable[..., Harness], fault: str) -> None:
    harness = harnesses(deadline=SHORT, threads=1)  # the thread must not keep waiting for the server
    stopped: list[int] = []

    def hang(connection: Connection, ops: Sequence[int]) -> None:
        if ops != [1]:
            return
        if fault == "is-stopped":
            stopped.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            os.kill(stopped[0], signal.SIGSTOP)
        connection.exec_driver_sql("SELECT pg_sleep(1.5)")

    harness.step = hang
    try:
        with pytest.raises(OutcomeUnknown):
            await harness.submit(1)
        assert await harness.submit_all([2, 3]) == [20, 30]
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert sum(batch.count(1) for batch in harness.batches) == 1


@on_postgresql
async def test_later_operations_succeed_after_an_idle_server_hangs(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(deadline=SHORT)
    pids: list[int] = []
    harness.step = lambda connection, _: pids.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
    assert await harness.submit(1) == 10
    os.kill(pids[0], signal.SIGSTOP)
    try:
        start = time.monotonic()
        [caught] = await harness.submit_all([2])
        assert isinstance(caught, Unavailable | OutcomeUnknown)
        assert await harness.submit_all([3, 4]) == [30, 40]
        assert time.monotonic() - start < 2 * SHORT + 1
    finally:
        os.kill(pids[0], signal.SIGCONT)


@on_postgresql
async def test_waiting_for_a_locked_row_is_limited(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses()
    with superuser(harness.database) as rival:
        rival.execute("BEGIN")
        rival.execute("INSERT INTO notes VALUES (1)")
        start = time.monotonic()
        with pytest.raises(Unavailable):
            await harness.submit(1)
        assert 0.4 < time.monotonic() - start < 2
        rival.execute("ROLLBACK")
    assert await harness.submit(1) == 10


@pytest.mark.slow
@on_sqlite
async def test_waiting_for_an_sqlite_file_that_another_process_locked_is_limited(
    harnesses: Callable[..., Harness],
) -> None:
    harness = harnesses()
    rival = database_at(harness.database.url)
    with rival.connect() as connection, rival.writing(connection):
        start = time.monotonic()
        with pytest.raises(Unavailable):
            await harness.submit(1)
        assert 1 < time.monotonic() - start < group_commit.DEADLINE
    rival.close()
    assert await harness.submit(1) == 10


@pytest.mark.slow
async def test_a_deadline_that_coincides_with_the_result_is_harmless(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(deadline=SHORT)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    returned = threading.Event()
    event.listen(harness.database.engine, "checkin", lambda *_: returned.set())
    answer = harness.submit(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # Block the loop from here, so that result and deadline are both due when it continues.
    assert returned.wait(10)
    time.sleep(SHORT)  # noqa: ASYNC251 - the loop is blocked on purpose
    with harness.database.connect() as connection, harness.database.writing(connection):  # the same pooled connection
        with suppress(OutcomeUnknown):
            assert await answer == 10
        connection.exec_driver_sql("INSERT INTO notes VALUES (2)")
    assert notes(harness.database) == [1, 2]

    harness.step = block = BlockingStep()
    stuck = harness.submit(3)
    try:
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(stuck, 4 * SHORT)
    finally:
        block.release()
    assert problems == []


# --- Callers that cancel, and overload -------------------------------------------------------------------------------


async def test_operations_cancelled_while_waiting_are_dropped(harness: Harness) -> None:
    harness.step = block = BlockingStep()
    first = harness.submit(0)
    await block.entered()
    rest = [harness.submit(op) for op in range(1, 9)]
    await asyncio.sleep(0)
    for task in rest[::2]:
        task.cancel()
    await asyncio.sleep(0)
    block.release()
    assert await asyncio.gather(first, *rest[1::2]) == [0, 20, 40, 60, 80]
    assert harness.batches == [[0], [2, 4, 6, 8]]
    assert all(task.cancelled() for task in rest[::2])


async def test_cancelled_operations_in_flight_do_not_affect_others(harness: Harness) -> None:
    harness.step = block = BlockingStep()
    batch = [harness.submit(op) for op in range(4)]
    await block.entered()
    behind = harness.submit(4)
    for task in batch[:3]:
        task.cancel()
    await asyncio.sleep(0)
    block.release()
    assert await batch[3] == 30
    assert await behind == 40
    assert notes(harness.database) == [0, 1, 2, 3, 4]


async def test_an_operation_cancelled_just_before_its_transaction_never_runs(harness: Harness) -> None:
    block = BlockingStep()
    event.listen(harness.database.engine, "checkout", block)
    cancelled, kept = harness.submit(1), harness.submit(2)
    await block.entered()
    cancelled.cancel()
    block.release()
    time.sleep(0.1)  # noqa: ASYNC251 - the loop must not handle the cancellation before the transaction begins
    assert await kept == 20
    assert harness.batches == [[2]]
    event.remove(harness.database.engine, "checkout", block)


async def test_the_next_operation_runs_after_a_whole_batch_is_cancelled(harness: Harness) -> None:
    harness.step = block = BlockingStep()
    batch = [harness.submit(op) for op in range(4)]
    await block.entered()
    for task in batch:
        task.cancel()
    await asyncio.sleep(0)
    block.release()
    assert await harness.submit(9) == 90
    assert notes(harness.database) == [0, 1, 2, 3, 9]


async def test_operations_above_the_queue_limit_are_rejected_immediately(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(max_waiting=3)
    harness.step = block = BlockingStep()
    first = harness.submit(0)
    await block.entered()
    waiting = [harness.submit(op) for op in (1, 2, 3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await harness.submit(4)
    waiting[0].cancel()
    await asyncio.sleep(0)
    replacement = harness.submit(5)  # a cancelled operation frees its place
    await asyncio.sleep(0)
    block.release()
    assert await asyncio.gather(first, *waiting[1:], replacement) == [0, 20, 30, 50]
    assert await harness.submit(4) == 40


# --- A database that cannot be reached -------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["postgresql+psycopg://nobody@127.0.0.1:{port}/none", "sqlite:///{missing}/sso.db"])
async def test_an_unreachable_database_is_reported_immediately(tmp_path: Path, url: str) -> None:
    database = database_at(make_url(url.format(port=free_port(), missing=tmp_path / "missing")))
    harness = Harness(database)
    start = time.monotonic()
    results = await harness.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert time.monotonic() - start < 1
    harness.threads.shutdown()
    database.close()


async def test_waiting_for_a_server_that_never_responds_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        database = database_at(make_url(f"postgresql+psycopg://nobody@127.0.0.1:{listener.getsockname()[1]}/none"))
        harness = Harness(database, deadline=SHORT)
        start = time.monotonic()
        results = await harness.submit_all([1, 2, 3])
        assert [type(result) for result in results] == [Unavailable] * 3
        assert time.monotonic() - start < SHORT + 1
    harness.threads.shutdown()
    database.close()


@pytest.mark.slow
async def test_reconnection_attempts_are_limited_regardless_of_the_load() -> None:
    attempts: list[float] = []

    def hang_up(listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is shut down
            while True:
                listener.accept()[0].close()
                attempts.append(time.monotonic())

    async def submit_until_end(harness: Harness) -> None:
        while time.monotonic() < end:
            started = time.monotonic()
            with pytest.raises(Unavailable, match="cannot connect"):
                await harness.submit(1)
            assert time.monotonic() - started < 1

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        threads.submit(hang_up, listener)
        port = listener.getsockname()[1]
        database = database_at(make_url(f"postgresql+psycopg://nobody@127.0.0.1:{port}/none?sslmode=disable"))
        harnesses = [Harness(database) for _ in range(4)]
        end = time.monotonic() + 3
        await asyncio.gather(*map(submit_until_end, harnesses))
        listener.shutdown(socket.SHUT_RDWR)
    # One attempt per group commit, then shared attempts after 0.05, 0.1, 0.2 and every 0.25 s.
    assert 5 <= len(attempts) <= 20
    for harness in harnesses:
        harness.threads.shutdown()
    database.close()


@on_postgresql
async def test_open_connections_are_used_while_new_ones_are_refused(harness: Harness, postgresql: str) -> None:
    name = harness.database.url.database
    with psycopg.connect(postgresql, autocommit=True) as connection:
        with harness.database.connect():
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            for _ in range(3):
                with (
                    pytest.raises(Unavailable, match="not currently accepting connections"),
                    harness.database.connect(),
                ):
                    pass
        assert await harness.submit(1) == 10
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    back = time.monotonic()
    with harness.database.connect():  # occupies the open connection
        while isinstance((await harness.submit_all([2]))[0], Unavailable):
            assert time.monotonic() < back + 2
            await asyncio.sleep(0.01)
    assert notes(harness.database) == [1, 2]


async def test_an_operating_system_error_during_connect_is_reported_immediately(
    harness: Harness,
) -> None:
    harness.database.close()
    attempts: list[object] = []

    def run_out_of_files(*_: object) -> None:
        attempts.append(_)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    event.listen(harness.database.engine, "connect", run_out_of_files, insert=True)
    start = time.monotonic()
    results = await harness.submit_all([1, 2, 3])
    event.remove(harness.database.engine, "connect", run_out_of_files)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert time.monotonic() - start < 1
    assert len(attempts) < 10
    assert await harness.submit(4) == 40


@on_postgresql
async def test_operations_succeed_after_all_connections_were_terminated(harness: Harness) -> None:
    with harness.database.connect(), harness.database.connect():  # the pool holds several connections
        assert await harness.submit(1) == 10
    with superuser(harness.database) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    [first] = await harness.submit_all([2])
    assert first == 20 or isinstance(first, Unavailable)  # either detected before use, or nothing was written
    assert await harness.submit_all([3, 4]) == [30, 40]
    assert notes(harness.database) == [1, *([2] if first == 20 else []), 3, 4]


# --- Properties of transactions --------------------------------------------------------------------------------------

_SETTINGS = (
    "lock_timeout",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "synchronous_commit",
    "transaction_isolation",
)


def settings_of(connection: Connection) -> list[str]:
    query = ", ".join(f"current_setting('{name}')" for name in _SETTINGS)
    return list(connection.exec_driver_sql(f"SELECT {query}").one())


@on_postgresql
@pytest.mark.parametrize(
    ("default", "inside"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_writing_transactions_override_unsafe_database_defaults(database_url: str, default: str, inside: str) -> None:
    made = make_url(database_url)
    with psycopg.connect(database_url, autocommit=True) as admin:
        for name, value in (
            ("synchronous_commit", default),
            ("default_transaction_isolation", "serializable"),
            ("lock_timeout", "7s"),
            ("statement_timeout", "8s"),
            ("idle_in_transaction_session_timeout", "9s"),
        ):
            admin.execute(f"ALTER DATABASE {made.database} SET {name} = '{value}'".encode())
    database = database_at(made.set(drivername="postgresql+psycopg"))
    before = ["7s", "8s", "9s", default, "serializable"]
    with database.connect() as connection:
        assert settings_of(connection) == before
        for fails in (False, True):
            try:
                with database.writing(connection):
                    assert settings_of(connection) == ["500ms", "2s", "5s", inside, "read committed"]
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            assert settings_of(connection) == before
    database.close()


@on_postgresql
def test_a_reading_transaction_is_bounded_and_cannot_write(database: Database) -> None:
    with database.connect() as connection:
        before = settings_of(connection)
        with database.reading(connection):
            assert settings_of(connection)[:3] == ["500ms", "2s", "5s"]
        assert settings_of(connection) == before
        with pytest.raises(Unavailable), database.reading(connection):
            connection.execute(consumed_nonces.insert().values(claims=bytes(16)))
    with database.connect() as connection:
        assert connection.execute(select(consumed_nonces)).all() == []


@on_sqlite
def test_every_sqlite_connection_flushes_each_commit_and_checks_foreign_keys(database: Database) -> None:
    names = ("journal_mode", "synchronous", "foreign_keys")
    with database.connect() as one, database.connect() as two, database.connect() as three:
        for connection in (one, two, three):
            values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]
            assert values == ["wal", 2, 1]


@pytest.mark.slow
@on_sqlite
def test_an_sqlite_write_acquires_its_lock_before_it_reads(database: Database) -> None:
    """A transaction that starts with a read fails, without waiting, if another one writes in between."""
    rival = database_at(database.url)
    with database.connect() as connection, database.writing(connection):
        connection.execute(select(consumed_nonces)).all()
        with rival.connect() as other:
            start = time.monotonic()
            with pytest.raises(Unavailable), rival.writing(other):
                pass
            assert time.monotonic() - start > 1
        connection.execute(consumed_nonces.insert().values(claims=bytes(16)))
    rival.close()
