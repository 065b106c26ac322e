"""Group commit: a read without a waiting caller is ended, so that it does not keep its thread."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sso_service.errors import Unavailable
from tests.support.databases import on_sqlite
from tests.support.group_commit import SHORT, BlockingStep, Harness, endless, notes
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio


class Entered:
    """A step that reports that it has begun, and counts how often it was left."""

    def __init__(self, step: Callable[[Connection, Sequence[int]], None]) -> None:
        self._step = step
        self.begun = threading.Event()
        self.left = 0

    def __call__(self, connection: Connection, ops: Sequence[int]) -> None:
        self.begun.set()
        try:
            self._step(connection, ops)
        finally:
            self.left += 1


@on_sqlite
async def test_a_read_whose_callers_have_all_gone_is_interrupted(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(reads=True, threads=1, deadline=PATIENCE)
    harness.step = step = Entered(endless)
    first, second = harness.submit(1), harness.submit(2)
    assert await asyncio.to_thread(step.begun.wait, PATIENCE)
    first.cancel()
    await asyncio.sleep(0.1)
    assert step.left == 0, "the second caller still waits"
    harness.step = None
    second.cancel()
    assert await asyncio.wait_for(harness.submit(3), PATIENCE) == 30, "the only thread is free again"
    assert step.left == 1


@on_sqlite
async def test_a_read_is_interrupted_in_each_of_its_statements(harnesses: Callable[..., Harness]) -> None:
    def several(connection: Connection, ops: Sequence[int]) -> None:
        with suppress(DBAPIError):
            endless(connection, ops)
        endless(connection, ops)

    harness = harnesses(reads=True, threads=1, deadline=PATIENCE)
    harness.step = step = Entered(several)
    task = harness.submit(1)
    assert await asyncio.to_thread(step.begun.wait, PATIENCE)
    harness.step = None
    task.cancel()
    assert await asyncio.wait_for(harness.submit(2), PATIENCE) == 20


@on_sqlite
async def test_a_read_is_interrupted_at_its_deadline(harnesses: Callable[..., Harness]) -> None:
    harness = harnesses(reads=True, threads=1, deadline=SHORT)
    harness.step = step = Entered(endless)
    with pytest.raises(Unavailable):
        await harness.submit(1)
    harness.step = None
    await until(lambda: step.left == 1)
    assert await harness.submit(2) == 20


async def test_a_write_is_not_interrupted_when_its_caller_has_gone(harness: Harness) -> None:
    harness.step = block = BlockingStep()
    task = harness.submit(1)
    await block.entered()
    task.cancel()
    await asyncio.sleep(0.1)
    block.release()
    assert await harness.submit(2) == 20
    assert notes(harness.database) == [1, 2]
