"""Purging the ledger in rounds, in a way that does not depend on clocks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqlalchemy import Connection, LargeBinary, Select, bindparam, delete, func, select, update

from sso_service.database.ledger import FLOOR, floor_at
from sso_service.database.schema import consumed_floor, consumed_nonces
from sso_service.database.transactions import Database

FLOOR_AGE = 60.0
"""Seconds that a floor must have been in force before rows below it are deleted: longer than any statement can last."""
RETENTION = 3600
"""Seconds by which the floor stays behind the database's clock."""
CLOCK_TOLERANCE = 30
"""Seconds by which clocks may differ. Above it nothing is purged."""
_DELETE_AT_ONCE = 5000


@dataclass(frozen=True, slots=True)
class PurgeRound:
    """The result of a round: the rows deleted, or the reason why it was skipped.

    `elsewhere` is true if the round stopped because another purger was deleting. `rows` is the approximate size of the
    ledger now.
    """

    deleted: int = 0
    skipped: str = ""
    elsewhere: bool = False
    rows: int = field(default=0, compare=False)


class Purger:
    """Purges in rounds. Each deletes rows below the floor that an earlier one saw in force, then raises the floor.

    The age of a floor counts from the moment when this object first saw it committed, on the monotonic clock. No clock
    that can be set is involved, and after a restart the age starts again. Any number of purgers may run: a lock lets
    one at a time delete, which saves work, but the result is correct without it.
    """

    def __init__(
        self,
        database: Database,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic = monotonic
        self._offset = clock() - monotonic()
        self._seen: tuple[bytes, float] | None = None  # a floor, and the monotonic time since when it is in force

    def run(self) -> PurgeRound:
        """Run one round. Raises `Unavailable` or `OutcomeUnknown`; another round may follow either."""
        with self._database.connect() as connection:
            with self._database.reading(connection):
                database_now, floor, lowest, size = connection.execute(_state_statement(self._database)).one()
            if skipped := self._clocks_disagree(database_now):
                return PurgeRound(skipped=skipped, rows=size)
            deleted, elsewhere = 0, False
            if self._seen is not None and floor >= self._seen[0]:  # lower: the database was replaced by an older one
                proven, since = self._seen
                if self._monotonic() - since < FLOOR_AGE:
                    return PurgeRound(rows=size)
                deleted, elsewhere = self._delete_below(connection, proven)
            target = floor_at(database_now - RETENTION)
            # Only where there is something to purge, so that an idle service writes nothing.
            if not elsewhere and floor < target and lowest is not None and lowest < target:
                with self._database.writing(connection):
                    connection.execute(
                        update(consumed_floor).where(consumed_floor.c.claims < target).values(claims=target)
                    )
                floor = target
            self._seen = (floor, self._monotonic())
            return PurgeRound(deleted, elsewhere=elsewhere, rows=max(0, size - deleted))

    def _clocks_disagree(self, database_now: int) -> str:
        if abs(difference := self._clock() - database_now) > CLOCK_TOLERANCE:
            return f"this node's clock and the database's differ by {difference:.0f} s"
        if abs(drift := self._clock() - self._monotonic() - self._offset) > CLOCK_TOLERANCE:
            return f"this node's clock was set by {drift:.0f} s since the start"
        return ""

    def _delete_below(self, connection: Connection, floor: bytes) -> tuple[int, bool]:
        """Return how many rows were deleted, and whether another purger was deleting."""
        deleted = 0
        while True:
            with self._database.purging(connection) as alone:
                count = connection.execute(_DELETE, {"floor": floor}).rowcount if alone else 0
            deleted += count
            if count < _DELETE_AT_ONCE:
                return deleted, not alone


# Deletes the oldest rows, `_DELETE_AT_ONCE` at most: a short transaction, so that logins never wait long for it.
_BELOW = bindparam("floor", type_=LargeBinary())
_NEXT_PIECE = (
    select(consumed_nonces.c.claims)
    .where(consumed_nonces.c.claims < _BELOW)
    .order_by(consumed_nonces.c.claims)
    .offset(_DELETE_AT_ONCE)
    .limit(1)
)
_DELETE = delete(consumed_nonces).where(consumed_nonces.c.claims < func.coalesce(_NEXT_PIECE.scalar_subquery(), _BELOW))


@cache
def _state_statement(database: Database) -> Select[Any]:
    lowest = select(func.min(consumed_nonces.c.claims, type_=LargeBinary())).scalar_subquery()
    return select(database.now(), FLOOR.scalar_subquery(), lowest, database.size(consumed_nonces))
