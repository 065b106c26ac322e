"""Roles and permissions: a table of each role's actions, and the order of the roles."""

import pytest

from sso_service.permissions import Role, Scope, permissions

ALL = {"view", "edit", "create", "delete", "publish"}
TABLE = {
    "posts": {"editor": {"view", "edit"}, "publisher": ALL, "admin": ALL},
    "ideas": {"editor": {"view", "edit"}, "publisher": ALL, "admin": ALL},
    "areas": {"editor": set(), "publisher": ALL, "admin": ALL},
    "topics": {"editor": set(), "publisher": ALL, "admin": ALL},
    "templates": {"editor": set(), "publisher": ALL, "admin": ALL},
    "settings": {"editor": set(), "publisher": set(), "admin": ALL},
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("section", TABLE)
def test_a_role_has_exactly_the_actions_of_the_table(role: Role, section: str) -> None:
    granted = {action for action in ALL if f"{section}:{action}" in permissions(role)}
    assert granted == TABLE[section][role.value]


@pytest.mark.parametrize("role", Role)
def test_permissions_are_sorted_and_complete(role: Role) -> None:
    granted = permissions(role)
    assert granted == sorted(f"{section}:{action}" for section in TABLE for action in TABLE[section][role.value])


def test_changing_a_result_does_not_affect_later_results() -> None:
    permissions(Role.EDITOR).append("settings:edit")
    assert "settings:edit" not in permissions(Role.EDITOR)


def test_the_names_are_those_of_the_api() -> None:
    assert [role.value for role in Role] == ["editor", "publisher", "admin"]
    assert {scope.value for scope in Scope} == {"write:sso", "verify:sso"}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("cap", Role)
def test_a_role_exceeds_only_those_below_it(role: Role, cap: Role) -> None:
    order = ["editor", "publisher", "admin"]
    assert role.exceeds(cap) == (order.index(role.value) > order.index(cap.value))


@pytest.mark.parametrize("other", ["", "Editor", "ADMIN", "owner", "admin "])
def test_unknown_roles_are_rejected(other: str) -> None:
    with pytest.raises(ValueError, match="is not a valid Role"):
        Role(other)
