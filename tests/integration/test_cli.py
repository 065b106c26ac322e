"""The command line: what each command does, prints and refuses, on both databases."""

import hashlib
import json
import os
import re
import shlex
import socket
import stat
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from sqlalchemy import Row, text

from scripts.tools.ports import free_port
from sso_service import cli, keyring, tokens
from sso_service.database import database_at, ledger
from sso_service.database.directory import AccessQuery, ProvisionRequest, provision
from sso_service.database.ledger import Redemption, Verdict, floor_at, redeem
from sso_service.database.schema import SCHEMA_VERSION
from sso_service.database.transactions import Database
from sso_service.keyring import SigningKey
from sso_service.server import supervisor
from sso_service.services.node import Node
from sso_service.settings import Settings
from sso_service.tokens import Claims
from sso_service.web.app import create_app
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.command_line import API_TOKEN, assert_refused, run, succeed
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE, PORTAL, TEAM
from tests.support.databases import changing, emptied, on_postgresql, on_sqlite
from tests.support.files import contents

EMAIL = JANE["email"]
PASSWORD = "hunter2"
ABSENT = 4_000_000_000
TOO_LARGE = "99999999999999999999"


def table(output: str) -> list[list[str]]:
    """The cells of what a list command prints, without the titles. Columns are two spaces apart."""
    return [re.split(r" {2,}", line) for line in output.splitlines()[1:]]


def states(env: Mapping[str, str]) -> dict[str, str]:
    """The state of each key, by id, newest first, as `keys list` has it."""
    return {row[0]: row[1] for row in table(succeed("keys", "list", env=env))}


@pytest.fixture
def env(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The settings of an operator whose database has the accounts of `tests.support.data`."""
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}


@pytest.fixture
def sqlite_env(sqlite_template: Path, tmp_path: Path) -> dict[str, str]:
    """The same on SQLite, for what does not depend on the database."""
    (tmp_path / "sso.db").write_bytes(sqlite_template.read_bytes())
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": "sqlite:///sso.db"}


@pytest.fixture
def query(database: Database) -> Callable[[str], Sequence[Row[Any]]]:
    """Rows of the database behind `env`."""

    def rows(statement: str) -> Sequence[Row[Any]]:
        with database.connect() as connection:
            return connection.execute(text(statement)).all()

    return rows


@pytest.fixture
def jane(database: Database) -> int:
    """The id of a user who is an editor in `ACCOUNT`."""
    person = ProvisionRequest(EMAIL, JANE["first_name"], JANE["last_name"], ACCOUNT, int(time.time()))
    with changing(database) as connection:
        return provision(database, connection, [person])[0].user_id


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_makes_the_database_and_a_first_key_that_signs(env: dict[str, str], tmp_path: Path) -> None:
    emptied(env["SSO_DATABASE_URL"])
    assert run("init", env=env).code == 0
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    assert list(states(env).values()) == ["signs"]
    assert table(succeed("account", "list", env=env)) == []


def test_init_makes_the_directories_that_are_missing(tmp_path: Path) -> None:
    env = {"SSO_HOME": str(tmp_path / "new" / "home")}
    assert run("init", env=env).code == 0
    assert (tmp_path / "new/home/var/sso.db").is_file()
    assert len(list((tmp_path / "new/home/keys").iterdir())) == 1


def test_init_again_changes_nothing(env: dict[str, str], tmp_path: Path) -> None:
    emptied(env["SSO_DATABASE_URL"])
    run("init", env=env)
    succeed("account", "add", "Kept", "--id", "7", env=env)
    succeed("api-token", "create", "--account", "7", "--name", "kept", "--scope", "write:sso", env=env)
    keys = contents(tmp_path / "keys")
    listed = [succeed(*arguments, env=env) for arguments in (("account", "list"), ("api-token", "list"))]

    succeed("init", env=env)

    assert contents(tmp_path / "keys") == keys
    assert [succeed(*arguments, env=env) for arguments in (("account", "list"), ("api-token", "list"))] == listed


def test_init_makes_a_key_that_signs_now_where_every_key_is_yet_to_sign(
    sqlite_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "keys").mkdir()
    later = keyring.rotate(tmp_path / "keys", now=int(time.time()), lead=600)
    succeed("init", env=sqlite_env)
    assert sorted(states(sqlite_env).values()) == ["signs", "signs later"]
    assert states(sqlite_env)[later.id] == "signs later"


@on_sqlite
def test_init_leaves_the_keys_alone_where_the_database_is_not_empty(
    env: dict[str, str], keys_dir: Path, tmp_path: Path
) -> None:
    before = contents(keys_dir)
    succeed("init", env=env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("init",), ("init", "--demo"), ("db", "upgrade")], ids=" ".join)
def test_an_empty_database_revokes_every_key_since_it_forgot_which_tokens_were_used(
    env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    keyring.rotate(keys_dir, now=int(time.time()))
    old = list(states(env))
    emptied(env["SSO_DATABASE_URL"])

    outcome = run(*arguments, env=env)

    assert outcome.code == 0
    assert "revoked" in outcome.err
    after = states(env)
    assert [after[key_id] for key_id in old] == ["revoked"] * 2
    assert list(after.values()).count("signs") == 1


def test_keys_that_could_not_be_revoked_for_an_empty_database_are_revoked_by_the_next_init(
    env: dict[str, str], keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied(env["SSO_DATABASE_URL"])
    old = next(iter(states(env)))

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("sso_service.keyring.os.replace", fail)  # a key directory that cannot be written
        assert run("init", env=env).code == 1

    assert run("init", env=env).code == 0
    assert states(env)[old] == "revoked"


# --- init --demo -----------------------------------------------------------------------------------------------------


def test_init_demo_makes_account_team_admin_and_one_api_token_which_it_prints(
    env: dict[str, str], query: Callable[[str], Sequence[Row[Any]]]
) -> None:
    emptied(env["SSO_DATABASE_URL"])
    printed = run("init", "--demo", env=env).out

    [secret] = set(API_TOKEN.findall(printed))
    assert table(succeed("account", "list", env=env)) == [["123", "Demo", "-", "42 Demo team"]]
    [row] = query("SELECT * FROM api_tokens")
    assert (row.account_id, row.name, row.digest) == (123, "demo", hashlib.sha256(secret.encode()).hexdigest())
    assert "write:sso" in row.scopes.split()
    [admin] = query("SELECT email, account_id, role FROM users JOIN memberships ON user_id = id")
    assert (admin.account_id, admin.role) == (123, "admin")
    assert table(succeed("user", "show", admin.email, env=env))[-1] == ["123", "Demo", "admin"]


def test_init_demo_again_replaces_only_the_demo_api_token(
    env: dict[str, str], keys_dir: Path, query: Callable[[str], Sequence[Row[Any]]]
) -> None:
    for account in (ACCOUNT, OTHER_ACCOUNT):
        for name in ("demo", "mine"):
            succeed("api-token", "create", "--account", str(account), "--name", name, "--scope", "write:sso", env=env)
    keys = contents(keys_dir)
    secrets = [API_TOKEN.findall(succeed("init", "--demo", env=env))[0] for _ in range(2)]
    assert secrets[0] != secrets[1]

    alive = query("SELECT account_id, name, digest FROM api_tokens WHERE revoked_at IS NULL ORDER BY id")
    assert [(row.account_id, row.name) for row in alive] == [
        (ACCOUNT, "mine"),
        (OTHER_ACCOUNT, "demo"),
        (OTHER_ACCOUNT, "mine"),
        (ACCOUNT, "demo"),
    ]
    assert alive[-1].digest == hashlib.sha256(secrets[1].encode()).hexdigest()
    assert contents(keys_dir) == keys
    assert "wf_live_" not in succeed("init", env=env)


# --- accounts and teams ----------------------------------------------------------------------------------------------


def test_account_add_prints_the_id_and_account_list_shows_it(env: dict[str, str]) -> None:
    assert succeed("account", "add", "Chosen", "--id", "2000", "--portal-url", PORTAL, env=env) == "2000\n"
    assert succeed("account", "add", "Next", env=env) == "2001\n"
    assert table(succeed("account", "list", env=env))[-2:] == [
        ["2000", "Chosen", PORTAL, "-"],
        ["2001", "Next", "-", "-"],
    ]


def test_team_add_prints_the_id_and_account_list_shows_it(env: dict[str, str]) -> None:
    assert succeed("team", "add", str(OTHER_ACCOUNT), "Chosen", "--id", "3000", env=env) == "3000\n"
    assert succeed("team", "add", str(OTHER_ACCOUNT), "Next", env=env) == "3001\n"
    row = table(succeed("account", "list", env=env))[-1]
    assert row[0] == str(OTHER_ACCOUNT)
    assert row[-1].endswith("3000 Chosen, 3001 Next")


@pytest.mark.parametrize("number", ["0", "-1", "4294967296", TOO_LARGE])
@pytest.mark.parametrize("arguments", [("account", "add", "New"), ("team", "add", str(ACCOUNT), "New")])
def test_an_id_must_fit_into_a_token(sqlite_env: dict[str, str], arguments: tuple[str, ...], number: str) -> None:
    assert_refused(run(*arguments, "--id", number, env=sqlite_env), "1", "4294967295")


@pytest.mark.parametrize("name", ["", "   ", "x" * 101, "line\nbreak", "\x1b[31mred"])
@pytest.mark.parametrize("arguments", [("account", "add"), ("team", "add", str(ACCOUNT))])
def test_a_name_must_be_one_that_can_be_shown(
    sqlite_env: dict[str, str], arguments: tuple[str, ...], name: str
) -> None:
    assert_refused(run(*arguments, name, env=sqlite_env), "name")


@pytest.mark.parametrize(
    "url",
    [
        "http://portal.example/",
        "javascript:alert(1)",
        "portal.example",
        "https://",
        "//x",
        "https://[",
        "https:///x",
        "https://portal.example/\x1b[31m",
        "https://portal.example/ x",
    ],
)
def test_a_portal_is_an_https_url(sqlite_env: dict[str, str], url: str) -> None:
    assert_refused(run("account", "add", "New", "--portal-url", url, env=sqlite_env), "https")
    assert "New" not in succeed("account", "list", env=sqlite_env)


@pytest.mark.parametrize(
    ("arguments", "number"),
    [(("account", "add", "New", "--id", str(ACCOUNT)), ACCOUNT), (("team", "add", "999", "New", "--id", "42"), TEAM)],
)
def test_an_id_that_is_taken_is_refused(env: dict[str, str], arguments: tuple[str, ...], number: int) -> None:
    before = succeed("account", "list", env=env)
    assert_refused(run(*arguments, env=env), str(number), "exists")
    assert succeed("account", "list", env=env) == before


# --- API tokens ------------------------------------------------------------------------------------------------------


def test_api_token_create_prints_the_secret_and_only_it(
    env: dict[str, str], query: Callable[[str], Sequence[Row[Any]]]
) -> None:
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
def test_an_api_token_has_no_cap_and_no_end_unless_given(
    env: dict[str, str], query: Callable[[str], Sequence[Row[Any]]]
) -> None:
    succeed("api-token", "create", "--account", str(ACCOUNT), "--name", "plain", "--scope", "write:sso", env=env)
    [row] = query("SELECT * FROM api_tokens")
    assert (row.max_role, row.expires_at) == (None, None)


def test_a_platform_api_token_belongs_to_no_account(
    env: dict[str, str], query: Callable[[str], Sequence[Row[Any]]]
) -> None:
    printed = succeed("api-token", "create", "--platform", "--name", "studio", "--scope", "verify:sso", env=env)
    assert API_TOKEN.fullmatch(printed.removesuffix("\n"))
    [row] = query("SELECT * FROM api_tokens")
    assert (row.account_id, row.scopes) == (None, "verify:sso")
    assert table(succeed("api-token", "list", env=env))[0][1] == "platform"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--platform", "--scope", "write:sso"), ["platform", "write:sso"]),
        (("--platform", "--scope", "verify:sso", "--scope", "write:sso"), ["platform", "write:sso"]),
        (("--platform", "--account", "123", "--scope", "verify:sso"), ["--platform", "--account"]),
        (("--scope", "verify:sso"), ["--platform", "--account"]),
        (("--account", "123", "--scope", "admin:sso"), ["admin:sso", "write:sso", "verify:sso"]),
        (("--account", "123", "--scope", "write:sso", "--scope", ""), ["scope"]),
        (
            ("--account", "123", "--scope", "write:sso", "--max-role", "owner"),
            ["owner", "editor", "publisher", "admin"],
        ),
        (("--account", str(ABSENT), "--scope", "write:sso"), [str(ABSENT)]),
    ],
)
def test_an_api_token_that_may_not_be_is_not_made(
    sqlite_env: dict[str, str], options: tuple[str, ...], words: list[str]
) -> None:
    assert_refused(run("api-token", "create", "--name", "new", *options, env=sqlite_env), *words)
    assert table(succeed("api-token", "list", env=sqlite_env)) == []


@pytest.mark.parametrize("days", ["0", "-1", "soon"])
def test_an_api_token_expires_in_a_number_of_days(sqlite_env: dict[str, str], days: str) -> None:
    options = ("--account", str(ACCOUNT), "--name", "new", "--scope", "write:sso", "--expires-in", days)
    outcome = run("api-token", "create", *options, env=sqlite_env)
    assert outcome.code != 0
    assert outcome.out == ""
    assert table(succeed("api-token", "list", env=sqlite_env)) == []


@pytest.mark.anyio
@on_sqlite
async def test_an_api_token_expires_after_its_days(env: dict[str, str], client: Client, clock: Clock) -> None:
    options = ("--account", str(ACCOUNT), "--name", "short", "--scope", "write:sso", "--expires-in", "1")
    secret = succeed("api-token", "create", *options, env=env).strip()
    clock.advance(86400 - 60)
    await client.issue(secret)
    clock.advance(120)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=secret)).status == 401


@pytest.mark.anyio
@on_sqlite
async def test_an_api_token_signs_in_nobody_above_its_max_role(env: dict[str, str], client: Client, jane: int) -> None:
    options = ("--account", str(ACCOUNT), "--name", "capped", "--scope", "write:sso", "--max-role", "publisher")
    secret = succeed("api-token", "create", *options, env=env).strip()
    for role, status in (("editor", 201), ("publisher", 201), ("admin", 403)):
        succeed("user", "set-role", EMAIL, "--account", str(ACCOUNT), role, env=env)
        assert (await client.post_json("/v1/sso_tokens", JANE, token=secret)).status == status, role


def test_no_list_shows_a_secret_or_its_digest(env: dict[str, str], keys_dir: Path, jane: int) -> None:
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
    # The hint is what an operator compares with the token in their hands: enough for that and for nothing else.
    shown = {secret[start : start + 9] for start in range(len("wf_live_"), len(secret) - 8)}
    assert not any(piece in printed for piece in shown)
    assert secret[-4:] in printed


def test_api_token_revoke_ends_it_once(env: dict[str, str], query: Callable[[str], Sequence[Row[Any]]]) -> None:
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
async def test_a_revoked_api_token_issues_no_more(env: dict[str, str], client: Client, api_token: str) -> None:
    await client.issue(api_token)
    succeed("api-token", "revoke", "1", env=env)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=api_token)).status == 401


@pytest.mark.anyio
@on_sqlite
async def test_api_token_revoke_says_what_may_still_be_alive_and_the_commands_that_end_it(
    env: dict[str, str], client: Client, api_token: str
) -> None:
    waiting = await client.issue(api_token)
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")

    printed = succeed("api-token", "revoke", "1", env=env)

    assert re.search(r"\b300 s\b", printed)
    assert re.search(r"\b12 h\b", printed)
    commands = [shlex.split(line)[1:] for line in re.findall(r"sso-service (?:\S+ ?)+", printed)]
    assert commands == [["keys", "revoke", "--all"], ["user", "sign-out", "EMAIL"]]
    assert (await client.get("/session")).status == 200  # it is alive, as was said
    for arguments in commands:
        succeed(*(EMAIL if word == "EMAIL" else word for word in arguments), env=env)
    assert "no key that is here" in succeed("inspect", waiting, env=env)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SSO_TOKEN_TTL", "60", r"\b60 s\b"),
        ("SSO_SESSION_TTL", "86400", r"\b24 h\b"),
        ("SSO_SESSION_TTL", "1800", r"\b30 min\b|\b1800 s\b|\b0[.]5 h\b"),
    ],
    ids=["tokens for a minute", "sessions for a day", "sessions for half an hour"],
)
def test_api_token_revoke_says_how_long_by_the_settings(
    sqlite_env: dict[str, str], variable: str, value: str, said: str
) -> None:
    options = ("--account", str(ACCOUNT), "--name", "leaked", "--scope", "write:sso")
    succeed("api-token", "create", *options, env=sqlite_env)
    assert re.search(said, succeed("api-token", "revoke", "1", env=sqlite_env | {variable: value}))


# --- people ----------------------------------------------------------------------------------------------------------


def test_user_show_tells_who_somebody_is_and_where(env: dict[str, str], jane: int) -> None:
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
def test_a_user_is_found_however_the_address_is_written(
    env: dict[str, str], jane: int, arguments: tuple[str, ...]
) -> None:
    succeed("user", arguments[0], EMAIL.upper(), *arguments[1:], env=env)


@pytest.mark.anyio
async def test_a_new_role_counts_at_once_for_who_is_signed_in(
    env: dict[str, str], client: Client, api_token: str
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    for role in ("admin", "publisher", "editor"):
        succeed("user", "set-role", EMAIL, "--account", str(ACCOUNT), role, env=env)
        assert (await client.get("/session")).json()["role"] == role
        assert table(succeed("user", "show", EMAIL, env=env))[-1][-1] == role


def test_a_role_is_of_one_account(env: dict[str, str], database: Database, jane: int) -> None:
    with changing(database) as connection:
        provision(database, connection, [ProvisionRequest(EMAIL, "Jane", "Doe", OTHER_ACCOUNT, 0)])
    succeed("user", "set-role", EMAIL, "--account", str(OTHER_ACCOUNT), "admin", env=env)
    assert [row[-1] for row in table(succeed("user", "show", EMAIL, env=env))[-2:]] == ["editor", "admin"]
    succeed("user", "remove", EMAIL, "--account", str(ACCOUNT), env=env)
    assert table(succeed("user", "show", EMAIL, env=env))[-1] == [str(OTHER_ACCOUNT), "Other", "admin"]
    assert str(ACCOUNT) not in succeed("user", "show", EMAIL, env=env)


@pytest.mark.anyio
@pytest.mark.parametrize("arguments", [("remove", "--account", str(ACCOUNT)), ("disable",), ("sign-out",)])
async def test_who_is_removed_disabled_or_signed_out_is_signed_in_no_longer(
    env: dict[str, str], client: Client, api_token: str, arguments: tuple[str, ...]
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    assert (await client.get("/session")).status == 200
    succeed("user", arguments[0], EMAIL, *arguments[1:], env=env)
    assert (await client.get("/session")).status == 401


@pytest.mark.anyio
@pytest.mark.parametrize("arguments", [("remove", "--account", str(ACCOUNT)), ("disable",)])
@on_sqlite
async def test_a_link_from_before_does_not_let_in_who_is_removed_or_disabled(
    env: dict[str, str], client: Client, api_token: str, arguments: tuple[str, ...]
) -> None:
    token = await client.issue(api_token)
    succeed("user", arguments[0], EMAIL, *arguments[1:], env=env)
    assert (await client.get(f"{PAGE}?sso={token}")).status == 403


@pytest.mark.anyio
async def test_who_was_signed_out_can_sign_in_again_at_once(
    env: dict[str, str], client: Client, api_token: str
) -> None:
    await client.issue(api_token)
    succeed("user", "sign-out", EMAIL, env=env)
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
    assert (await client.get("/session")).status == 200


@pytest.mark.anyio
@on_sqlite
async def test_disabling_locks_out_until_enabled(env: dict[str, str], client: Client, api_token: str) -> None:
    await client.issue(api_token)
    succeed("user", "disable", EMAIL, env=env)
    assert "disabled" in succeed("user", "show", EMAIL, env=env)
    assert (await client.post_json("/v1/sso_tokens", JANE, token=api_token)).error == "user_disabled"
    succeed("user", "enable", EMAIL, env=env)
    assert "disabled" not in succeed("user", "show", EMAIL, env=env)
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303


def test_a_role_that_does_not_exist_is_refused(env: dict[str, str], jane: int) -> None:
    outcome = run("user", "set-role", EMAIL, "--account", str(ACCOUNT), "owner", env=env)
    assert_refused(outcome, "owner", "editor", "publisher", "admin")
    assert table(succeed("user", "show", EMAIL, env=env))[-1][-1] == "editor"


@pytest.mark.parametrize("name", ["show", "set-role", "remove", "disable", "enable", "sign-out"])
@pytest.mark.parametrize("email", ["nobody@example.com", "no address", "", "x@" + "y" * 300 + ".example"])
def test_a_user_who_is_not_known_is_refused(sqlite_env: dict[str, str], name: str, email: str) -> None:
    options = {"set-role": ("--account", str(ACCOUNT), "editor"), "remove": ("--account", str(ACCOUNT))}
    outcome = run("user", name, email, *options.get(name, ()), env=sqlite_env)
    assert_refused(outcome, "nobody@example.com" if email.startswith("nobody") else "email")


@pytest.mark.parametrize("arguments", [("set-role", "admin"), ("remove",)], ids=" ".join)
def test_who_is_not_a_member_has_no_role_to_change_or_to_lose(
    env: dict[str, str], jane: int, arguments: tuple[str, ...]
) -> None:
    outcome = run("user", arguments[0], EMAIL, "--account", str(OTHER_ACCOUNT), *arguments[1:], env=env)
    assert_refused(outcome, EMAIL, str(OTHER_ACCOUNT))
    assert table(succeed("user", "show", EMAIL, env=env))[-1] == [str(ACCOUNT), "One", "editor"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("team", "add", "{}", "New"),
        ("api-token", "create", "--account", "{}", "--name", "new", "--scope", "write:sso"),
        ("api-token", "revoke", "{}"),
        ("user", "set-role", EMAIL, "--account", "{}", "editor"),
        ("user", "remove", EMAIL, "--account", "{}"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("database_url", "number"),
    [("sqlite", str(ABSENT)), ("sqlite", TOO_LARGE), ("postgresql", TOO_LARGE)],
    indirect=["database_url"],
)
def test_a_number_that_stands_for_nothing_is_refused(
    env: dict[str, str], jane: int, arguments: tuple[str, ...], number: str
) -> None:
    assert_refused(run(*(word.format(number) for word in arguments), env=env))


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_list_says_what_each_key_is_good_for_newest_first(sqlite_env: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    directory.mkdir()
    now = int(time.time())
    spent, gone, previous, signing, future = (
        keyring.rotate(directory, now=now + offset, lead=0).id
        for offset in (-200_000, -150_000, -100_000, -10_000, 1000)
    )
    keyring.revoke(directory, gone, now=now)
    assert states(sqlite_env) == {
        future: "signs later",
        signing: "signs",
        previous: "verifies",
        gone: "revoked",
        spent: "spent",
    }
    assert list(states(sqlite_env)) == [future, signing, previous, gone, spent]


def test_rotate_makes_a_key_that_signs_in_a_minute(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [old] = states(sqlite_env)
    before = time.time()
    printed = succeed("keys", "rotate", env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert new in printed
    assert states(sqlite_env) == {new: "signs later", old: "signs"}
    assert before + 59 <= read_key(keys_dir, new)["signs_from"] <= time.time() + 60
    assert len(urlsafe_b64decode(read_key(keys_dir, new)["secret"] + "=")) == 32


@pytest.mark.parametrize(("lead", "state"), [(0, "signs"), (3600, "signs later")])
def test_rotate_takes_the_lead_it_is_given(sqlite_env: dict[str, str], keys_dir: Path, lead: int, state: str) -> None:
    [old] = states(sqlite_env)
    before = int(time.time())
    succeed("keys", "rotate", "--lead", str(lead), env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert states(sqlite_env)[new] == state
    assert states(sqlite_env)[old] == ("verifies" if lead == 0 else "signs")
    assert before + lead <= read_key(keys_dir, new)["signs_from"] <= time.time() + lead


def test_a_rotation_that_is_only_tried_changes_nothing(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    spent = keyring.rotate(keys_dir, now=int(time.time()) - 200_000, lead=0).id
    keyring.rotate(keys_dir, now=int(time.time()) - 100_000, lead=0)
    before = contents(keys_dir)
    assert "would" in succeed("keys", "rotate", "--dry-run", env=sqlite_env)
    assert spent in succeed("keys", "rotate", "--prune", "--dry-run", env=sqlite_env)
    assert spent in succeed("keys", "prune", "--dry-run", env=sqlite_env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("rotate", "--prune"), ("prune",)])
def test_prune_deletes_exactly_what_can_verify_nothing(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    [signing] = states(sqlite_env)
    now = int(time.time())
    spent = keyring.rotate(keys_dir, now=now - 200_000, lead=0).id
    gone = keyring.rotate(keys_dir, now=now - 150_000, lead=0).id
    keyring.revoke(keys_dir, gone, now=now)
    verifies = keyring.rotate(keys_dir, now=now - 100_000, lead=0).id
    printed = succeed("keys", *arguments, env=sqlite_env)
    assert spent in printed
    assert gone in printed
    assert verifies not in printed
    left = states(sqlite_env)
    assert {spent, gone}.isdisjoint(left)
    assert (left[verifies], left[signing]) == ("verifies", "signs")
    assert len(left) == (3 if arguments[0] == "rotate" else 2)
    assert not any(key_id in succeed("keys", "prune", env=sqlite_env) for key_id in (spent, gone, verifies, signing))


def test_rotation_for_cron_is_one_line_of_json(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    line = succeed("keys", "rotate", "--prune", "--json", env=sqlite_env)
    told = json.loads(line)
    (made,) = told.pop("made")
    assert told == {"event": "keys.rotate", "dry_run": False, "pruned": []}
    assert line.count("\n") == 1
    assert json.loads((keys_dir / f"{made['id']}.json").read_text())["signs_from"] == made["signs_from"]
    revoked = json.loads(succeed("keys", "revoke", made["id"], "--json", env=sqlite_env))
    assert (revoked["event"], revoked["revoked"]) == ("keys.revoke", made["id"])
    tried = json.loads(succeed("keys", "prune", "--dry-run", "--json", env=sqlite_env))
    assert tried == {"event": "keys.prune", "dry_run": True, "pruned": []}


@pytest.mark.parametrize("shorter", ["SSO_SESSION_TTL", "SSO_TOKEN_TTL"])
def test_prune_heeds_whatever_lives_longest(sqlite_env: dict[str, str], keys_dir: Path, shorter: str) -> None:
    [old] = states(sqlite_env)
    keyring.rotate(keys_dir, now=int(time.time()) - 1000, lead=0)
    ttl = {"SSO_SESSION_TTL": "3600", "SSO_TOKEN_TTL": "3600"}
    succeed("keys", "prune", env=sqlite_env | ttl | {shorter: "60"})
    assert old in states(sqlite_env)
    succeed("keys", "prune", env=sqlite_env | {"SSO_SESSION_TTL": "60", "SSO_TOKEN_TTL": "60"})
    assert old not in states(sqlite_env)


def test_revoking_a_key_takes_its_secret_away_and_lets_a_new_one_sign(
    sqlite_env: dict[str, str], keys_dir: Path
) -> None:
    [old] = states(sqlite_env)
    secret = read_key(keys_dir, old)["secret"]
    printed = succeed("keys", "revoke", old, env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert states(sqlite_env) == {new: "signs", old: "revoked"}
    assert old in printed
    assert new in printed
    assert set(read_key(keys_dir, old)) == {"id", "signs_from", "revoked_at"}
    assert not any(secret.encode() in content for content in contents(keys_dir).values())


def test_revoking_all_keys_leaves_one_new_one(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    keyring.rotate(keys_dir, now=int(time.time()), lead=0)
    old = set(states(sqlite_env))
    printed = succeed("keys", "revoke", "--all", env=sqlite_env)
    after = states(sqlite_env)
    [new] = after.keys() - old
    assert after == {new: "signs"} | dict.fromkeys(old, "revoked")
    assert new in printed


def test_revoking_all_keys_does_not_pass_over_a_broken_one_in_silence(
    sqlite_env: dict[str, str], keys_dir: Path
) -> None:
    [old] = states(sqlite_env)
    whole = (keys_dir / f"{old}.json").read_bytes()
    (keys_dir / f"{old}.json").write_bytes(whole[:20])
    outcome = run("keys", "revoke", "--all", env=sqlite_env)
    if "revoked_at" not in read_key(keys_dir, old, default={}):  # it may come back whole, and alive
        assert old in outcome.err


@pytest.mark.parametrize("key_id", ["20200101T000000Z-abcdef", "../keys", "", "."])
def test_a_key_that_is_not_there_cannot_be_revoked(sqlite_env: dict[str, str], keys_dir: Path, key_id: str) -> None:
    before = contents(keys_dir)
    assert_refused(run("keys", "revoke", key_id, env=sqlite_env), key_id)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [(), ("20200101T000000Z-abcdef", "--all")])
def test_revoke_wants_either_one_key_or_all(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(keys_dir)
    assert_refused(run("keys", "revoke", *arguments, env=sqlite_env), "--all")
    assert contents(keys_dir) == before


def test_a_broken_key_is_reported_by_name_and_the_others_are_listed(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [good] = states(sqlite_env)
    (keys_dir / "broken.json").write_text('{"secret": "sensitive"')
    outcome = run("keys", "list", env=sqlite_env)
    assert outcome.code == 0
    assert [row[0] for row in table(outcome.out)] == [good]
    assert "broken" in outcome.err
    assert "sensitive" not in outcome.err


@pytest.mark.parametrize("arguments", [("init",), ("keys", "rotate")])
def test_keys_are_for_their_owner_only_whatever_the_umask(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"SSO_HOME": str(tmp_path)}
    umask = os.umask(0)
    try:
        succeed("init", env=env)
        run(*arguments, env=env)
        succeed("keys", "revoke", next(iter(states(env))), env=env)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert len(modes) >= 2
    assert set(modes.values()) == {0o600}


def read_key(directory: Path, key_id: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a key's file; `default` if that is no JSON."""
    try:
        content: dict[str, Any] = json.loads((directory / f"{key_id}.json").read_text())
    except ValueError:
        if default is None:
            raise
        return default
    return content


# --- the schema ------------------------------------------------------------------------------------------------------


def test_db_current_tells_the_schema_and_changes_nothing(env: dict[str, str], keys_dir: Path) -> None:
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    emptied(env["SSO_DATABASE_URL"])
    for _ in range(2):
        assert succeed("db", "current", env=env) == "none\n"


def test_db_upgrade_brings_an_empty_database_to_this_version_once(env: dict[str, str]) -> None:
    emptied(env["SSO_DATABASE_URL"])
    assert SCHEMA_VERSION in succeed("db", "upgrade", env=env)
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    succeed("account", "add", "Kept", "--id", "7", env=env)
    succeed("db", "upgrade", env=env)
    assert table(succeed("account", "list", env=env))[0][1] == "Kept"


def test_upgrading_a_database_that_is_up_to_date_revokes_no_key(env: dict[str, str], keys_dir: Path) -> None:
    before = contents(keys_dir)
    succeed("db", "upgrade", env=env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("init",), ("db", "upgrade"), ("account", "list")], ids=" ".join)
def test_a_schema_that_this_version_does_not_know_is_refused(
    env: dict[str, str], keys_dir: Path, database: Database, arguments: tuple[str, ...]
) -> None:
    with changing(database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = contents(keys_dir)
    assert_refused(run(*arguments, env=env), "9999")
    assert succeed("db", "current", env=env) == "9999\n"
    assert contents(keys_dir) == before


# --- inspect ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """A member, a key that signs, and a way to make tokens that are good, or almost."""

    env: dict[str, str]
    database: Database
    keys: Path
    key: SigningKey
    user_id: int
    now: int

    def claims(self, **changes: int) -> Claims:
        fields = {"expires_at": self.now + 300, "user_id": self.user_id, "account_id": ACCOUNT, "nonce": 0xDEADBEEF}
        return Claims(**fields | changes)

    def token(self, **changes: int) -> str:
        return tokens.sign(self.claims(**changes), self.key.token_key)

    def consume(self, claims: Claims) -> None:
        place = AccessQuery(claims.user_id, claims.account_id)
        with changing(self.database) as connection:
            [redeemed] = redeem(self.database, connection, [Redemption(claims.pack(), place, int(time.time()))])
        assert redeemed.verdict is Verdict.REDEEMED


@pytest.fixture
def stage(env: dict[str, str], database: Database, keys_dir: Path, jane: int, clock: Clock) -> Stage:
    [key] = keyring.load(keys_dir)[0].values()
    assert isinstance(key, SigningKey)
    return Stage(env, database, keys_dir, key, jane, int(clock()))


def good(stage: Stage) -> str:
    return stage.token()


def consumed(stage: Stage) -> str:
    stage.consume(stage.claims())
    return stage.token()


def expired(stage: Stage) -> str:
    return stage.token(expires_at=stage.now - 1)


def forged(stage: Stage) -> str:
    token = stage.token()
    return token[:30] + ("A" if token[30] != "A" else "B") + token[31:]


def signed_for_another_purpose(stage: Stage) -> str:
    return tokens.sign(stage.claims(), stage.key.session_key)


def signed_by_the_secret_itself(stage: Stage) -> str:
    return tokens.sign(stage.claims(), stage.key.secret)


def overlong(stage: Stage) -> str:
    return stage.token(expires_at=stage.now + 600)


def of_a_retired_key(stage: Stage) -> str:
    token = stage.token()
    keyring.rotate(stage.keys, now=stage.now - 1000, lead=0)
    return token


def expired_of_a_retired_key(stage: Stage) -> str:
    token = stage.token(expires_at=stage.now - 700)
    keyring.rotate(stage.keys, now=stage.now - 1000, lead=0)
    return token


def of_the_previous_key(stage: Stage) -> str:
    token = stage.token()
    keyring.rotate(stage.keys, now=stage.now - 100, lead=0)
    return token


def of_a_revoked_key(stage: Stage) -> str:
    token = stage.token()
    keyring.revoke(stage.keys, stage.key.id, now=stage.now)
    return token


def of_a_disabled_user(stage: Stage) -> str:
    succeed("user", "disable", EMAIL, env=stage.env)
    return stage.token()


def of_a_removed_member(stage: Stage) -> str:
    succeed("user", "remove", EMAIL, "--account", str(ACCOUNT), env=stage.env)
    return stage.token()


def of_another_account(stage: Stage) -> str:
    return stage.token(account_id=OTHER_ACCOUNT)


def of_nobody(stage: Stage) -> str:
    return stage.token(user_id=ABSENT)


def below_the_floor(stage: Stage) -> str:
    with changing(stage.database) as connection:
        connection.execute(text("UPDATE consumed_floor SET claims = :floor"), {"floor": floor_at(stage.now + 301)})
    return stage.token()


DECIDED_BY_KEYS: list[tuple[Callable[[Stage], str], str, int]] = [
    (of_the_previous_key, "would sign in", 303),
    (forged, "signature", 401),
    (signed_for_another_purpose, "signature", 401),
    (signed_by_the_secret_itself, "signature", 401),
    (overlong, "longer", 401),
    (of_a_retired_key, "key", 401),
    (expired_of_a_retired_key, "expired", 401),
    (of_a_revoked_key, "signature", 401),
]
DECIDED_BY_THE_DATABASE: list[tuple[Callable[[Stage], str], str, int]] = [
    (good, "would sign in", 303),
    (consumed, "used", 401),
    (expired, "expired", 401),
    (below_the_floor, "expired", 401),
    (of_a_disabled_user, "disabled", 403),
    (of_a_removed_member, "account", 403),
    (of_another_account, "account", 403),
    (of_nobody, "user", 403),
]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("database_url", "make", "verdict", "status"),
    [
        pytest.param(database, *kind, id=f"{database}-{kind[0].__name__}")
        for database, kinds in (
            ("sqlite", DECIDED_BY_KEYS + DECIDED_BY_THE_DATABASE),
            ("postgresql", DECIDED_BY_THE_DATABASE),
        )
        for kind in kinds
    ],
    indirect=["database_url"],
)
async def test_inspect_says_what_a_login_would_come_to_and_shows_and_consumes_nothing(
    stage: Stage, service: Node, make: Callable[[Stage], str], verdict: str, status: int
) -> None:
    token = make(stage)
    secret = urlsafe_b64encode(stage.key.secret).decode().rstrip("=")

    printed = [succeed("inspect", token, env=stage.env) for _ in range(2)]
    answer = await Client(create_app(service)).get(f"/?sso={token}")

    for output in printed:
        conclusion = output.splitlines()[-1]
        assert verdict in conclusion
        assert conclusion.startswith("refused") == (status != 303)
        assert token not in output
        assert token[22:] not in output  # the tag
        assert secret not in output
    assert answer.status == status


@on_sqlite
def test_inspect_tells_ref_claims_key_and_age(stage: Stage) -> None:
    token = stage.token(expires_at=stage.now + 200)
    printed = succeed("inspect", token, env=stage.env)
    assert hashlib.sha256(token.encode()).hexdigest()[:12] in printed
    said = dict(re.split(r" {2,}", line, maxsplit=1) for line in printed.splitlines())
    assert said["user"] == str(stage.user_id)
    assert said["email"] == EMAIL
    assert said["account"] == str(ACCOUNT)
    assert said["nonce"] == "deadbeef"
    assert said["consumed"] == "no"
    assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stage.now + 200)) in said["expires"]
    age = re.search(r"(\d+) s ago", said["issued"])
    assert age is not None
    assert 100 <= int(age[1]) <= 130
    assert stage.key.id in printed


def test_inspect_tells_that_an_expired_token_was_used(stage: Stage) -> None:
    claims = stage.claims(expires_at=stage.now - 100)
    stage.consume(claims)
    printed = succeed("inspect", tokens.sign(claims, stage.key.token_key), env=stage.env)
    assert re.search(r"^consumed +yes$", printed, re.MULTILINE)
    assert "expired" in printed.splitlines()[-1]


@on_sqlite
def test_inspect_warns_that_what_nobody_signed_anybody_could_have_written(stage: Stage) -> None:
    printed = succeed("inspect", forged(stage), env=stage.env)
    assert "anybody" in printed
    assert EMAIL not in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda token: "",
        lambda token: "x",
        lambda token: token[:-1],
        lambda token: token + "=",
        lambda token: token + "A",
        lambda token: f" {token}",
        lambda token: token + "\n",
        lambda token: token[:-1] + "B",  # has spare bits
        lambda token: token[:20] + "+" + token[21:],
        lambda token: token[:20] + "\u0100" + token[21:],
        lambda token: token[:20] + "\udcff" + token[21:],
        lambda token: f"https://studio.example/?sso={token}",
    ],
)
def test_inspect_of_what_is_no_token_says_so_and_needs_neither_keys_nor_database(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    text_given = change(tokens.sign(Claims(1_900_000_000, 1, 123, 7), bytes(32)))
    printed = succeed("inspect", text_given, env={"SSO_HOME": str(tmp_path)})
    assert printed.splitlines()[-1].startswith("refused")
    assert "malformed" in printed
    assert len(text_given) < 2 or text_given not in printed


@on_sqlite
def test_inspect_without_a_database_does_not_call_a_token_good(stage: Stage, tmp_path: Path) -> None:
    outcome = run("inspect", stage.token(), env=stage.env | {"SSO_DATABASE_URL": "sqlite:///absent.db"})
    assert outcome.code == 1
    assert "sign in" not in outcome.out
    assert len(outcome.err.splitlines()) == 1


# --- purge -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long a command would have slept; it does not."""
    pauses: list[float] = []
    monkeypatch.setattr("sso_service.cli.time.sleep", pauses.append)
    monkeypatch.setattr(ledger, "FLOOR_AGE", 0.0)
    return pauses


def test_purge_deletes_what_expired_over_an_hour_ago_after_waiting_a_minute(
    stage: Stage, query: Callable[[str], Sequence[Row[Any]]], slept: list[float]
) -> None:
    old, recent, live = (stage.claims(expires_at=stage.now + offset) for offset in (-7200, -3000, 300))
    for claims in (old, recent, live):
        stage.consume(claims)
    outcome = run("purge", env=stage.env)
    assert outcome.code == 0
    assert outcome.out.startswith("1 ")
    assert len(slept) == 1
    assert slept[0] >= 60
    rows = [bytes(row.claims) for row in query("SELECT claims FROM consumed_nonces ORDER BY claims")]
    assert rows == [recent.pack(), live.pack()]
    with changing(stage.database) as connection:
        place = AccessQuery(stage.user_id, ACCOUNT)
        [again] = redeem(stage.database, connection, [Redemption(old.pack(), place, int(time.time()))])
    assert again.verdict is Verdict.EXPIRED


def test_purge_of_nothing_is_no_error(env: dict[str, str], slept: list[float]) -> None:
    outcome = run("purge", env=env)
    assert (outcome.code, outcome.out[:2]) == (0, "0 ")


def test_purge_leaves_to_another_one_what_that_is_at(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    stage.consume(stage.claims(expires_at=stage.now - 7200))
    other = database_at(stage.database.url)
    with ExitStack() as stack:

        def begin(_: float) -> None:
            stack.enter_context(other.purging(stack.enter_context(other.connect())))

        monkeypatch.setattr("sso_service.cli.time.sleep", begin)
        outcome = run("purge", env=stage.env)
    assert (outcome.code, outcome.out) == (0, "0 deleted. Another purge is at work and does the rest.\n")
    other.close()


def test_purge_does_nothing_while_clocks_disagree(
    stage: Stage,
    query: Callable[[str], Sequence[Row[Any]]],
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage.consume(stage.claims(expires_at=stage.now - 7200))
    monkeypatch.setattr(ledger, "CLOCK_TOLERANCE", -1)
    assert_refused(run("purge", env=stage.env), "clock")
    assert slept == []
    assert len(query("SELECT claims FROM consumed_nonces")) == 1


# --- what an operator runs into --------------------------------------------------------------------------------------

WITH_DATABASE = [
    ("account", "list"),
    ("account", "add", "New"),
    ("team", "add", str(ACCOUNT), "New"),
    ("api-token", "list"),
    ("api-token", "create", "--account", str(ACCOUNT), "--name", "new", "--scope", "write:sso"),
    ("api-token", "revoke", "1"),
    ("user", "show", EMAIL),
    ("user", "set-role", EMAIL, "--account", str(ACCOUNT), "admin"),
    ("user", "remove", EMAIL, "--account", str(ACCOUNT)),
    ("user", "disable", EMAIL),
    ("user", "enable", EMAIL),
    ("user", "sign-out", EMAIL),
    ("db", "upgrade"),
    ("db", "current"),
    ("purge",),
    ("serve",),
]
WITH_KEYS = [
    ("keys", "list"),
    ("keys", "rotate"),
    ("keys", "rotate", "--dry-run"),
    ("keys", "rotate", "--prune"),
    ("keys", "revoke", "20200101T000000Z-abcdef"),
    ("keys", "revoke", "--all"),
    ("keys", "prune"),
    ("keys", "prune", "--dry-run"),
    ("serve",),
]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process no supervisor is started: `serve` must have failed before."""

    def run_server(*_: object, **__: object) -> None:
        raise AssertionError("the supervisor was started")

    monkeypatch.setattr(supervisor, "run", run_server)


@pytest.mark.parametrize("arguments", WITH_DATABASE, ids=" ".join)
def test_an_sqlite_database_that_is_not_there_is_said_to_be_so_and_not_made(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": "sqlite:///absent/sso.db"})
    assert_refused(outcome, "absent/sso.db", "sso-service init")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("arguments", [*WITH_DATABASE, ("init",)], ids=" ".join)
def test_a_postgresql_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://operator:{PASSWORD}@127.0.0.1:{free_port()}/sso"
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": url})
    assert_refused(outcome, url.partition("@")[2])
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [("account", "list"), ("serve",)], ids=" ".join)
def test_a_password_among_the_parameters_of_a_url_is_not_shown_either(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://operator@127.0.0.1:{free_port()}/sso?password={PASSWORD}"
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": url})
    assert_refused(outcome, "127.0.0.1")
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [*WITH_KEYS, ("init",), ("init", "--demo")], ids=" ".join)
def test_a_key_directory_that_cannot_be_listed_is_named(sqlite_env: dict[str, str], arguments: tuple[str, ...]) -> None:
    Path(sqlite_env["SSO_HOME"], "keys").write_text("")
    assert_refused(run(*arguments, env=sqlite_env), str(Path(sqlite_env["SSO_HOME"], "keys")))


@pytest.mark.parametrize("arguments", WITH_KEYS, ids=" ".join)
def test_a_key_directory_that_is_not_there_is_named(sqlite_env: dict[str, str], arguments: tuple[str, ...]) -> None:
    assert_refused(run(*arguments, env=sqlite_env), str(Path(sqlite_env["SSO_HOME"], "keys")))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSO_PORT", PASSWORD),
        ("SSO_PORT", "65536"),
        ("SSO_TOKEN_TTL", "0"),
        ("SSO_DATABASE_URL", PASSWORD),
        ("SSO_DATABASE_URL", f"mysql://operator:{PASSWORD}@127.0.0.1/sso"),
        ("SSO_DATABASE_URL", "sqlite://"),
        ("SSO_DATABASE_URL", f"postgresql://operator:with@sign:{PASSWORD}@127.0.0.1/sso"),
        ("SSO_DATABASE_URL", f"postgresql://operator@127.0.0.1:{PASSWORD}/sso"),
    ],
)
def test_a_setting_that_cannot_be_is_named_without_its_value(
    sqlite_env: dict[str, str], variable: str, value: str
) -> None:
    outcome = run("account", "list", env=sqlite_env | {variable: value})
    assert_refused(outcome, variable)
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [("init",), *WITH_KEYS, *WITH_DATABASE], ids=" ".join)
def test_every_command_that_reads_the_settings_refuses_wrong_ones(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(keys_dir)
    assert_refused(run(*arguments, env=sqlite_env | {"SSO_PORT": PASSWORD}), "SSO_PORT")
    assert contents(keys_dir) == before


# --- serve, before it serves -----------------------------------------------------------------------------------------


@on_sqlite
def test_serve_needs_a_key_that_signs(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    assert_refused(run("serve", env=env), "key", "sso-service keys rotate --lead 0")
    keyring.rotate(tmp_path / "keys", now=int(time.time()), lead=600)
    assert_refused(run("serve", env=env), "key", "sso-service keys rotate --lead 0")


@pytest.mark.parametrize(
    ("state", "remedy"), [("DROP SCHEMA public CASCADE; CREATE SCHEMA public", "init"), ("old", "db upgrade")]
)
@on_postgresql
def test_serve_refuses_a_postgresql_whose_schema_is_not_up_to_date(
    env: dict[str, str], keys_dir: Path, state: str, remedy: str
) -> None:
    with psycopg.connect(env["SSO_DATABASE_URL"], autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'" if state == "old" else state.encode())
    before = contents(keys_dir)
    assert_refused(run("serve", env=env), f"sso-service {remedy}")
    assert contents(keys_dir) == before


def test_serve_warns_of_a_variable_that_is_no_setting_and_serves(
    sqlite_env: dict[str, str], keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[list[tuple[str, int]], int]] = []

    def run_server(_: Settings, listeners: list[socket.socket], *, workers: int) -> None:
        served.append(([listener.getsockname() for listener in listeners], workers))
        for listener in listeners:
            listener.close()

    monkeypatch.setattr(supervisor, "run", run_server)
    port = free_port()
    outcome = run("serve", "--workers", "3", env=sqlite_env | {"SSO_KEY_DIR": PASSWORD, "SSO_PORT": str(port)})
    assert (outcome.code, outcome.out) == (0, "")
    [line] = outcome.err.splitlines()
    assert "SSO_KEY_DIR" in line
    assert PASSWORD not in line
    assert served == [([("127.0.0.1", port)], 3)]


# --- help ------------------------------------------------------------------------------------------------------------


def commands_of(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, found in group.commands.items():
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from commands_of(found, (*path, name))


@pytest.mark.parametrize("path", list(commands_of(cli.main)), ids=" ".join)
def test_every_command_explains_itself_without_any_setting(path: tuple[str, ...], tmp_path: Path) -> None:
    printed = succeed(*path, "--help", env={"SSO_HOME": str(tmp_path), "SSO_PORT": "x"})
    assert len(printed.splitlines()) > 3
    assert printed == succeed(*path, "-h", env={"SSO_HOME": str(tmp_path)})


def test_the_commands_are_those_of_the_design() -> None:
    assert {" ".join(path) for path in commands_of(cli.main)} - {"db copy"} == {
        "init",
        "serve",
        "account",
        "account add",
        "account list",
        "team",
        "team add",
        "api-token",
        "api-token create",
        "api-token list",
        "api-token revoke",
        "user",
        "user show",
        "user set-role",
        "user remove",
        "user disable",
        "user enable",
        "user sign-out",
        "keys",
        "keys list",
        "keys rotate",
        "keys revoke",
        "keys prune",
        "db",
        "db upgrade",
        "db current",
        "inspect",
        "purge",
    }
