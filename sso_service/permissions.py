"""Scopes of API tokens, roles of people, and what a role may do. Pure: tables and look-ups."""

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

_ACTIONS = frozenset({"view", "edit", "create", "delete", "publish"})
_CONTENT = frozenset({"posts", "ideas", "areas", "topics", "templates"})
_SETTINGS = frozenset({"settings"})


def _grant(sections: frozenset[str], actions: frozenset[str]) -> frozenset[str]:
    return frozenset(f"{section}:{action}" for section in sections for action in actions)


# The one table that says who may do what. Every other statement about it is derived from here.
_PERMISSIONS = {
    Role.EDITOR: _grant(frozenset({"posts", "ideas"}), frozenset({"view", "edit"})),
    Role.PUBLISHER: _grant(_CONTENT, _ACTIONS),
    Role.ADMIN: _grant(_CONTENT | _SETTINGS, _ACTIONS),
}


def may_view(role: Role, section: str) -> bool:
    """True if `role` sees `section` of a Studio. A section that the table does not know is for admins only."""
    return role is Role.ADMIN or f"{section}:view" in _PERMISSIONS[role]


def permissions(role: Role) -> list[str]:
    """The sorted `section:action` pairs that `role` may do."""
    return sorted(_PERMISSIONS[role])
