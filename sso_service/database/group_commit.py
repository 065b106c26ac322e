"""Group commit: while one transaction is in flight, arriving operations wait and share the next one.

One transaction per request is slow: each would pay for its own round trips and its own flush to disk. A `GroupCommit`
owns the database access for one kind of operation. Callers submit an operation and await its result; they do not deal
with connections, transactions or each other.

Guarantees for each operation:

- it is part of at most one transaction that can have been committed;
- an operation that fails, fails alone: the batch is rolled back and each operation runs by itself;
- it is answered within `deadline` seconds: if it still waits, it is removed and never run (`Unavailable`); if it is in
  flight, its outcome is unknown (`OutcomeUnknown`; for reads, which change nothing, `Unavailable`);
- an operation whose caller was cancelled while it waited is removed.

A read that no caller waits for any more, because they were cancelled or their deadline has passed, is ended where that
is possible, so that it does not keep its thread.
"""

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from sqlalchemy import Connection

from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown, Overloaded, Unavailable

DEADLINE = 2.5
"""Seconds within which every operation is answered."""

MAX_BATCH = 512
"""Operations in one transaction: enough to make its cost per operation small, few enough to keep it short."""

MAX_WAITING = 4096
"""Operations that may wait, which is most of what can be done within the deadline. Further ones are rejected."""

_ATTEMPTS = 3
_BREAK_AGAIN = 0.05
"""Seconds after which an abandoned read is ended once more, because it may have begun its next statement."""

log = logging.getLogger(__name__)

Op = TypeVar("Op")
Result = TypeVar("Result")

Transaction = Literal["reading", "writing", "consuming"]
"""The method of `Database` that begins the transaction of a batch."""

Observer = Callable[[int, float], None]
"""Called with the size of each committed batch and the seconds that its transaction took."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Op, Result]):
    """An operation with the future of its result and its deadline (monotonic seconds)."""

    op: Op
    future: "asyncio.Future[Result]"
    deadline: float


@dataclass(slots=True, eq=False)
class _Run(Generic[Op, Result]):
    """One run of a worker thread: the batch that it has taken, and `Database.breaker` of its connection."""

    batch: Sequence[_Waiting[Op, Result]] = ()
    breaker: Callable[[], object] | None = None

    @property
    def is_unwanted(self) -> bool:
        """Whether no caller waits for a result of the batch."""
        return bool(self.batch) and all(waiting.future.done() for waiting in self.batch)


class GroupCommit(ABC, Generic[Op, Result]):
    """Runs operations of one kind in batches, one batch at a time. For one event loop.

    A subclass names its `kind` for metrics and its `transaction`, and implements `run_batch`. Batches run in a thread
    of `executor`. `deadline` is in seconds, `max_waiting` is a number of operations.
    """

    kind: ClassVar[str]
    transaction: ClassVar[Transaction]
    max_batch: ClassVar[int] = MAX_BATCH

    def __init__(
        self,
        database: Database,
        executor: Executor,
        *,
        deadline: float = DEADLINE,
        max_waiting: int = MAX_WAITING,
        observe: Observer = lambda size, seconds: None,
    ) -> None:
        self.database = database
        self._executor = executor
        self._deadline = deadline
        self._max_waiting = max_waiting
        self._observe = observe
        self._queue: deque[_Waiting[Op, Result]] = deque()
        # Guards the moment when an operation goes from waiting to in flight: either the worker thread takes it or the
        # event loop removes it, never both.
        self._handover = threading.Lock()
        self._current: _Run[Op, Result] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @abstractmethod
    def run_batch(self, connection: Connection, ops: Sequence[Op]) -> Sequence[Result]:
        """Return a result for each operation, in their order.

        Runs in a worker thread, within a transaction. It may run again with the same operations if the transaction had
        no effect.
        """

    async def submit(self, op: Op) -> Result:
        """Return the result of `op`, once its transaction is committed.

        Raises `Overloaded`, `Unavailable`, `OutcomeUnknown`, or what `run_batch` raised for this operation alone.
        """
        if len(self._queue) >= self._max_waiting:
            raise Overloaded("too many operations are waiting")
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Op, Result] = _Waiting(op, loop.create_future(), time.monotonic() + self._deadline)
        self._queue.append(waiting)
        if self._current is None:
            # Not immediately but at the end of this turn of the event loop, so that operations which arrive in the same
            # turn share the batch.
            self._current = _Run()
            loop.call_soon(self._start, self._current)
        if self._timer is None:
            self._timer = loop.call_later(self._deadline, self._expire)
        try:
            return await waiting.future
        except asyncio.CancelledError:
            with self._handover:
                if waiting in self._queue:
                    self._queue.remove(waiting)
                run = self._current
                unwanted = run is not None and run.is_unwanted
            if run and unwanted and self.transaction == "reading" and self.database.breaks_cheaply:
                self._break(run)
            raise

    # --- in the event loop

    def _start(self, run: _Run[Op, Result]) -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._run_batch, run)
        future.add_done_callback(lambda done: self._complete(run, done))

    def _complete(self, run: _Run[Op, Result], done: "asyncio.Future[Sequence[Result | Exception]]") -> None:
        if done.cancelled():
            return
        if (crash := done.exception()) is None:
            results = done.result()
        else:
            log.error("database: a batch was lost", exc_info=crash)
            results = [self._late("the batch was lost")] * len(run.batch)
        for waiting, result in zip(run.batch, results, strict=True):
            _resolve(waiting, result)
        if run is self._current:
            self._next()

    def _next(self) -> None:
        self._current = _Run() if self._queue else None
        if self._current:
            self._start(self._current)

    def _expire(self) -> None:
        """Answer operations whose deadline has passed. One timer serves all: deadlines are in the order of arrival."""
        now = time.monotonic()
        expired: list[_Waiting[Op, Result]] = []
        with self._handover:
            while self._queue and self._queue[0].deadline <= now:
                expired.append(self._queue.popleft())
            run = self._current
            in_flight = run.batch if run else ()
            deadlines = [waiting.deadline for waiting in (*in_flight, *self._queue) if waiting.deadline > now]
        for waiting in expired:
            _resolve(waiting, Unavailable("no answer from the database in time"))
        for waiting in in_flight:
            if waiting.deadline <= now:
                _resolve(waiting, self._late("no answer from the database in time"))
        if run and run.is_unwanted:
            # All callers of this batch have been answered, and the operations behind it must not wait for it either.
            self._break(run)
            self._next()
        self._timer = asyncio.get_running_loop().call_later(min(deadlines) - now, self._expire) if deadlines else None

    def _break(self, run: _Run[Op, Result]) -> None:
        """End the statement that the thread of `run` executes, unless the run is over."""
        with self._handover:
            if run.breaker is None:
                return
            run.breaker()
        asyncio.get_running_loop().call_later(_BREAK_AGAIN, self._break, run)

    def _late(self, message: str) -> Exception:
        """Return the error for an operation in flight: a read that is not answered has changed nothing."""
        return Unavailable(message) if self.transaction == "reading" else OutcomeUnknown(message)

    # --- in a worker thread

    def _run_batch(self, run: _Run[Op, Result]) -> Sequence[Result | Exception]:
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self.database.connect())
            except Unavailable as error:
                self._take_batch(run)
                return [error] * len(run.batch)
            run.breaker = self.database.breaker(connection, reading=self.transaction == "reading")
            # Taken only now: operations that arrive while the connection is opened still wait, and can be removed.
            self._take_batch(run)
            try:
                return self._run_together(connection, run.batch)
            finally:
                # Before another run gets this connection: `_break` must not touch it after that.
                with self._handover:
                    run.breaker = None

    def _take_batch(self, run: _Run[Op, Result]) -> None:
        with self._handover:
            batch: list[_Waiting[Op, Result]] = []
            while self._queue and len(batch) < self.max_batch:
                waiting = self._queue.popleft()
                if not waiting.future.done():
                    batch.append(waiting)
            run.batch = batch

    def _run_together(
        self, connection: Connection, batch: Sequence[_Waiting[Op, Result]]
    ) -> Sequence[Result | Exception]:
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
        with getattr(self.database, self.transaction)(connection):
            results = self.run_batch(connection, ops)
        self._observe(len(ops), time.perf_counter() - started)
        return results


def _resolve(waiting: _Waiting[Op, Result], result: Result | Exception) -> None:
    if waiting.future.done():  # its caller was cancelled, or its deadline has passed
        return
    if isinstance(result, Exception):
        waiting.future.set_exception(result)
    else:
        waiting.future.set_result(result)


def _retryable(error: Exception) -> bool:
    return isinstance(error, Unavailable) and error.retryable
