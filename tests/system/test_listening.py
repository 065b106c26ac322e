"""Listening on a unix socket, and on sockets that the parent process has opened."""

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
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def env(settings: Settings, keys_dir: Path) -> dict[str, str]:
    return {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}


@pytest.fixture
def uds() -> Iterator[Path]:
    """The path of a unix socket. It must be shorter than the paths that pytest makes."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "sso.sock"


class UnixSocketConnection(HTTPConnection):
    """An HTTP connection through a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("studio.example", timeout=PATIENCE)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self._path)


@contextmanager
def response_to(connection: HTTPConnection, target: str, **headers: str) -> Iterator[HTTPResponse]:
    """Return the response to GET `target`. `X_Forwarded_Proto="https"` is the header `X-Forwarded-Proto: https`."""
    with closing(connection):
        connection.request("GET", target, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield connection.getresponse()


def ready(connection: HTTPConnection) -> bool:
    with response_to(connection, "/readyz") as answer:
        return answer.status == 200


def link(connection: HTTPConnection, api_token: str) -> str:
    """Return a login link that the service issued."""
    with closing(connection):
        connection.request("POST", "/v1/sso_tokens", json.dumps(JANE), {"Authorization": f"Bearer {api_token}"})
        return f"{PAGE}?sso={json.loads(connection.getresponse().read())['token']}"


def cookie_through_a_tls_proxy(connection: HTTPConnection, target: str) -> str:
    """Return the session cookie of a login whose headers claim that a proxy received it over TLS."""
    with response_to(connection, target, X_Forwarded_Proto="https", X_Forwarded_For="192.0.2.7") as answer:
        assert answer.status == 303
        return answer.headers["Set-Cookie"]


@pytest.mark.parametrize(("workers", "proxies"), [(1, "*"), (2, "192.0.2.1")])
def test_clients_of_the_unix_socket_are_trusted_as_proxies(
    env: dict[str, str], uds: Path, tmp_path: Path, api_token: str, workers: int, proxies: str
) -> None:
    with serving(env | {"SSO_TRUSTED_PROXIES": proxies}, tmp_path / "log", uds=uds, workers=workers) as running:
        assert stat.S_IMODE(uds.stat().st_mode) == 0o660
        assert ready(UnixSocketConnection(uds))
        cookie = cookie_through_a_tls_proxy(UnixSocketConnection(uds), link(UnixSocketConnection(uds), api_token))
        assert "; Secure" in cookie
    assert f"unix:{uds}" in running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def test_forwarded_headers_of_an_untrusted_client_are_ignored(
    env: dict[str, str], tmp_path: Path, api_token: str
) -> None:
    with serving(env | {"SSO_TRUSTED_PROXIES": "192.0.2.1"}, tmp_path / "log") as running:
        port = int(running.url.rpartition(":")[2])
        target = link(HTTPConnection("127.0.0.1", port), api_token)
        assert "; Secure" not in cookie_through_a_tls_proxy(HTTPConnection("127.0.0.1", port), target)


def test_only_an_abandoned_unix_socket_is_replaced(env: dict[str, str], uds: Path, tmp_path: Path) -> None:
    with serving(env, tmp_path / "log", uds=uds) as running:
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(PATIENCE)
        assert uds.is_socket()
    with serving(env, tmp_path / "log", uds=uds):
        assert str(uds) in refused("serve", "--uds", str(uds), env=env)
        assert ready(UnixSocketConnection(uds))


def test_an_unusable_address_is_reported_in_one_line(env: dict[str, str], tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear Jane")
    for place in (("--uds", str(letter)), ("--uds", str(tmp_path / "no" / "such.sock")), ("--fd", "77"), ("--fd", "0")):
        assert place[1] in refused("serve", *place, env=env)
    assert letter.read_text() == "Dear Jane"
    assert "--fd" in refused("serve", "--uds", str(tmp_path / "sso.sock"), "--fd", "3", env=env)
    # LISTEN_FDS is for the process LISTEN_PID. This one ignores it without a message.
    taken = {"SSO_PORT": "1", "SSO_HOST": "192.0.2.1", "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    assert "192.0.2.1" in refused("serve", env=env | taken)


def test_a_passed_socket_that_does_not_listen_is_refused(env: dict[str, str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = f"Error: file descriptor {theirs.fileno()} is not a listening socket\n"
        done = subprocess.run(
            [sys.executable, "-m", "sso_service", "serve", "--fd", str(theirs.fileno())],
            env={**os.environ, **env},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_socket_activation_starts_the_service(
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
        target = link(HTTPConnection("127.0.0.1", port, timeout=PATIENCE), api_token)
        assert "; Secure" in cookie_through_a_tls_proxy(UnixSocketConnection(uds), target)
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE)
    assert f"Listening on http://127.0.0.1:{port}, unix:{uds}" in log
    assert "Traceback" not in log
