"""What a role may do, and which stands above which: the design's three sentences, spelled out as a table."""

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
def test_a_role_may_do_in_a_section_what_the_table_says(role: Role, section: str) -> None:
    granted = {action for action in ALL if f"{section}:{action}" in permissions(role)}
    assert granted == TABLE[section][role.value]


@pytest.mark.parametrize("role", Role)
def test_permissions_are_sorted_and_there_are_none_beside_the_table(role: Role) -> None:
    granted = permissions(role)
    assert granted == sorted(f"{section}:{action}" for section in TABLE for action in TABLE[section][role.value])


def test_whoever_changes_the_answer_changes_nothing_for_the_next() -> None:
    permissions(Role.EDITOR).append("settings:edit")
    assert "settings:edit" not in permissions(Role.EDITOR)


def test_the_names_are_those_of_the_interface() -> None:
    assert [role.value for role in Role] == ["editor", "publisher", "admin"]
    assert {scope.value for scope in Scope} == {"write:sso", "verify:sso"}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("cap", Role)
def test_a_role_exceeds_those_below_it_and_not_itself(role: Role, cap: Role) -> None:
    order = ["editor", "publisher", "admin"]
    assert role.exceeds(cap) == (order.index(role.value) > order.index(cap.value))


@pytest.mark.parametrize("other", ["", "Editor", "ADMIN", "owner", "admin "])
def test_there_are_no_other_roles(other: str) -> None:
    with pytest.raises(ValueError, match="is not a valid Role"):
        Role(other)
