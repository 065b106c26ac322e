"""How many connections a worker may have: the setting, and the file descriptors that the system allows."""

import asyncio
import errno
import logging
import sys
import time
from typing import Any

from sso_service.observability import metrics

log = logging.getLogger(__name__)

_LOG_INTERVAL = 60.0
"""Seconds between two lines about connections that were refused."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Capacity:
    """The number of connections that a worker accepts. Those above it are counted, and logged once a minute."""

    def __init__(self) -> None:
        self.limit = sys.maxsize
        self._refused = 0
        self._logged = -_LOG_INTERVAL

    def limit_to(self, connections: int) -> None:
        """Accept `connections` at most, and no more than four fifths of the file descriptors.

        The rest is for the database, key files and the log: a worker without a free descriptor would fail at work that
        has nothing to do with the connection that took the last one.
        """
        self.limit = max(1, min(connections, _descriptors() * 4 // 5))

    def refused(self) -> None:
        """Count a connection that was closed because there are too many."""
        metrics.CONNECTIONS_REFUSED.inc()
        self._refused += 1
        if (now := time.monotonic()) - self._logged >= _LOG_INTERVAL:
            self._logged = now
            log.warning("Refused %d connections above the limit of %d", self._refused, self.limit)
            self._refused = 0

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error of the event loop: one without a free descriptor is a refused connection, not a traceback."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            self.refused()
        else:
            loop.default_exception_handler(context)


CAPACITY = Capacity()
"""The capacity of this process."""


def limit_connections(connections: int) -> None:
    """Accept at most `connections` in this process. Call it in the event loop that serves, before it accepts any."""
    CAPACITY.limit_to(connections)
    asyncio.get_running_loop().set_exception_handler(CAPACITY.handle)
    log.info("At most %d connections", CAPACITY.limit)


def _descriptors() -> int:
    """Return the limit of file descriptors, after raising the soft limit to the hard one."""
    try:
        import resource  # noqa: PLC0415 - does not exist on Windows, which has no such limit
    except ImportError:
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):  # macOS reports an infinite limit and does not allow it
        pass
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
