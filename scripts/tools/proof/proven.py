"""What runs in the processes of a node that is tried: the service itself, which writes down what it decides.

    python -m scripts.tools.proof.proven

Beside the settings of the service it reads PROOF_NODE (its name), PROOF_DECISIONS (the directory for what it writes),
PROOF_CLOCK (a file that says how wrong its clock is), PROOF_WORKERS, PROOF_RETENTION (seconds), and PROOF_BROKEN, which
names a promise that is to be broken: the proof of the proof.
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
from sso_service.keyring import KeyDirectory, KeyRing
from sso_service.server import supervisor
from sso_service.services import node
from sso_service.services.node import Node
from sso_service.settings import Settings, read_settings
from sso_service.tokens import Claims
from sso_service.web import app

FLOOR_AGE = 8.0
"""Instead of a minute. A statement that was begun under a lower floor has to be over by then, and those live 2 s on
PostgreSQL (`statement_timeout`), while SQLite has no statement that writes beside another."""

PURGE_INTERVAL = 1.0
"""Instead of a minute: purging all the time, so that a purge is near whatever else happens."""

BROKEN = ("single-use", "floor", "durability", "revocation")
"""The promises that can be broken. That of durability only on PostgreSQL."""

OFFSET = struct.Struct("d")
"""What is in the file of PROOF_CLOCK: seconds by which the clock is ahead."""


class _Clock:
    """The node's clock, which can be set while it runs.

    Only the one that can be set outside as well: what counts seconds, and with it all waiting, goes on as it did. (A
    library between us and the system, as libfaketime is, also changes waiting, and makes `time.sleep` fail.)
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._offset = mmap.mmap(file.fileno(), OFFSET.size, access=mmap.ACCESS_READ)
        self._machine = time.time

    def __call__(self) -> float:
        return self._machine() + float(OFFSET.unpack_from(self._offset)[0])

    def rule(self, database: Database) -> None:
        """Makes it the clock of this process; also of SQLite, which runs in it."""
        time.time = self
        if database.is_sqlite:
            # "%s" and "now", which is how the service asks for it.
            event.listen(
                database.engine,
                "connect",
                lambda connection, _: connection.create_function("strftime", 2, lambda *_: str(int(self()))),
            )


@dataclass(frozen=True, slots=True)
class _Found:
    """A token that was found to be good."""

    token: str
    key_id: str
    at: float


# Of this request: each is a task, with a context of its own.
_found: ContextVar[_Found] = ContextVar("_found")


class ProvenNode(Node):
    """The service, which writes a line to a file before it passes a token to the database."""

    def __init__(self, settings: Settings, database: Database, keys: KeyDirectory) -> None:
        clock = _Clock(os.environ["PROOF_CLOCK"])
        clock.rule(database)
        super().__init__(settings, database, keys, clock=clock)
        self._name = os.environ["PROOF_NODE"]
        path = Path(os.environ["PROOF_DECISIONS"], f"{self._name}-{os.getpid()}.jsonl")
        self._decisions = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._read, self._redeem = self.redeeming._read, self.redeeming._redeem
        self.redeeming._read = self._read_and_remember  # type: ignore[method-assign] # observed from outside
        self.redeeming._redeem = self._record_and_redeem  # type: ignore[method-assign] # observed from outside

    def _read_and_remember(self, token: str) -> Claims:
        claims = self._read(token)
        # The code under test is not asked for the key: it is found by signing the same claims with each key.
        made_by = (key.id for key in self.keys.ring.known_keys() if tokens.sign(claims, key.token_key) == token)
        _found.set(_Found(token, next(made_by, ""), time.monotonic()))
        return claims

    async def _record_and_redeem(self, claims: Claims, access: AccessQuery | None) -> Redeemed:
        now, found = self.trust.now(), _found.get()
        if now < claims.expires_at:  # otherwise the service does not pass it to the database either
            line = Decision(
                at=found.at, node=self._name, pid=os.getpid(), token=found.token, now=now, key_id=found.key_id
            )
            os.write(self._decisions, write_line(line))  # one write, so that the line is complete or missing
        return await self._redeem(claims, access)


def create_app() -> ASGIApp:
    """Return the application of a worker."""
    # Shorter than an hour in proportion to the lifetime of tokens and the errors of clocks here, so that used tokens
    # are forgotten within the trial, and a clock that is set back further than this meets that.
    purging.RETENTION = int(os.environ["PROOF_RETENTION"])
    purging.FLOOR_AGE = FLOOR_AGE
    node.PURGE_INTERVAL = PURGE_INTERVAL
    if broken := os.environ.get("PROOF_BROKEN"):
        _break(broken)
    return app.create_app(app.node_from(os.environ, ProvenNode))


def _break(promise: str) -> None:
    """Makes the service break a promise."""
    match promise:
        case "single-use":  # whoever may have it gets it, used or not
            redeem = ledger.redeem

            def redeem_again(*arguments: Any) -> list[Redeemed]:
                return [
                    Redeemed(Verdict.REDEEMED) if one.verdict is Verdict.CONSUMED else one for one in redeem(*arguments)
                ]

            ledger.redeem = redeem_again  # type: ignore[assignment] # that is the point
        case "floor":  # what is old by the clock is deleted, and nothing keeps it from being used again
            Purger.run = _purge_by_the_clock  # type: ignore[assignment, method-assign] # likewise
        case "durability":  # the server answers before anything is on disk
            postgresql._DURABLE = "SELECT set_config('synchronous_commit', 'off', true)"
        case "revocation":  # a key that is known stays
            refresh = KeyDirectory.refresh

            def refresh_and_keep(keys: KeyDirectory) -> bool:
                known = {key.id: key for key in keys.ring.known_keys()}
                done = refresh(keys)
                keys.ring = KeyRing(({entry.id: entry for entry in keys.ring.entries} | known).values())
                return done

            KeyDirectory.refresh = refresh_and_keep  # type: ignore[assignment, method-assign] # likewise


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
