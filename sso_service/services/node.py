"""One serving process: its use cases, its condition, and its background work."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from sso_service.database.accounts import Expiring
from sso_service.database.directory import AccessChecks, ApiTokenUses, Lookups, Provisioning
from sso_service.database.group_commit import GroupCommit
from sso_service.database.health import HealthChecks
from sso_service.database.ledger import Redemptions, StateChecks
from sso_service.database.purging import CLOCK_TOLERANCE, Purger
from sso_service.database.transactions import Database
from sso_service.database.work import Changes, Reads
from sso_service.errors import DatabaseError, Unavailable
from sso_service.key_directory import KeyDirectory
from sso_service.observability import metrics
from sso_service.services.accounts import Accounts
from sso_service.services.issuing import Issuing
from sso_service.services.page_limits import PageLimits
from sso_service.services.redeeming import Redeeming
from sso_service.services.sessions import Sessions
from sso_service.services.trust import Trust
from sso_service.settings import Settings

PURGE_INTERVAL = 61.0
"""Seconds between two purge rounds: slightly more than the age that a floor must have."""
_LOGIN_THREADS = 16
_PAGE_THREADS = 4
"""One for each kind of work of pages, and one in case a transaction is stuck."""
_NAMED_FILES = 5
"""Maximum number of key files that a problem names."""

log = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=GroupCommit)  # type: ignore[type-arg]  # of any operation and result


@dataclass(frozen=True, slots=True)
class Condition:
    """The state of this node: its problems by subject, and figures where they are known.

    `unusable_key_files` includes files that contain a revoked key again. `signing_key_age` is in seconds.
    `clock_difference` is the number of seconds by which this node's clock is ahead of the database's.
    """

    problems: dict[str, str]
    unusable_key_files: int
    signing_key_age: int | None = None
    clock_difference: float | None = None


class Node:
    """All use cases over one database, one key directory and one clock (Unix seconds). For one event loop."""

    def __init__(
        self, settings: Settings, database: Database, keys: KeyDirectory, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self.database = database
        self.trust = Trust(keys, clock=clock)
        # Logins and issuing share threads and connections with nothing that an account can make slow. Access checks are
        # on their side, although pages need them too: one query serves all that arrive together. So are the health
        # checks, which must report the condition of logins, not of pages.
        self._login_threads = ThreadPoolExecutor(_LOGIN_THREADS, thread_name_prefix="logins")
        self._page_threads = ThreadPoolExecutor(_PAGE_THREADS, thread_name_prefix="pages")
        self.page_database = database.for_pages()
        """The same database with the connections of pages."""
        access_checks = self._batch(AccessChecks)
        self._health_checks = self._batch(HealthChecks)
        self.sessions = Sessions(self.trust, access_checks, lifetime=settings.session_ttl)
        self.issuing = Issuing(
            settings, self.trust, self._batch(Lookups), self._batch(Provisioning), self._batch(ApiTokenUses)
        )
        self.redeeming = Redeeming(
            settings,
            self.trust,
            self.sessions,
            self.issuing.authorize,
            self.issuing.count,
            self._batch(Redemptions),
            self._batch(StateChecks),
            access_checks,
        )
        self.accounts = Accounts(
            self._page_batch(Reads), self._page_batch(Changes), searches=self._page_batch(Reads), clock=clock
        )
        self.page_limits = PageLimits(settings.page_rate)
        self.consumed_rows: int | None = None
        """Approximate number of rows in the ledger at the last purge round."""
        self.expiring: Expiring | None = None
        """The API tokens that expire soon, at the last count."""
        self._draining = False

    def _batch(self, kind: type[Batch]) -> Batch:
        batch: Batch = kind(self.database, self._login_threads, observe=metrics.batches(kind.kind))
        return batch

    def _page_batch(self, kind: type[Batch]) -> Batch:
        batch: Batch = kind(self.page_database, self._page_threads, observe=metrics.batches(kind.kind))
        return batch

    @property
    def keys(self) -> KeyDirectory:
        """The key directory."""
        return self.trust.keys

    async def condition(self) -> Condition:
        """Return the state of this node now."""
        problems: dict[str, str] = {}
        key_age = difference = None
        if self._draining:
            problems["node"] = "it is being stopped"
        try:
            key_age = self.trust.now() - self.trust.signing_key().signs_from
        except Unavailable as error:
            problems["keys"] = str(error)
        # The file may be a tombstone, or the key that another node signs with, so this node may trust too much or too
        # little. A revoked key that reappeared is neither: this node handles it, and only the alert reports it.
        if unusable := self.keys.unusable:
            problems["keys"] = "; ".join([*filter(None, [problems.get("keys")]), _described(unusable)])
        try:
            health = await self._health_checks.submit(None)
        except Unavailable as error:
            problems["database"] = str(error)
        else:
            if health.problem:
                problems["database"] = health.problem
            if abs(difference := self.trust.clock() - health.now) > CLOCK_TOLERANCE:
                problems["clock"] = f"this node's clock and the database's differ by {difference:.0f} s"
        return Condition(problems, len(unusable) + len(self.keys.revived), key_age, difference)

    def drain(self) -> None:
        """Report not ready from now on, so that balancers stop sending requests. The node keeps serving."""
        self._draining = True

    async def run_in_background(self) -> None:
        """Keep keys, ledger and search texts up to date, and watch for API tokens that expire, until cancelled."""
        purger = Purger(self.database, clock=self.trust.clock)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.trust.keep_fresh())
            group.create_task(_repeat("purge", partial(self._purge, purger)))
            group.create_task(_repeat("expiring API tokens", self._watch_api_tokens))
            group.create_task(_repeat("search texts", self.accounts.add_search_texts, at_once=True))

    async def _purge(self, purger: Purger) -> None:
        # In the pool that `close` waits for: no connection may be in use when the database is closed.
        done = await asyncio.get_running_loop().run_in_executor(self._login_threads, purger.run)
        self.consumed_rows = done.rows
        if done.skipped:
            log.warning("purge: skipped: %s", done.skipped)

    async def _watch_api_tokens(self) -> None:
        self.expiring = await self.accounts.count_expiring_api_tokens()
        if self.expiring.count:
            await self.accounts.log_expiring_api_tokens()

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self.trust.close()
        for threads in (self._login_threads, self._page_threads):
            threads.shutdown(cancel_futures=True)
        self.database.close()


def _described(unusable: dict[str, str]) -> str:
    """Return the key files that cannot be used, with the reasons. Names are quoted, because they may be any bytes."""
    named = [f"{f'{key_id}.json'!r} {problem}" for key_id, problem in sorted(unusable.items())[:_NAMED_FILES]]
    more = [f"{len(unusable) - _NAMED_FILES} more"] if len(unusable) > _NAMED_FILES else []
    return f"key files that cannot be used: {', '.join(named + more)}"


async def _repeat(name: str, work: Callable[[], Awaitable[None]], *, at_once: bool = False) -> None:
    """Do `work` about once a minute, until cancelled. A failure is logged under `name`."""
    while True:
        if not at_once:
            # With a random delay, so that workers that started together do not keep working together.
            await asyncio.sleep(PURGE_INTERVAL + secrets.randbelow(1000) / 100)
        at_once = False
        try:
            await work()
        except DatabaseError as error:
            log.warning("%s: %s", name, error)
        except Exception:
            log.exception("%s: failed; the next round tries again", name)
