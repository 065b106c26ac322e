"""A limit on the log lines that anonymous clients can cause: they must not fill a disk or hide other lines."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import Context

LINES = 10
"""Lines of one kind that a worker writes within a second."""
REPORT = 5.0
"""Seconds after the first omitted line until the number of omitted lines is logged."""

log = logging.getLogger(__name__)


class LineLimit:
    """Admits `LINES` lines a second, and later logs how many were omitted. `kind` is the subject of that message.

    `clock` returns seconds that only increase.
    """

    def __init__(self, kind: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._kind = kind
        self._clock = clock
        self._since = -1.0
        self._written = 0
        self._omitted = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # the event loop in which the report is due

    def admits(self) -> bool:
        """Return whether the line may be written. Otherwise it is added to the next report."""
        now = self._clock()
        if now - self._since >= 1:
            self._since, self._written = now, 0
        if self._written < LINES:
            self._written += 1
            return True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # without an event loop nothing could report
            return True
        self._omitted += 1
        if self._loop is not loop:
            self._loop = loop
            # In a context of its own: the present one belongs to a request, which the report is not about.
            loop.call_later(REPORT, self._report, context=Context())
        return False

    def _report(self) -> None:
        omitted, self._omitted, self._loop = self._omitted, 0, None
        log.warning("%d %s in %.0f s were not logged", omitted, self._kind, REPORT)


class LimitedMessage(logging.Filter):
    """A filter of log records that limits one constant message of a library."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__()
        self._message = message
        self._limit = LineLimit(kind)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may be written."""
        return record.msg != self._message or self._limit.admits()
