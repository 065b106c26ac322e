"""People, accounts, teams and API tokens: what the service asks about them, and newcomers.

The functions with an `_all` in their names serve a batch: one statement for any number of operations.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    FromClause,
    Select,
    String,
    and_,
    case,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from sso_service.database.engine import Database, batch_parameter, rows
from sso_service.database.schema import accounts, api_tokens, memberships, teams, users
from sso_service.permissions import Role


def digest(secret: str) -> str:
    """The hex SHA-256 by which an API token is stored and found.

    A plain hash is enough: the secret has 256 random bits, so there is nothing to guess that a slow hash would protect.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class ApiToken(msgspec.Struct, frozen=True):
    """An API token as it is stored: everything but the secret. Times are Unix seconds."""

    id: int
    account_id: int | None
    scopes: frozenset[str]
    max_role: Role | None
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class User(msgspec.Struct, frozen=True):
    """A person. `sessions_from` is the time (Unix seconds) before which no session of theirs counts."""

    id: int
    email: str
    first_name: str
    last_name: str
    disabled: bool
    sessions_from: int


class Lookup(msgspec.Struct, frozen=True):
    """Who calls, and about whom."""

    digest: str
    email: str


class Found(msgspec.Struct, frozen=True):
    """What a `Lookup` found: the API token, the user, and the user's role in the API token's account."""

    api_token: ApiToken | None
    user_id: int | None
    disabled: bool
    role: Role | None


class Place(msgspec.Struct, frozen=True):
    """A user in an account, perhaps on the way to a team."""

    user_id: int
    account_id: int
    team_id: int | None = None


class Standing(msgspec.Struct, frozen=True):
    """What holds for a `Place` at this moment. `team_exists` is about the account's own teams."""

    user: User | None
    role: Role | None
    portal_url: str | None
    team_exists: bool

    @property
    def member(self) -> tuple[User, Role] | None:
        """The user and their role, if they exist, are not disabled, and are a member of the account."""
        if self.user is None or self.user.disabled or self.role is None:
            return None
        return self.user, self.role

    @property
    def has_access(self) -> bool:
        """True if there is such a member."""
        return self.member is not None


class NewPerson(msgspec.Struct, frozen=True):
    """Someone to be a member of an account, and to be created if need be."""

    email: str
    first_name: str
    last_name: str
    account_id: int
    now: int


class Provisioned(msgspec.Struct, frozen=True):
    """What became of a `NewPerson`. `role` is None if the user is disabled and was therefore not made a member."""

    user_id: int
    created: bool
    role: Role | None


@cache
def _lookup_statement(database: Database) -> Select[Any]:
    batch = database.batch(digest=String(), email=String())
    return (
        select(
            api_tokens.c.id,
            api_tokens.c.account_id,
            api_tokens.c.scopes,
            api_tokens.c.max_role,
            api_tokens.c.expires_at,
            api_tokens.c.revoked_at,
            api_tokens.c.last_used_at,
            users.c.id,
            users.c.disabled_at,
            memberships.c.role,
        )
        .select_from(batch)
        .outerjoin(api_tokens, api_tokens.c.digest == batch.c.digest)
        .outerjoin(users, users.c.email == batch.c.email)
        .outerjoin(
            memberships,
            and_(memberships.c.user_id == users.c.id, memberships.c.account_id == api_tokens.c.account_id),
        )
        .order_by(batch.c.position)
    )


def look_up_all(database: Database, connection: Connection, lookups: Sequence[Lookup]) -> list[Found]:
    """API token, user and membership of each lookup, in one read."""
    asked = batch_parameter((lookup.digest, lookup.email) for lookup in lookups)
    return [
        Found(
            None
            if token_id is None
            else ApiToken(token_id, account, _scopes(scopes), _role(cap), expiry, revoked, used),
            user_id,
            disabled_at is not None,
            _role(role),
        )
        for token_id, account, scopes, cap, expiry, revoked, used, user_id, disabled_at, role in rows(
            connection, _lookup_statement(database), asked
        )
    ]


def sessions_from() -> ColumnElement[int]:
    """The time before which no session counts, of a user or of their membership: whichever is later."""
    later = memberships.c.sessions_from > users.c.sessions_from
    return case((later, memberships.c.sessions_from), else_=users.c.sessions_from)


def places_in(batch: FromClause) -> FromClause:
    """A batch's `user_id`, `account_id` and `team_id`, with the user, the membership and the team, where they exist."""
    return (
        batch.outerjoin(users, users.c.id == batch.c.user_id)
        .outerjoin(
            memberships,
            and_(memberships.c.user_id == batch.c.user_id, memberships.c.account_id == batch.c.account_id),
        )
        .outerjoin(teams, and_(teams.c.id == batch.c.team_id, teams.c.account_id == batch.c.account_id))
    )


@cache
def _standing_statement(database: Database) -> Select[Any]:
    batch = database.batch(user_id=BigInteger(), account_id=BigInteger(), team_id=BigInteger())
    return (
        select(
            users.c.id,
            users.c.email,
            users.c.first_name,
            users.c.last_name,
            users.c.disabled_at,
            sessions_from(),
            memberships.c.role,
            accounts.c.portal_url,
            teams.c.id,
        )
        .select_from(places_in(batch))
        .outerjoin(accounts, accounts.c.id == batch.c.account_id)
        .order_by(batch.c.position)
    )


def standing_of_all(database: Database, connection: Connection, places: Sequence[Place]) -> list[Standing]:
    """What holds for each place now, in one read."""
    asked = batch_parameter((place.user_id, place.account_id, place.team_id) for place in places)
    return [
        Standing(
            None if user_id is None else User(user_id, email, first, last, disabled_at is not None, sessions_from),
            _role(role),
            portal_url,
            team_id is not None,
        )
        for user_id, email, first, last, disabled_at, sessions_from, role, portal_url, team_id in rows(
            connection, _standing_statement(database), asked
        )
    ]


@cache
def _create_users_statement(database: Database) -> "ReturningInsert[Any]":
    batch = database.batch(email=String(), first_name=String(), last_name=String(), created_at=BigInteger())
    columns = ["email", "first_name", "last_name", "created_at"]
    # In the order of the address, so that two nodes' batches cannot deadlock. SQLite needs the WHERE to tell the
    # ON CONFLICT from a join's ON.
    source = select(*(batch.c[name] for name in columns)).where(true()).order_by(batch.c.email)
    insert = database.insert(users).from_select(columns, source, include_defaults=False)
    return insert.on_conflict_do_nothing().returning(users.c.email, users.c.id)


@cache
def _find_users_statement(database: Database) -> Select[Any]:
    batch = database.batch(email=String())
    return select(users.c.email, users.c.id, users.c.disabled_at).join(batch, users.c.email == batch.c.email)


@cache
def _join_statement(database: Database) -> "ReturningInsert[Any]":
    batch = database.batch(user_id=BigInteger(), account_id=BigInteger(), role=String(), now=BigInteger())
    # The database's clock bounds that of a node that is ahead: the others would accept no session until theirs had
    # caught up.
    now = case((batch.c.now < database.now(), batch.c.now), else_=database.now())
    columns = ["user_id", "account_id", "role", "sessions_from"]
    joining = select(batch.c.user_id, batch.c.account_id, batch.c.role, now).where(true())
    source = joining.order_by(batch.c.user_id, batch.c.account_id)
    insert = database.insert(memberships).from_select(columns, source, include_defaults=False)
    return insert.on_conflict_do_nothing().returning(memberships.c.user_id, memberships.c.account_id)


@cache
def _roles_statement(database: Database) -> Select[Any]:
    batch = database.batch(user_id=BigInteger(), account_id=BigInteger())
    return select(memberships.c.user_id, memberships.c.account_id, memberships.c.role).join(
        batch, and_(memberships.c.user_id == batch.c.user_id, memberships.c.account_id == batch.c.account_id)
    )


def provision_all(database: Database, connection: Connection, people: Sequence[NewPerson]) -> list[Provisioned]:
    """Makes each person a member of the account they come with: created if unknown, `editor` unless a member already.

    People with the same address are one user, and only the first of them is told that it was created here.
    """
    first_of: dict[str, NewPerson] = {}
    for person in people:
        first_of.setdefault(person.email, person)
    newcomers = batch_parameter([p.email, p.first_name, p.last_name, p.now] for p in first_of.values())
    created = dict(rows(connection, _create_users_statement(database), newcomers))
    ids = dict(created)
    disabled: set[str] = set()
    if known := [[email] for email in first_of if email not in created]:
        # A statement of its own: the one above could not see what another node committed while it waited for it.
        for email, user_id, disabled_at in rows(connection, _find_users_statement(database), batch_parameter(known)):
            ids[email] = user_id
            if disabled_at is not None:
                disabled.add(email)

    # Whoever was removed and joins again has none of the sessions back that ended then. Who is new has had none.
    places = {
        (ids[person.email], person.account_id): 0 if person.email in created else person.now
        for person in people
        if person.email not in disabled
    }
    roles: dict[tuple[int, int], Role] = {}
    if places:
        joining = batch_parameter([*place, Role.EDITOR, now] for place, now in places.items())
        roles = dict.fromkeys(rows(connection, _join_statement(database), joining), Role.EDITOR)
    if members := [list(place) for place in places if place not in roles]:
        for user_id, account_id, role in rows(connection, _roles_statement(database), batch_parameter(members)):
            roles[user_id, account_id] = Role(role)

    # `pop`: only the first of several with one address is told that it was created.
    return [
        Provisioned(
            ids[person.email],
            created=created.pop(person.email, None) is not None,
            role=roles.get((ids[person.email], person.account_id)),
        )
        for person in people
    ]


def touch_all(_: Database, connection: Connection, uses: Sequence[tuple[int, int]]) -> list[None]:
    """Notes that API tokens were used: (id, time of use in Unix seconds, cut to the hour) each."""
    for token_id, hour in sorted(set(uses)):
        connection.execute(
            update(api_tokens)
            .where(api_tokens.c.id == token_id)
            .where(or_(api_tokens.c.last_used_at.is_(None), api_tokens.c.last_used_at < hour))
            .values(last_used_at=hour)
        )
    return [None] * len(uses)


_ROLES = {str(role): role for role in Role}


@cache
def _scopes(value: str) -> frozenset[str]:
    return frozenset(value.split())


def _role(value: str | None) -> Role | None:
    return None if value is None else _ROLES[value]
