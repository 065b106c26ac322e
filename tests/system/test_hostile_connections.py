"""Clients that never read, leave at any moment, or are too many: the service keeps running, without tracebacks."""

import json
import random
import re
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from sso_service import keyring
from tests.support.data import JANE
from tests.support.metrics import sample_of, samples_in
from tests.support.processes import Running, serving
from tests.support.waiting import PATIENCE, wait_until

MIB = 1024 * 1024
HOST = b"Host: studio.example\r\n"
BODY = json.dumps(JANE).encode()
HIDDEN = b"GET /docs HTTP/1.1\r\n" + HOST + b"\r\n"
"""A request inside a body. It must never be answered."""


def message(first: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    return first + b" HTTP/1.1\r\n" + HOST + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


AUTHORIZATION = b"Authorization: Bearer x"
"""With it the service reads the body before it refuses the API token."""


def post(target: bytes, body: bytes, *lines: bytes) -> bytes:
    return message(b"POST " + target, AUTHORIZATION, b"Content-Length: %d" % len(body), *lines, body=body)


def chunked(target: bytes, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end
    return message(b"POST " + target, AUTHORIZATION, b"Transfer-Encoding: chunked", body=body)


@pytest.fixture(scope="module")
def env(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    (home / "sso.db").write_bytes(sqlite_template.read_bytes())
    (home / "keys").mkdir(mode=0o700)
    keyring.rotate(home / "keys", now=int(time.time()) - 3600, lead=0)
    return {"SSO_HOME": str(home), "SSO_DATABASE_URL": "sqlite:///sso.db"}


@pytest.fixture(scope="module")
def running(env: dict[str, str]) -> Iterator[Running]:
    with serving(env, Path(env["SSO_HOME"], "log")) as running:
        yield running
        assert httpx.get(f"{running.url}/healthz").status_code == 200
    log = running.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log


def connect(running: Running, *, small: bool = False) -> socket.socket:
    """Return a connection. With `small`, its receive buffer is."""
    client = socket.socket()
    client.settimeout(PATIENCE)
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    client.connect(("127.0.0.1", urlsplit(running.url).port or 0))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def received(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def open_connections(running: Running) -> int:
    found = psutil.Process(running.process.pid).net_connections("tcp")
    return sum(each.status != psutil.CONN_LISTEN for each in found)


def test_pipelined_requests_without_a_reader_take_little_memory(running: Running) -> None:
    service = psutil.Process(running.process.pid)
    before = service.memory_info().rss
    with closing(connect(running, small=True)) as client:
        client.settimeout(0.5)
        sent, piece = 0, message(b"GET /a") * 9000
        with suppress(TimeoutError):
            while sent < 10 * MIB:
                sent += client.send(piece)
        assert service.memory_info().rss - before < 60 * MIB
        assert httpx.get(f"{running.url}/healthz").status_code == 200


def test_clients_that_leave_without_reading_leave_no_traceback(running: Running) -> None:
    wait_until(lambda: open_connections(running) == 0)  # those of the test before may be about to close
    with ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(closing(connect(running, small=True)))
            client.sendall(message(b"GET /docs") * 8)
        wait_until(lambda: open_connections(running) >= 100)
    wait_until(lambda: open_connections(running) == 0)


KINDS = [
    message(b"GET /docs"),
    message(b"GET /docs", b"Connection: close"),
    message(b"GET /docs", b"Connection: Upgrade", b"Upgrade: h2c"),
    message(b"GET /a?sso=" + b"A" * 43, b"Accept: text/html"),
    b"GET /openapi.json HTTP/1.0\r\n\r\n",
    post(b"/v1/sso_tokens", BODY),
    post(b"/v1/sso_tokens", BODY, b"Expect: 100-continue"),
    chunked(b"/v1/sso_tokens", BODY, BODY),
    post(b"/healthz", b"a" * 100_000),
    post(b"/sso/confirm", b"token=a&" * 500, b"Sec-Fetch-Site: same-origin"),
    b"NONSENSE\r\n\r\n",
]


def leave(connect: Callable[[], socket.socket], number: int) -> None:
    """Send some requests, whole or in part, read nothing or a little, and close or reset the connection."""
    chance = random.Random(number)
    with suppress(OSError), closing(connect()) as client:
        client.settimeout(0.1)
        content = b"".join(chance.choices(KINDS, k=chance.choice((1, 1, 2, 8))))
        client.sendall(content[: chance.choice((len(content), chance.randrange(len(content))))])
        time.sleep(chance.choice((0, 0.01)))
        if chance.random() < 0.3:
            client.recv(chance.choice((1, 50_000)))
        if chance.random() < 0.3:
            client.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
        if chance.random() < 0.6:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_clients_that_leave_at_any_moment_leave_no_traceback(running: Running) -> None:
    wait_until(lambda: open_connections(running) == 0)  # those of the test before may be about to close
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: leave(lambda: connect(running, small=bool(number % 2)), number), range(600)))
    wait_until(lambda: open_connections(running) == 0)


def test_clients_of_a_unix_socket_that_leave_leave_no_traceback(env: dict[str, str], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's paths are too long for a unix socket
        path = Path(directory, "sso.sock")

        def through_the_socket() -> socket.socket:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            return client

        with serving(env, tmp_path / "log", uds=path) as running:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda number: leave(through_the_socket, number), range(600)))
            with closing(through_the_socket()) as client:
                client.sendall(message(b"GET /healthz", b"Connection: close"))
                assert received(client).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in running.log.read_text()


LAST = message(b"GET /healthz", b"Connection: close")
SEQUENCE = b"".join(
    [
        post(b"/v1/sso_tokens", HIDDEN),
        message(b"GET /session"),
        chunked(b"/v1/sso_tokens", HIDDEN, b"\r\n\r\n", b"0\r\n\r\n" + HIDDEN, end=b"000;a=b\r\nX: y\r\n\r\n"),
        message(b"HEAD /session"),
        message(b"OPTIONS /a?sso=x", b"Content-Length: 0"),
        post(b"/v1/sso_tokens", BODY, b"Connection: Upgrade", b"Upgrade: h2c"),
        b"\r\n\r\n",
        LAST,
        HIDDEN,
    ]
)
STATUSES = [b"401", b"401", b"401", b"401", b"204", b"401", b"200"]


def statuses(running: Running, pieces: list[bytes], *, ends: bool = False) -> list[bytes]:
    with closing(connect(running)) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.001)
        if ends:
            client.shutdown(socket.SHUT_WR)
        answer = received(client)
    assert b"<html" not in answer  # of `HIDDEN`
    return re.findall(rb"HTTP/1.1 (\d+) ", answer)


def test_requests_divided_at_any_byte_get_the_same_answers(running: Running) -> None:
    # Bytes that are sent behind the last request reset the connection, so these pieces end with it.
    whole = SEQUENCE.removesuffix(HIDDEN)
    halves = [[whole[:at], whole[at:]] for at in range(1, len(whole))]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda pieces: statuses(running, pieces), halves)) == [STATUSES] * len(halves)
    assert statuses(running, [whole], ends=True) == STATUSES


def test_requests_behind_the_last_one_are_not_answered(running: Running) -> None:
    assert statuses(running, [SEQUENCE]) == STATUSES
    assert statuses(running, [LAST + HIDDEN * 10_000]) == [b"200"]
    assert statuses(running, [b"GET /session HTTP/1.0\r\n\r\n" + HIDDEN]) == [b"401"]


def test_many_blank_lines_are_refused(running: Running) -> None:
    """Data is divided at blank lines, so thousands of them in a few kilobytes would occupy the event loop."""
    few, many = b"\r\n\r\n" * 100, b"\r\n\r\n" * 2000
    assert statuses(running, [few + LAST]) == [b"200"]
    assert statuses(running, [chunked(b"/v1/sso_tokens", few) + LAST]) == [b"401", b"200"]
    assert statuses(running, [many + LAST]) == [b"400"]
    assert statuses(running, [chunked(b"/v1/sso_tokens", many) + LAST]) == [b"400"]
    assert statuses(running, [post(b"/v1/sso_tokens", many) + LAST]) == [b"401", b"200"]


def test_connections_above_the_limit_are_closed_and_counted(env: dict[str, str], tmp_path: Path) -> None:
    with serving({**env, "SSO_MAX_CONNECTIONS": "5"}, tmp_path / "log") as running, ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(running))) for _ in range(5)]
        for client in clients:
            client.sendall(message(b"GET /healthz"))
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        for _ in range(20):
            with closing(connect(running)) as refused, suppress(ConnectionError):
                assert refused.recv(1) == b""
        clients[0].sendall(message(b"GET /metrics", b"Connection: close"))
        samples = samples_in(received(clients[0]).partition(b"\r\n\r\n")[2].decode())
        assert sample_of(samples, "sso_connections_refused_total") >= 20
        assert httpx.get(f"{running.url}/healthz").status_code == 200
    assert running.log.read_text().count("Refused") == 1
