"""The ledger of consumed tokens: where single use is decided.

A token is redeemed by inserting its sixteen claim bytes. The primary key admits them once; whoever's insert took place
won, everybody else lost, on any number of workers and nodes, since the database is the only judge.

Rows are kept until their tokens are long expired. **Deleting a row makes its token insertable again**, and no clock may
be trusted to say that this is harmless: a node whose clock is wrong would accept the old token, and one that was paused
would insert after the deletion. So there is a floor: a value that only ever rises, and below which nothing is inserted.
A row is deleted only when it lies below a floor that has been in force for so long that every statement which could
have started under a lower one is over.
"""

import logging
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    LargeBinary,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    literal,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from sso_service.database.directory import Place, places_in, sessions_from
from sso_service.database.engine import Database, batch_parameter, rows
from sso_service.database.schema import consumed_floor, consumed_nonces, memberships, teams, users

CLAIMS_SIZE = 16
FLOOR_AGE = 60.0
"""Seconds for which a floor must have been in force before rows below it go: longer than any statement may live."""
RETENTION = 3600
"""Seconds by which the floor stays behind the database's clock."""
CLOCK_TOLERANCE = 30
"""Seconds of disagreement between clocks from which on nothing is purged."""
_DELETE_AT_ONCE = 5000

log = logging.getLogger(__name__)


class Verdict(Enum):
    """What came of an attempt to redeem."""

    REDEEMED = auto()
    CONSUMED = auto()
    EXPIRED = auto()  # below the floor
    NO_ACCESS = auto()  # disabled, or not a member (any more); nothing consumed
    NO_TEAM = auto()  # the team that the path names is not the account's; nothing consumed


class Redemption(msgspec.Struct, frozen=True):
    """Claims (16 bytes) to be consumed at `now` (Unix seconds) for a user in a place.

    Without a place they are consumed for nobody, whoever has access: the token is taken back.
    """

    claims: bytes
    place: Place | None
    now: int


class Redeemed(msgspec.Struct, frozen=True):
    """The verdict. `sessions_from` is the user's if it is later than the redemption's `now`, else 0."""

    verdict: Verdict
    sessions_from: int = 0


class _Admission(msgspec.Struct, frozen=True):
    """Whether claims may be consumed: `refusal` says why not."""

    refusal: Verdict | None = None
    sessions_from: int = 0


def _slices() -> tuple[Any, Any]:
    """A recursive table that cuts the parameter `claims` into pieces of 16 bytes.

    One parameter for any number of claims, hence one statement text, spelled alike for both databases.
    """
    claims = bindparam("claims", type_=LargeBinary())
    start = select(literal(1, Integer).label("start")).cte("slices", recursive=True)
    start = start.union_all(
        select(start.c.start + CLAIMS_SIZE).where(start.c.start + CLAIMS_SIZE <= func.length(claims))
    )
    return start, func.substr(claims, start.c.start, CLAIMS_SIZE, type_=LargeBinary())


_FLOOR = select(consumed_floor.c.claims)


@cache
def _consume_statement(database: Database) -> "ReturningInsert[Any]":
    slices, claims = _slices()
    # In order, so that two nodes' batches lock in the same order and cannot deadlock. A floor that is missing compares
    # as unknown, and nothing is inserted.
    source = select(claims).select_from(slices).where(claims >= _FLOOR.scalar_subquery()).order_by(slices.c.start)
    insert = database.insert(consumed_nonces).from_select(["claims"], source)
    return insert.on_conflict_do_nothing().returning(consumed_nonces.c.claims)


@cache
def _find_statement() -> Select[Any]:
    slices, claims = _slices()
    return select(consumed_nonces.c.claims).join_from(slices, consumed_nonces, consumed_nonces.c.claims == claims)


def redeem_all(database: Database, connection: Connection, redemptions: Sequence[Redemption]) -> list[Redeemed]:
    """Consumes the claims of those who have access. Of several with equal claims, at most the first is redeemed.

    Must run in a durable transaction of its own, and nobody may be told of success before that is committed.
    """
    admissions = _admissions(database, connection, redemptions)
    wanted = {
        redemption.claims
        for redemption, admission in zip(redemptions, admissions, strict=True)
        if admission.refusal is None
    }
    won = _execute(connection, _consume_statement(database), wanted)
    # A new statement: the snapshot of the insert cannot see the row of another node that it had to wait for.
    # Those who have no access (any more) are looked up as well: it may be that they have used their token before.
    refused = {
        redemption.claims
        for redemption, admission in zip(redemptions, admissions, strict=True)
        if admission.refusal is Verdict.NO_ACCESS
    }
    consumed = _execute(connection, _find_statement(), (wanted | refused) - won)

    results: list[Redeemed] = []
    for redemption, admission in zip(redemptions, admissions, strict=True):
        if admission.refusal is Verdict.NO_ACCESS and redemption.claims in consumed:
            results.append(Redeemed(Verdict.CONSUMED))
        elif admission.refusal is not None:
            results.append(Redeemed(admission.refusal))
        elif redemption.claims in won:
            won.remove(redemption.claims)  # the next one with equal claims in this batch comes too late
            consumed.add(redemption.claims)
            results.append(Redeemed(Verdict.REDEEMED, admission.sessions_from))
        else:
            results.append(Redeemed(Verdict.CONSUMED if redemption.claims in consumed else Verdict.EXPIRED))
    return results


_NOWHERE = (None, None, None)
_NO_ACCESS = _Admission(Verdict.NO_ACCESS)
_NO_TEAM = _Admission(Verdict.NO_TEAM)
_ADMITTED = _Admission()


@cache
def _admissions_statement(database: Database) -> Select[Any]:
    batch = database.batch(user_id=BigInteger(), account_id=BigInteger(), team_id=BigInteger(), now=BigInteger())
    has_access = and_(users.c.id.is_not(None), users.c.disabled_at.is_(None), memberships.c.role.is_not(None))
    team_exists = or_(batch.c.team_id.is_(None), teams.c.id.is_not(None))
    admission = case(
        (not_(has_access), -1),
        (not_(team_exists), -2),
        (sessions_from() > batch.c.now, sessions_from()),
        else_=0,
    )
    return select(database.pairs(batch.c.position, admission)).select_from(places_in(batch))


def _admissions(database: Database, connection: Connection, redemptions: Sequence[Redemption]) -> list[_Admission]:
    """Whether each redemption's user may have what they ask for.

    Asked for as one row with a number for each, since fetching a row costs more than finding it. For -1 it remains as
    it is: no access for those who need a place.
    """
    asked = batch_parameter((*(msgspec.structs.astuple(r.place) if r.place else _NOWHERE), r.now) for r in redemptions)
    ((pairs,),) = rows(connection, _admissions_statement(database), asked)
    admissions = [_NO_ACCESS if redemption.place else _ADMITTED for redemption in redemptions]
    for position, admission in msgspec.json.decode(pairs):
        if admission == 0:
            admissions[position] = _ADMITTED
        elif admission == -2:
            admissions[position] = _NO_TEAM
        elif admission > 0:
            admissions[position] = _Admission(sessions_from=admission)
    return admissions


def state_of_all(_: Database, connection: Connection, claims: Sequence[bytes]) -> list[Verdict | None]:
    """CONSUMED, EXPIRED (below the floor), or None (redeemable) for each claims (16 bytes). Changes nothing."""
    floor = bytes(connection.execute(_FLOOR).scalar_one())
    consumed = _execute(connection, _find_statement(), set(claims))
    return [
        Verdict.CONSUMED if one in consumed else Verdict.EXPIRED if one < floor else None  # a row may outlive the floor
        for one in claims
    ]


def _execute(connection: Connection, statement: Any, claims: set[bytes]) -> set[bytes]:
    if not claims:
        return set()
    return {row[0] for row in rows(connection, statement, {"claims": b"".join(sorted(claims))})}


# --- purging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """What a purge round did: rows deleted, and why it did nothing, if so.

    `elsewhere`: it left off since another purger was deleting. `rows` is about how many the ledger has now.
    """

    deleted: int = 0
    skipped: str = ""
    elsewhere: bool = False
    rows: int = field(default=0, compare=False)


class Purger:
    """Purges in rounds. Each deletes below the floor that an earlier one saw in force, then raises the floor.

    That a floor is old enough is measured from when this object first saw it committed, on the monotonic clock: not by
    any clock that can be set, and anew after a restart. Any number of purgers may be at work: one at a time deletes, so
    that none does what another does already, and if it should be several, no harm is done.
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
        self._seen: tuple[bytes, float] | None = None  # a floor, and since when it is known to be in force

    def run(self) -> Round:
        """One round. Raises `Unavailable` or `OutcomeUnknown`; either may be followed by another round."""
        with self._database.connect() as connection:
            with self._database.reading(connection):
                database_now, floor, lowest, size = connection.execute(_state_statement(self._database)).one()
            if skipped := self._clocks_disagree(database_now):
                return Round(skipped=skipped, rows=size)
            deleted, elsewhere = 0, False
            if self._seen is not None and floor >= self._seen[0]:  # lower: an older database was put in its place
                proven, since = self._seen
                if self._monotonic() - since < FLOOR_AGE:
                    return Round(rows=size)
                deleted, elsewhere = self._delete_below(connection, proven)
            target = floor_at(database_now - RETENTION)
            # Only where there is something to purge, so that a service that nobody uses writes nothing.
            if not elsewhere and floor < target and lowest is not None and lowest < target:
                with self._database.writing(connection):
                    connection.execute(
                        update(consumed_floor).where(consumed_floor.c.claims < target).values(claims=target)
                    )
                floor = target
            self._seen = (floor, self._monotonic())
            return Round(deleted, elsewhere=elsewhere, rows=max(0, size - deleted))

    def _clocks_disagree(self, database_now: int) -> str:
        if abs(difference := self._clock() - database_now) > CLOCK_TOLERANCE:
            return f"this node's clock and the database's differ by {difference:.0f} s"
        if abs(drift := self._clock() - self._monotonic() - self._offset) > CLOCK_TOLERANCE:
            return f"this node's clock was set by {drift:.0f} s since the start"
        return ""

    def _delete_below(self, connection: Connection, floor: bytes) -> tuple[int, bool]:
        """How many were deleted, and whether another purger came between."""
        deleted = 0
        while True:
            with self._database.purging(connection) as alone:
                count = connection.execute(_DELETE, {"floor": floor}).rowcount if alone else 0
            deleted += count
            if count < _DELETE_AT_ONCE:
                return deleted, not alone


# A piece from the left edge, so that logins never wait long for it: up to the first row that is to stay for now.
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
    return select(database.now(), _FLOOR.scalar_subquery(), lowest, database.size(consumed_nonces))


def floor_at(expires_at: int) -> bytes:
    """The lowest claims of a token that expires at `expires_at` (Unix seconds)."""
    return struct.pack(">I", max(0, expires_at)) + bytes(CLAIMS_SIZE - 4)
