"""Scopes of API tokens, roles of members, and the permissions of each role. Pure: tables and look-ups."""

from collections.abc import Sequence
from enum import StrEnum


class Scope(StrEnum):
    """A permission of an API token."""

    WRITE_SSO = "write:sso"
    VERIFY_SSO = "verify:sso"


class Role(StrEnum):
    """A member's role in an account, ordered from the least to the most powerful."""

    EDITOR = "editor"
    PUBLISHER = "publisher"
    ADMIN = "admin"

    def exceeds(self, other: "Role") -> bool:
        """Return whether this role ranks above `other`."""
        return _RANK[self] > _RANK[other]


_RANK = {role: rank for rank, role in enumerate(Role)}

_CONTENT = ("posts", "ideas", "areas", "topics", "templates")
SECTIONS = (*_CONTENT, "settings")
"""The sections of a Studio."""
ACTIONS = ("view", "edit", "create", "delete", "publish")
"""The actions within a section."""


def _grant(sections: Sequence[str], actions: Sequence[str]) -> frozenset[str]:
    return frozenset(f"{section}:{action}" for section in sections for action in actions)


# The single source of permissions. Everything else about permissions is derived from this table.
_PERMISSIONS = {
    Role.EDITOR: _grant(("posts", "ideas"), ("view", "edit")),
    Role.PUBLISHER: _grant(_CONTENT, ACTIONS),
    Role.ADMIN: _grant(SECTIONS, ACTIONS),
}


def may(role: Role, section: str, action: str) -> bool:
    """Return whether `role` may do `action` in `section`."""
    return f"{section}:{action}" in _PERMISSIONS[role]


def may_view(role: Role, section: str) -> bool:
    """Return whether `role` may view `section`. Sections that are not in the table are for admins only."""
    return role is Role.ADMIN or may(role, section, "view")


def permissions(role: Role) -> list[str]:
    """Return the sorted `section:action` pairs that `role` may do."""
    return sorted(_PERMISSIONS[role])
