"""The command `api-token`."""

import hashlib
import json
import re
import shlex
import time
from pathlib import Path

import pytest

from sso_service.permissions import Role, Scope
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.command_line import API_TOKEN, EMAIL, assert_refused, assert_usage_error, run, succeed, table
from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.databases import Query, on_sqlite
from tests.support.files import contents

ABSENT = 4_000_000_000


def test_api_token_create_prints_only_the_secret(env: dict[str, str], query: Query) -> None:
    printed = succeed(
        "api-token", "create", "--account", str(ACCOUNT), "--name", "intranet",
        "--scope", "write:sso", "--scope", "verify:sso", "--max-role", "publisher", "--expires-in", "30", env=env,
    )  # fmt: skip
    assert API_TOKEN.fullmatch(printed.removesuffix("\n"))
    [row] = query("SELECT * FROM api_tokens")
    assert row.digest == hashlib.sha256(printed.strip().encode()).hexdigest()
    assert (row.account_id, row.name, row.max_role) == (ACCOUNT, "intranet", "publisher")
    assert set(row.scopes.split()) == {"write:sso", "verify:sso"}
    assert abs(row.created_at - time.time()) < 30
    assert row.expires_at == row.created_at + 30 * 86400
    assert row.revoked_at is None


@on_sqlite
def test_an_api_token_has_no_max_role_and_no_expiry_by_default(env: dict[str, str], query: Query) -> None:
    succeed("api-token", "create", "--account", str(ACCOUNT), "--name", "plain", "--scope", "write:sso", env=env)
    [row] = query("SELECT * FROM api_tokens")
    assert (row.max_role, row.expires_at) == (None, None)


def test_a_platform_api_token_belongs_to_no_account(env: dict[str, str], query: Query) -> None:
    printed = succeed("api-token", "create", "--platform", "--name", "studio", "--scope", "verify:sso", env=env)
    assert API_TOKEN.fullmatch(printed.removesuffix("\n"))
    [row] = query("SELECT * FROM api_tokens")
    assert (row.account_id, row.scopes) == (None, "verify:sso")
    assert table(succeed("api-token", "list", env=env))[0][1] == "platform"


@on_sqlite
def test_api_token_list_prints_json(env: dict[str, str], query: Query) -> None:
    assert json.loads(succeed("api-token", "list", "--json", env=env)) == []
    options = ("--scope", "write:sso", "--scope", "verify:sso", "--max-role", "editor", "--expires-in", "1")
    secret = succeed("api-token", "create", "--account", str(ACCOUNT), "--name", "intranet", *options, env=env).strip()
    succeed("api-token", "create", "--platform", "--name", "studio", "--scope", "verify:sso", env=env)
    succeed("api-token", "revoke", "1", env=env)

    [intranet, studio] = json.loads(succeed("api-token", "list", "--json", env=env))

    row = query("SELECT * FROM api_tokens WHERE id = 1")[0]
    assert intranet == {
        "id": 1,
        "account_id": ACCOUNT,
        "name": "intranet",
        "hint": secret[-4:],
        "scopes": ["verify:sso", "write:sso"],
        "max_role": "editor",
        "created_at": row.created_at,
        "expires_at": row.created_at + 86400,
        "revoked_at": row.revoked_at,
        "last_used_at": None,
        "created_by": None,
        "created_by_name": None,
        "created_by_email": None,
        "status": "revoked",
    }
    assert (studio["account_id"], studio["max_role"], studio["expires_at"]) == (None, None, None)
    assert studio["status"] == "active"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--platform", "--scope", "write:sso"), ["platform", "write:sso"]),
        (("--platform", "--scope", "verify:sso", "--scope", "write:sso"), ["platform", "write:sso"]),
        (("--platform", "--account", "123", "--scope", "verify:sso"), ["--platform", "--account"]),
        (("--scope", "verify:sso"), ["--platform", "--account"]),
        (("--account", str(ABSENT), "--scope", "write:sso"), [str(ABSENT)]),
    ],
)
def test_an_api_token_for_no_account_or_too_many_is_refused(
    sqlite_env: dict[str, str], options: tuple[str, ...], words: list[str]
) -> None:
    assert_refused(run("api-token", "create", "--name", "new", *options, env=sqlite_env), *words)
    assert table(succeed("api-token", "list", env=sqlite_env)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scope", "admin:sso"), ["--scope", "admin:sso", "write:sso", "verify:sso"]),
        (("--scope", "write:sso", "--scope", ""), ["--scope"]),
        (("--scope", "write:sso", "--max-role", "owner"), ["--max-role", "owner", "editor", "publisher", "admin"]),
    ],
)
def test_unknown_scopes_and_roles_are_refused(
    sqlite_env: dict[str, str], options: tuple[str, ...], words: list[str]
) -> None:
    create = ("api-token", "create", "--account", str(ACCOUNT), "--name", "new")
    assert_usage_error(run(*create, *options, env=sqlite_env), *words)
    assert table(succeed("api-token", "list", env=sqlite_env)) == []


def test_the_help_of_api_token_create_lists_scopes_and_roles(sqlite_env: dict[str, str]) -> None:
    printed = succeed("api-token", "create", "--help", env=sqlite_env)
    for word in (*Scope, *Role, "Recommended: editor", "Recommended: 90"):
        assert word in " ".join(printed.split())


@pytest.mark.parametrize("days", ["0", "-1", "soon"])
def test_the_lifetime_of_an_api_token_is_a_number_of_days(sqlite_env: dict[str, str], days: str) -> None:
    options = ("--account", str(ACCOUNT), "--name", "new", "--scope", "write:sso", "--expires-in", days)
    assert_usage_error(run("api-token", "create", *options, env=sqlite_env), "--expires-in", days)
    assert table(succeed("api-token", "list", env=sqlite_env)) == []


@pytest.mark.anyio
@on_sqlite
async def test_an_api_token_expires_after_its_lifetime(env: dict[str, str], client: Client, clock: Clock) -> None:
    options = ("--account", str(ACCOUNT), "--name", "short", "--scope", "write:sso", "--expires-in", "1")
    secret = succeed("api-token", "create", *options, env=env).strip()
    clock.advance(86400 - 60)
    await client.issue(secret)
    clock.advance(120)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=secret)).status == 401


@pytest.mark.anyio
@on_sqlite
async def test_an_api_token_is_refused_for_users_above_its_max_role(
    env: dict[str, str], client: Client, jane: int
) -> None:
    options = ("--account", str(ACCOUNT), "--name", "capped", "--scope", "write:sso", "--max-role", "publisher")
    secret = succeed("api-token", "create", *options, env=env).strip()
    for role, status in (("editor", 201), ("publisher", 201), ("admin", 403)):
        succeed("user", "set-role", EMAIL, "--account", str(ACCOUNT), role, env=env)
        assert (await client.post_json("/v1/sso_tokens", JANE, token=secret)).status == status, role


def test_lists_contain_no_secrets_and_no_digests(env: dict[str, str], keys_dir: Path, jane: int) -> None:
    options = ("--account", str(ACCOUNT), "--name", "intranet", "--scope", "write:sso")
    secret = succeed("api-token", "create", *options, env=env).strip()
    keys = [json.loads(content)["secret"] for content in contents(keys_dir).values()]
    printed = "".join(
        succeed(*arguments, env=env)
        for arguments in (
            ("api-token", "list"),
            ("api-token", "revoke", "1"),
            ("api-token", "list"),
            ("account", "list"),
            ("keys", "list"),
            ("keys", "rotate"),
            ("keys", "list"),
            ("user", "show", EMAIL),
        )
    )
    assert "intranet" in printed
    for hidden in (secret, secret.removeprefix("wf_live_"), hashlib.sha256(secret.encode()).hexdigest(), *keys):
        assert hidden not in printed
    # The hint identifies an API token that the operator has at hand. It must not help to guess one.
    shown = {secret[start : start + 9] for start in range(len("wf_live_"), len(secret) - 8)}
    assert not any(piece in printed for piece in shown)
    assert secret[-4:] in printed


def test_a_second_revocation_keeps_the_time_of_the_first(env: dict[str, str], query: Query) -> None:
    for name in ("kept", "leaked"):
        succeed("api-token", "create", "--account", str(ACCOUNT), "--name", name, "--scope", "write:sso", env=env)
    ids = {row.name: row.id for row in query("SELECT id, name FROM api_tokens")}
    assert "leaked" in succeed("api-token", "revoke", str(ids["leaked"]), env=env)
    revoked = {row.name: row.revoked_at for row in query("SELECT name, revoked_at FROM api_tokens")}
    assert revoked["kept"] is None
    assert abs(revoked["leaked"] - time.time()) < 30
    succeed("api-token", "revoke", str(ids["leaked"]), env=env)
    assert {row.name: row.revoked_at for row in query("SELECT name, revoked_at FROM api_tokens")} == revoked


@pytest.mark.anyio
@on_sqlite
async def test_a_revoked_api_token_is_refused(env: dict[str, str], client: Client, api_token: str) -> None:
    await client.issue(api_token)
    succeed("api-token", "revoke", "1", env=env)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=api_token)).status == 401


@pytest.mark.anyio
@on_sqlite
async def test_api_token_revoke_names_the_commands_that_end_sessions(
    env: dict[str, str], client: Client, api_token: str
) -> None:
    waiting = await client.issue(api_token)
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")

    printed = succeed("api-token", "revoke", "1", env=env)

    assert re.search(r"\b300 s\b", printed)
    assert re.search(r"\b12 h\b", printed)
    commands = [shlex.split(line)[1:] for line in re.findall(r"sso-service (?:\S+ ?)+", printed)]
    assert commands == [["keys", "revoke", "--all"], ["user", "sign-out", "EMAIL"]]
    assert (await client.get("/session")).status == 200  # the session goes on, as printed
    for arguments in commands:
        succeed(*(EMAIL if word == "EMAIL" else word for word in arguments), env=env)
    assert "no known key" in succeed("inspect", waiting, env=env)


@pytest.mark.parametrize(
    ("variable", "value", "printed"),
    [
        ("SSO_TOKEN_TTL", "60", r"\b60 s\b"),
        ("SSO_SESSION_TTL", "86400", r"\b24 h\b"),
        ("SSO_SESSION_TTL", "1800", r"\b30 min\b|\b1800 s\b|\b0[.]5 h\b"),
    ],
    ids=["tokens for a minute", "sessions for a day", "sessions for half an hour"],
)
def test_api_token_revoke_prints_the_lifetimes_of_the_settings(
    sqlite_env: dict[str, str], variable: str, value: str, printed: str
) -> None:
    options = ("--account", str(ACCOUNT), "--name", "leaked", "--scope", "write:sso")
    succeed("api-token", "create", *options, env=sqlite_env)
    assert re.search(printed, succeed("api-token", "revoke", "1", env=sqlite_env | {variable: value}))
