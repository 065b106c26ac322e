"""Limits on connections: the size of heads and bodies, the time that a head may take, and many connections at once."""

import resource
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sso_service import keyring
from sso_service.server.protocol import HEAD_TIMEOUT, MAX_BODY, MAX_HEAD
from tests.support.data import PAGE
from tests.support.processes import Running, serving
from tests.support.waiting import PATIENCE, Stopwatch

KIB = 1024
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: studio.example\r\n\r\n"
CHUNKED = b"POST /healthz HTTP/1.1\r\nHost: studio.example\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def running(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("home")
    shutil.copy(sqlite_template, home / "sso.db")
    (home / "keys").mkdir()
    keyring.rotate(home / "keys", now=int(time.time()) - 3600, lead=0)
    with serving({"SSO_HOME": str(home), "SSO_DATABASE_URL": "sqlite:///sso.db"}, home / "log") as running:
        yield running
    assert "Traceback" not in running.log.read_text()


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(running.url).port or 0), timeout=PATIENCE)


def rest(connection: socket.socket) -> bytes:
    """Return what is received until the other side closes."""
    content = b""
    try:
        while piece := connection.recv(65536):
            content += piece
    except ConnectionResetError:  # the service closed without reading everything
        pass
    return content


def answer_to(running: Running, *pieces: bytes) -> bytes:
    """Send a request in pieces that the service reads one by one. Return what is received until it closes."""
    with closing(connect(running)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the service has closed the connection early
        return rest(connection)


def get(target: str, *headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: studio.example", "Connection: close", "Accept: application/json"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def in_pieces(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def alive(connection: socket.socket) -> bool:
    return ask(connection, ALIVE).startswith(b"HTTP/1.1 200 ")


def ask(connection: socket.socket, request: bytes) -> bytes:
    """Return the response, in JSON, to a request on a connection that stays open."""
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"}") and (piece := connection.recv(65536)):
        answer += piece
    return answer


@pytest.mark.parametrize("size", [1 << 20, 9000], ids=["at once", "in pieces"])
def test_a_head_of_64_kib_is_refused(running: Running, size: int) -> None:
    one_header = get("/session", "Cookie: " + "a" * 64 * KIB)
    many_headers = get("/session", *(f"X-{number}: 1" for number in range(8000)))
    endless = get("/session", "Cookie: " + "a" * 256 * KIB)[:-4]
    for request in (one_header, many_headers, endless):
        answer = answer_to(running, *in_pieces(request, size))
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"connection: close\r\n" in answer
        assert b'"code":"headers_too_large"' in answer


@pytest.mark.parametrize("size", [1 << 20, 9000], ids=["at once", "in pieces"])
def test_an_address_of_64_kib_is_refused(running: Running, size: int) -> None:
    answer = answer_to(running, *in_pieces(get("/" + "a" * 64 * KIB), size))
    assert answer.startswith(b"HTTP/1.1 414 ")
    assert b'"code":"uri_too_long"' in answer


@pytest.mark.parametrize("size", [1 << 20, 1000], ids=["at once", "in pieces"])
def test_an_address_of_8_kib_with_16_kib_of_cookies_is_served(running: Running, size: int) -> None:
    target = f"{PAGE}?sso={'A' * 43}&more=" + "a" * (8 * KIB)
    answer = answer_to(running, *in_pieces(get(target, "Cookie: " + "a" * (16 * KIB)), size))
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_the_limit_of_a_head_is_exact(running: Running) -> None:
    empty = len(get("/healthz", "Cookie: "))
    for size, status in [(MAX_HEAD - 1, 200), (MAX_HEAD + 1, 431)]:
        request = get("/healthz", "Cookie: " + "a" * (size - empty))
        assert len(request) == size
        for pieces in ([request], in_pieces(request, 20_000)):
            assert answer_to(running, *pieces).startswith(f"HTTP/1.1 {status} ".encode())


def test_each_of_several_requests_in_one_piece_has_its_own_limit(running: Running) -> None:
    with closing(connect(running)) as connection:
        number = 4 * MAX_HEAD // len(ALIVE)
        connection.sendall(ALIVE * number)
        connection.sendall(get("/healthz"))
        assert rest(connection).count(b"HTTP/1.1 200 ") == number + 1


def test_a_body_does_not_count_towards_the_next_head(running: Running) -> None:
    # In one piece, because a request that is answered before its body ends is the last one on its connection.
    whole = b"POST /healthz HTTP/1.1\r\nHost: studio.example\r\nContent-Length: 12000\r\n\r\n" + b"a" * 12_000
    after = get("/healthz", "Cookie: " + "a" * (MAX_HEAD - 1000))
    answer = answer_to(running, whole, after[:20_000], after[20_000:])
    assert answer.count(b"HTTP/1.1 405 ") == answer.count(b"HTTP/1.1 200 ") == 1


def test_endless_trailers_end_the_connection(running: Running) -> None:
    few = CHUNKED + b"2\r\n{}\r\n0\r\nX-Trailer: a\r\n\r\n"
    assert answer_to(running, few + get("/healthz")).count(b"HTTP/1.1 ") == 2
    with closing(connect(running)) as connection:
        connection.sendall(CHUNKED + b"0\r\n")
        with pytest.raises(ConnectionError):
            send_repeatedly(connection, b"X-Trailer: a\r\n" * KIB, at_most=4 * MAX_BODY)


def send_repeatedly(connection: socket.socket, content: bytes, *, at_most: int) -> None:
    for _ in range(at_most // len(content)):
        connection.sendall(content)
        time.sleep(0.002)


def test_data_that_is_not_http_gets_a_json_error(running: Running) -> None:
    answer = answer_to(running, b"HELO studio.example\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"bad_request"' in answer


def drip(running: Running, connection: socket.socket, start: bytes) -> tuple[bytes, float, float]:
    """Send `start` and then a byte every 0.1 s. Return what is received, and after how many seconds.

    The second number of seconds is without the time that the machine took for other work.
    """
    connection.sendall(start)
    connection.settimeout(0.1)
    begun = Stopwatch(running.process.pid)
    while begun.seconds < HEAD_TIMEOUT + PATIENCE:
        try:
            connection.sendall(b"a")
            return connection.recv(65536), begun.seconds, begun.own_seconds
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return b"", begun.seconds, begun.own_seconds


def test_slow_and_silent_clients_are_disconnected_in_time(
    running: Running,
) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        new, used, silent, good = (stack.enter_context(closing(connect(running))) for _ in range(4))
        assert alive(used)
        dripping = [
            pool.submit(drip, running, new, b"GET / HTTP/1.1\r\nX: "),
            pool.submit(drip, running, used, b"GET / HTTP/1.1\r\nX: "),
        ]
        nothing = pool.submit(rest, silent)
        served = 0
        while not nothing.done() or not all(each.done() for each in dripping):
            assert alive(good)
            served += 1
            time.sleep(0.05)
        assert served > 10
        for each in dripping:
            answer, seconds, own_seconds = each.result()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert seconds > HEAD_TIMEOUT - 1
            assert own_seconds < HEAD_TIMEOUT + 2
        assert nothing.result() == b""


def test_a_thousand_unfinished_requests_do_not_delay_others(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with ExitStack() as stack:
        for _ in range(1000):
            half = stack.enter_context(closing(connect(running)))
            half.sendall(b"GET /session HTTP/1.1\r\nHost: studio")
        for _ in range(50):
            with closing(connect(running)) as connection:
                assert alive(connection)
        assert answer_to(running, get("/readyz")).startswith(b"HTTP/1.1 200 ")
