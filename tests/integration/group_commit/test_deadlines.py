"""Group commit: deadlines, callers that cancel, overload, and databases that cannot be reached."""

import asyncio
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event, make_url

from scripts.tools.ports import free_port
from sso_service.database import database_at, group_commit
from sso_service.errors import OutcomeUnknown, Overloaded, Unavailable
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.group_commit import SHORT, BlockingStep, Harness, notes, superuser
from tests.support.waiting import Stopwatch

pytestmark = pytest.mark.anyio


# --- Deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reads", "expected"), [(False, OutcomeUnknown), (True, Unavailable)])
async def test_a_deadline_in_flight_does_not_block_later_operations(
    harnesses: Callable[..., Harness], reads: bool, expected: type[Exception]
) -> None:
    harness = harnesses(reads=reads, deadline=SHORT)
    harness.step = block = BlockingStep()
    start = Stopwatch()
    stuck = harness.submit(1)
    await block.entered()
    harness.step = None
    try:
        with pytest.raises(expected):
            await stuck
        assert start.seconds >= SHORT
        assert start.own_seconds < SHORT + 1
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
    start = Stopwatch()
    results = await harness.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.seconds >= SHORT
    assert start.own_seconds < SHORT + 1
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
        start = Stopwatch()
        [caught] = await harness.submit_all([2])
        assert isinstance(caught, Unavailable | OutcomeUnknown)
        assert await harness.submit_all([3, 4]) == [30, 40]
        assert start.own_seconds < 2 * SHORT + 1
    finally:
        os.kill(pids[0], signal.SIGCONT)


@on_postgresql
async def test_waiting_for_a_locked_row_is_limited(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses()
    with superuser(harness.database) as rival:
        rival.execute("BEGIN")
        rival.execute("INSERT INTO notes VALUES (1)")
        start = Stopwatch()
        with pytest.raises(Unavailable):
            await harness.submit(1)
        assert start.seconds > 0.4
        assert start.own_seconds < 2
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
        start = Stopwatch()
        with pytest.raises(Unavailable):
            await harness.submit(1)
        assert start.seconds > 1
        assert start.own_seconds < group_commit.DEADLINE
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
    start = Stopwatch()
    results = await harness.submit_all([1, 2, 3])
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.own_seconds < 1
    harness.threads.shutdown()
    database.close()


async def test_waiting_for_a_server_that_never_responds_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        database = database_at(make_url(f"postgresql+psycopg://nobody@127.0.0.1:{listener.getsockname()[1]}/none"))
        harness = Harness(database, deadline=SHORT)
        start = Stopwatch()
        results = await harness.submit_all([1, 2, 3])
        assert [type(result) for result in results] == [Unavailable] * 3
        assert start.own_seconds < SHORT + 1
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
            started = Stopwatch()
            with pytest.raises(Unavailable, match="cannot connect"):
                await harness.submit(1)
            assert started.own_seconds < 1

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
    back = Stopwatch()
    with harness.database.connect():  # occupies the open connection
        while isinstance((await harness.submit_all([2]))[0], Unavailable):
            assert back.own_seconds < 2
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
    start = Stopwatch()
    results = await harness.submit_all([1, 2, 3])
    event.remove(harness.database.engine, "connect", run_out_of_files)
    assert [type(result) for result in results] == [Unavailable] * 3
    assert start.own_seconds < 1
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
