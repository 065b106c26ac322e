"""What an operator changes: accounts, teams, API tokens, people. One call, one change, in the caller's transaction."""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Update, delete, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from sso_service.database.directory import digest
from sso_service.database.schema import accounts, api_tokens, memberships, teams, users
from sso_service.errors import Overloaded
from sso_service.permissions import Role, Scope
from sso_service.tokens import CLOCK_ALLOWANCE

TOKEN_PREFIX = "wf_live_"  # nosec B105 # noqa: S105 - a prefix for secret scanners to look for
_HINT_SIZE = 4


class NotFound(Exception):
    """There is no such account, team, user, membership or API token; the message says which."""


class Conflict(Exception):
    """It exists already; the message says what."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's role in an account."""

    account_id: int
    account_name: str
    role: Role


def add_account(
    connection: Connection, name: str, *, account_id: int | None = None, portal_url: str | None = None
) -> int:
    """The id of a new account. Raises `Conflict` if `account_id` is taken."""
    if account_id is None:
        account_id = connection.execute(select(func.coalesce(func.max(accounts.c.id), 0) + 1)).scalar_one()
    _check_free(account_id)
    _insert(connection, accounts, f"account {account_id}", id=account_id, name=name, portal_url=portal_url)
    return account_id


def list_accounts(connection: Connection) -> Sequence[Row[Any]]:
    """All accounts: id, name, portal_url."""
    return connection.execute(select(accounts).order_by(accounts.c.id)).all()


def find_account(connection: Connection, account_id: int) -> Row[Any]:
    """The account: id, name, portal_url. Raises `NotFound`."""
    row = connection.execute(select(accounts).where(accounts.c.id == account_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no account {account_id}")
    return row


def list_teams(connection: Connection, account_id: int) -> Sequence[Row[int, str]]:
    """The account's teams: id, name."""
    statement = select(teams.c.id, teams.c.name).where(teams.c.account_id == account_id)
    return connection.execute(statement.order_by(teams.c.id)).all()


def add_team(connection: Connection, account_id: int, name: str, *, team_id: int | None = None) -> int:
    """The id of a new team. Raises `NotFound` for an unknown account, `Conflict` if `team_id` is taken."""
    check_account(connection, account_id)
    if team_id is None:
        team_id = connection.execute(select(func.coalesce(func.max(teams.c.id), 0) + 1)).scalar_one()
    _check_free(team_id)
    _insert(connection, teams, f"team {team_id}", id=team_id, account_id=account_id, name=name)
    return team_id


def check_account(connection: Connection, account_id: int) -> None:
    """Raises `NotFound` unless the account exists."""
    find_account(connection, account_id)


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
    """The id and the secret of a new API token. The secret is nowhere else: only its digest is stored.

    `account_id` None makes a platform API token, good for all accounts, which must not have `write:sso`: it would let
    its holder sign in as anybody. Raises `NotFound` for an unknown account, `ValueError` for such a scope.
    """
    if account_id is None and Scope.WRITE_SSO in scopes:
        raise ValueError(f"a platform API token cannot have the scope {Scope.WRITE_SSO}")
    if account_id is not None:
        check_account(connection, account_id)
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


def list_api_tokens(connection: Connection) -> Sequence[Row[Any]]:
    """All API tokens, with all that is stored of them."""
    return connection.execute(select(api_tokens).order_by(api_tokens.c.id)).all()


def list_api_tokens_of(connection: Connection, account_id: int, *, limit: int) -> Sequence[Row[Any]]:
    """The account's API tokens, `limit` of them at most: rather those that are not revoked, and rather the newest."""
    rows = connection.execute(
        select(api_tokens)
        .where(api_tokens.c.account_id == account_id)
        .order_by(api_tokens.c.revoked_at.is_not(None), api_tokens.c.id.desc())
        .limit(limit)
    ).all()
    return sorted(rows, key=lambda row: int(row.id))


def find_api_token(connection: Connection, token_id: int, account_id: int | None = None) -> Row[Any]:
    """The API token, if it is this account's where one is given. Raises `NotFound`."""
    for row in connection.execute(select(api_tokens).where(api_tokens.c.id == token_id)):
        if account_id in {None, row.account_id}:
            return row
    raise NotFound(f"there is no API token {token_id}")


def revoke_api_token(connection: Connection, token_id: int, *, now: int) -> Row[Any]:
    """The API token, revoked from now on (or since earlier). Raises `NotFound`."""
    connection.execute(_revoke(now).where(api_tokens.c.id == token_id))
    return find_api_token(connection, token_id)


def revoke_api_tokens_named(connection: Connection, account_id: int, name: str, *, now: int) -> None:
    """Revokes the account's API tokens of this name."""
    connection.execute(_revoke(now).where(api_tokens.c.account_id == account_id, api_tokens.c.name == name))


def _revoke(now: int) -> Update:
    # Its secret does not find it any more. So refusing it takes the same steps, and the same time, as refusing one that
    # never was; and no mistake elsewhere can bring it back. What is left of the digest still tells which one it was.
    lost = literal("-") + func.substr(api_tokens.c.digest, 2)
    return update(api_tokens).where(api_tokens.c.revoked_at.is_(None)).values(revoked_at=now, digest=lost)


def find_user(connection: Connection, email: str) -> Row[Any]:
    """The user's row. `email` is normalised. Raises `NotFound`."""
    row = connection.execute(select(users).where(users.c.email == email)).one_or_none()
    if row is None:
        raise NotFound(f"there is no user {email}")
    return row


def list_memberships(connection: Connection, user_id: int) -> list[Membership]:
    """The accounts that the user belongs to, with the role in each."""
    rows = connection.execute(
        select(accounts.c.id, accounts.c.name, memberships.c.role)
        .join_from(memberships, accounts, memberships.c.account_id == accounts.c.id)
        .where(memberships.c.user_id == user_id)
        .order_by(accounts.c.id)
    )
    return [Membership(account_id, name, Role(role)) for account_id, name, role in rows]


def set_role(connection: Connection, email: str, account_id: int, role: Role) -> int:
    """Gives a member another role, and returns the user's id. Raises `NotFound`."""
    return _change_membership(
        connection, email, account_id, lambda where: update(memberships).where(*where).values(role=role)
    )


def remove_member(connection: Connection, email: str, account_id: int) -> int:
    """Takes the user out of the account, and returns their id; the user stays. Raises `NotFound`."""
    return _change_membership(connection, email, account_id, lambda where: delete(memberships).where(*where))


def _change_membership(connection: Connection, email: str, account_id: int, statement: Any) -> int:
    check_account(connection, account_id)
    user_id: int = find_user(connection, email).id
    where = (memberships.c.user_id == user_id, memberships.c.account_id == account_id)
    if connection.execute(statement(where)).rowcount == 0:
        raise NotFound(f"{email} is not a member of account {account_id}")
    return user_id


def disable_user(connection: Connection, email: str, *, now: int) -> int:
    """Nothing is good any more that this person holds or gets. Returns the user's id. Raises `NotFound`."""
    user_id: int = find_user(connection, email).id
    # So that no session comes back when they are enabled again. Whoever signs out too often is disabled all the same.
    with suppress(Overloaded):
        sign_out(connection, user_id, now=now)
    connection.execute(
        update(users).where(users.c.id == user_id, users.c.disabled_at.is_(None)).values(disabled_at=now)
    )
    return user_id


def enable_user(connection: Connection, email: str) -> int:
    """Undoes `disable_user`, and returns the user's id. Raises `NotFound`."""
    user_id: int = find_user(connection, email).id
    connection.execute(update(users).where(users.c.id == user_id).values(disabled_at=None))
    return user_id


def sign_out_user(connection: Connection, email: str, *, now: int) -> int:
    """Ends every session of this person that began up to now, and returns the user's id.

    Sessions know their beginning to the second, so those of this second end too; one that begins within it later is
    dated to the next, and if they sign out again within the second, to the one after that. Raises `NotFound`, or
    `Overloaded` if this was done too often within these seconds.
    """
    user_id: int = find_user(connection, email).id
    sign_out(connection, user_id, now=now)
    return user_id


def sign_out(connection: Connection, user_id: int, *, now: int) -> None:
    """Likewise, of the user with this id, who must exist."""
    of_user = select(users.c.sessions_from).where(users.c.id == user_id)
    of_memberships = select(memberships.c.sessions_from).where(memberships.c.user_id == user_id)
    before = connection.scalars(of_user.union_all(of_memberships)).all()
    later = sessions_end(*before, now=now, ahead=CLOCK_ALLOWANCE // 2)
    connection.execute(update(users).where(users.c.id == user_id).values(sessions_from=later))


def sessions_end(*before: int, now: int, ahead: int) -> int:
    """The next `sessions_from`: one that ends what began up to `now`, and what `before` had dated to later than that.

    `before` is each `sessions_from` by which a session may be dated. Raises `Overloaded` if the next would be more than
    `ahead` seconds after `now`: no node would accept a session from too far in the future.
    """
    later = max(*before, now) + 1
    if later > now + ahead:
        raise Overloaded("signed out too often within these seconds, or the database's clock was set back")
    return later


def _check_free(new_id: int) -> None:
    if new_id > 2**32 - 1:
        raise Conflict("there is no next free id; choose one")


def _insert(connection: Connection, table: Any, what: str, **values: Any) -> None:
    try:
        connection.execute(insert(table).values(**values))
    except IntegrityError as error:
        raise Conflict(f"{what} exists already") from error
