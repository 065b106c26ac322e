"""Connecting to a server that is away: one attempt at a time, with growing pauses."""

import threading
import time
from typing import Any

import psycopg
from sqlalchemy import Dialect, Engine, ExceptionContext, event

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.25  # seconds between two attempts


class Reconnecting:
    """Opens the connections of `engine`. While the server cannot be reached, attempts run one by one, with pauses.

    Without this, each rejected batch would be one more attempt, and a server under stress would get more of it. A
    caller that arrives during a pause waits for its end; if another caller then makes the attempt, it gets the last
    error. Existing connections stay in use. A new connection counts as good once it was used and returned intact:
    PgBouncer accepts connections without a server too.
    """

    def __init__(self, engine: Engine) -> None:
        self._lock = threading.Lock()
        self._pause = 0.0  # 0: the server is reachable
        self._not_before = 0.0
        self._failure = ""
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "handle_error", self._on_error)
        event.listen(engine, "checkin", self._on_return)

    def _connect(self, dialect: Dialect, record: Any, arguments: tuple[Any, ...], parameters: dict[str, Any]) -> Any:
        if self._pause:
            time.sleep(max(0.0, self._not_before - time.monotonic()))
        with self._lock:
            if self._pause:
                if time.monotonic() < self._not_before:
                    raise psycopg.OperationalError(self._failure)
                # This attempt stands for all callers: no other one is made before the next pause is over.
                self._pause_until_next(min(2 * self._pause, _LONGEST_PAUSE))
        try:
            connection = dialect.connect(*arguments, **parameters)
        except psycopg.Error as error:
            self._record_failure(error)
            raise
        record.info["untried"] = True
        return connection

    def _on_error(self, context: ExceptionContext) -> None:
        connection = context.connection
        if context.is_disconnect and connection and not connection.invalidated and "untried" in connection.info:
            self._record_failure(context.original_exception)

    def _on_return(self, connection: psycopg.Connection[Any] | None, record: Any) -> None:
        if connection is not None and record.info.pop("untried", False):
            self._pause = 0.0

    def _record_failure(self, error: BaseException) -> None:
        with self._lock:
            self._failure = str(error)
            if not self._pause:
                self._pause_until_next(_FIRST_PAUSE)

    def _pause_until_next(self, pause: float) -> None:
        self._pause = pause
        self._not_before = time.monotonic() + pause
