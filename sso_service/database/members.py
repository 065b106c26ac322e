"""What the admins of an account see and change: its members and their roles.

Changes are made in a transaction that began with `check_admin`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Select, delete, func, or_, select, update

from sso_service.database.administration import sessions_end, sign_out
from sso_service.database.engine import Database
from sso_service.database.schema import accounts, memberships, users
from sso_service.errors import NotFound
from sso_service.permissions import Role
from sso_service.tokens import CLOCK_ALLOWANCE


class NotAnAdmin(Exception):
    """Who asks for the change is not an admin of the account, or not any more."""


class LastAdmin(Exception):
    """The change would leave the account without an admin."""


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody who belongs to an account."""

    id: int
    email: str
    first_name: str
    last_name: str
    role: Role
    disabled: bool


@dataclass(frozen=True, slots=True)
class Members:
    """Some of the members that were asked for, and how many there are in all."""

    members: Sequence[Member]
    total: int


_COLUMNS = (
    users.c.id,
    users.c.email,
    users.c.first_name,
    users.c.last_name,
    memberships.c.role,
    users.c.disabled_at,
)


def list_members(connection: Connection, account_id: int, *, search: str = "", offset: int = 0, limit: int) -> Members:
    """The account's members by name, those in whose name or address `search` occurs, from `offset` on."""
    of_account = memberships.c.account_id == account_id
    wanted: list[ColumnElement[bool]] = [of_account]
    if search:
        name = users.c.first_name + " " + users.c.last_name
        wanted.append(or_(users.c.email.icontains(search, autoescape=True), name.icontains(search, autoescape=True)))
    joined = select(*_COLUMNS).join_from(memberships, users, memberships.c.user_id == users.c.id).where(*wanted)
    rows = connection.execute(
        joined.order_by(func.lower(users.c.last_name), func.lower(users.c.first_name), users.c.id)
        .offset(offset)
        .limit(limit)
    )
    total = connection.execute(select(func.count()).select_from(joined.subquery())).scalar_one()
    return Members([_member(*row) for row in rows], total)


def find_member(connection: Connection, account_id: int, user_id: int) -> Member:
    """The member. Raises `NotFound`."""
    row = connection.execute(
        select(*_COLUMNS)
        .join_from(memberships, users, memberships.c.user_id == users.c.id)
        .where(memberships.c.account_id == account_id, memberships.c.user_id == user_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"user {user_id} is not a member of account {account_id}")
    return _member(*row)


def set_member_role(connection: Connection, account_id: int, user_id: int, role: Role) -> None:
    """Gives a member another role. Raises `NotFound` or `LastAdmin`."""
    member = find_member(connection, account_id, user_id)
    connection.execute(update(memberships).where(*_membership(account_id, member.id)).values(role=role))
    _check_an_admin_remains(connection, account_id)


def remove_member(connection: Connection, account_id: int, user_id: int) -> None:
    """Takes a member out of the account. Raises `NotFound` or `LastAdmin`."""
    member = find_member(connection, account_id, user_id)
    connection.execute(delete(memberships).where(*_membership(account_id, member.id)))
    _check_an_admin_remains(connection, account_id)


def sign_out_member(connection: Connection, account_id: int, user_id: int, *, database: Database) -> None:
    """Ends all sessions of a member in this account; those in other accounts are not ours to end.

    Raises `NotFound`, or `Overloaded` if this was done too often within these seconds.
    """
    member = find_member(connection, account_id, user_id)
    where = _membership(account_id, member.id)
    # By the database's clock: ours may be ahead, and no node would accept a new session until it has caught up.
    dates = select(memberships.c.sessions_from, users.c.sessions_from, database.now())
    *before, now = connection.execute(dates.join_from(memberships, users).where(*where)).one()
    # Half as far ahead as for the user: whatever an account does, there is room for "sign out everywhere" after it.
    later = sessions_end(*before, now=now, ahead=CLOCK_ALLOWANCE // 4)
    connection.execute(update(memberships).where(*where).values(sessions_from=later))


def sign_out_user(connection: Connection, user_id: int, *, database: Database) -> None:
    """Ends all sessions of a user, in all accounts."""
    sign_out(connection, user_id, now=connection.execute(select(database.now())).scalar_one())


def check_admin(connection: Connection, account_id: int, admin_id: int) -> None:
    """Raises `NotAnAdmin` unless the user is one now, and keeps everybody else from changing that until the end.

    The lock on the account's row makes changes to its members go one after the other. Without it two admins could
    demote each other at the same moment, each still seeing the other as the one who remains. It is one that lets
    newcomers join meanwhile, whose membership refers to the row.
    """
    connection.execute(select(accounts.c.id).where(accounts.c.id == account_id).with_for_update(key_share=True))
    found = connection.execute(_admins(account_id).where(users.c.id == admin_id)).first()
    if found is None:
        raise NotAnAdmin(f"user {admin_id} is not an admin of account {account_id}")


def _check_an_admin_remains(connection: Connection, account_id: int) -> None:
    if connection.execute(_admins(account_id).limit(1)).first() is None:
        raise LastAdmin(f"account {account_id} would have no admin")


def _admins(account_id: int) -> Select[tuple[int]]:
    """Those who can act as admins: somebody who is disabled cannot."""
    return (
        select(users.c.id)
        .join_from(memberships, users, memberships.c.user_id == users.c.id)
        .where(memberships.c.account_id == account_id, memberships.c.role == Role.ADMIN, users.c.disabled_at.is_(None))
    )


def _membership(account_id: int, user_id: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return memberships.c.account_id == account_id, memberships.c.user_id == user_id


def _member(id_: int, email: str, first_name: str, last_name: str, role: str, disabled_at: int | None) -> Member:
    return Member(id_, email, first_name, last_name, Role(role), disabled_at is not None)
