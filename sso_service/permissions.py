"""Scopes of API tokens, roles of people, and what a role may do. Pure: tables and look-ups."""

from collections.abc import Sequence
from enum import StrEnum


class Scope(StrEnum):
    """What an API token may be used for."""

    WRITE_SSO = "write:sso"
    VERIFY_SSO = "verify:sso"


class Role(StrEnum):
    """A person's role in one account, from the least to the most powerful."""

    EDITOR = "editor"
    PUBLISHER = "publisher"
    ADMIN = "admin"

    def exceeds(self, other: "Role") -> bool:
        """True if this role stands above `other`."""
        return _RANK[self] > _RANK[other]


_RANK = {role: rank for rank, role in enumerate(Role)}

_CONTENT = ("posts", "ideas", "areas", "topics", "templates")
SECTIONS = (*_CONTENT, "settings")
"""The sections of a Studio."""
ACTIONS = ("view", "edit", "create", "delete", "publish")
"""What can be done in a section."""


def _grant(sections: Sequence[str], actions: Sequence[str]) -> frozenset[str]:
    return frozenset(f"{section}:{action}" for section in sections for action in actions)


# The one table that says who may do what. Every other statement about it is derived from here.
_PERMISSIONS = {
    Role.EDITOR: _grant(("posts", "ideas"), ("view", "edit")),
    Role.PUBLISHER: _grant(_CONTENT, ACTIONS),
    Role.ADMIN: _grant(SECTIONS, ACTIONS),
}


def may(role: Role, section: str, action: str) -> bool:
    """True if `role` may do `action` in `section`."""
    return f"{section}:{action}" in _PERMISSIONS[role]


def may_view(role: Role, section: str) -> bool:
    """True if `role` sees `section` of a Studio. A section that the table does not know is for admins only."""
    return role is Role.ADMIN or may(role, section, "view")


def permissions(role: Role) -> list[str]:
    """The sorted `section:action` pairs that `role` may do."""
    return sorted(_PERMISSIONS[role])
