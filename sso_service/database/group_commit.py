"""Group commit: while one transaction is in flight, the operations that arrive wait together and all go into the next.

One request, one transaction is the slow way: each would pay for its own round trips and its own flush to disk. A
`GroupCommit` owns the access to the database for one kind of operation. Callers hand it an operation and await the
result; they know nothing of connections, transactions or each other.

What each operation can rely on:

- it is in at most one transaction that can have been committed;
- an operation that fails, fails alone: the batch is rolled back and each operation is run by itself;
- after `deadline` seconds there is an answer: still waiting, it is removed and never run (`Unavailable`); in flight,
  what became of it is not known (`OutcomeUnknown`), or for reads does not matter;
- a caller that went away while waiting takes nobody's place: its operation is dropped.
"""

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Generic, TypeVar

from sqlalchemy import Connection

from sso_service.database.engine import Database
from sso_service.errors import OutcomeUnknown, Overloaded, Unavailable

DEADLINE = 2.5
"""Seconds within which every operation is answered."""

MAX_BATCH = 512
"""Operations in one transaction. Enough to make its cost vanish, few enough to keep it short."""

MAX_WAITING = 4096
"""Operations that may wait, a good deal of what can be done within the deadline. More are turned away at once."""

_ATTEMPTS = 3

log = logging.getLogger(__name__)

Op = TypeVar("Op")
Result = TypeVar("Result")


class _Waiting(Generic[Op, Result]):
    __slots__ = ("deadline", "future", "op")

    def __init__(self, op: Op, future: "asyncio.Future[Result]", deadline: float) -> None:
        self.op = op
        self.future = future
        self.deadline = deadline


class _Flight(Generic[Op, Result]):
    """One trip of a worker thread to the database."""

    def __init__(self) -> None:
        self.batch: Sequence[_Waiting[Op, Result]] = ()
        self.socket: socket.socket | None = None  # to the server; None for SQLite


class GroupCommit(Generic[Op, Result]):
    """Runs operations of one kind in batches, one batch at a time. For one event loop.

    `work` gets a connection in a transaction that `transaction` opened and closes, and the batch; it returns a result
    for each operation, in their order. It is called in a thread of `executor`, and may be called again with the same
    operations if the transaction came to nothing. `late` makes the exception for an operation that is in flight when
    `deadline` (seconds) is over. `observe` is told the size of each committed batch, and the seconds that it took.
    """

    def __init__(
        self,
        database: Database,
        work: Callable[[Connection, Sequence[Op]], Sequence[Result]],
        *,
        transaction: Callable[[Connection], AbstractContextManager[None]],
        executor: Executor,
        late: Callable[[str], Exception],
        deadline: float = DEADLINE,
        max_waiting: int = MAX_WAITING,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._database = database
        self._work = work
        self._transaction = transaction
        self._executor = executor
        self._late = late
        self._deadline = deadline
        self._max_waiting = max_waiting
        self._observe = observe
        self._waiting: deque[_Waiting[Op, Result]] = deque()
        # Guards the moment when an operation goes from waiting to in flight: exactly one of the worker thread, which
        # takes it, and the loop, which gives it up, gets it.
        self._handover = threading.Lock()
        self._flight: _Flight[Op, Result] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    async def submit(self, op: Op) -> Result:
        """The result of `op`, once its transaction is committed.

        Raises `Overloaded`, `Unavailable`, `OutcomeUnknown`, or what `work` raised for this operation alone.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("too many operations are waiting")
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Op, Result] = _Waiting(op, loop.create_future(), time.monotonic() + self._deadline)
        self._waiting.append(waiting)
        if self._flight is None:
            # Not at once but at the end of this turn of the loop: whatever else arrives in it comes along.
            self._flight = _Flight()
            loop.call_soon(self._depart, self._flight)
        if self._alarm is None:
            self._alarm = loop.call_later(self._deadline, self._ring)
        try:
            return await waiting.future
        except asyncio.CancelledError:
            with self._handover:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)
            raise

    def _depart(self, flight: _Flight[Op, Result]) -> None:
        loop = asyncio.get_running_loop()
        trip = loop.run_in_executor(self._executor, self._fly, flight)
        trip.add_done_callback(lambda done: self._land(flight, done))

    def _land(self, flight: _Flight[Op, Result], done: "asyncio.Future[Sequence[Result | Exception]]") -> None:
        if done.cancelled():
            return
        if (crash := done.exception()) is None:
            results = done.result()
        else:
            log.error("database: a batch was lost", exc_info=crash)
            results = [self._late("the batch was lost")] * len(flight.batch)
        for waiting, result in zip(flight.batch, results, strict=True):
            _answer(waiting, result)
        if flight is self._flight:
            self._next()

    def _next(self) -> None:
        self._flight = _Flight() if self._waiting else None
        if self._flight:
            self._depart(self._flight)

    def _ring(self) -> None:
        """Answers those whose deadline has come. One timer for all: they become due in the order of their arrival."""
        now = time.monotonic()
        due: list[_Waiting[Op, Result]] = []
        with self._handover:
            while self._waiting and self._waiting[0].deadline <= now:
                due.append(self._waiting.popleft())
            flight = self._flight
            in_flight = flight.batch if flight else ()
            deadlines = [waiting.deadline for waiting in (*in_flight, *self._waiting) if waiting.deadline > now]
        for waiting in due:
            _answer(waiting, Unavailable("no answer from the database in time"))
        for waiting in in_flight:
            if waiting.deadline <= now:
                _answer(waiting, self._late("no answer from the database in time"))
        if flight and in_flight and all(waiting.future.done() for waiting in in_flight):
            # Nobody waits for this one any more, and those behind it shall not wait for it either.
            # The server is told nothing: the thread just stops waiting for it, and the connection is thrown away.
            with self._handover:
                if flight.socket is not None:
                    with suppress(OSError):
                        flight.socket.shutdown(socket.SHUT_RDWR)
            self._next()
        self._alarm = asyncio.get_running_loop().call_later(min(deadlines) - now, self._ring) if deadlines else None

    # --- in a worker thread ---

    def _fly(self, flight: _Flight[Op, Result]) -> Sequence[Result | Exception]:
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._database.connect())
            except Unavailable as error:
                self._board(flight)
                return [error] * len(flight.batch)
            flight.socket = connection.info.get("socket")
            # Only now: whoever waits while the connection is made is not in flight, and can still be given up.
            self._board(flight)
            try:
                return self._run(connection, flight.batch)
            finally:
                # Before somebody else gets the connection: it is not this flight's to abandon any more.
                with self._handover:
                    flight.socket = None

    def _board(self, flight: _Flight[Op, Result]) -> None:
        with self._handover:
            boarding: list[_Waiting[Op, Result]] = []
            while self._waiting and len(boarding) < MAX_BATCH:
                waiting = self._waiting.popleft()
                if not waiting.future.done():
                    boarding.append(waiting)
            flight.batch = boarding

    def _run(self, connection: Connection, batch: Sequence[_Waiting[Op, Result]]) -> Sequence[Result | Exception]:
        if not batch:
            return ()
        try:
            return self._attempt(connection, [waiting.op for waiting in batch])
        except OutcomeUnknown as error:
            return [error] * len(batch)
        except Exception as error:
            begun = not isinstance(error, Unavailable) or error.begun
            if connection.invalidated or not begun or (len(batch) == 1 and not _retryable(error)):
                return [error] * len(batch)
        return [self._run_alone(connection, waiting) for waiting in batch]

    def _run_alone(self, connection: Connection, waiting: _Waiting[Op, Result]) -> Result | Exception:
        failure: Exception = Unavailable("the connection to the database was lost")
        for _ in range(_ATTEMPTS):
            if waiting.future.done() or connection.invalidated:
                break
            try:
                return self._attempt(connection, [waiting.op])[0]
            except Exception as error:
                failure = error
                if not _retryable(error):
                    break
        return failure

    def _attempt(self, connection: Connection, ops: Sequence[Op]) -> Sequence[Result]:
        started = time.perf_counter()
        with self._transaction(connection):
            results = self._work(connection, ops)
        self._observe(len(ops), time.perf_counter() - started)
        return results


def _answer(waiting: _Waiting[Op, Result], result: Result | Exception) -> None:
    if waiting.future.done():  # its caller went away, or it was told that it is late
        return
    if isinstance(result, Exception):
        waiting.future.set_exception(result)
    else:
        waiting.future.set_result(result)


def _retryable(error: Exception) -> bool:
    return isinstance(error, Unavailable) and error.retryable
