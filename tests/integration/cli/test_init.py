"""The command `init`: database, first signing key, demo account."""

import hashlib
import time
from pathlib import Path

import pytest

from sso_service import keyring
from sso_service.database.schema import SCHEMA_VERSION
from tests.support.command_line import API_TOKEN, run, states, succeed, table
from tests.support.data import ACCOUNT, OTHER_ACCOUNT
from tests.support.databases import Query, emptied, on_sqlite
from tests.support.files import contents


def test_init_creates_the_database_and_a_key_that_signs(env: dict[str, str], tmp_path: Path) -> None:
    emptied(env["SSO_DATABASE_URL"])
    assert run("init", env=env).code == 0
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    assert list(states(env).values()) == ["signs"]
    assert table(succeed("account", "list", env=env)) == []


def test_init_creates_missing_directories(tmp_path: Path) -> None:
    env = {"SSO_HOME": str(tmp_path / "new" / "home")}
    assert run("init", env=env).code == 0
    assert (tmp_path / "new/home/var/sso.db").is_file()
    assert len(list((tmp_path / "new/home/keys").iterdir())) == 1


def test_a_second_init_changes_nothing(env: dict[str, str], tmp_path: Path) -> None:
    emptied(env["SSO_DATABASE_URL"])
    run("init", env=env)
    succeed("account", "add", "Kept", "--id", "7", env=env)
    succeed("api-token", "create", "--account", "7", "--name", "kept", "--scope", "write:sso", env=env)
    keys = contents(tmp_path / "keys")
    listed = [succeed(*arguments, env=env) for arguments in (("account", "list"), ("api-token", "list"))]

    succeed("init", env=env)

    assert contents(tmp_path / "keys") == keys
    assert [succeed(*arguments, env=env) for arguments in (("account", "list"), ("api-token", "list"))] == listed


def test_init_creates_a_key_if_all_keys_sign_only_later(sqlite_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    later = keyring.rotate(tmp_path / "keys", now=int(time.time()), lead=600)
    succeed("init", env=sqlite_env)
    assert sorted(states(sqlite_env).values()) == ["signs", "signs later"]
    assert states(sqlite_env)[later.id] == "signs later"


@on_sqlite
def test_init_keeps_the_keys_of_an_existing_database(env: dict[str, str], keys_dir: Path, tmp_path: Path) -> None:
    before = contents(keys_dir)
    succeed("init", env=env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("init",), ("init", "--demo"), ("db", "upgrade")], ids=" ".join)
def test_all_keys_are_revoked_when_the_ledger_is_new(
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


def test_init_revokes_keys_that_an_earlier_init_failed_to_revoke(
    env: dict[str, str], keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied(env["SSO_DATABASE_URL"])
    old = next(iter(states(env)))

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("sso_service.keyring.os.replace", fail)  # the key directory cannot be written
        assert run("init", env=env).code == 1

    assert run("init", env=env).code == 0
    assert states(env)[old] == "revoked"


def test_init_demo_creates_account_team_admin_and_api_token(env: dict[str, str], query: Query) -> None:
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


def test_a_second_init_demo_replaces_only_the_demo_api_token(env: dict[str, str], keys_dir: Path, query: Query) -> None:
    for account in (ACCOUNT, OTHER_ACCOUNT):
        for name in ("demo", "mine"):
            succeed("api-token", "create", "--account", str(account), "--name", name, "--scope", "write:sso", env=env)
    keys = contents(keys_dir)
    secrets = [API_TOKEN.findall(succeed("init", "--demo", env=env))[0] for _ in range(2)]
    assert secrets[0] != secrets[1]

    active = query("SELECT account_id, name, digest FROM api_tokens WHERE revoked_at IS NULL ORDER BY id")
    assert [(row.account_id, row.name) for row in active] == [
        (ACCOUNT, "mine"),
        (OTHER_ACCOUNT, "demo"),
        (OTHER_ACCOUNT, "mine"),
        (ACCOUNT, "demo"),
    ]
    assert active[-1].digest == hashlib.sha256(secrets[1].encode()).hexdigest()
    assert contents(keys_dir) == keys
    assert "wf_live_" not in succeed("init", env=env)
