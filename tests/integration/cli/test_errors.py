"""Errors that all commands report in the same way: ids, database, key directory, settings."""

from pathlib import Path

import pytest

from scripts.tools.ports import free_port
from sso_service.errors import OutcomeUnknown
from sso_service.services.accounts import Accounts
from tests.support.command_line import EMAIL, assert_refused, assert_usage_error, run
from tests.support.data import ACCOUNT
from tests.support.databases import on_sqlite
from tests.support.files import contents

PASSWORD = "hunter2"


WITH_ID = [
    ("team", "add", "{}", "New"),
    ("api-token", "create", "--account", "{}", "--name", "new", "--scope", "write:sso"),
    ("api-token", "revoke", "{}"),
    ("user", "set-role", EMAIL, "--account", "{}", "editor"),
    ("user", "remove", EMAIL, "--account", "{}"),
]
ABSENT = 4_000_000_000
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


@pytest.mark.parametrize("arguments", WITH_ID, ids=" ".join)
@on_sqlite
def test_an_unknown_id_is_refused(env: dict[str, str], jane: int, arguments: tuple[str, ...]) -> None:
    assert_refused(run(*(word.format(ABSENT) for word in arguments), env=env), str(ABSENT))


@pytest.mark.parametrize("arguments", WITH_ID, ids=" ".join)
@pytest.mark.parametrize("number", ["0", "x", "1.5", "4294967296", "99999999999999999999"])
def test_an_impossible_id_is_refused(sqlite_env: dict[str, str], arguments: tuple[str, ...], number: str) -> None:
    assert_usage_error(run(*(word.format(number) for word in arguments), env=sqlite_env), number)


@pytest.mark.parametrize("arguments", WITH_DATABASE, ids=" ".join)
def test_a_missing_sqlite_database_is_reported_and_not_created(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": "sqlite:///absent/sso.db"})
    assert_refused(outcome, "absent/sso.db", "sso-service init")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("arguments", [*WITH_DATABASE, ("init",)], ids=" ".join)
def test_an_unreachable_database_is_named_without_its_password(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://operator:{PASSWORD}@127.0.0.1:{free_port()}/sso"
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": url})
    assert_refused(outcome, url.partition("@")[2])
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [("account", "list"), ("serve",)], ids=" ".join)
def test_a_password_in_the_query_of_a_database_url_is_hidden(
    tmp_path: Path, keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    url = f"postgresql://operator@127.0.0.1:{free_port()}/sso?password={PASSWORD}"
    outcome = run(*arguments, env={"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": url})
    assert_refused(outcome, "127.0.0.1")
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [*WITH_KEYS, ("init",), ("init", "--demo")], ids=" ".join)
def test_an_unreadable_key_directory_is_named(sqlite_env: dict[str, str], arguments: tuple[str, ...]) -> None:
    Path(sqlite_env["SSO_HOME"], "keys").write_text("")
    assert_refused(run(*arguments, env=sqlite_env), str(Path(sqlite_env["SSO_HOME"], "keys")))


@pytest.mark.parametrize("arguments", WITH_KEYS, ids=" ".join)
def test_a_missing_key_directory_is_named(sqlite_env: dict[str, str], arguments: tuple[str, ...]) -> None:
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
def test_an_invalid_setting_is_named_without_its_value(sqlite_env: dict[str, str], variable: str, value: str) -> None:
    outcome = run("account", "list", env=sqlite_env | {variable: value})
    assert_refused(outcome, variable)
    assert PASSWORD not in outcome.err


@pytest.mark.parametrize("arguments", [("init",), ("inspect", "x"), *WITH_KEYS, *WITH_DATABASE], ids=" ".join)
def test_every_command_refuses_invalid_settings(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(keys_dir)
    for variable in ("SSO_PORT", "SSO_DATABASE_URL"):
        assert_refused(run(*arguments, env=sqlite_env | {variable: PASSWORD}), variable)
    assert contents(keys_dir) == before


def test_an_unknown_outcome_is_not_reported_as_a_failure(
    sqlite_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_connection(*_: object, **__: object) -> int:
        raise OutcomeUnknown("the connection was lost")

    monkeypatch.setattr(Accounts, "add_account", lose_connection)
    outcome = run("account", "add", "New", env=sqlite_env)
    assert_refused(outcome, "the change may or may not have been made", "the connection was lost")
