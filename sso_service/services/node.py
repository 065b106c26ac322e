"""One serving process: its use cases, its condition, and its background work."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from sso_service.database.directory import AccessChecks, ApiTokenUses, Lookups, Provisioning
from sso_service.database.group_commit import GroupCommit
from sso_service.database.health import HealthChecks
from sso_service.database.ledger import Redemptions, StateChecks
from sso_service.database.purging import CLOCK_TOLERANCE, Purger
from sso_service.database.transactions import Database
from sso_service.database.work import Changes, Reads
from sso_service.errors import OutcomeUnknown, Unavailable
from sso_service.keyring import KeyDirectory
from sso_service.observability import metrics
from sso_service.services.accounts import Accounts
from sso_service.services.issuing import Issuing
from sso_service.services.redeeming import Redeeming
from sso_service.services.sessions import Sessions
from sso_service.services.trust import Trust
from sso_service.settings import Settings

PURGE_INTERVAL = 61.0
"""Seconds between two purge rounds: slightly more than the age that a floor must have."""
_THREADS = 16

log = logging.getLogger(__name__)

Batch = TypeVar("Batch", bound=GroupCommit)  # type: ignore[type-arg]  # of any operation and result


@dataclass(frozen=True, slots=True)
class Condition:
    """The state of this node: its problems by subject, and figures where they are known.

    `signing_key_age` is in seconds. `clock_difference` is the number of seconds by which this node's clock is ahead of
    the database's.
    """

    problems: dict[str, str]
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
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")
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
        self.accounts = Accounts(self._batch(Reads), self._batch(Changes), clock=clock)
        self.consumed_rows: int | None = None
        """Approximate number of rows in the ledger at the last purge round."""
        self._draining = False

    def _batch(self, kind: type[Batch]) -> Batch:
        batch: Batch = kind(self.database, self._threads, observe=metrics.batches(kind.kind))
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
        try:
            health = await self._health_checks.submit(None)
        except Unavailable as error:
            problems["database"] = str(error)
        else:
            if health.problem:
                problems["database"] = health.problem
            if abs(difference := self.trust.clock() - health.now) > CLOCK_TOLERANCE:
                problems["clock"] = f"this node's clock and the database's differ by {difference:.0f} s"
        return Condition(problems, key_age, difference)

    def drain(self) -> None:
        """Report not ready from now on, so that balancers stop sending requests. The node keeps serving."""
        self._draining = True

    async def run_in_background(self) -> None:
        """Keep the keys up to date and the ledger small, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.trust.keep_fresh())
            group.create_task(self._keep_purging())

    async def _keep_purging(self) -> None:
        purger = Purger(self.database, clock=self.trust.clock)
        while True:
            # With a random delay, so that workers that started together do not keep purging together.
            await asyncio.sleep(PURGE_INTERVAL + secrets.randbelow(1000) / 100)
            try:
                done = await asyncio.to_thread(purger.run)
            except (Unavailable, OutcomeUnknown) as error:
                log.warning("purge: %s", error)
            except Exception:
                log.exception("purge: failed; the next round tries again")
            else:
                self.consumed_rows = done.rows
                if done.skipped:
                    log.warning("purge: skipped: %s", done.skipped)

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self.trust.close()
        self._threads.shutdown(cancel_futures=True)
        self.database.close()
