"""Group commit: batching, isolation of failures, and the outcomes of COMMIT."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, IntegrityError

from sso_service.database import group_commit
from sso_service.database.directory import AccessQuery, Provisioning, ProvisionRequest, provision
from sso_service.database.ledger import Redemption, Redemptions, Verdict
from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown, Unavailable
from tests.support.data import ACCOUNT
from tests.support.databases import on_postgresql
from tests.support.group_commit import BlockingStep, Harness, commit_that_fails, execute, notes, superuser, trigger
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.anyio


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
    same, other = (
        Redemption(b"s" * 16, access, jane.sessions_from, 1),
        Redemption(b"o" * 16, access, jane.sessions_from, 1),
    )
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
        end = time.monotonic() + PATIENCE
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
