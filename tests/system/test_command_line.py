"""Commands in new processes: with a running service, concurrently, and the modules that they import."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from scripts.tools.ports import free_port
from sso_service import keyring
from tests.support.command_line import API_TOKEN, assert_refused, curl, run, run_as_process, succeed
from tests.support.data import ACCOUNT
from tests.support.databases import emptied
from tests.support.processes import command, serving


@pytest.fixture
def env(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The settings of an operator whose database has the accounts of `tests.support.data`."""
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}


@pytest.fixture
def sqlite_env(sqlite_template: Path, tmp_path: Path) -> dict[str, str]:
    """The same settings with SQLite, for tests that do not depend on the kind of database."""
    (tmp_path / "sso.db").write_bytes(sqlite_template.read_bytes())
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": "sqlite:///sso.db"}


def test_the_output_of_init_demo_works_with_a_running_service(env: dict[str, str], tmp_path: Path) -> None:
    emptied(env["SSO_DATABASE_URL"])
    old = API_TOKEN.findall(run("init", "--demo", env=env).out)[0]
    with serving(env, tmp_path / "log") as running:
        printed = succeed("init", "--demo", env=env | {"SSO_PORT": str(urlsplit(running.url).port)})
        secret = API_TOKEN.findall(printed)[0]
        [link] = re.findall(r"\S+\?sso=(?!TOKEN)\S+", printed)
        [page] = re.findall(r"(\S+\?sso=)TOKEN", printed)

        with httpx.Client() as browser:
            assert browser.get(link).status_code == 303
            session = browser.get(f"{running.url}/session").json()
            assert (session["account_id"], session["role"]) == (123, "admin")
        assert httpx.get(link).status_code == 401

        url, headers, body = curl(printed)
        assert url.startswith(running.url)
        assert secret in headers["Authorization"]
        issued = httpx.post(url, headers=headers, content=body)
        assert issued.status_code == 201
        with httpx.Client() as browser:
            answer = browser.get(page + issued.json()["token"])
            assert (answer.status_code, answer.headers["location"]) == (303, urlsplit(page).path)
            assert browser.get(f"{running.url}/session").json()["user"]["email"] == json.loads(body)["email"]

        replaced = httpx.post(url, headers=headers | {"Authorization": f"Bearer {old}"}, content=body)
        assert replaced.status_code == 401


def test_only_one_process_changes_keys_at_a_time(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    before = sorted(keys_dir.glob("*.json"))
    for arguments in (["rotate"], ["prune"], ["revoke", "--all"]):
        with keyring.locked(keys_dir):
            done = command("keys", *arguments, "--json", env=sqlite_env)
            assert done.returncode == 75
            assert "another process is changing the keys" in json.loads(done.stdout)["error"]
            assert done.stderr.count("\n") == 1
            # A dry run changes nothing, so it does not need the lock.
            assert command("keys", "rotate", "--dry-run", env=sqlite_env).returncode == 0
    assert sorted(keys_dir.glob("*.json")) == before
    succeed("keys", "rotate", env=sqlite_env)


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        (("account", "list"), {"SSO_DATABASE_URL": "sqlite:///absent.db"}),
        (("keys", "list"), {"SSO_KEYS_DIR": "absent"}),
        (("serve",), {"SSO_PORT": "x"}),
        (("user", "show", "nobody@example.com"), {}),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    sqlite_env: dict[str, str], arguments: tuple[str, ...], change: dict[str, str]
) -> None:
    assert_refused(run_as_process(*arguments, env=sqlite_env | change))


def test_the_secret_of_an_api_token_is_the_only_output(sqlite_env: dict[str, str]) -> None:
    options = ("--account", str(ACCOUNT), "--name", "piped", "--scope", "write:sso")
    outcome = run_as_process("api-token", "create", *options, env=sqlite_env)
    assert API_TOKEN.fullmatch(outcome.out.removesuffix("\n"))
    assert (outcome.code, outcome.err) == (0, "")


def python(program: str, env: Mapping[str, str]) -> str:
    """Run a Python program in a new process, and return its output."""
    arguments, environ = [sys.executable, "-c", program], {**os.environ, **env}
    done = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_commands_import_neither_metrics_nor_uvicorn(sqlite_env: dict[str, str]) -> None:
    program = """
import sys
from sso_service.cli import main
main(["account", "list"], standalone_mode=False)
print(*sys.modules)
"""
    loaded = {name.partition(".")[0] for name in python(program, sqlite_env).split()}
    assert "sqlalchemy" in loaded
    assert loaded.isdisjoint({"prometheus_client", "starlette", "uvicorn"})


def test_serve_sets_the_metrics_directory_before_the_import(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    program = """
import os, sys
from sso_service.cli import main
from sso_service.server import supervisor
def serve(config, listeners):
    for listener in listeners:
        listener.close()
    print(os.path.isdir(os.environ["PROMETHEUS_MULTIPROC_DIR"]), "prometheus_client" in sys.modules)
    return True
supervisor._serve = serve
main(["serve"], standalone_mode=False)
"""
    assert python(program, sqlite_env | {"SSO_PORT": str(free_port())}) == "True False\n"
