"""How many connections a worker may have: the setting, and the file descriptors that the system allows."""

import logging
import sys
import time

from sso_service.observability import metrics
from sso_service.server.descriptors import for_connections, raise_limit

log = logging.getLogger(__name__)

_LOG_INTERVAL = 60.0
"""Seconds between two lines about connections that were refused."""


class Capacity:
    """The number of connections that a worker accepts. Those above it are counted, and logged once a minute."""

    def __init__(self) -> None:
        self.limit = sys.maxsize
        self._refused = 0
        self._logged = -_LOG_INTERVAL

    def refuse(self, *, now: float | None = None) -> None:
        """Count a connection that is closed because there are too many. `now` is in seconds of any clock."""
        metrics.CONNECTIONS_REFUSED.inc()
        self._refused += 1
        now = time.monotonic() if now is None else now
        if now - self._logged >= _LOG_INTERVAL:
            self._logged = now
            log.warning("Refused %d connections above the limit of %d", self._refused, self.limit)
            self._refused = 0


CAPACITY = Capacity()
"""The capacity of this process."""


def limit_connections(connections: int) -> None:
    """Accept `connections` at most in this process, and no more than its file descriptors allow."""
    CAPACITY.limit = min(connections, for_connections(raise_limit()))
    log.info("Accepting at most %d connections", CAPACITY.limit)
