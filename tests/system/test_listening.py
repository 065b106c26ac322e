"""Where the service can listen beside a port: a unix socket, and a socket that whoever starts it has opened."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from scripts.tools.ports import free_port
from sso_service.settings import Settings
from tests.support.command_line import refused
from tests.support.data import JANE, PAGE
from tests.support.processes import serving, wait_for_port
from tests.support.programs import program

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def env(settings: Settings, keys_dir: Path) -> dict[str, str]:
    return {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}


@pytest.fixture
def uds() -> Iterator[Path]:
    """A path of a unix socket, which may not be as long as pytest's own are."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "sso.sock"


class ByUnixSocket(HTTPConnection):
    """A connection to a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("studio.example", timeout=15)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(15)
        self.sock.connect(self._path)


@contextmanager
def asked(connection: HTTPConnection, target: str, **headers: str) -> Iterator[HTTPResponse]:
    with closing(connection):
        connection.request("GET", target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield connection.getresponse()


def ready(connection: HTTPConnection) -> bool:
    with asked(connection, "/readyz") as answer:
        return answer.status == 200


def link(connection: HTTPConnection, api_token: str) -> str:
    """A login link that a node issued."""
    with closing(connection):
        connection.request("POST", "/v1/sso_tokens", json.dumps(JANE), {"Authorization": f"Bearer {api_token}"})
        return f"{PAGE}?sso={json.loads(connection.getresponse().read())['token']}"


def cookie_behind_a_proxy_with_tls(connection: HTTPConnection, target: str) -> str:
    with asked(connection, target, X_Forwarded_Proto="https", X_Forwarded_For="192.0.2.7") as answer:
        assert answer.status == 303
        return answer.headers["Set-Cookie"]


@pytest.mark.parametrize(("workers", "proxies"), [(1, "*"), (2, "192.0.2.1")])
def test_a_unix_socket_is_for_its_group_and_whoever_can_open_it_is_believed_as_a_proxy_is(
    env: dict[str, str], uds: Path, tmp_path: Path, api_token: str, workers: int, proxies: str
) -> None:
    with serving(env | {"SSO_TRUSTED_PROXIES": proxies}, tmp_path / "log", uds=uds, workers=workers) as running:
        assert stat.S_IMODE(uds.stat().st_mode) == 0o660
        assert ready(ByUnixSocket(uds))
        cookie = cookie_behind_a_proxy_with_tls(ByUnixSocket(uds), link(ByUnixSocket(uds), api_token))
        assert "; Secure" in cookie
    assert f"unix:{uds}" in running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def test_whoever_comes_through_a_port_and_is_no_proxy_of_ours_is_not_believed(
    env: dict[str, str], tmp_path: Path, api_token: str
) -> None:
    with serving(env | {"SSO_TRUSTED_PROXIES": "192.0.2.1"}, tmp_path / "log") as running:
        port = int(running.url.rpartition(":")[2])
        target = link(HTTPConnection("127.0.0.1", port), api_token)
        assert "; Secure" not in cookie_behind_a_proxy_with_tls(HTTPConnection("127.0.0.1", port), target)


def test_a_unix_socket_that_a_killed_service_has_left_is_taken_and_one_that_is_used_is_not(
    env: dict[str, str], uds: Path, tmp_path: Path
) -> None:
    with serving(env, tmp_path / "log", uds=uds) as running:
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(10)
        assert uds.is_socket()
    with serving(env, tmp_path / "log", uds=uds):
        assert str(uds) in refused("serve", "--uds", str(uds), env=env)
        assert ready(ByUnixSocket(uds))


def test_where_nobody_can_listen_is_said_in_one_line(env: dict[str, str], tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear Jane")
    for place in (("--uds", str(letter)), ("--uds", str(tmp_path / "no" / "such.sock")), ("--fd", "77"), ("--fd", "0")):
        assert place[1] in refused("serve", *place, env=env)
    assert letter.read_text() == "Dear Jane"
    assert "--fd" in refused("serve", "--uds", str(tmp_path / "sso.sock"), "--fd", "3", env=env)
    # Without a word about it: a variable that was meant for another process is none for this one.
    taken = {"SSO_PORT": "1", "SSO_HOST": "192.0.2.1", "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    assert "192.0.2.1" in refused("serve", env=env | taken)


def test_a_socket_that_is_passed_and_does_not_listen_is_refused(env: dict[str, str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said = f"Error: file descriptor {theirs.fileno()} is not a socket that listens\n"
        done = subprocess.run(
            [sys.executable, "-m", "sso_service", "serve", "--fd", str(theirs.fileno())],
            env={**os.environ, **env},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_passes_its_sockets_and_starts_the_service_with_the_first_connection(
    env: dict[str, str], uds: Path, workers: str, api_token: str
) -> None:
    port = free_port()
    variables = {**os.environ, **env, "SSO_TRUSTED_PROXIES": "192.0.2.1"}
    process = subprocess.Popen(
        [
            program("systemd-socket-activate"),
            f"--listen=127.0.0.1:{port}",
            f"--listen={uds}",
            *(f"--setenv={name}={value}" for name, value in variables.items()),
            *(sys.executable, "-m", "sso_service", "serve", "--workers", workers),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_port(port)
        target = link(HTTPConnection("127.0.0.1", port, timeout=15), api_token)
        assert "; Secure" in cookie_behind_a_proxy_with_tls(ByUnixSocket(uds), target)
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20)
    assert f"Listening on http://127.0.0.1:{port}, unix:{uds}" in said
    assert "Traceback" not in said
