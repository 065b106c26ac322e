"""The ledger of consumed tokens: single use is decided here.

Consuming a token inserts its 16 claim bytes. The primary key admits them once: the request whose insert succeeds wins,
all others lose, on any number of workers and nodes, because the database alone decides.

Rows are kept until long after their tokens have expired. **Deleting a row makes its token insertable again**, and no
clock can be trusted to prove this harmless: a node whose clock is wrong would accept the old token, and a paused node
would insert it after the deletion. Therefore the ledger has a floor: a value that only rises, below which nothing is
inserted. `purging.py` deletes a row only below a floor that has been in force for longer than any statement can last.
"""

import struct
from collections.abc import Sequence
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
    func,
    literal,
    not_,
    or_,
    select,
)
from sqlalchemy.sql.dml import ReturningInsert

from sso_service.database.directory import AccessQuery, sessions_from, with_members
from sso_service.database.group_commit import GroupCommit
from sso_service.database.schema import consumed_floor, consumed_nonces, memberships, teams, users
from sso_service.database.transactions import Database, batch_parameter, rows

CLAIMS_SIZE = 16


class Verdict(Enum):
    """The outcome of an attempt to redeem a token."""

    REDEEMED = auto()
    CONSUMED = auto()
    EXPIRED = auto()  # below the floor, or issued before its user's `sessions_from`; nothing was consumed
    NO_ACCESS = auto()  # the user is disabled or not a member; nothing was consumed
    NO_TEAM = auto()  # the team in the path does not belong to the account; nothing was consumed


class Redemption(msgspec.Struct, frozen=True):
    """Claims (16 bytes) to be consumed at `now`, if `access` is granted to a token from `issued_at` (Unix seconds).

    Without `access` they are consumed in any case, which revokes the token.
    """

    claims: bytes
    access: AccessQuery | None
    issued_at: int
    now: int


class Redeemed(msgspec.Struct, frozen=True):
    """The verdict. `sessions_from` is the user's, if it is later than the redemption's `now`, otherwise 0."""

    verdict: Verdict
    sessions_from: int = 0


class _Permission(msgspec.Struct, frozen=True):
    """Whether claims may be consumed. `refusal` is the reason why not."""

    refusal: Verdict | None = None
    sessions_from: int = 0


def _slices() -> tuple[Any, Any]:
    """Return a recursive table that splits the parameter `claims` into pieces of 16 bytes.

    One parameter serves any number of claims, so there is one statement text, the same for both databases.
    """
    claims = bindparam("claims", type_=LargeBinary())
    start = select(literal(1, Integer).label("start")).cte("slices", recursive=True)
    start = start.union_all(
        select(start.c.start + CLAIMS_SIZE).where(start.c.start + CLAIMS_SIZE <= func.length(claims))
    )
    return start, func.substr(claims, start.c.start, CLAIMS_SIZE, type_=LargeBinary())


FLOOR = select(consumed_floor.c.claims)


@cache
def _consume_statement(database: Database) -> "ReturningInsert[Any]":
    slices, claims = _slices()
    # Sorted, so that batches of two nodes lock in the same order and cannot deadlock. A missing floor compares as
    # unknown, and then nothing is inserted.
    source = select(claims).select_from(slices).where(claims >= FLOOR.scalar_subquery()).order_by(slices.c.start)
    insert = database.insert(consumed_nonces).from_select(["claims"], source)
    return insert.on_conflict_do_nothing().returning(consumed_nonces.c.claims)


@cache
def _find_statement() -> Select[Any]:
    slices, claims = _slices()
    return select(consumed_nonces.c.claims).join_from(slices, consumed_nonces, consumed_nonces.c.claims == claims)


class Redemptions(GroupCommit[Redemption, Redeemed]):
    """Consumes login tokens.

    This batch shares its transaction with nothing else, so that nothing else can fail or delay it.
    """

    kind = "redeem"
    transaction = "consuming"

    def run_batch(self, connection: Connection, ops: Sequence[Redemption]) -> list[Redeemed]:
        return redeem(self.database, connection, ops)


def redeem(database: Database, connection: Connection, redemptions: Sequence[Redemption]) -> list[Redeemed]:
    """Consume the claims whose users have access. Of several with equal claims, at most the first is redeemed.

    This must run in a durable transaction of its own, and success must not be reported before that is committed.
    """
    permitted = list(zip(redemptions, _permissions(database, connection, redemptions), strict=True))
    wanted = {redemption.claims for redemption, permission in permitted if permission.refusal is None}
    won = _execute(connection, _consume_statement(database), wanted)
    # A new statement, because the INSERT's snapshot lacks rows of other nodes whose commit it waited for. Claims of
    # users without access are looked up as well: the token may have been used before they lost it or signed out.
    refused = {redemption.claims for redemption, permission in permitted if permission.refusal in _LOST}
    consumed = _execute(connection, _find_statement(), (wanted | refused) - won)

    results: list[Redeemed] = []
    for redemption, permission in permitted:
        if permission.refusal in _LOST and redemption.claims in consumed:
            results.append(Redeemed(Verdict.CONSUMED))
        elif permission.refusal is not None:
            results.append(Redeemed(permission.refusal))
        elif redemption.claims in won:
            won.remove(redemption.claims)  # a later redemption of equal claims in this batch loses
            consumed.add(redemption.claims)
            results.append(Redeemed(Verdict.REDEEMED, permission.sessions_from))
        else:
            results.append(Redeemed(Verdict.CONSUMED if redemption.claims in consumed else Verdict.EXPIRED))
    return results


_NO_QUERY = (None, None, None)
_NO_ACCESS = _Permission(Verdict.NO_ACCESS)
_PERMITTED = _Permission()
_REFUSED = {-2: _Permission(Verdict.EXPIRED), -3: _Permission(Verdict.NO_TEAM)}
_LOST = {Verdict.NO_ACCESS, Verdict.EXPIRED}


@cache
def _permissions_statement(database: Database) -> Select[Any]:
    batch = database.batch(
        user_id=BigInteger(), account_id=BigInteger(), team_id=BigInteger(), issued_at=BigInteger(), now=BigInteger()
    )
    has_access = and_(users.c.id.is_not(None), users.c.disabled_at.is_(None), memberships.c.role.is_not(None))
    team_exists = or_(batch.c.team_id.is_(None), teams.c.id.is_not(None))
    permission = case(
        (not_(has_access), -1),
        (sessions_from() > batch.c.issued_at, -2),
        (not_(team_exists), -3),
        (sessions_from() > batch.c.now, sessions_from()),
        else_=0,
    )
    return select(database.pairs(batch.c.position, permission)).select_from(with_members(batch))


def _permissions(database: Database, connection: Connection, redemptions: Sequence[Redemption]) -> list[_Permission]:
    """Return for each redemption whether its user has access.

    Fetching a row costs more than finding it, so the database returns one row with a number for each redemption: -1 for
    no access, -2 for a token from before `sessions_from`, -3 for no such team, 0 for access, otherwise `sessions_from`.

    A sign-out may be committed after this statement and before the token is consumed. It ends the session all the same:
    the session is dated when the redemption was asked for, and the sign-out is dated later.
    """
    asked = batch_parameter(
        (*(msgspec.structs.astuple(each.access) if each.access else _NO_QUERY), each.issued_at, each.now)
        for each in redemptions
    )
    ((pairs,),) = rows(connection, _permissions_statement(database), asked)
    permissions = [_NO_ACCESS if redemption.access else _PERMITTED for redemption in redemptions]
    for position, number in msgspec.json.decode(pairs):
        if number == 0:
            permissions[position] = _PERMITTED
        elif number > 0:
            permissions[position] = _Permission(sessions_from=number)
        elif number < -1:
            permissions[position] = _REFUSED[number]
    return permissions


class StateChecks(GroupCommit[bytes, "Verdict | None"]):
    """Checks whether claims were consumed, for `/verify` and for questions before a sign-in."""

    kind = "state"
    transaction = "reading"

    def run_batch(self, connection: Connection, ops: Sequence[bytes]) -> list[Verdict | None]:
        return check_states(connection, ops)


def check_states(connection: Connection, claims: Sequence[bytes]) -> list[Verdict | None]:
    """Return CONSUMED, EXPIRED (below the floor) or None (redeemable) for each 16-byte claims. Changes nothing."""
    floor = bytes(connection.execute(FLOOR).scalar_one())
    consumed = _execute(connection, _find_statement(), set(claims))
    return [
        Verdict.CONSUMED if one in consumed else Verdict.EXPIRED if one < floor else None  # a row may outlive the floor
        for one in claims
    ]


def _execute(connection: Connection, statement: Any, claims: set[bytes]) -> set[bytes]:
    if not claims:
        return set()
    return {row[0] for row in rows(connection, statement, {"claims": b"".join(sorted(claims))})}


def floor_at(expires_at: int) -> bytes:
    """Return the lowest claims that a token with this expiry (Unix seconds) can have."""
    return struct.pack(">I", max(0, expires_at)) + bytes(CLAIMS_SIZE - 4)
