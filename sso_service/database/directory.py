"""Looking up users, members, teams and API tokens, and provisioning users.

Each batch runs one statement for any number of operations.
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
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningInsert

from sso_service.database.group_commit import GroupCommit
from sso_service.database.schema import accounts, api_tokens, memberships, teams, users
from sso_service.database.transactions import Database, batch_parameter, rows
from sso_service.people import search_text
from sso_service.permissions import Role


def digest(secret: str) -> str:
    """Return the hex SHA-256 under which an API token is stored and found.

    A plain hash is enough: the secret has 256 random bits, so it cannot be guessed and a slow hash would add nothing.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class ApiToken(msgspec.Struct, frozen=True):
    """An API token as it is stored, without its secret. Times are Unix seconds."""

    id: int
    account_id: int | None
    scopes: frozenset[str]
    max_role: Role | None
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class User(msgspec.Struct, frozen=True):
    """A user. Tokens and sessions from before `sessions_from` (Unix seconds) are not valid."""

    id: int
    email: str
    first_name: str
    last_name: str
    disabled: bool
    sessions_from: int


class Lookup(msgspec.Struct, frozen=True):
    """A question: the API token with this digest that has not expired at `now` (Unix seconds), and a user by address.

    Without such an API token no user is looked up.
    """

    digest: str
    email: str
    now: int


class Found(msgspec.Struct, frozen=True):
    """The answer to a `Lookup`: API token, user, and the user's role in the API token's account.

    Tokens and sessions from before `sessions_from` (Unix seconds) are not valid. Without a user it is 0.
    """

    api_token: ApiToken | None
    user_id: int | None
    disabled: bool
    role: Role | None
    sessions_from: int


class AccessQuery(msgspec.Struct, frozen=True):
    """A question: may this user use this account, and does the team exist there?"""

    user_id: int
    account_id: int
    team_id: int | None = None


class Access(msgspec.Struct, frozen=True):
    """The answer to an `AccessQuery` at this moment. `team_exists` refers to the account's own teams."""

    user: User | None
    role: Role | None
    portal_url: str | None
    team_exists: bool

    @property
    def member(self) -> tuple[User, Role] | None:
        """The user and their role, unless the user is unknown, disabled, or not a member of the account."""
        if self.user is None or self.user.disabled or self.role is None:
            return None
        return self.user, self.role


class ProvisionRequest(msgspec.Struct, frozen=True):
    """A person to be made a member of an account at `now` (Unix seconds), and created if unknown."""

    email: str
    first_name: str
    last_name: str
    account_id: int
    now: int


class Provisioned(msgspec.Struct, frozen=True):
    """The result of a `ProvisionRequest`. `role` is None for a disabled user, who is not made a member.

    Tokens and sessions from before `sessions_from` (Unix seconds) are not valid.
    """

    user_id: int
    created: bool
    role: Role | None
    sessions_from: int


@cache
def _lookup_statement(database: Database) -> Select[Any]:
    batch = database.batch(digest=String(), email=String(), now=BigInteger())
    # An unknown API token and an expired one must take the same time. A plain join would read the row of the expired
    # one only. So for every digest the nearest row in the index is read, and compared afterwards. The search is for a
    # digest with a letter behind it, because finding an equal one takes less time.
    each, nearest = api_tokens.alias("each"), api_tokens.alias("nearest")
    behind = batch.c.digest.concat(literal_column("'g'"))
    nearest_id = select(each.c.id).where(each.c.digest < behind).order_by(each.c.digest.desc()).limit(1)
    # True if the first is true and the second is false. AND would evaluate the second only for the expired one.
    has_expired = func.coalesce(nearest.c.expires_at <= batch.c.now, false())
    is_valid = (nearest.c.digest == batch.c.digest).self_group().bool_op(">")(has_expired)
    return (
        select(
            *(api_tokens.c[name] for name in ApiToken.__struct_fields__),
            users.c.id,
            users.c.disabled_at,
            memberships.c.role,
            sessions_from(),
        )
        .select_from(batch)
        .outerjoin(nearest, nearest.c.id == nearest_id.scalar_subquery())
        .outerjoin(api_tokens, api_tokens.c.id == case((is_valid, nearest.c.id)))
        # Without a valid API token the address is compared with null, so the time does not depend on it either.
        .outerjoin(users, users.c.email == case((api_tokens.c.id.is_not(None), batch.c.email)))
        .outerjoin(memberships, _is_membership(users.c.id, api_tokens.c.account_id))
        .order_by(batch.c.position)
    )


def _is_membership(user_id: ColumnElement[int], account_id: ColumnElement[int]) -> ColumnElement[bool]:
    return and_(memberships.c.user_id == user_id, memberships.c.account_id == account_id)


class Lookups(GroupCommit[Lookup, Found]):
    """Finds API tokens and users, for issuing."""

    kind = "lookup"
    transaction = "reading"

    def run_batch(self, connection: Connection, ops: Sequence[Lookup]) -> list[Found]:
        return look_up(self.database, connection, ops)


def look_up(database: Database, connection: Connection, lookups: Sequence[Lookup]) -> list[Found]:
    """Return API token, user and membership for each lookup, in one read."""
    asked = batch_parameter((lookup.digest, lookup.email, lookup.now) for lookup in lookups)
    return [
        Found(
            None
            if token_id is None
            else ApiToken(token_id, account, _scopes(scopes), _role(cap), expiry, revoked, used),
            user_id,
            disabled_at is not None,
            _role(role),
            valid_from or 0,
        )
        for token_id, account, scopes, cap, expiry, revoked, used, user_id, disabled_at, role, valid_from in rows(
            connection, _lookup_statement(database), asked
        )
    ]


def sessions_from() -> ColumnElement[int]:
    """Return the later `sessions_from` of user and membership: tokens and sessions from before it are not valid."""
    later = memberships.c.sessions_from > users.c.sessions_from
    return case((later, memberships.c.sessions_from), else_=users.c.sessions_from)


def with_members(batch: FromClause) -> FromClause:
    """Join a batch's `user_id`, `account_id` and `team_id` with user, membership and team, where these exist."""
    return (
        batch.outerjoin(users, users.c.id == batch.c.user_id)
        .outerjoin(memberships, _is_membership(batch.c.user_id, batch.c.account_id))
        .outerjoin(teams, and_(teams.c.id == batch.c.team_id, teams.c.account_id == batch.c.account_id))
    )


@cache
def _access_statement(database: Database) -> Select[Any]:
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
        .select_from(with_members(batch))
        .outerjoin(accounts, accounts.c.id == batch.c.account_id)
        .order_by(batch.c.position)
    )


class AccessChecks(GroupCommit[AccessQuery, Access]):
    """Checks whether users may use accounts, for sessions, `/verify` and forward authentication."""

    kind = "standing"
    transaction = "reading"

    def run_batch(self, connection: Connection, ops: Sequence[AccessQuery]) -> list[Access]:
        return check_access(self.database, connection, ops)


def check_access(database: Database, connection: Connection, queries: Sequence[AccessQuery]) -> list[Access]:
    """Return the current access for each query, in one read."""
    asked = batch_parameter((query.user_id, query.account_id, query.team_id) for query in queries)
    return [
        Access(
            None if user_id is None else User(user_id, email, first, last, disabled_at is not None, sessions_from),
            _role(role),
            portal_url,
            team_id is not None,
        )
        for user_id, email, first, last, disabled_at, sessions_from, role, portal_url, team_id in rows(
            connection, _access_statement(database), asked
        )
    ]


@cache
def _create_users_statement(database: Database) -> "ReturningInsert[Any]":
    batch = database.batch(
        email=String(), first_name=String(), last_name=String(), search=String(), created_at=BigInteger()
    )
    columns = ["email", "first_name", "last_name", "search", "created_at"]
    # A token or session that is older than its user was for another person, who had this id in another database.
    sessions_from = _at_most_now(database, batch.c.created_at)
    # Ordered by address, so that batches of two nodes cannot deadlock. SQLite needs the WHERE to distinguish
    # ON CONFLICT from the ON of a join.
    source = select(*(batch.c[name] for name in columns), sessions_from).where(true()).order_by(batch.c.email)
    insert = database.insert(users).from_select([*columns, "sessions_from"], source, include_defaults=False)
    return insert.on_conflict_do_nothing().returning(users.c.email, users.c.id, users.c.sessions_from)


def _at_most_now(database: Database, time: ColumnElement[int]) -> ColumnElement[int]:
    """Return a node's `time`, limited by the database's clock.

    Other nodes would refuse tokens and sessions from a node that is ahead, until their clocks had caught up.
    """
    return case((time < database.now(), time), else_=database.now())


@cache
def _find_users_statement(database: Database) -> Select[Any]:
    batch = database.batch(email=String())
    found = select(users.c.email, users.c.id, users.c.sessions_from, users.c.disabled_at)
    return found.join(batch, users.c.email == batch.c.email)


@cache
def _join_statement(database: Database) -> "ReturningInsert[Any]":
    batch = database.batch(
        user_id=BigInteger(),
        account_id=BigInteger(),
        role=String(),
        now=BigInteger(),
        later=BigInteger(),
        earliest=BigInteger(),
    )
    joined_at = _at_most_now(database, batch.c.now) + batch.c.later
    sessions_from = case((joined_at < batch.c.earliest, batch.c.earliest), else_=joined_at)
    columns = ["user_id", "account_id", "role", "sessions_from"]
    joining = select(batch.c.user_id, batch.c.account_id, batch.c.role, sessions_from).where(true())
    source = joining.order_by(batch.c.user_id, batch.c.account_id)
    insert = database.insert(memberships).from_select(columns, source, include_defaults=False)
    return insert.on_conflict_do_nothing().returning(*_key_of_membership, memberships.c.sessions_from)


_key_of_membership = (memberships.c.user_id, memberships.c.account_id)


@cache
def _roles_statement(database: Database) -> Select[Any]:
    batch = database.batch(user_id=BigInteger(), account_id=BigInteger())
    found = select(*_key_of_membership, memberships.c.sessions_from, memberships.c.role)
    return found.join(batch, _is_membership(batch.c.user_id, batch.c.account_id))


class Provisioning(GroupCommit[ProvisionRequest, Provisioned]):
    """Creates users and memberships, for issuing."""

    kind = "provision"
    transaction = "writing"

    def run_batch(self, connection: Connection, ops: Sequence[ProvisionRequest]) -> list[Provisioned]:
        return provision(self.database, connection, ops)


def provision(database: Database, connection: Connection, people: Sequence[ProvisionRequest]) -> list[Provisioned]:
    """Make each person a member of the account: created if unknown, `editor` unless already a member.

    Requests with the same address are one user, and only the first of them reports `created`.
    """
    first_of: dict[str, ProvisionRequest] = {}
    for person in people:
        first_of.setdefault(person.email, person)
    unknown = batch_parameter(
        [p.email, p.first_name, p.last_name, search_text(p.email, p.first_name, p.last_name), p.now]
        for p in first_of.values()
    )
    new = rows(connection, _create_users_statement(database), unknown)
    created = {email: (id_, since) for email, id_, since in new}
    found = dict(created)
    disabled: set[str] = set()
    if known := [[email] for email in first_of if email not in created]:
        # A new statement, because the INSERT's snapshot lacks rows of other nodes whose commit it waited for.
        for email, id_, since, disabled_at in rows(connection, _find_users_statement(database), batch_parameter(known)):
            found[email] = id_, since
            if disabled_at is not None:
                disabled.add(email)

    # Tokens and sessions of a member who was removed and joins again stay ended, also those of the present second and
    # those that an operator's sign-out has dated ahead. Where a sign-out within the account did so, its date went with
    # the membership: these may be valid again if the member returns before that date, some seconds after the sign-out.
    # A new user had none.
    joins: dict[tuple[int, int], tuple[int, int, int]] = {}
    for person in people:
        if person.email not in disabled:
            user_id, since = found[person.email]
            is_new = person.email in created
            joins[user_id, person.account_id] = (person.now, 0, 0) if is_new else (person.now, 1, since + 1)
    joined: dict[tuple[int, int], tuple[Role, int]] = {}
    if joins:
        joining = batch_parameter([*member, Role.EDITOR, *times] for member, times in joins.items())
        for user_id, account_id, since in rows(connection, _join_statement(database), joining):
            joined[user_id, account_id] = Role.EDITOR, since
    if members := [list(member) for member in joins if member not in joined]:
        for user_id, account_id, since, role in rows(connection, _roles_statement(database), batch_parameter(members)):
            joined[user_id, account_id] = Role(role), since

    provisioned = []
    for person in people:
        user_id, of_user = found[person.email]
        role, of_member = joined.get((user_id, person.account_id), (None, 0))
        # `pop`: only the first of several requests with one address reports that it created the user.
        was_created = created.pop(person.email, None) is not None
        provisioned.append(Provisioned(user_id, was_created, role, max(of_user, of_member)))
    return provisioned


class ApiTokenUses(GroupCommit[tuple[int, int], None]):
    """Records when API tokens were last used."""

    kind = "use"
    transaction = "writing"

    def run_batch(self, connection: Connection, ops: Sequence[tuple[int, int]]) -> list[None]:
        return record_uses(connection, ops)


def record_uses(connection: Connection, uses: Sequence[tuple[int, int]]) -> list[None]:
    """Record the use of API tokens, each as its id and the time in Unix seconds, rounded down to the hour."""
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
