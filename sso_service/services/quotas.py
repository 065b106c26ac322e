"""How often an API token may be used: `SSO_RATE_LIMIT`, in each worker."""

import math
import time

import msgspec
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from sso_service.database.directory import digest
from sso_service.errors import RateLimited


class Quota(msgspec.Struct, frozen=True):
    """The `limit` of requests within `window` seconds, how many are left, and the seconds until more are."""

    limit: int
    window: int
    remaining: int
    reset: int


class Quotas:
    """Counts the requests of each API token. Without a `rate` nothing is counted, and no method costs anything."""

    def __init__(self, rate: RateLimitItem | None) -> None:
        self._rate = rate
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        # The digests of API tokens that were accepted once. A client with another secret must not learn the limit, and
        # must not fill the memory.
        self._accepted: set[str] = set()

    def accept(self, secret: str) -> None:
        """Remember that this is the secret of an API token."""
        if self._rate is not None:
            self._accepted.add(digest(secret))

    def count(self, secret: str) -> None:
        """Count a request. Raises `RateLimited` if no request is left."""
        if self._rate is not None and not self._limiter.hit(self._rate, digest(secret)):
            raise RateLimited(max(1, self._stats(self._rate, digest(secret))[1]))

    def of(self, secret: str) -> Quota | None:
        """Return the quota of an API token, or None if there is no rate or the API token was never accepted."""
        if self._rate is None or (key := digest(secret)) not in self._accepted:
            return None
        return Quota(self._rate.amount, self._rate.get_expiry(), *self._stats(self._rate, key))

    def _stats(self, rate: RateLimitItem, key: str) -> tuple[int, int]:
        """Return the number of requests that are left, and the seconds until there are more, rounded up."""
        stats = self._limiter.get_window_stats(rate, key)
        return stats.remaining, max(0, math.ceil(stats.reset_time - time.time()))
