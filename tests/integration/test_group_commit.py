"""Group commit: who goes together, who fails alone, and what is said when the database fails, hangs or comes back."""

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
from tests.support.waiting import Stopwatch

pytestmark = pytest.mark.anyio

SHORT = 0.4
"""A deadline in seconds that is worth waiting for in a test."""

Step = Callable[[Connection, Sequence[int]], object]


Work = Callable[[Connection, Sequence[int]], list[int]]


class _LaneWrites(GroupCommit[int, int]):
    kind = "test"
    transaction: ClassVar[Transaction] = "writing"

    def __init__(self, work: Work, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._work = work

    def run_batch(self, connection: Connection, ops: Sequence[int]) -> list[int]:
        return self._work(connection, ops)


class _LaneReads(_LaneWrites):
    transaction = "reading"


class Lane:
    """A group commit whose operation `n` notes the number `n` and results in `10 * n`.

    `batches` are the operations of each call of its work; `step`, where set, runs at the end of each.
    """

    def __init__(self, database: Database, *, threads: int = 16, reads: bool = False, **options: Any) -> None:
        self.database = database
        self.batches: list[list[int]] = []
        self.step: Step | None = None
        self.threads = ThreadPoolExecutor(threads)
        self.reads = reads
        self.commits = (_LaneReads if reads else _LaneWrites)(self._work, database, self.threads, **options)

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


class Gate:
    """A step that stays in the database until it is opened, the first time that it runs."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._opened = threading.Event()

    def __call__(self, *_: object) -> None:
        self._entered.set()
        assert self._opened.wait(10)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def lanes(database: Database) -> Iterator[Callable[..., Lane]]:
    """Makes lanes over the database, which has an empty table of notes."""
    execute(database, "CREATE TABLE notes (n INTEGER PRIMARY KEY)")
    made: list[Lane] = []

    def make(**options: Any) -> Lane:
        made.append(Lane(database, **options))
        return made[-1]

    yield make
    for lane in made:
        lane.threads.shutdown()


@pytest.fixture
def lane(lanes: Callable[..., Lane]) -> Lane:
    return lanes()


@pytest.fixture
def statements(database: Database) -> list[str]:
    """Every statement that goes to the database from now on."""
    seen: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def see(_c: object, _r: object, statement: str, *_: object) -> None:
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
    """A connection to PostgreSQL past everything that is tested."""
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True)


def trigger(database: Database, body: str, *, at_commit: bool) -> None:
    """Runs `body` (PL/pgSQL) for each note, at once or when its transaction is committed."""
    deferred = "DEFERRABLE INITIALLY DEFERRED" if at_commit else ""
    function = f"RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$"
    with superuser(database) as connection:
        connection.execute("CREATE SEQUENCE attempts")
        connection.execute(f"CREATE FUNCTION misbehave() {function}".encode())
        connection.execute(
            f"CREATE CONSTRAINT TRIGGER misbehave AFTER INSERT ON notes {deferred} "
            "FOR EACH ROW EXECUTE FUNCTION misbehave()".encode()
        )


# --- together --------------------------------------------------------------------------------------------------------


async def test_operations_that_arrive_while_one_is_in_flight_share_the_next_transaction(
    lane: Lane, statements: list[str]
) -> None:
    lane.step = gate = Gate()
    first = lane.submit(0)
    await gate.entered()
    rest = [lane.submit(op) for op in range(1, 101)]
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(first, *rest) == [10 * op for op in range(101)]
    assert lane.batches == [[0], list(range(1, 101))]
    assert statements.count("COMMIT") == 2
    assert notes(lane.database) == list(range(101))


async def test_operations_that_arrive_in_one_turn_of_the_loop_share_a_transaction(
    lane: Lane, statements: list[str]
) -> None:
    assert await lane.submit_all(range(10)) == [10 * op for op in range(10)]
    assert lane.batches == [list(range(10))]
    assert statements.count("COMMIT") == 1


async def test_no_transaction_carries_more_than_it_can_in_a_short_time(lane: Lane) -> None:
    many = 2 * group_commit.MAX_BATCH + 1
    await lane.submit_all(range(many))
    assert [len(batch) for batch in lane.batches] == [group_commit.MAX_BATCH, group_commit.MAX_BATCH, 1]
    assert [op for batch in lane.batches for op in batch] == list(range(many))


async def test_nobody_is_answered_before_the_commit_is(lane: Lane) -> None:
    gate = Gate()

    @event.listens_for(lane.database.engine, "before_cursor_execute")
    def hold_commit(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement == "COMMIT":
            gate()

    answer = lane.submit(1)
    await gate.entered()
    done, _ = await asyncio.wait([answer], timeout=0.05)
    assert not done
    with lane.database.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM notes").scalar_one() == 0
    gate.open()
    assert await answer == 10


async def test_of_equal_claims_in_one_batch_only_the_first_is_redeemed(database: Database) -> None:
    with database.connect() as connection, database.writing(connection):
        jane = provision(database, connection, [ProvisionRequest("jane@example.com", "J", "D", ACCOUNT, 1)])[0]
    place = AccessQuery(jane.user_id, ACCOUNT)
    same, other = Redemption(b"s" * 16, place, 1), Redemption(b"o" * 16, place, 1)
    with ThreadPoolExecutor() as threads:
        commits = Redemptions(database, threads)
        batch = [same, same, other, same, other]
        verdicts = [r.verdict for r in await asyncio.gather(*map(commits.submit, batch))]
    used, lost = Verdict.REDEEMED, Verdict.CONSUMED
    assert verdicts == [used, lost, used, lost, lost]


async def test_of_equal_addresses_in_one_batch_only_the_first_is_told_that_it_was_created(database: Database) -> None:
    people = [
        ProvisionRequest(email, "A", "B", ACCOUNT, 1) for email in ("a@x.test", "b@x.test", "a@x.test", "a@x.test")
    ]
    with ThreadPoolExecutor() as threads:
        commits = Provisioning(database, threads)
        provisioned = await asyncio.gather(*map(commits.submit, people))
    assert [p.created for p in provisioned] == [True, True, False, False]
    assert len({p.user_id for p in provisioned}) == 2


# --- alone -----------------------------------------------------------------------------------------------------------


async def test_an_operation_that_the_work_refuses_fails_alone(lane: Lane) -> None:
    def refuse_seven(_: Connection, ops: Sequence[int]) -> None:
        if 7 in ops:
            raise ValueError("seven")

    lane.step = refuse_seven
    results = await lane.submit_all(range(10))
    assert isinstance(results.pop(7), ValueError)
    assert results == [10 * op for op in range(10) if op != 7]
    assert notes(lane.database) == [op for op in range(10) if op != 7]
    assert lane.batches == [list(range(10)), *([op] for op in range(10))]


async def test_an_operation_that_breaks_a_constraint_fails_alone(lane: Lane) -> None:
    execute(lane.database, "INSERT INTO notes VALUES (3)")
    results = await lane.submit_all(range(6))
    assert isinstance(results.pop(3), IntegrityError)
    assert results == [0, 10, 20, 40, 50]
    assert notes(lane.database) == list(range(6))


async def test_a_batch_that_fails_before_its_commit_is_rolled_back(lane: Lane, statements: list[str]) -> None:
    def fail(connection: Connection, _: Sequence[int]) -> None:
        connection.exec_driver_sql("SELECT * FROM there_is_no_such_table")

    lane.step = fail
    [failure] = await lane.submit_all([1])
    assert isinstance(failure, DBAPIError | Unavailable)
    assert "COMMIT" not in statements
    assert notes(lane.database) == []
    lane.step = None
    assert await lane.submit(1) == 10


# --- what COMMIT may answer ------------------------------------------------------------------------------------------


@contextmanager
def commit_that_fails(database: Database, *, after: bool) -> Iterator[list[str]]:
    """Loses the connection at COMMIT, before it is sent or after it was done; yields the COMMITs so far."""
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


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_commit_that_loses_its_connection_is_never_repeated_and_nobody_is_told_what_came_of_it(
    lane: Lane, after: bool
) -> None:
    with commit_that_fails(lane.database, after=after) as sent:
        results = await lane.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert len(sent) == len(lane.batches) == 1
    assert notes(lane.database) == (list(range(5)) if after else [])
    assert await lane.submit(9) == 90


@on_postgresql
async def test_a_server_that_dies_during_the_commit_leaves_the_outcome_unknown(
    lane: Lane, statements: list[str]
) -> None:
    trigger(lane.database, "PERFORM pg_terminate_backend(pg_backend_pid()), pg_sleep(1)", at_commit=True)
    results = await lane.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(lane.batches) == 1
    execute(lane.database, "DROP TRIGGER misbehave ON notes")
    assert await lane.submit(9) == 90
    assert notes(lane.database) == [9]


@on_postgresql
async def test_a_server_that_dies_before_the_commit_leaves_nothing_and_says_so(
    lane: Lane, statements: list[str]
) -> None:
    def terminate(connection: Connection, ops: Sequence[int]) -> None:
        if 0 in ops:
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(1)")

    lane.step = terminate
    [failure] = await lane.submit_all([0])
    assert isinstance(failure, Unavailable)
    assert "COMMIT" not in statements
    assert await lane.submit(9) == 90
    assert notes(lane.database) == [9]


@on_postgresql
@pytest.mark.parametrize(
    "error",
    ["RAISE EXCEPTION 'no'", "RAISE EXCEPTION 'no' USING ERRCODE = '57014'", "RAISE unique_violation"],
    ids=["an error", "a cancel", "a constraint"],
)
async def test_an_error_during_the_commit_leaves_the_outcome_unknown(
    lane: Lane, statements: list[str], error: str
) -> None:
    trigger(lane.database, error, at_commit=True)
    results = await lane.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(lane.batches) == 1


@on_postgresql
async def test_a_warning_during_the_commit_leaves_the_outcome_unknown(lane: Lane, statements: list[str]) -> None:
    trigger(lane.database, "RAISE WARNING 'perhaps'", at_commit=True)
    results = await lane.submit_all(range(5))
    assert [type(result) for result in results] == [OutcomeUnknown] * 5
    assert statements.count("COMMIT") == len(lane.batches) == 1
    execute(lane.database, "DROP TRIGGER misbehave ON notes")
    assert await lane.submit(9) == 90


@on_postgresql
@pytest.mark.parametrize(("level", "at_commit"), [("NOTICE", True), ("WARNING", False)])
async def test_a_notice_or_a_warning_before_the_commit_is_nothing_to_worry_about(
    lane: Lane, level: str, at_commit: bool
) -> None:
    trigger(lane.database, f"RAISE {level} 'hm'", at_commit=at_commit)
    assert await lane.submit_all([1, 2]) == [10, 20]


@on_postgresql
async def test_a_commit_that_did_not_wait_for_its_synchronous_standby_leaves_the_outcome_unknown(lane: Lane) -> None:
    waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"

    def cancel(connection: "psycopg.Connection[Any]") -> None:
        end = time.monotonic() + 10
        while not connection.execute(waiting).fetchall():
            assert time.monotonic() < end

    with superuser(lane.database) as connection:
        connection.execute("SET synchronous_commit = local")
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        try:
            answer = lane.submit(1)
            await asyncio.to_thread(cancel, connection)
            with pytest.raises(OutcomeUnknown, match="synchronous replication"):
                await answer
        finally:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


async def test_a_commit_that_turns_out_to_be_a_rollback_is_no_success(lane: Lane) -> None:
    def fail_in_silence(connection: Connection, _: Sequence[int]) -> None:
        if lane.database.is_sqlite:
            connection.exec_driver_sql("ROLLBACK")
            return
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("SELECT 1 / 0")

    lane.step = fail_in_silence
    results = await lane.submit_all([1, 2])
    assert notes(lane.database) == []
    assert all(isinstance(result, OutcomeUnknown | Unavailable) for result in results), results


@on_postgresql
@pytest.mark.parametrize("at_commit", [False, True], ids=["before COMMIT", "at COMMIT"])
@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_transaction_that_the_server_ended_for_another_is_repeated(
    lane: Lane, code: str, at_commit: bool
) -> None:
    once = f"IF nextval('attempts') <= 1 THEN RAISE EXCEPTION 'again' USING ERRCODE = '{code}'; END IF"
    trigger(lane.database, once, at_commit=at_commit)
    assert await lane.submit(1) == 10
    assert lane.batches == [[1], [1]]
    assert await lane.submit_all([2, 3]) == [20, 30]
    assert notes(lane.database) == [1, 2, 3]


@on_postgresql
async def test_a_batch_that_the_server_ended_for_another_is_repeated_one_by_one(lane: Lane) -> None:
    once = "IF nextval('attempts') <= 1 THEN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END IF"
    trigger(lane.database, once, at_commit=True)
    assert await lane.submit_all([1, 2, 3]) == [10, 20, 30]
    assert notes(lane.database) == [1, 2, 3]


@on_postgresql
async def test_a_transaction_that_the_server_ends_again_and_again_is_given_up(lane: Lane) -> None:
    trigger(lane.database, "RAISE EXCEPTION 'again' USING ERRCODE = '40001'", at_commit=True)
    with pytest.raises(Unavailable):
        await lane.submit(1)
    assert 1 < len(lane.batches) < 10


@on_postgresql
async def test_a_real_deadlock_is_repeated(lane: Lane) -> None:
    execute(lane.database, "INSERT INTO notes VALUES (100), (200)")
    touch = "UPDATE notes SET n = n WHERE n = {}"
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    with superuser(lane.database) as rival, superuser(lane.database) as watcher, ThreadPoolExecutor() as threads:
        rival.execute("BEGIN")
        rival.execute(touch.format(200).encode())

        def collide(connection: Connection, _: Sequence[int]) -> None:
            connection.exec_driver_sql("SET LOCAL deadlock_timeout = '10ms'")
            connection.exec_driver_sql(touch.format(100))
            if len(lane.batches) == 1:
                blocked = threads.submit(rival.execute, touch.format(100).encode())
                blocked.add_done_callback(lambda _: rival.execute("COMMIT"))
                while not watcher.execute(waiting).fetchall():
                    pass
            connection.exec_driver_sql(touch.format(200))

        lane.step = collide
        assert await lane.submit(1) == 10
    assert lane.batches[:2] == [[1], [1]]  # on a slow machine they may collide once more


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_read_whose_commit_loses_its_connection_is_unavailable_since_nothing_can_have_happened(
    lanes: Callable[..., Lane], after: bool
) -> None:
    lane = lanes(reads=True)
    with commit_that_fails(lane.database, after=after):
        results = await lane.submit_all([1, 2])
    assert [type(result) for result in results] == [Unavailable] * 2
    assert await lane.submit(3) == 30


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reads", "expected"), [(False, OutcomeUnknown), (True, Unavailable)])
async def test_an_operation_in_flight_at_its_deadline_is_answered_and_those_behind_it_go_on(
    lanes: Callable[..., Lane], reads: bool, expected: type[Exception]
) -> None:
    lane = lanes(reads=reads, deadline=SHORT)
    lane.step = gate = Gate()
    start = Stopwatch()
    stuck = lane.submit(1)
    await gate.entered()
    lane.step = None
    try:
        with pytest.raises(expected):
            await stuck
        assert start.seconds >= SHORT
        assert start.own_seconds < SHORT + 1
        if not (lane.database.is_sqlite and not reads):  # SQLite has one writer, and it is still writing
            assert await lane.submit(2) == 20
    finally:
        gate.open()
    assert await lane.submit(3) == 30
    assert lane.batches[0] == [1]
    assert sum(batch.count(1) for batch in lane.batches) == 1


@pytest.mark.parametrize("reads", [False, True])
async def test_an_operation_that_still_waits_at_its_deadline_is_removed_and_never_run(
    lanes: Callable[..., Lane], reads: bool
) -> None:
    lane = lanes(reads=reads, deadline=SHORT, threads=1)
    gate = Gate()
    occupied = lane.threads.submit(gate)
    start = Stopwatch()
    results = await lane.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.seconds >= SHORT
    assert start.own_seconds < SHORT + 1
    gate.open()
    occupied.result()
    assert await lane.submit(4) == 40
    assert lane.batches == [[4]]


@pytest.mark.slow
async def test_each_waits_for_its_own_deadline(lanes: Callable[..., Lane]) -> None:
    lane = lanes(deadline=2 * SHORT, threads=1)
    gate = Gate()
    lane.threads.submit(gate)
    early = lane.submit(1)
    await asyncio.sleep(SHORT)
    late = lane.submit(2)
    with pytest.raises(Unavailable):
        await early
    assert not late.done()
    gate.open()
    assert await late == 20
    assert lane.batches == [[2]]


@on_postgresql
@pytest.mark.parametrize("fault", ["sleeps", "is stopped"])
async def test_a_lane_whose_server_hangs_is_abandoned_and_later_operations_succeed(
    lanes: Callable[..., Lane], fault: str
) -> None:
    lane = lanes(deadline=SHORT, threads=1)  # which must not go on waiting for the server
    stopped: list[int] = []

    def hang(connection: Connection, ops: Sequence[int]) -> None:
        if ops != [1]:
            return
        if fault == "is stopped":
            stopped.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
            os.kill(stopped[0], signal.SIGSTOP)
        connection.exec_driver_sql("SELECT pg_sleep(1.5)")

    lane.step = hang
    try:
        with pytest.raises(OutcomeUnknown):
            await lane.submit(1)
        assert await lane.submit_all([2, 3]) == [20, 30]
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert sum(batch.count(1) for batch in lane.batches) == 1


@on_postgresql
async def test_a_server_that_began_to_hang_during_a_pause_is_abandoned_too(lanes: Callable[..., Lane]) -> None:
    lane = lanes(deadline=SHORT)
    pids: list[int] = []
    lane.step = lambda connection, _: pids.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
    assert await lane.submit(1) == 10
    os.kill(pids[0], signal.SIGSTOP)
    try:
        start = Stopwatch()
        [caught] = await lane.submit_all([2])
        assert isinstance(caught, Unavailable | OutcomeUnknown)
        assert await lane.submit_all([3, 4]) == [30, 40]
        assert start.own_seconds < 2 * SHORT + 1
    finally:
        os.kill(pids[0], signal.SIGCONT)


@on_postgresql
async def test_a_row_that_somebody_else_has_locked_is_waited_for_only_so_long(lanes: Callable[..., Lane]) -> None:
    lane = lanes()
    with superuser(lane.database) as rival:
        rival.execute("BEGIN")
        rival.execute("INSERT INTO notes VALUES (1)")
        start = Stopwatch()
        with pytest.raises(Unavailable):
            await lane.submit(1)
        assert start.seconds > 0.4
        assert start.own_seconds < 2
        rival.execute("ROLLBACK")
    assert await lane.submit(1) == 10


@pytest.mark.slow
@on_sqlite
async def test_a_file_that_another_process_has_locked_is_waited_for_only_so_long(lanes: Callable[..., Lane]) -> None:
    lane = lanes()
    rival = database_at(lane.database.url)
    with rival.connect() as connection, rival.writing(connection):
        start = Stopwatch()
        with pytest.raises(Unavailable):
            await lane.submit(1)
        assert start.seconds > 1
        assert start.own_seconds < group_commit.DEADLINE
    rival.close()
    assert await lane.submit(1) == 10


@pytest.mark.slow
async def test_a_deadline_that_comes_just_as_the_answer_does_harms_nobody_else(lanes: Callable[..., Lane]) -> None:
    lane = lanes(deadline=SHORT)
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    returned = threading.Event()
    event.listen(lane.database.engine, "checkin", lambda *_: returned.set())
    answer = lane.submit(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    # From here on the loop is held up, so that both are there when it looks again.
    assert returned.wait(10)
    time.sleep(SHORT)  # noqa: ASYNC251 - the loop is held up on purpose
    with lane.database.connect() as connection, lane.database.writing(connection):  # the very same connection
        with suppress(OutcomeUnknown):
            assert await answer == 10
        connection.exec_driver_sql("INSERT INTO notes VALUES (2)")
    assert notes(lane.database) == [1, 2]

    lane.step = gate = Gate()
    stuck = lane.submit(3)
    try:
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(stuck, 4 * SHORT)
    finally:
        gate.open()
    assert problems == []


# --- callers that go away, and too many of them ----------------------------------------------------------------------


async def test_callers_that_go_away_while_waiting_are_dropped_and_harm_no_one(lane: Lane) -> None:
    lane.step = gate = Gate()
    first = lane.submit(0)
    await gate.entered()
    rest = [lane.submit(op) for op in range(1, 9)]
    await asyncio.sleep(0)
    for task in rest[::2]:
        task.cancel()
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(first, *rest[1::2]) == [0, 20, 40, 60, 80]
    assert lane.batches == [[0], [2, 4, 6, 8]]
    assert all(task.cancelled() for task in rest[::2])


async def test_callers_that_go_away_while_in_flight_harm_no_one(lane: Lane) -> None:
    lane.step = gate = Gate()
    batch = [lane.submit(op) for op in range(4)]
    await gate.entered()
    behind = lane.submit(4)
    for task in batch[:3]:
        task.cancel()
    await asyncio.sleep(0)
    gate.open()
    assert await batch[3] == 30
    assert await behind == 40
    assert notes(lane.database) == [0, 1, 2, 3, 4]


async def test_a_caller_who_goes_away_at_the_last_moment_is_not_run_either(lane: Lane) -> None:
    gate = Gate()
    event.listen(lane.database.engine, "checkout", gate)
    gone, stays = lane.submit(1), lane.submit(2)
    await gate.entered()
    gone.cancel()
    gate.open()
    time.sleep(0.1)  # noqa: ASYNC251 - the loop has no chance to see to it before the transaction begins
    assert await stays == 20
    assert lane.batches == [[2]]
    event.remove(lane.database.engine, "checkout", gate)


async def test_when_everybody_has_gone_away_the_next_one_is_served(lane: Lane) -> None:
    lane.step = gate = Gate()
    batch = [lane.submit(op) for op in range(4)]
    await gate.entered()
    for task in batch:
        task.cancel()
    await asyncio.sleep(0)
    gate.open()
    assert await lane.submit(9) == 90
    assert notes(lane.database) == [0, 1, 2, 3, 9]


async def test_more_than_may_wait_are_turned_away_at_once(lanes: Callable[..., Lane]) -> None:
    lane = lanes(max_waiting=3)
    lane.step = gate = Gate()
    first = lane.submit(0)
    await gate.entered()
    waiting = [lane.submit(op) for op in (1, 2, 3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await lane.submit(4)
    waiting[0].cancel()
    await asyncio.sleep(0)
    in_its_place = lane.submit(5)  # who went away takes nobody's place
    await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(first, *waiting[1:], in_its_place) == [0, 20, 30, 50]
    assert await lane.submit(4) == 40


# --- a database that is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["postgresql+psycopg://nobody@127.0.0.1:{port}/none", "sqlite:///{missing}/sso.db"])
async def test_a_database_that_cannot_be_reached_is_reported_at_once(tmp_path: Path, url: str) -> None:
    database = database_at(make_url(url.format(port=free_port(), missing=tmp_path / "missing")))
    lane = Lane(database)
    start = Stopwatch()
    results = await lane.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.own_seconds < 1
    lane.threads.shutdown()
    database.close()


async def test_a_server_that_accepts_connections_and_never_answers_costs_no_more_than_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        database = database_at(make_url(f"postgresql+psycopg://nobody@127.0.0.1:{listener.getsockname()[1]}/none"))
        lane = Lane(database, deadline=SHORT)
        start = Stopwatch()
        results = await lane.submit_all([1, 2, 3])
        assert [type(result) for result in results] == [Unavailable] * 3
        assert start.own_seconds < SHORT + 1
    lane.threads.shutdown()
    database.close()


@pytest.mark.slow
async def test_a_server_that_is_away_is_tried_a_few_times_a_second_however_many_ask() -> None:
    attempts: list[float] = []

    def hang_up(listener: socket.socket) -> None:
        with suppress(OSError):  # it is shut down
            while True:
                listener.accept()[0].close()
                attempts.append(time.monotonic())

    async def ask(lane: Lane) -> None:
        while time.monotonic() < end:
            asked = Stopwatch()
            with pytest.raises(Unavailable, match="cannot connect"):
                await lane.submit(1)
            assert asked.own_seconds < 1

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        threads.submit(hang_up, listener)
        port = listener.getsockname()[1]
        database = database_at(make_url(f"postgresql+psycopg://nobody@127.0.0.1:{port}/none?sslmode=disable"))
        lanes = [Lane(database) for _ in range(4)]
        end = time.monotonic() + 3
        await asyncio.gather(*map(ask, lanes))
        listener.shutdown(socket.SHUT_RDWR)
    # One of each lane, and then after 0.05, 0.1, 0.2 and each 0.25 s.
    assert 5 <= len(attempts) <= 20
    for lane in lanes:
        lane.threads.shutdown()
    database.close()


@on_postgresql
async def test_when_no_more_connections_can_be_made_those_that_are_there_go_on(lane: Lane, postgresql: str) -> None:
    name = lane.database.url.database
    with psycopg.connect(postgresql, autocommit=True) as connection:
        with lane.database.connect():
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            for _ in range(3):
                with pytest.raises(Unavailable, match="not currently accepting connections"), lane.database.connect():
                    pass
        assert await lane.submit(1) == 10
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    back = Stopwatch()
    with lane.database.connect():  # the one that was there
        while isinstance((await lane.submit_all([2]))[0], Unavailable):
            assert back.own_seconds < 2
            await asyncio.sleep(0.01)
    assert notes(lane.database) == [1, 2]


async def test_an_error_of_the_operating_system_while_connecting_is_reported_at_once_and_not_tried_on_and_on(
    lane: Lane,
) -> None:
    lane.database.close()
    attempts: list[object] = []

    def run_out_of_files(*_: object) -> None:
        attempts.append(_)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    event.listen(lane.database.engine, "connect", run_out_of_files, insert=True)
    start = Stopwatch()
    results = await lane.submit_all([1, 2, 3])
    event.remove(lane.database.engine, "connect", run_out_of_files)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.own_seconds < 1
    assert len(attempts) < 10
    assert await lane.submit(4) == 40


@on_postgresql
async def test_after_all_connections_were_cut_the_service_goes_on_without_a_restart(lane: Lane) -> None:
    with lane.database.connect(), lane.database.connect():  # so that there are several in the pool
        assert await lane.submit(1) == 10
    with superuser(lane.database) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    [first] = await lane.submit_all([2])
    assert first == 20 or isinstance(first, Unavailable)  # found out in time, or nothing happened
    assert await lane.submit_all([3, 4]) == [30, 40]
    assert notes(lane.database) == [1, *([2] if first == 20 else []), 3, 4]


# --- what a transaction is -------------------------------------------------------------------------------------------

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
def test_a_writing_transaction_is_durable_and_bounded_whatever_the_defaults_and_leaves_nothing_behind(
    database_url: str, default: str, inside: str
) -> None:
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
def test_an_sqlite_write_takes_its_place_before_it_reads(database: Database) -> None:
    """One that began with a read would fail when another wrote in between, however long it were willing to wait."""
    rival = database_at(database.url)
    with database.connect() as connection, database.writing(connection):
        connection.execute(select(consumed_nonces)).all()
        with rival.connect() as other:
            start = Stopwatch()
            with pytest.raises(Unavailable), rival.writing(other):
                pass
            assert start.seconds > 1
        connection.execute(consumed_nonces.insert().values(claims=bytes(16)))
    rival.close()
