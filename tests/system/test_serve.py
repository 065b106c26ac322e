"""The processes of `sso-service serve`: start, responses, memory, stop."""

import http.client
import json
import re
import signal
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from sso_service import keyring
from sso_service.database.schema import SCHEMA_VERSION
from tests.support.command_line import refused
from tests.support.data import JANE, PAGE
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.processes import Running, command, serving
from tests.support.waiting import PATIENCE, Stopwatch, wait_until

MEGABYTE = 1024 * 1024
MEMORY_LIMIT = 90 * MEGABYTE
LINUX = Path("/proc/self/smaps_rollup").exists()


@pytest.fixture
def env(database_url: str, keys_dir: Path, tmp_path: Path) -> dict[str, str]:
    """The settings of a service that is ready to start."""
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}


@contextmanager
def accepting(env: Mapping[str, str], log: Path, *, workers: int = 1) -> Iterator[Running]:
    """Run a service until the end of the block. It accepts connections from the beginning."""
    with serving(env, log, workers=workers) as running:
        wait_until(lambda: accepts(running))
        yield running


def accepts(running: Running) -> bool:
    with suppress(ConnectionRefusedError):
        connect(running).close()
        return True
    return False


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(running.url).port or 0), timeout=PATIENCE)


def ask(running: Running, method: str, target: str, body: object = None, **headers: str) -> tuple[int, str, Any]:
    """Send a request on a new connection. Return status, cookie, and the decoded body if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(running.url).port, timeout=PATIENCE)
    with closing(connection):
        connection.request(method, target, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        content = answer.read()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, answer.headers.get("Set-Cookie", ""), json.loads(content) if is_json else None


def workers_of(running: Running) -> list[int]:
    """Return the process IDs of the workers: the children of the started process, or that process itself."""
    return sorted(pid for pid, parent in processes() if parent == running.process.pid) or [running.process.pid]


def processes() -> Iterator[tuple[int, int]]:
    """Yield process ID and parent's ID of every process that multiprocessing has spawned."""
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            if b"spawn_main" in (directory / "cmdline").read_bytes():
                parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
                yield int(directory.name), int(parent)


def request_to_issue(token: str, email: str) -> tuple[bytes, bytes]:
    """Return head and body of a request whose body is sent only after the response 100 Continue."""
    body = json.dumps(JANE | {"email": email}).encode()
    head = (
        "POST /v1/sso_tokens HTTP/1.1\r\nHost: studio.example\r\nConnection: close\r\nExpect: 100-continue\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode(), body


def received(connection: socket.socket, *, until: bytes | None = None) -> bytes:
    """Return what is received until the other side closes, or until the content ends with `until`."""
    content = b""
    while until is None or not content.endswith(until):
        piece = connection.recv(65536)
        if not piece:
            break
        content += piece
    return content


def test_two_workers_are_two_processes_with_one_ledger(env: dict[str, str], tmp_path: Path, api_token: str) -> None:
    with accepting(env, tmp_path / "log", workers=2) as running:
        if LINUX:
            assert len(workers_of(running)) == 2
            assert running.process.pid not in workers_of(running)

        def issue(_: int) -> tuple[int, str, Any]:
            return ask(running, "POST", "/v1/sso_tokens", JANE, authorization=f"Bearer {api_token}")

        with ThreadPoolExecutor(8) as pool:
            issued = list(pool.map(issue, range(16)))
            assert [status for status, *_ in issued] == [201] * 16
            assert [content["user_created"] for *_, content in issued].count(True) == 1
            links = [f"{PAGE}?sso={content['token']}" for *_, content in issued for _ in range(2)]
            logins = list(pool.map(lambda link: ask(running, "GET", link)[0], links))
        assert sorted(logins) == [303] * 16 + [401] * 16
        assert ask(running, "GET", "/readyz")[0] == 200


@pytest.mark.skipif(not LINUX, reason="memory is read from /proc")
def test_a_worker_takes_less_than_90_megabytes(env: dict[str, str], tmp_path: Path, api_token: str) -> None:
    with accepting(env, tmp_path / "log", workers=2) as running:

        def visit(number: int) -> list[int]:
            person = JANE | {"email": f"user{number}@example.com"}
            issued = ask(running, "POST", "/v1/sso_tokens", person, authorization=f"Bearer {api_token}")
            login = ask(running, "GET", f"{PAGE}?sso={issued[2]['token']}")
            session = ask(running, "GET", "/session", cookie=login[1].partition(";")[0])
            refused = ask(running, "GET", f"/?sso={'A' * 43}")
            return [answer[0] for answer in (issued, login, session, refused)]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(visit, range(100))) == [[201, 303, 200, 401]] * 100

        for pid in workers_of(running):
            assert resident(pid) < MEMORY_LIMIT


def resident(pid: int) -> int:
    """Return the bytes of memory that a process occupies, including shared memory."""
    found = re.search(r"^Rss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("workers", [1, 2])
@on_sqlite
def test_sigterm_answers_open_requests_and_ends_all_processes(
    env: dict[str, str], tmp_path: Path, api_token: str, workers: int
) -> None:
    with accepting(env, tmp_path / "log", workers=workers) as running:
        pids = workers_of(running) if LINUX else []
        head, body = request_to_issue(api_token, "late@example.com")
        with connect(running) as connection:
            connection.sendall(head)
            assert connection.recv(1024).startswith(b"HTTP/1.1 100 ")  # the request is in progress

            started = Stopwatch(running.process.pid)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: running.log.read_text().count("Shutting down") == workers)
            wait_until(lambda: not accepts(running))  # so that a proxy goes to another node
            connection.sendall(body)

            answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 201 ")
        assert b'"user_created":true' in answer

        # Process managers count an end by SIGTERM (143 in a shell) as a clean stop.
        assert running.process.wait(PATIENCE) in {0, -signal.SIGTERM}
        assert started.own_seconds < 8
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        with pytest.raises(ConnectionRefusedError):
            connect(running)
    log = running.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


@on_sqlite
def test_sigterm_waits_for_idle_connections_only_until_their_time_out(env: dict[str, str], tmp_path: Path) -> None:
    with accepting(env, tmp_path / "log") as running, connect(running) as silent, connect(running) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: studio.example\r\n\r\n")
        assert received(idle, until=b'{"status":"ok"}').startswith(b"HTTP/1.1 200 ")
        started = Stopwatch(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(PATIENCE)
        assert started.own_seconds < 8
        assert received(silent) == received(idle) == b""


@pytest.mark.parametrize("workers", [1, 2])
@on_sqlite
def test_a_port_in_use_is_reported_in_one_line(env: dict[str, str], workers: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert port in refused("serve", "--workers", str(workers), env=env | {"SSO_PORT": port})


@on_sqlite
def test_an_address_of_another_machine_is_reported_in_one_line(env: dict[str, str]) -> None:
    assert "192.0.2.1" in refused("serve", env=env | {"SSO_HOST": "192.0.2.1"})


@on_sqlite
def test_the_service_starts_with_a_warning_about_a_misspelt_setting(env: dict[str, str], tmp_path: Path) -> None:
    with accepting(env | {"SSO_TOKEN_TLL": "hunter2"}, tmp_path / "log") as running:
        assert ask(running, "GET", "/readyz")[0] == 200
    assert "SSO_TOKEN_TLL" in running.log.read_text()
    assert "hunter2" not in running.log.read_text()


@on_sqlite
def test_an_embedded_database_is_created_at_start_and_old_keys_revoked(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sso.db").unlink()
    [old] = keyring.load(tmp_path / "keys")[0]
    with accepting(env, tmp_path / "log", workers=2) as running:
        assert ask(running, "GET", "/readyz")[0] == 200
        assert command("db", "current", env=env).stdout == f"{SCHEMA_VERSION}\n"
    entries, _ = keyring.load(tmp_path / "keys")
    assert isinstance(entries[old], keyring.Tombstone)
    assert len(entries) == 2


@on_postgresql
@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ("DROP SCHEMA public CASCADE; CREATE SCHEMA public", "sso-service init"),
        ("UPDATE alembic_version SET version_num = '0000'", "sso-service db upgrade"),
    ],
)
def test_an_empty_or_old_postgresql_database_is_not_served(env: Mapping[str, str], change: str, remedy: str) -> None:
    with psycopg.connect(env["SSO_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(change.encode())
    assert remedy in refused("serve", "--workers", "2", env=env)


@on_sqlite
def test_a_service_without_a_key_does_not_start(env: dict[str, str], tmp_path: Path) -> None:
    for path in (tmp_path / "keys").iterdir():
        path.unlink()
    assert "sso-service keys rotate --lead 0" in refused("serve", env=env)


@on_sqlite
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_service_leaves_no_metrics_directory_behind(
    env: dict[str, str], tmp_path: Path, workers: int
) -> None:
    with serving(env, tmp_path / "log", workers=workers) as running:
        process = psutil.Process(running.process.pid)
        opened = [file.path for each in (process, *process.children()) for file in each.open_files()]
        (metrics,) = {Path(path).parent for path in opened if "sso-metrics-" in path}
    assert running.process.returncode == 0
    assert not metrics.exists()
