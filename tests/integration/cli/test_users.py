"""The command `user`."""

import pytest

from sso_service.database.directory import ProvisionRequest, provision
from sso_service.database.transactions import Database
from tests.support.client import Client
from tests.support.command_line import EMAIL, assert_refused, assert_usage_error, run, succeed, table
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite


def test_user_show_prints_a_user_with_accounts_and_roles(env: dict[str, str], jane: int) -> None:
    printed = succeed("user", "show", EMAIL, env=env)
    for word in (EMAIL, JANE["first_name"], JANE["last_name"], str(jane)):
        assert word in printed
    assert table(printed)[-1] == [str(ACCOUNT), "One", "editor"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("show",),
        ("set-role", "--account", str(ACCOUNT), "admin"),
        ("remove", "--account", str(ACCOUNT)),
        ("disable",),
        ("enable",),
        ("sign-out",),
    ],
    ids=" ".join,
)
@on_sqlite
def test_the_case_of_an_address_does_not_matter(env: dict[str, str], jane: int, arguments: tuple[str, ...]) -> None:
    succeed("user", arguments[0], EMAIL.upper(), *arguments[1:], env=env)


@pytest.mark.anyio
async def test_a_new_role_applies_to_the_current_session(env: dict[str, str], client: Client, api_token: str) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    for role in ("admin", "publisher", "editor"):
        succeed("user", "set-role", EMAIL, "--account", str(ACCOUNT), role, env=env)
        assert (await client.get("/session")).json()["role"] == role
        assert table(succeed("user", "show", EMAIL, env=env))[-1][-1] == role


def test_a_user_can_have_different_roles_in_two_accounts(env: dict[str, str], database: Database, jane: int) -> None:
    with changing(database) as connection:
        provision(database, connection, [ProvisionRequest(EMAIL, "Jane", "Doe", OTHER_ACCOUNT, 0)])
    succeed("user", "set-role", EMAIL, "--account", str(OTHER_ACCOUNT), "admin", env=env)
    assert [row[-1] for row in table(succeed("user", "show", EMAIL, env=env))[-2:]] == ["editor", "admin"]
    succeed("user", "remove", EMAIL, "--account", str(ACCOUNT), env=env)
    assert table(succeed("user", "show", EMAIL, env=env))[-1] == [str(OTHER_ACCOUNT), "Other", "admin"]
    assert str(ACCOUNT) not in succeed("user", "show", EMAIL, env=env)


@pytest.mark.anyio
@pytest.mark.parametrize("arguments", [("remove", "--account", str(ACCOUNT)), ("disable",), ("sign-out",)])
async def test_removing_disabling_and_signing_out_end_the_session(
    env: dict[str, str], client: Client, api_token: str, arguments: tuple[str, ...]
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    assert (await client.get("/session")).status == 200
    succeed("user", arguments[0], EMAIL, *arguments[1:], env=env)
    assert (await client.get("/session")).status == 401


@pytest.mark.anyio
@pytest.mark.parametrize("arguments", [("remove", "--account", str(ACCOUNT)), ("disable",)])
@on_sqlite
async def test_removing_and_disabling_invalidate_login_links(
    env: dict[str, str], client: Client, api_token: str, arguments: tuple[str, ...]
) -> None:
    token = await client.issue(api_token)
    succeed("user", arguments[0], EMAIL, *arguments[1:], env=env)
    assert (await client.get(f"{PAGE}?sso={token}")).status == 403


@pytest.mark.anyio
async def test_a_user_can_sign_in_directly_after_a_sign_out(
    env: dict[str, str], client: Client, api_token: str
) -> None:
    await client.issue(api_token)
    succeed("user", "sign-out", EMAIL, env=env)
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
    assert (await client.get("/session")).status == 200


@pytest.mark.anyio
@on_sqlite
async def test_a_disabled_user_can_sign_in_once_enabled(env: dict[str, str], client: Client, api_token: str) -> None:
    await client.issue(api_token)
    succeed("user", "disable", EMAIL, env=env)
    assert "disabled" in succeed("user", "show", EMAIL, env=env)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=api_token)).error == "user_disabled"
    succeed("user", "enable", EMAIL, env=env)
    assert "disabled" not in succeed("user", "show", EMAIL, env=env)
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303


def test_an_unknown_role_is_refused(env: dict[str, str], jane: int) -> None:
    outcome = run("user", "set-role", EMAIL, "--account", str(ACCOUNT), "owner", env=env)
    assert_usage_error(outcome, "owner", "editor", "publisher", "admin")
    assert table(succeed("user", "show", EMAIL, env=env))[-1][-1] == "editor"


@pytest.mark.parametrize("name", ["show", "set-role", "remove", "disable", "enable", "sign-out"])
@pytest.mark.parametrize("email", ["nobody@example.com", "no address", "", "x@" + "y" * 300 + ".example"])
def test_an_unknown_address_is_refused(sqlite_env: dict[str, str], name: str, email: str) -> None:
    options = {"set-role": ("--account", str(ACCOUNT), "editor"), "remove": ("--account", str(ACCOUNT))}
    outcome = run("user", name, email, *options.get(name, ()), env=sqlite_env)
    assert_refused(outcome, "nobody@example.com" if email.startswith("nobody") else "email")


@pytest.mark.parametrize("arguments", [("set-role", "admin"), ("remove",)], ids=" ".join)
def test_the_role_of_a_user_who_is_not_a_member_cannot_change(
    env: dict[str, str], jane: int, arguments: tuple[str, ...]
) -> None:
    outcome = run("user", arguments[0], EMAIL, "--account", str(OTHER_ACCOUNT), *arguments[1:], env=env)
    assert_refused(outcome, EMAIL, str(OTHER_ACCOUNT))
    assert table(succeed("user", "show", EMAIL, env=env))[-1] == [str(ACCOUNT), "One", "editor"]
