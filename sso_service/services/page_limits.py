"""Limits on requests for pages: how often for a session and for an account, how many at a time for an account."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from limits import RateLimitItem

from sso_service.errors import PagesRateLimited
from sso_service.sessions import Session

SESSIONS = 3
"""Sessions whose quotas an account has together. Otherwise a user could sign in often and use a quota each time: some
ten requests a second keep the processor of a worker so busy that logins of all accounts wait."""
AT_ONCE = 4
"""Requests of an account that are handled at a time. Other accounts' requests wait behind these at most."""
WAITING = 64
"""Further requests of an account that may wait, so that the whole team may click at the same moment."""
PATIENCE = 2.5
"""Seconds that a request waits for its turn."""

_MOST_COUNTED = 50_000
"""Sessions whose requests are counted: about 15 MB. Beyond that the one that was unused for longest is forgotten."""


@dataclass(slots=True)
class _Line:
    """The requests of an account: those that are handled, and those that wait in their order."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    requests: int = 0


class _Rates:
    """Counts requests by key: `amount` within `window` seconds for each."""

    def __init__(self, amount: int, window: int, monotonic: Callable[[], float]) -> None:
        # Not the limiter of the library: it goes through all keys a hundred times a second, holding the interpreter's
        # lock, which is fine for API tokens but not for sessions.
        self._window = window
        self._interval = window / amount
        self._monotonic = monotonic
        self._unused_at: OrderedDict[Hashable, float] = OrderedDict()

    def count(self, key: Hashable) -> None:
        """Count a request. Raises `PagesRateLimited` if there are too many with this key.

        Each request takes an interval from the key's window, which refills with time (the generic cell rate algorithm
        of ITU-T I.371, in its form as virtual scheduling). A refused request takes nothing.
        """
        now = self._monotonic()
        unused_at = max(now, self._unused_at.pop(key, now)) + self._interval
        if (excess := unused_at - now - self._window) > 1e-6:
            self._unused_at[key] = unused_at - self._interval
            raise PagesRateLimited(math.ceil(excess))
        self._unused_at[key] = unused_at
        if len(self._unused_at) > _MOST_COUNTED:
            self._unused_at.popitem(last=False)


class PageLimits:
    """Counts requests for pages, of each session and of each account, and lets a few of an account run at a time.

    A session may make requests at `rate`, the sessions of an account together at `SESSIONS` times that. `monotonic` is
    a clock in seconds. For one event loop.
    """

    def __init__(self, rate: RateLimitItem, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        window = rate.get_expiry()
        self._sessions = _Rates(rate.amount, window, monotonic)
        self._accounts = _Rates(rate.amount * SESSIONS, window, monotonic)
        self._lines: dict[int, _Line] = {}

    def count(self, session: Session) -> None:
        """Count a request. Raises `PagesRateLimited` if the session or its account makes too many. Uses no database."""
        self._sessions.count(session)
        self._accounts.count(session.account_id)

    @asynccontextmanager
    async def turn(self, account_id: int) -> AsyncIterator[None]:
        """Run the block when it is the request's turn.

        Raises `PagesRateLimited` if too many requests of the account wait, or if the turn does not come in time.
        """
        line = self._lines.setdefault(account_id, _Line())
        if line.requests >= AT_ONCE + WAITING:
            raise PagesRateLimited(1)
        line.requests += 1
        try:
            try:
                async with asyncio.timeout(PATIENCE):
                    await line.turns.acquire()
            except TimeoutError:
                raise PagesRateLimited(1) from None
            try:
                yield
            finally:
                line.turns.release()
        finally:
            line.requests -= 1
            if not line.requests:
                del self._lines[account_id]
