"""Changes by an operator or an admin: users by address, at a given time, in the test's own transaction."""

from typing import cast

from sqlalchemy import ColumnElement, Connection, literal

from sso_service.database import members
from sso_service.database.accounts import (
    add_account,
    add_team,
    create_api_token,
    list_api_tokens_of,
    revoke_api_token,
    revoke_api_tokens_named,
)
from sso_service.database.members import find_user, list_memberships, sign_out_member
from sso_service.database.transactions import Database
from sso_service.permissions import Role

__all__ = [
    "add_account",
    "add_team",
    "create_api_token",
    "disable_user",
    "enable_user",
    "find_user",
    "list_api_tokens_of",
    "list_memberships",
    "remove_member",
    "revoke_api_token",
    "revoke_api_tokens_named",
    "set_role",
    "sign_out_member",
    "sign_out_user",
]


class _Clock:
    """Stand-in for a database whose clock shows a given time."""

    def __init__(self, now: int) -> None:
        self._now = now

    def now(self) -> ColumnElement[int]:
        return literal(self._now)


def set_role(connection: Connection, email: str, account_id: int, role: Role) -> int:
    """Change a member's role, and return the user's id."""
    user_id = find_user(connection, email).id
    members.set_role(connection, account_id, user_id, role)
    return user_id


def remove_member(connection: Connection, email: str, account_id: int) -> int:
    """Remove a member, and return the user's id."""
    user_id = find_user(connection, email).id
    members.remove_member(connection, account_id, user_id)
    return user_id


def disable_user(connection: Connection, email: str, *, now: int) -> int:
    """Disable a user at `now` (Unix seconds), and return their id."""
    user_id = find_user(connection, email).id
    members.disable_user(connection, user_id, database=cast("Database", _Clock(now)))
    return user_id


def enable_user(connection: Connection, email: str) -> int:
    """Enable a user, and return their id."""
    user_id = find_user(connection, email).id
    members.enable_user(connection, user_id)
    return user_id


def sign_out_user(connection: Connection, email: str, *, now: int) -> int:
    """End a user's sessions at `now` (Unix seconds), and return their id."""
    user_id = find_user(connection, email).id
    members.sign_out_user(connection, user_id, database=cast("Database", _Clock(now)))
    return user_id
