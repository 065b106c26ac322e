"""Users and memberships: reading and changing them. Each function runs in the caller's transaction."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, Update, and_, delete, func, select, true, update

from sso_service.database.accounts import ApiTokenRecord, api_tokens_created_by, find_account
from sso_service.database.schema import IS_ADMIN, accounts, memberships, users
from sso_service.database.transactions import Database
from sso_service.errors import LastAdmin, NotAnAdmin, NotFound, Overloaded
from sso_service.people import fold, search_text
from sso_service.permissions import Role
from sso_service.tokens import CLOCK_ALLOWANCE

MOST_LISTED = 10_000
"""Members that a list shows at most. It bounds the cost of counting and of the last page; a search finds the others."""
_AT_ONCE = 200
"""Users whose search text is added in one transaction: few, because logins may wait for it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class UserRecord:
    """A user as operators see it. Times are Unix seconds."""

    id: int
    email: str
    first_name: str
    last_name: str
    created_at: int
    disabled_at: int | None
    sessions_from: int


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's role in an account."""

    account_id: int
    account_name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Member:
    """A user in an account."""

    id: int
    email: str
    first_name: str
    last_name: str
    role: Role
    disabled: bool


@dataclass(frozen=True, slots=True)
class MemberPage:
    """Some of the members that a search found, and the number of members that can be listed.

    `more` is true if the search found further ones.
    """

    members: Sequence[Member]
    total: int
    more: bool = False


# --- reading ---------------------------------------------------------------------------------------------------------


def find_user(connection: Connection, email: str) -> UserRecord:
    """Return the user. `email` is normalised. Raises `NotFound`."""
    columns = (users.c[name] for name in UserRecord.__slots__)
    for row in connection.execute(select(*columns).where(users.c.email == email)):
        return UserRecord(*row)
    raise NotFound(f"there is no user {email}")


def list_memberships(connection: Connection, user_id: int) -> list[Membership]:
    """Return the accounts of a user with the role in each, by account id."""
    rows = connection.execute(
        select(accounts.c.id, accounts.c.name, memberships.c.role)
        .join_from(memberships, accounts)
        .where(memberships.c.user_id == user_id)
        .order_by(accounts.c.id)
    )
    return [Membership(account_id, name, Role(role)) for account_id, name, role in rows]


_COLUMNS = (users.c.id, users.c.email, users.c.first_name, users.c.last_name, memberships.c.role, users.c.disabled_at)


def list_members(
    connection: Connection, account_id: int, *, search: str = "", offset: int = 0, limit: int
) -> MemberPage:
    """Return `limit` members from `offset` on, by name: all, or those whose name or address contains `search`.

    Case and composition of characters are ignored. The list ends after `MOST_LISTED` members.
    """
    # The search compares texts that were folded when they were stored, in the database's own code. A callback into
    # Python would need the interpreter's lock for each member, which the event loop needs for logins.
    conditions = [memberships.c.account_id == account_id]
    name: ColumnElement[str] = users.c.search
    if search:
        conditions.append(users.c.search.contains(fold(search), autoescape=True))
        # An expression has no index. PostgreSQL would follow it through all users, expecting to find enough members
        # soon, and the cost of a search without a hit would depend on the size of the other accounts.
        name = name.concat("")
    by_name = name, users.c.id
    members_by_name = select(users.c.id, name.label("name")).join_from(memberships, users).where(*conditions)
    listed = members_by_name.order_by(*by_name).limit(MOST_LISTED + 1).cte("listed")
    total = select(func.count().label("total")).select_from(listed).subquery("counted")
    first = max(0, min(offset, MOST_LISTED))
    on_page = (
        select(listed.c.id).order_by(listed.c.name, listed.c.id).offset(first).limit(min(limit, MOST_LISTED - first))
    )
    page = on_page.subquery("page")
    # Few rows leave the database, the total in each of them, because fetching a row costs more than finding it.
    rows = connection.execute(
        select(total.c.total, *_COLUMNS)
        .select_from(total)
        .outerjoin(page, true())
        .outerjoin(users, users.c.id == page.c.id)
        .outerjoin(memberships, and_(memberships.c.user_id == page.c.id, memberships.c.account_id == account_id))
        .order_by(*by_name)
    ).all()
    counted = rows[0].total
    members = [_member(*row[1:]) for row in rows if row.id is not None]
    return MemberPage(members, min(counted, MOST_LISTED), more=counted > MOST_LISTED)


def find_member(connection: Connection, account_id: int, user_id: int) -> Member:
    """Return the member. Raises `NotFound`."""
    found = select(*_COLUMNS).join_from(memberships, users).where(*_membership(account_id, user_id))
    for row in connection.execute(found):
        return _member(*row)
    raise NotFound(f"user {user_id} is not a member of account {account_id}")


def has_other_admin(connection: Connection, account_id: int, user_id: int) -> bool:
    """Return whether the account has an admin, not disabled, other than this user."""
    return connection.execute(_admins(account_id).where(users.c.id != user_id).limit(1)).first() is not None


def lacks_search_text(connection: Connection) -> bool:
    """Return whether there is a user whom a search cannot find: see `add_search_texts`."""
    return connection.execute(select(users.c.id).where(users.c.search == "").limit(1)).first() is not None


def add_search_texts(connection: Connection) -> None:
    """Add the missing search texts of some users.

    A program of the version before search texts creates users without, while nodes are upgraded one by one.
    """
    columns = users.c.id, users.c.email, users.c.first_name, users.c.last_name
    incomplete = connection.execute(select(*columns).where(users.c.search == "").order_by(users.c.id).limit(_AT_ONCE))
    for user_id, *person in incomplete.all():
        connection.execute(update(users).where(users.c.id == user_id).values(search=search_text(*person)))


# --- changing members ------------------------------------------------------------------------------------------------


def as_admin(work: Callable[[Connection], T], *, account_id: int, admin_id: int) -> Callable[[Connection], T]:
    """Return `work`, restricted to what an admin of the account may do.

    It raises `NotAnAdmin` unless `admin_id` is an admin when the transaction runs, and `LastAdmin` if `work` leaves the
    account without one.
    """

    def guarded(connection: Connection) -> T:
        # The lock on the account's row serialises changes to its members. Without it, two admins could demote each
        # other at the same moment, because each transaction still sees the other as the remaining admin. FOR NO KEY
        # UPDATE does not block new members, whose memberships refer to the row.
        connection.execute(select(accounts.c.id).where(accounts.c.id == account_id).with_for_update(key_share=True))
        this_admin = _admins(account_id).where(users.c.id == admin_id)
        if connection.execute(this_admin).first() is None:
            raise NotAnAdmin(f"user {admin_id} is not an admin of account {account_id}")
        result = work(connection)
        # Only necessary once for each admin, who is not one afterwards.
        if (
            connection.execute(this_admin).first() is None
            and connection.execute(_admins(account_id).limit(1)).first() is None
        ):
            raise LastAdmin(f"account {account_id} would have no admin")
        return result

    return guarded


def with_created_api_tokens(
    work: Callable[[Connection], object], *, user_id: int, account_id: int | None = None, now: int, revoke: bool
) -> Callable[[Connection], list[ApiTokenRecord]]:
    """Return `work`, which ends the user's right to create API tokens: in this account if one is given, or in all.

    It returns the active API tokens that the user created there, which it also revokes if `revoke` is set.
    """

    def extended(connection: Connection) -> list[ApiTokenRecord]:
        # The lock that `as_admin` takes as well: an API token that the user is creating at this moment is either
        # complete, and found below, or refused, because the user has lost the role.
        theirs = select(memberships.c.account_id).where(memberships.c.user_id == user_id)
        locked = select(accounts.c.id).where(
            accounts.c.id.in_(theirs) if account_id is None else accounts.c.id == account_id
        )
        connection.execute(locked.order_by(accounts.c.id).with_for_update(key_share=True))
        work(connection)
        return api_tokens_created_by(connection, user_id, account_id, now=now, revoke=revoke)

    return extended


def set_role(connection: Connection, account_id: int, user_id: int, role: Role) -> None:
    """Change a member's role. Raises `NotFound`."""
    find_account(connection, account_id)
    find_member(connection, account_id, user_id)
    connection.execute(update(memberships).where(*_membership(account_id, user_id)).values(role=role))


def remove_member(connection: Connection, account_id: int, user_id: int) -> None:
    """Remove a member from the account. The user stays. Raises `NotFound`."""
    find_account(connection, account_id)
    find_member(connection, account_id, user_id)
    connection.execute(delete(memberships).where(*_membership(account_id, user_id)))


def sign_out_member(
    connection: Connection, account_id: int, user_id: int, *, database: Database, by_member: bool = False
) -> int:
    """End all sessions and outstanding login links of a member in this account. Other accounts are not affected.

    Returns the new `sessions_from`. With `by_member`, the members themselves do it. Raises `NotFound`, or `Overloaded`
    if this was done too often within a few seconds.
    """
    find_member(connection, account_id, user_id)
    where = _membership(account_id, user_id)
    dates = select(memberships.c.sessions_from, users.c.sessions_from).join_from(memberships, users)
    before = connection.execute(dates.where(*where)).one()
    ahead = _AHEAD_BY_MEMBER if by_member else _AHEAD_BY_ADMIN
    later = _next_sessions_from(*before, now=database_time(connection, database), ahead=ahead)
    connection.execute(_raise_sessions_from(memberships, later).where(*where))
    return later


# How far a sign-out may date `sessions_from` ahead, in seconds. Whatever an account's admins do, its members can sign
# out everywhere, and whatever happens in accounts, an operator can sign a user out. Nodes accept tokens and sessions
# that are dated up to `CLOCK_ALLOWANCE` ahead; the rest of it is left for clocks that differ.
_AHEAD_BY_ADMIN = CLOCK_ALLOWANCE // 4
_AHEAD_BY_MEMBER = CLOCK_ALLOWANCE // 3
_AHEAD_BY_OPERATOR = CLOCK_ALLOWANCE // 2


# --- changing users --------------------------------------------------------------------------------------------------


def disable_user(connection: Connection, user_id: int, *, database: Database) -> None:
    """Disable the user: all current and future tokens and sessions are rejected."""
    # So that no session becomes valid again when the user is enabled. Disabling must work even if the user has signed
    # out too often to do so once more.
    with suppress(Overloaded):
        sign_out_user(connection, user_id, database=database)
    connection.execute(
        update(users)
        .where(users.c.id == user_id, users.c.disabled_at.is_(None))
        .values(disabled_at=database_time(connection, database))
    )


def enable_user(connection: Connection, user_id: int) -> None:
    """Undo `disable_user`."""
    connection.execute(update(users).where(users.c.id == user_id).values(disabled_at=None))


def sign_out_user(connection: Connection, user_id: int, *, database: Database) -> int:
    """End every session that the user has begun so far, in all accounts, and every outstanding login link.

    Returns the new `sessions_from`.

    A session records its start to the second, so sessions of the current second end too. A session that begins later in
    this second is dated to the next one, and after a further sign-out in the same second to the one after that. Raises
    `Overloaded` if this was done too often within a few seconds.
    """
    of_user = select(users.c.sessions_from).where(users.c.id == user_id)
    of_memberships = select(memberships.c.sessions_from).where(memberships.c.user_id == user_id)
    before = connection.scalars(of_user.union_all(of_memberships)).all()
    later = _next_sessions_from(*before, now=database_time(connection, database), ahead=_AHEAD_BY_OPERATOR)
    connection.execute(_raise_sessions_from(users, later).where(users.c.id == user_id))
    return later


def _raise_sessions_from(table: Table, later: int) -> Update:
    # Another transaction may have set a later time since the present one was read. It must not become earlier again.
    return update(table).where(table.c.sessions_from < later).values(sessions_from=later)


def _next_sessions_from(*before: int, now: int, ahead: int) -> int:
    """Return the `sessions_from` that ends all present sessions.

    These began up to `now` (Unix seconds), or at one of `before`, the present values of `sessions_from`, which may be
    later. Raises `Overloaded` if the result would be more than `ahead` seconds after `now`: nodes refuse sessions from
    too far in the future.
    """
    later = max(*before, now) + 1
    if later > now + ahead:
        raise Overloaded("signed out too often within a few seconds, or the database's clock was set back")
    return later


def database_time(connection: Connection, database: Database) -> int:
    """Return the database's clock in Unix seconds.

    A sign-out is dated by it: if a node's clock is ahead, other nodes would refuse new sessions until they caught up.
    """
    return connection.execute(select(database.now())).scalar_one()


def _admins(account_id: int) -> Select[tuple[int]]:
    """Select the members that can act as admins: disabled ones cannot."""
    return (
        select(users.c.id)
        .join_from(memberships, users)
        .where(memberships.c.account_id == account_id, IS_ADMIN, users.c.disabled_at.is_(None))
    )


def _membership(account_id: int, user_id: int) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return memberships.c.account_id == account_id, memberships.c.user_id == user_id


def _member(id_: int, email: str, first_name: str, last_name: str, role: str, disabled_at: int | None) -> Member:
    return Member(id_, email, first_name, last_name, Role(role), disabled_at is not None)
