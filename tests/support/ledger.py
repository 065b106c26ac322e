"""The ledger: its rows, and the clocks that purging depends on."""

from dataclasses import dataclass, field

from sqlalchemy import select, update

from sso_service.database.ledger import floor_at
from sso_service.database.purging import Purger
from sso_service.database.schema import consumed_floor, consumed_nonces
from sso_service.database.transactions import Database
from sso_service.tokens import unsafe_read_claims
from tests.support.clock import Clock

NOW = 1_900_000_000
HOUR = 3600


@dataclass
class ClockedLedger:
    """A database and the clocks of a node, all under the test's control."""

    database: Database
    database_clock: Clock
    node: Clock = field(default_factory=lambda: Clock(NOW))
    monotonic: Clock = field(default_factory=lambda: Clock(1000))

    def purger(self) -> Purger:
        return Purger(self.database, clock=self.node, monotonic=self.monotonic)

    def wait(self, seconds: float) -> None:
        for clock in (self.database_clock, self.node, self.monotonic):
            clock.advance(seconds)


def claims(expires_at: int, nonce: int = 0) -> bytes:
    return floor_at(expires_at)[:4] + nonce.to_bytes(12, "big")


def put(database: Database, *rows: bytes) -> None:
    with database.connect() as connection, database.writing(connection):
        connection.execute(consumed_nonces.insert(), [{"claims": row} for row in rows])


def rows(database: Database) -> list[bytes]:
    with database.connect() as connection:
        return sorted(bytes(row) for row in connection.execute(select(consumed_nonces.c.claims)).scalars())


def number_consumed(database: Database) -> int:
    with database.connect() as connection:
        return len(connection.execute(select(consumed_nonces)).all())


def claims_of(token: str) -> bytes:
    return unsafe_read_claims(token).pack()


def consumed_claims(database: Database) -> set[bytes]:
    with database.connect() as connection:
        return {bytes(row) for row in connection.execute(select(consumed_nonces.c.claims)).scalars()}


def floor(database: Database) -> bytes:
    with database.connect() as connection:
        return bytes(connection.execute(select(consumed_floor.c.claims)).scalar_one())


def set_floor(database: Database, value: bytes) -> None:
    with database.connect() as connection, database.writing(connection):
        connection.execute(update(consumed_floor).values(claims=value))
