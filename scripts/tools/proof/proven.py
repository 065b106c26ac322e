"""The processes of a node under test: the service itself, which also records its decisions.

    python -m scripts.tools.proof.proven

In addition to the service's settings it reads these variables: PROOF_NODE (its name), PROOF_DECISIONS (directory for
the records), PROOF_CLOCK (file with the error of its clock), PROOF_WORKERS, PROOF_RETENTION (seconds), and
PROOF_BROKEN. The last one names a promise to break, which shows that the proof notices it.
"""

import mmap
import os
import struct
import time
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, event
from starlette.types import ASGIApp

from scripts.tools.proof.history import Decision, write_line
from sso_service import tokens
from sso_service.database import ledger, postgresql, purging
from sso_service.database.directory import AccessQuery
from sso_service.database.ledger import Redeemed, Verdict
from sso_service.database.purging import Purger, PurgeRound
from sso_service.database.schema import consumed_nonces
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.keyring import KeyRing
from sso_service.server import supervisor
from sso_service.services import node
from sso_service.services.node import Node
from sso_service.settings import Settings, read_settings
from sso_service.tokens import Claims
from sso_service.web import app

FLOOR_AGE = 8.0
"""Seconds, instead of a minute. Statements that began under a lower floor must have ended by then. On PostgreSQL they
take at most 2 s (`statement_timeout`). On SQLite, no two writing statements run at the same time.
"""

PURGE_INTERVAL = 1.0
"""Seconds, instead of a minute: purges run all the time, so that one coincides with every other event."""

BROKEN = ("single-use", "floor", "durability", "revocation")
"""The promises that can be broken; durability only on PostgreSQL."""

OFFSET = struct.Struct("d")
"""The content of the file PROOF_CLOCK: seconds by which the clock is ahead."""


class _Clock:
    """The node's clock, which can be set while it runs.

    Only the wall clock is affected, as on a real machine. The monotonic clock, and with it every time-out, is not. (A
    library such as libfaketime also affects time-outs, and makes `time.sleep` fail.)
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._offset = mmap.mmap(file.fileno(), OFFSET.size, access=mmap.ACCESS_READ)
        self._machine = time.time

    def __call__(self) -> float:
        return self._machine() + float(OFFSET.unpack_from(self._offset)[0])

    def install(self, database: Database) -> None:
        """Make this the clock of the process, and of SQLite, which runs in it."""
        time.time = self
        if database.is_sqlite:
            # The arguments are "%s" and "now", as the service uses it.
            event.listen(
                database.engine,
                "connect",
                lambda connection, _: connection.create_function("strftime", 2, lambda *_: str(int(self()))),
            )


@dataclass(frozen=True, slots=True)
class _Found:
    """A token that was found genuine."""

    token: str
    key_id: str
    at: float


# Per request: each request is a task with its own context.
_found: ContextVar[_Found] = ContextVar("_found")


class ObservedNode(Node):
    """The service, which records each token in a file before it passes it to the database."""

    def __init__(self, settings: Settings, database: Database, keys: KeyDirectory) -> None:
        clock = _Clock(os.environ["PROOF_CLOCK"])
        clock.install(database)
        super().__init__(settings, database, keys, clock=clock)
        self._name = os.environ["PROOF_NODE"]
        path = Path(os.environ["PROOF_DECISIONS"], f"{self._name}-{os.getpid()}.jsonl")
        self._decisions = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._read, self._redeem = self.redeeming._read, self.redeeming._redeem
        self.redeeming._read = self._read_and_remember  # type: ignore[method-assign] # observed from outside
        self.redeeming._redeem = self._record_and_redeem  # type: ignore[method-assign] # observed from outside

    def _read_and_remember(self, token: str, account_id: int | None) -> Claims:
        claims = self._read(token, account_id)
        # The key is not taken from the code under test. It is found by signing the same claims with each key.
        made_by = (key.id for key in self.keys.ring.known_keys() if tokens.sign(claims, key.token_key) == token)
        _found.set(_Found(token, next(made_by, ""), time.monotonic()))
        return claims

    async def _record_and_redeem(self, claims: Claims, access: AccessQuery | None, *, now: int) -> Redeemed:
        found = _found.get()
        if now < claims.expires_at:  # otherwise the service does not pass it to the database either
            line = Decision(
                at=found.at, node=self._name, pid=os.getpid(), token=found.token, now=now, key_id=found.key_id
            )
            os.write(self._decisions, write_line(line))  # one write, so that the line is complete or missing
        return await self._redeem(claims, access, now=now)


def create_app() -> ASGIApp:
    """Return the application of a worker."""
    # Shorter than an hour, in proportion to the lifetime of tokens and the clock errors of a trial. So consumed tokens
    # are purged within the trial, and a clock is set back further than this.
    purging.RETENTION = int(os.environ["PROOF_RETENTION"])
    purging.FLOOR_AGE = FLOOR_AGE
    node.PURGE_INTERVAL = PURGE_INTERVAL
    if broken := os.environ.get("PROOF_BROKEN"):
        _break(broken)
    return app.create_app(app.node_from(os.environ, ObservedNode))


def _break(promise: str) -> None:
    """Make the service break a promise."""
    match promise:
        case "single-use":  # a consumed token is redeemed again
            redeem = ledger.redeem

            def redeem_again(*arguments: Any) -> list[Redeemed]:
                return [
                    Redeemed(Verdict.REDEEMED) if one.verdict is Verdict.CONSUMED else one for one in redeem(*arguments)
                ]

            ledger.redeem = redeem_again  # type: ignore[assignment] # breaks it deliberately
        case "floor":  # purges by the clock, without the floor that keeps purged tokens from being redeemed again
            Purger.run = _purge_by_the_clock  # type: ignore[assignment, method-assign] # breaks it deliberately
        case "durability":  # the server confirms before the data is on disk
            postgresql._DURABLE = "SELECT set_config('synchronous_commit', 'off', true)"
        case "revocation":  # known keys are never removed
            refresh = KeyDirectory.refresh

            def refresh_and_keep(keys: KeyDirectory) -> bool:
                known = {key.id: key for key in keys.ring.known_keys()}
                done = refresh(keys)
                keys.ring = KeyRing(({entry.id: entry for entry in keys.ring.entries} | known).values())
                return done

            KeyDirectory.refresh = refresh_and_keep  # type: ignore[assignment, method-assign] # breaks it deliberately


def _purge_by_the_clock(purger: Purger) -> PurgeRound:
    lowest = ledger.floor_at(int(purger._clock()) - purging.RETENTION)
    database = purger._database
    with database.connect() as connection, database.writing(connection):
        deleted = connection.execute(delete(consumed_nonces).where(consumed_nonces.c.claims < lowest)).rowcount
    return PurgeRound(deleted)


if __name__ == "__main__":
    supervisor.run(
        read_settings(os.environ), workers=int(os.environ["PROOF_WORKERS"]), app="scripts.tools.proof.proven:create_app"
    )
