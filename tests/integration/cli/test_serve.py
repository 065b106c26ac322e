"""The command `serve`, before the server starts."""

import socket
import time
from pathlib import Path

import psycopg
import pytest

from scripts.tools.ports import free_port
from sso_service import keyring
from sso_service.server import supervisor
from sso_service.settings import Settings
from tests.support.command_line import assert_refused, run
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.files import contents

PASSWORD = "hunter2"


@on_sqlite
def test_serve_requires_a_key_that_signs(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    assert_refused(run("serve", env=env), "key", "sso-service keys rotate --lead 0")
    keyring.rotate(tmp_path / "keys", now=int(time.time()), lead=600)
    assert_refused(run("serve", env=env), "key", "sso-service keys rotate --lead 0")


@pytest.mark.parametrize(
    ("state", "remedy"), [("DROP SCHEMA public CASCADE; CREATE SCHEMA public", "init"), ("old", "db upgrade")]
)
@on_postgresql
def test_serve_does_not_upgrade_postgresql(env: dict[str, str], keys_dir: Path, state: str, remedy: str) -> None:
    with psycopg.connect(env["SSO_DATABASE_URL"], autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'" if state == "old" else state.encode())
    before = contents(keys_dir)
    assert_refused(run("serve", env=env), f"sso-service {remedy}")
    assert contents(keys_dir) == before


def test_serve_warns_about_unknown_variables(
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


@on_postgresql
def test_serve_starts_while_the_synchronous_standby_is_away(
    env: dict[str, str], keys_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Settings] = []

    def run_server(settings: Settings, listeners: list[socket.socket], **_: object) -> None:
        served.append(settings)
        for listener in listeners:
            listener.close()

    monkeypatch.setattr(supervisor, "run", run_server)
    outcome = run("serve", env=env | {"SSO_REQUIRE_SYNC_STANDBY": "1", "SSO_PORT": str(free_port())})
    assert (outcome.code, outcome.err) == (0, "")
    # The node issues and checks sessions. Until the standby is back, it reports not ready and consumes nothing.
    assert [settings.require_sync_standby for settings in served] == [True]
