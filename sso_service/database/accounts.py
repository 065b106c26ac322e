"""Accounts, teams and API tokens: reading and changing them. Each function runs in the caller's transaction."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum, auto
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, and_, func, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError

from sso_service.database.directory import digest
from sso_service.database.schema import accounts, api_tokens, teams, users
from sso_service.errors import Conflict, NotFound
from sso_service.permissions import Role, Scope

TOKEN_PREFIX = "wf_live_"  # nosec B105 # noqa: S105 - a prefix that secret scanners recognize
_HINT_SIZE = 4
EXPIRES_SOON = 14 * 86400
"""Seconds before its expiry from which an API token is shown, logged and counted as one that expires soon."""
_DAY = 86400
_LOGGED_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Account:
    """An account, with the URL of its portal if it has one."""

    id: int
    name: str
    portal_url: str | None


@dataclass(frozen=True, slots=True)
class Team:
    """A team of an account."""

    id: int
    account_id: int
    name: str


class ApiTokenStatus(StrEnum):
    """Whether an API token is accepted. An active one becomes `expiring` some days before it expires."""

    ACTIVE = auto()
    EXPIRING = auto()
    EXPIRED = auto()
    REVOKED = auto()


ACTIVE = (ApiTokenStatus.ACTIVE, ApiTokenStatus.EXPIRING)
INACTIVE = (ApiTokenStatus.EXPIRED, ApiTokenStatus.REVOKED)


@dataclass(frozen=True, slots=True)
class ApiTokenRecord:
    """An API token as operators and admins see it. `hint` is the end of the secret; times are Unix seconds.

    `created_by` is the user id of the admin who created it, with the admin's present name and address. All three are
    None if an operator created it, or a version of this service that did not record it.
    """

    id: int
    account_id: int | None
    name: str
    hint: str
    scopes: frozenset[Scope]
    max_role: Role | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None
    created_by: int | None
    created_by_name: str | None
    created_by_email: str | None

    def status(self, now: int) -> ApiTokenStatus:
        """Return the status at `now` (Unix seconds)."""
        if self.revoked_at is not None:
            return ApiTokenStatus.REVOKED
        if self.expires_at is None or self.expires_at > now + EXPIRES_SOON:
            return ApiTokenStatus.ACTIVE
        return ApiTokenStatus.EXPIRING if self.expires_at > now else ApiTokenStatus.EXPIRED


@dataclass(frozen=True, slots=True)
class Expiring:
    """The number of active API tokens that expire soon, and the next expiry of any active one (Unix seconds)."""

    count: int
    next_expiry: int | None


@dataclass(frozen=True, slots=True)
class ExpiringApiToken:
    """An API token that expires soon, at `expires_at` (Unix seconds)."""

    id: int
    account_id: int | None
    expires_at: int


# --- accounts and teams ----------------------------------------------------------------------------------------------


def add_account(
    connection: Connection, name: str, *, account_id: int | None = None, portal_url: str | None = None
) -> int:
    """Add an account and return its id: `account_id`, or the next free one. Raises `Conflict` if that is taken."""
    return _insert(connection, accounts, "account", account_id, name=name, portal_url=portal_url)


def list_accounts(connection: Connection) -> list[Account]:
    """Return all accounts, by id."""
    return [Account(*row) for row in connection.execute(_columns(accounts, Account).order_by(accounts.c.id))]


def find_account(connection: Connection, account_id: int) -> Account:
    """Return the account. Raises `NotFound`."""
    for row in connection.execute(_columns(accounts, Account).where(accounts.c.id == account_id)):
        return Account(*row)
    raise NotFound(f"there is no account {account_id}")


def add_team(connection: Connection, account_id: int, name: str, *, team_id: int | None = None) -> int:
    """Add a team and return its id: `team_id`, or the next free one.

    Raises `NotFound` for an unknown account, `Conflict` if the id is taken.
    """
    find_account(connection, account_id)
    return _insert(connection, teams, "team", team_id, account_id=account_id, name=name)


def list_teams(connection: Connection, account_id: int | None = None) -> list[Team]:
    """Return the teams of an account, or all teams, by id."""
    statement = _columns(teams, Team).order_by(teams.c.id)
    if account_id is not None:
        statement = statement.where(teams.c.account_id == account_id)
    return [Team(*row) for row in connection.execute(statement)]


def find_account_with_teams(connection: Connection, account_id: int) -> tuple[Account, list[Team]]:
    """Return the account and its teams, by id. Raises `NotFound`."""
    return find_account(connection, account_id), list_teams(connection, account_id)


# --- API tokens ------------------------------------------------------------------------------------------------------


def create_api_token(
    connection: Connection,
    *,
    account_id: int | None,
    name: str,
    scopes: frozenset[Scope],
    now: int,
    max_role: Role | None = None,
    expires_at: int | None = None,
    created_by: int | None = None,
) -> tuple[int, str]:
    """Create an API token and return its id and secret. Only a digest of the secret is stored.

    `account_id` None makes a platform API token, valid for all accounts. It must not have `write:sso`, with which its
    holder could sign in as any user. `now` and `expires_at` are Unix seconds. `created_by` is the user id of an admin.
    Raises `NotFound` for an unknown account, `ValueError` for such a scope.
    """
    if account_id is None and Scope.WRITE_SSO in scopes:
        raise ValueError(f"a platform API token cannot have the scope {Scope.WRITE_SSO}")
    if account_id is not None:
        find_account(connection, account_id)
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    token_id = connection.execute(
        insert(api_tokens)
        .values(
            account_id=account_id,
            name=name,
            digest=digest(secret),
            hint=secret[-_HINT_SIZE:],
            scopes=" ".join(sorted(scopes)),
            max_role=max_role,
            created_at=now,
            expires_at=expires_at,
            created_by=created_by,
        )
        .returning(api_tokens.c.id)
    ).scalar_one()
    return token_id, secret


def list_api_tokens(connection: Connection) -> list[ApiTokenRecord]:
    """Return all API tokens, by id."""
    return [_record(*row) for row in connection.execute(_API_TOKENS.order_by(api_tokens.c.id))]


def list_api_tokens_of(
    connection: Connection,
    account_id: int,
    *,
    now: int,
    statuses: Sequence[ApiTokenStatus] = ACTIVE,
    created_by: int | None = None,
    before: int | None = None,
    after: int | None = None,
    limit: int,
) -> list[ApiTokenRecord]:
    """Return at most `limit` API tokens of an account that have one of `statuses` at `now`, the newest first.

    With `before`, they are the next older ones than the API token with this id; with `after`, the next newer ones. Only
    those that the user `created_by` has created, if one is given.
    """
    found = _API_TOKENS.where(api_tokens.c.account_id == account_id, _has_status(statuses, now)).limit(limit)
    if created_by is not None:
        found = found.where(api_tokens.c.created_by == created_by)
    if before is not None:
        found = found.where(api_tokens.c.id < before)
    if after is not None:
        rows = connection.execute(found.where(api_tokens.c.id > after).order_by(api_tokens.c.id))
        return [_record(*row) for row in rows][::-1]
    return [_record(*row) for row in connection.execute(found.order_by(api_tokens.c.id.desc()))]


def find_api_token(connection: Connection, token_id: int, account_id: int | None = None) -> ApiTokenRecord:
    """Return the API token, of this account if one is given. Raises `NotFound`."""
    for row in connection.execute(_API_TOKENS.where(api_tokens.c.id == token_id)):
        record = _record(*row)
        if account_id in {None, record.account_id}:
            return record
    raise NotFound(f"there is no API token {token_id}")


def revoke_api_token(
    connection: Connection, token_id: int, *, now: int, account_id: int | None = None
) -> ApiTokenRecord:
    """Revoke the API token, of this account if one is given, and return it. Raises `NotFound`."""
    find_api_token(connection, token_id, account_id)
    _revoke(connection, api_tokens.c.id == token_id, now=now)
    return find_api_token(connection, token_id)


def api_tokens_created_by(
    connection: Connection, user_id: int, account_id: int | None = None, *, now: int, revoke: bool = False
) -> list[ApiTokenRecord]:
    """Return the active API tokens that a user created, in this account if one is given, and revoke them if asked."""
    created = [api_tokens.c.created_by == user_id, _has_status(ACTIVE, now)]
    if account_id is not None:
        created.append(api_tokens.c.account_id == account_id)
    found = [_record(*row) for row in connection.execute(_API_TOKENS.where(*created).order_by(api_tokens.c.id))]
    if revoke and found:
        _revoke(connection, *created, now=now)
    return found


def count_expiring_api_tokens(connection: Connection, account_id: int | None = None, *, now: int) -> Expiring:
    """Return how many active API tokens expire soon, and the next expiry, of this account if one is given."""
    of_account = [] if account_id is None else [api_tokens.c.account_id == account_id]
    expiring = func.count().filter(_has_status([ApiTokenStatus.EXPIRING], now))
    found = select(expiring, func.min(api_tokens.c.expires_at)).where(_has_status(ACTIVE, now), *of_account)
    return Expiring(*connection.execute(found).one())


def take_expiring_api_tokens(connection: Connection, *, now: int) -> list[ExpiringApiToken]:
    """Return some of the API tokens that expire soon and were not returned within a day, and record that they were.

    However many processes ask, each API token is returned once a day. A call returns few, so that a log line for each
    is never much; the next call returns the next ones.
    """
    logged = api_tokens.c.expiry_logged_at
    due = and_(_has_status([ApiTokenStatus.EXPIRING], now), or_(logged.is_(None), logged <= now - _DAY))
    some = select(api_tokens.c.id).where(due).order_by(api_tokens.c.expires_at).limit(_LOGGED_AT_ONCE)
    # With `due` again, because PostgreSQL evaluates only this for a row that another process has just changed.
    taken = update(api_tokens).where(api_tokens.c.id.in_(some), due).values(expiry_logged_at=now)
    columns = (api_tokens.c[each.name] for each in fields(ExpiringApiToken))
    return [ExpiringApiToken(*row) for row in connection.execute(taken.returning(*columns))]


def _revoke(connection: Connection, *conditions: ColumnElement[bool], now: int) -> None:
    # The secret no longer finds the row. So refusing it takes the same steps, and the same time, as refusing an unknown
    # one, and no mistake elsewhere can reactivate it. The rest of the digest still identifies the secret.
    unfindable = literal("-") + func.substr(api_tokens.c.digest, 2)
    not_revoked = update(api_tokens).where(*conditions, api_tokens.c.revoked_at.is_(None))
    connection.execute(not_revoked.values(revoked_at=now, digest=unfindable))


def _has_status(statuses: Sequence[ApiTokenStatus], now: int) -> ColumnElement[bool]:
    """Return the condition that an API token has one of `statuses`: the same as `ApiTokenRecord.status`."""
    expires_at, revoked = api_tokens.c.expires_at, api_tokens.c.revoked_at.is_not(None)
    conditions = {
        ApiTokenStatus.ACTIVE: and_(~revoked, or_(expires_at.is_(None), expires_at > now + EXPIRES_SOON)),
        ApiTokenStatus.EXPIRING: and_(~revoked, expires_at > now, expires_at <= now + EXPIRES_SOON),
        ApiTokenStatus.EXPIRED: and_(~revoked, expires_at <= now),
        ApiTokenStatus.REVOKED: revoked,
    }
    return or_(*(conditions[status] for status in statuses))


_API_TOKENS = select(
    *(api_tokens.c[each.name] for each in fields(ApiTokenRecord) if each.name in api_tokens.c),
    users.c.first_name + " " + users.c.last_name,
    users.c.email,
).outerjoin_from(api_tokens, users, users.c.id == api_tokens.c.created_by)


def _record(  # one argument for each column
    id_: int, account_id: int | None, name: str, hint: str, scopes: str, max_role: str | None, *others: Any
) -> ApiTokenRecord:
    held = frozenset(Scope(scope) for scope in scopes.split())
    return ApiTokenRecord(id_, account_id, name, hint, held, Role(max_role) if max_role else None, *others)


def _columns(table: Table, record: type) -> Select[Any]:
    """Select the columns that the fields of the dataclass `record` name."""
    return select(*(table.c[each.name] for each in fields(record)))


def _insert(connection: Connection, table: Table, kind: str, new_id: int | None, **values: Any) -> int:
    """Insert a row and return its id: `new_id`, or the next free one. Raises `Conflict`."""
    if new_id is None:
        new_id = connection.execute(select(func.coalesce(func.max(table.c.id), 0) + 1)).scalar_one()
    if new_id > 2**32 - 1:
        raise Conflict("there is no next free id; choose one")
    try:
        connection.execute(insert(table).values(id=new_id, **values))
    except IntegrityError as error:
        raise Conflict(f"{kind} {new_id} exists already") from error
    return new_id
