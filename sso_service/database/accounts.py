"""Accounts, teams and API tokens: reading and changing them. Each function runs in the caller's transaction."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Select, Table, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from sso_service.database.directory import digest
from sso_service.database.schema import accounts, api_tokens, teams
from sso_service.errors import Conflict, NotFound
from sso_service.permissions import Role, Scope

TOKEN_PREFIX = "wf_live_"  # nosec B105 # noqa: S105 - a prefix that secret scanners recognize
_HINT_SIZE = 4


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


@dataclass(frozen=True, slots=True)
class ApiTokenRecord:
    """An API token as operators and admins see it. `hint` is the end of the secret; times are Unix seconds."""

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
) -> tuple[int, str]:
    """Create an API token and return its id and secret. Only a digest of the secret is stored.

    `account_id` None makes a platform API token, valid for all accounts. It must not have `write:sso`, with which its
    holder could sign in as any user. `now` and `expires_at` are Unix seconds. Raises `NotFound` for an unknown account,
    `ValueError` for such a scope.
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
        )
        .returning(api_tokens.c.id)
    ).scalar_one()
    return token_id, secret


def list_api_tokens(connection: Connection) -> list[ApiTokenRecord]:
    """Return all API tokens, by id."""
    statement = _columns(api_tokens, ApiTokenRecord).order_by(api_tokens.c.id)
    return [_record(*row) for row in connection.execute(statement)]


def list_api_tokens_of(connection: Connection, account_id: int, *, limit: int) -> Sequence[ApiTokenRecord]:
    """Return at most `limit` API tokens of an account, by id. Active ones and newer ones are preferred."""
    rows = connection.execute(
        _columns(api_tokens, ApiTokenRecord)
        .where(api_tokens.c.account_id == account_id)
        .order_by(api_tokens.c.revoked_at.is_not(None), api_tokens.c.id.desc())
        .limit(limit)
    )
    return sorted((_record(*row) for row in rows), key=lambda record: record.id)


def find_api_token(connection: Connection, token_id: int, account_id: int | None = None) -> ApiTokenRecord:
    """Return the API token, of this account if one is given. Raises `NotFound`."""
    for row in connection.execute(_columns(api_tokens, ApiTokenRecord).where(api_tokens.c.id == token_id)):
        record = _record(*row)
        if account_id in {None, record.account_id}:
            return record
    raise NotFound(f"there is no API token {token_id}")


def revoke_api_token(
    connection: Connection, token_id: int, *, now: int, account_id: int | None = None
) -> ApiTokenRecord:
    """Revoke the API token, of this account if one is given, and return it. Raises `NotFound`."""
    find_api_token(connection, token_id, account_id)
    # The secret no longer finds the row. So refusing it takes the same steps, and the same time, as refusing an unknown
    # one, and no mistake elsewhere can reactivate it. The rest of the digest still identifies the secret.
    unfindable = literal("-") + func.substr(api_tokens.c.digest, 2)
    active = update(api_tokens).where(api_tokens.c.id == token_id, api_tokens.c.revoked_at.is_(None))
    connection.execute(active.values(revoked_at=now, digest=unfindable))
    return find_api_token(connection, token_id)


def _record(  # one argument for each column
    id_: int, account_id: int | None, name: str, hint: str, scopes: str, max_role: str | None, *times: Any
) -> ApiTokenRecord:
    held = frozenset(Scope(scope) for scope in scopes.split())
    return ApiTokenRecord(id_, account_id, name, hint, held, Role(max_role) if max_role else None, *times)


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
