"""Malformed and ambiguous requests, byte for byte, to the service alone and behind the shipped proxy configurations.

Each gets one clear response or the end of its connection. No attacker can hide a request in it from a proxy, and the
service keeps running.
"""

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sso_service import keyring
from sso_service.database import open_database
from sso_service.permissions import Scope
from sso_service.settings import read_settings
from tests.support import administration
from tests.support.client import Answer
from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.databases import changing
from tests.support.deployments import Deployment, running_deployment
from tests.support.processes import Running, serving
from tests.support.proxies import proxying
from tests.support.studio_server import application
from tests.support.waiting import PATIENCE

HOST = b"Host: studio.example"
PERSON = json.dumps(JANE).encode()


def message(first: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    """Return a request of exactly these lines."""
    return b"".join(line + b"\r\n" for line in (first, *lines, b"")) + body


def chunked(content: bytes, size: bytes = b"%x", trailer: bytes = b"") -> bytes:
    """Return `content` as a body of one chunk. `size` is the format of the chunk's size."""
    return size % len(content) + b"\r\n" + content + b"\r\n0\r\n" + trailer + b"\r\n"


LAST = message(b"GET /healthz HTTP/1.1", HOST, b"Connection: close")
"""A request that ends the connection once all earlier ones are answered."""


def parsed(stream: bytes) -> list[Answer]:
    """Return the responses in what was received. Fail if it contains anything else."""
    answers = []
    while stream:
        head, _, stream = stream.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        answer = Answer(int(first[9:12]), headers, b"")
        length = int(answer.header("content-length") or 0)
        assert len(stream) >= length, answer
        answers.append(Answer(answer.status, headers, stream[:length]))
        stream = stream[length:]
    return answers


def exchanged(connection: socket.socket, request: bytes, then: bytes = b"") -> bytes:
    """Return what is received until the other side closes. `then` is sent once the first bytes have arrived."""
    received = b""
    with closing(connection), suppress(ConnectionResetError, BrokenPipeError, ssl.SSLError):
        connection.sendall(request)
        if then:
            received = connection.recv(65536)
            connection.sendall(then)
        while piece := connection.recv(65536):
            received += piece
    return received


@dataclass(frozen=True, slots=True)
class Wire:
    """A service and an API token, for requests in raw bytes."""

    running: Running
    secret: str

    @property
    def authorization(self) -> bytes:
        return b"Authorization: Bearer " + self.secret.encode()

    def connect(self) -> socket.socket:
        parts = urlsplit(self.running.url)
        return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=PATIENCE)

    def answers(self, request: bytes, then: bytes = b"") -> list[Answer]:
        """Return the responses until the service closes. `then` is sent once the first bytes have arrived."""
        return parsed(exchanged(self.connect(), request, then))

    def statuses(self, request: bytes, then: bytes = b"") -> list[int]:
        return [answer.status for answer in self.answers(request, then)]

    def post(self, target: bytes, *lines: bytes, body: bytes) -> bytes:
        """Return a POST with the API token. `lines` must contain the length of the body."""
        return message(b"POST " + target + b" HTTP/1.1", HOST, self.authorization, *lines, body=body)

    def call(self, target: bytes, content: object) -> Answer:
        body = json.dumps(content).encode()
        request = self.post(target, b"Content-Length: %d" % len(body), b"Connection: close", body=body)
        [answer] = self.answers(request)
        return answer

    def issue(self) -> str:
        token: str = self.call(b"/v1/sso_tokens", JANE).json()["token"]
        return token

    def is_unused(self, token: str) -> bool:
        return self.call(b"/v1/sso_tokens/verify", {"token": token}).json()["active"] is True


@pytest.fixture(scope="module")
def wire(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    """One service for all requests of this module. Its log must contain no traceback at the end."""
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "sso.db").write_bytes(sqlite_template.read_bytes())
    (directory / "keys").mkdir(mode=0o700)
    keyring.rotate(directory / "keys", now=int(time.time()) - 3600, lead=0)
    env = {"SSO_HOME": str(directory), "SSO_DATABASE_URL": "sqlite:///sso.db"}
    database = open_database(read_settings(env))
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=ACCOUNT, name="x", scopes=frozenset(Scope), now=int(time.time())
        )
    database.close()
    with serving(env, directory / "log") as running:
        wire = Wire(running, secret)
        yield wire
        assert wire.statuses(LAST) == [200]
        log = running.log.read_text()
    assert "Traceback" not in log
    assert "ERROR" not in log
    assert secret not in log


# --- one request -----------------------------------------------------------------------------------------------------

REFUSED = {
    "no Host": message(b"GET /session HTTP/1.1"),
    "two Hosts": message(b"GET /session HTTP/1.1", HOST, b"Host: evil.example"),
    "two equal Hosts": message(b"GET /session HTTP/1.1", HOST, HOST),
    "two Hosts in HTTP/1.0": message(b"GET /session HTTP/1.0", HOST, HOST),
    "a space in a header's name": message(b"GET /session HTTP/1.1", HOST, b"X Y: z"),
    "a space after a header's name": message(b"GET /session HTTP/1.1", HOST, b"X : z"),
    "a space before the first header": message(b"GET /session HTTP/1.1", b" X: y", HOST),
    "a header on two lines": message(b"GET /session HTTP/1.1", HOST, b"X: y", b" z"),
    "a header on two lines, with a tab": message(b"GET /session HTTP/1.1", HOST, b"X: y", b"\tz"),
    "a header without a name": message(b"GET /session HTTP/1.1", HOST, b": y"),
    "a header without a colon": message(b"GET /session HTTP/1.1", HOST, b"nonsense"),
    "a null byte in a header's name": message(b"GET /session HTTP/1.1", HOST, b"X\0: y"),
    "a null byte in a header": message(b"GET /session HTTP/1.1", HOST, b"X: y\0z"),
    "a control character in a header": message(b"GET /session HTTP/1.1", HOST, b"X: y\x01"),
    "a delete character in a header": message(b"GET /session HTTP/1.1", HOST, b"X: y\x7f"),
    "lines that end in LF": b"GET /session HTTP/1.1\n" + HOST + b"\n\n",
    "lines that end in CR": b"GET /session HTTP/1.1\r" + HOST + b"\r\r",
    "a CR within a header": message(b"GET /session HTTP/1.1", HOST, b"X: y\rHost: evil.example"),
    "a head that ends in LF": b"GET /session HTTP/1.1\r\n" + HOST + b"\r\n\n",
    "no target": message(b"GET HTTP/1.1", HOST),
    "a target without a slash": message(b"GET session HTTP/1.1", HOST),
    "a query without a path": message(b"GET ?sso=x HTTP/1.1", HOST),
    "a host and no path": message(b"GET http://studio.example HTTP/1.1", HOST),
    "a host and a query": message(b"GET http://studio.example?sso=x HTTP/1.1", HOST),
    "a host and an impossible port": message(b"GET http://studio.example:99999/session HTTP/1.1", HOST),
    "an authority": message(b"GET studio.example:443 HTTP/1.1", HOST),
    "a broken percent-encoding in the path": message(b"GET /a%zz?sso=x HTTP/1.1", HOST),
    "a percent sign at the end of the path": message(b"GET /100%?sso=x HTTP/1.1", HOST),
    "a path of percent signs": message(b"GET /" + b"%" * 30_000 + b" HTTP/1.1", HOST),
    "CONNECT": message(b"CONNECT studio.example:443 HTTP/1.1", HOST),
    "CONNECT with a path": message(b"CONNECT /session HTTP/1.1", HOST),
    "a space in the target": message(b"GET /ses sion HTTP/1.1", HOST),
    **{
        f"byte {byte:02x} in the target": message(b"GET /a?s%bso=x&sso=y HTTP/1.1" % bytes([byte]), HOST)
        for byte in (*range(0x20), 0x7F, 0x80, 0xE4, 0xFF)
    },
    "tabs instead of spaces": message(b"GET\t/session\tHTTP/1.1", HOST),
    "a method in lower case": message(b"get /session HTTP/1.1", HOST),
    "an unknown method": message(b"STEAL /session HTTP/1.1", HOST),
    "HTTP/0.9": b"GET /session\r\n\r\n",
    "HTTP/1.2": message(b"GET /session HTTP/1.2", HOST),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "http/1.1": message(b"GET /session http/1.1", HOST),
    "another protocol": message(b"GET /session ICE/1.0", HOST),
    "SSH": b"SSH-2.0-OpenSSH_9.0\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "the PROXY protocol": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + LAST,
}


def test_a_head_has_at_most_100_lines(wire: Wire) -> None:
    requests = [([b"a:"] * count, status) for count, status in ((98, 401), (99, 431), (6000, 431))]
    # An address of a proxy counts as a line.
    forwarded = b"X-Forwarded-For: 192.0.2.1"
    requests += [([forwarded + b",127.0.0.1" * count], status) for count, status in ((97, 401), (98, 431), (2500, 431))]
    requests += [([forwarded, forwarded + b",127.0.0.1" * 98], 431)]
    for lines, status in requests:
        request = message(b"GET /session HTTP/1.1", HOST, b"Connection: close", *lines)
        answers = wire.answers(request)
        assert [answer.status for answer in answers] == [status]
        assert answers[0].error == ("headers_too_large" if status == 431 else "not_signed_in")


def test_an_encoded_path_is_decoded_and_kept_as_it_was_sent(wire: Wire) -> None:
    close = b"Connection: close"
    # Decoded, the path is one of the service's own.
    assert wire.statuses(message(b"GET /%68ealthz?a=%zz HTTP/1.1", HOST, close)) == [200]
    for path in (b"/caf%C3%A9/%f0%9f%98%80=%3D", b"/a%20b", b"/a_%5F"):
        token = wire.issue().encode()
        [answer] = wire.answers(message(b"GET %b?b=%%zz&sso=%b HTTP/1.1" % (path, token), HOST, close))
        assert (answer.status, answer.header("location")) == (303, (path + b"?b=%zz").decode())
    assert wire.statuses(message(b"GET /a%2fb?sso=x HTTP/1.1", HOST, close)) == [400]


@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
def test_invalid_requests_are_refused_and_end_the_connection(wire: Wire, request_: bytes) -> None:
    assert wire.statuses(request_ + LAST) in ([400], [414])


ANSWERED = {
    "a host in the target": (message(b"GET http://evil.example/session HTTP/1.1", HOST), 401),
    "a host in the target of a login link": (message(b"GET http://evil.example/a?sso=x HTTP/1.1", HOST), 401),
    "a star": (message(b"OPTIONS * HTTP/1.1", HOST), 404),
    "TRACE": (message(b"TRACE /session HTTP/1.1", HOST), 405),
    "TRACE of a login link": (message(b"TRACE /a?sso=x HTTP/1.1", HOST), 405),
    "PROPFIND of a login link": (message(b"PROPFIND /a?sso=x HTTP/1.1", HOST), 405),
    "empty lines before it": (b"\r\n\r\n" + message(b"GET /session HTTP/1.1", HOST), 401),
    "a fragment": (message(b"GET /session#/healthz HTTP/1.1", HOST), 401),
    "an upgrade to HTTP/2": (message(b"GET /session HTTP/1.1", HOST, b"Connection: Upgrade", b"Upgrade: h2c"), 401),
    "an upgrade to WebSocket": (
        message(b"GET /session HTTP/1.1", HOST, b"Connection: keep-alive, Upgrade", b"Upgrade: websocket"),
        401,
    ),
    "an upgrade without Connection": (message(b"GET /session HTTP/1.1", HOST, b"Upgrade: h2c"), 401),
    "a body of a GET": (message(b"GET /session HTTP/1.1", HOST, b"Content-Length: 5", body=b"GET /"), 401),
    "an unknown expectation": (message(b"GET /session HTTP/1.1", HOST, b"Expect: a miracle"), 401),
    "cookies of 60,000 bytes": (message(b"GET /session HTTP/1.1", HOST, b"Cookie: " + b"a=b; " * 12_000), {401, 431}),
    "a thousand headers": (message(b"GET /session HTTP/1.1", HOST, *[b"X%d: y" % n for n in range(1000)]), {401, 431}),
}


@pytest.mark.parametrize(("request_", "status"), ANSWERED.values(), ids=ANSWERED)
def test_unusual_requests_are_answered_once_and_keep_the_connection(
    wire: Wire, request_: bytes, status: int | set[int]
) -> None:
    first, *rest = wire.statuses(request_ + LAST)
    assert first == status or (isinstance(status, set) and first in status)
    assert rest == [200] or (first, rest) == (431, [])


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    session, readyz = message(b"GET /session HTTP/1.1", HOST), message(b"GET /readyz HTTP/1.1", HOST)
    assert wire.statuses((session + readyz) * 20 + LAST) == [401, 200] * 20 + [200]
    upgrade = message(b"GET /readyz HTTP/1.1", HOST, b"Connection: Upgrade", b"Upgrade: h2c")
    assert wire.statuses((session + upgrade) * 500 + LAST) == [401, 200] * 500 + [200]


def test_http_1_0_gets_one_response_and_needs_no_host(wire: Wire) -> None:
    for lines in ([], [b"Connection: keep-alive"], [HOST]):
        assert wire.statuses(message(b"GET /healthz HTTP/1.0", *lines) + LAST) == [200]


def test_a_repeated_authorization_header_is_refused(wire: Wire) -> None:
    length = b"Content-Length: %d" % len(PERSON)
    twice = wire.post(b"/v1/sso_tokens", wire.authorization, length, body=PERSON)
    assert wire.statuses(twice + LAST) == [401, 200]
    other = wire.post(b"/v1/sso_tokens", b"Authorization: Bearer x", length, body=PERSON)
    assert wire.statuses(other + LAST) == [401, 200]
    # The service does not depend on the content type, so a second one is harmless.
    types = wire.post(b"/v1/sso_tokens", b"Content-Type: a/b", b"Content-Type: text/plain", length, body=PERSON)
    assert wire.statuses(types + LAST) == [201, 200]


@pytest.mark.parametrize("connection", [b"Upgrade", b"Upgrade, HTTP2-Settings", b"keep-alive, upgrade"])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0", b"h2c, websocket"])
def test_an_upgrade_is_declined_and_the_request_is_read_completely(
    wire: Wire, connection: bytes, protocol: bytes
) -> None:
    """Java's HTTP client sends `Upgrade: h2c` with every request over plain HTTP."""
    upgrade = [b"Connection: " + connection, b"Upgrade: " + protocol, b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"]
    length = b"Content-Length: %d" % len(PERSON)
    whole = wire.post(b"/v1/sso_tokens", *upgrade, length, body=PERSON)
    assert wire.statuses(whole + whole + LAST) == [201, 201, 200]
    pieces = wire.post(b"/v1/sso_tokens", *upgrade, b"Transfer-Encoding: chunked", body=chunked(PERSON))
    assert wire.statuses(pieces + pieces + LAST) == [201, 201, 200]
    # Now the body follows once the head was read, and then the head arrives byte by byte as well.
    waiting = wire.post(b"/v1/sso_tokens", *upgrade, length, b"Expect: 100-continue", body=b"")
    assert wire.statuses(waiting, PERSON + LAST) == [100, 201, 200]
    with closing(wire.connect()) as connection_:
        connection_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in whole + LAST:
            connection_.sendall(bytes([byte]))
        assert [answer.status for answer in parsed(b"".join(iter(lambda: connection_.recv(65536), b"")))] == [201, 200]


def test_a_client_that_expects_100_continue_receives_it(wire: Wire) -> None:
    lines = [b"Expect: 100-continue", b"Content-Length: %d" % len(PERSON)]
    assert wire.statuses(wire.post(b"/v1/sso_tokens", *lines, body=b""), PERSON + LAST) == [100, 201, 200]


@pytest.mark.parametrize("expect", [b"Expect: 100-continue", b"Expect: x 100-continue", b"X: y"])
def test_a_response_before_the_end_of_the_body_closes_the_connection(wire: Wire, expect: bytes) -> None:
    """A proxy that was told not to send the body would send the next request in its place."""
    for first in FIRST_LINES:
        for length in (b"Content-Length: 5000", b"Transfer-Encoding: chunked"):
            [answer] = wire.answers(message(first, HOST, expect, length), LAST)
            assert answer.status in {200, 204, 401, 403, 405}
            assert answer.header("connection") == "close"


def test_an_early_response_reaches_a_client_that_still_sends_its_body(wire: Wire) -> None:
    head = message(b"POST /v1/sso_tokens HTTP/1.1", HOST, b"Content-Length: 500000")
    with closing(wire.connect()) as connection:
        connection.sendall(head)
        for _ in range(50):
            connection.sendall(b"a" * 10_000)
        [answer] = parsed(b"".join(iter(lambda: connection.recv(65536), b"")))
    assert (answer.status, answer.error) == (401, "missing_token")


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_chunked_body_is_read_and_its_trailers_are_not_headers(wire: Wire) -> None:
    pieces = b"Transfer-Encoding: chunked"
    for body in (
        chunked(PERSON),
        chunked(PERSON, b"%X"),
        chunked(PERSON, b"000%x"),
        chunked(PERSON, b"%x;name=value"),
        b"".join(b"1\r\n%c\r\n" % byte for byte in PERSON) + b"0\r\n\r\n",
        chunked(PERSON, trailer=b"Authorization: Bearer x\r\nX: y\r\n"),
    ):
        assert wire.statuses(wire.post(b"/v1/sso_tokens", pieces, body=body) + LAST) == [201, 200]
    without_token = message(b"POST /v1/sso_tokens HTTP/1.1", HOST, pieces, b"Trailer: Authorization")
    body = chunked(PERSON, trailer=wire.authorization + b"\r\n")
    assert wire.statuses(without_token + body + LAST) == [401, 200]
    for trailer in (b"Host: a", b"Content-Length: 5", b"Transfer-Encoding: x", b"Connection: Upgrade\r\nUpgrade: h2c"):
        body = chunked(PERSON, trailer=trailer + b"\r\n")
        assert wire.statuses(wire.post(b"/v1/sso_tokens", pieces, body=body) + LAST) in ([201, 200], [400])


BAD_CHUNKS = {
    "not hexadecimal": b"zz\r\n",
    "negative": b"-1\r\n",
    "signed": b"+5\r\nhello\r\n0\r\n\r\n",
    "with a prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "empty": b"\r\nhello\r\n0\r\n\r\n",
    "of 65 bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "of a hundred digits": b"f" * 100 + b"\r\nhello\r\n0\r\n\r\n",
    "before a space": b"5 \r\nhello\r\n0\r\n\r\n",
    "after a space": b" 5\r\nhello\r\n0\r\n\r\n",
    "that ends in LF": b"5\nhello\r\n0\r\n\r\n",
    "that ends in CR": b"5\rhello\r\n0\r\n\r\n",
    "with an extension that ends in LF": b"5;a\nhello\r\n0\r\n\r\n",
    "before content that ends in LF": b"5\r\nhello\n0\r\n\r\n",
    "before longer content": b"5\r\nhello!!0\r\n\r\n",
    "before shorter content": b"5\r\nhell\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_an_ambiguous_chunk_size_ends_the_connection(wire: Wire, body: bytes) -> None:
    assert wire.statuses(wire.post(b"/v1/sso_tokens", b"Transfer-Encoding: chunked", body=body) + LAST) == [400]


def test_a_body_that_announces_too_much_is_refused_at_once(wire: Wire) -> None:
    for lines, body in (
        ([b"Content-Length: 16385"], b"{"),
        ([b"Content-Length: 18446744073709551615"], b"{"),
        ([b"Transfer-Encoding: chunked"], b"ffffffffffffffff\r\n" + b" " * 16_385),
        (
            [b"Transfer-Encoding: chunked"],
            b"1000;" + b"a" * 50_000 + b"\r\n" + b" " * 4096 + b"\r\n5000\r\n" + b" " * 16_385,
        ),
    ):
        [answer] = wire.answers(wire.post(b"/v1/sso_tokens", *lines, body=body))
        assert (answer.status, answer.error) == (413, "payload_too_large")


# --- a request within a request --------------------------------------------------------------------------------------

LENGTHS = {
    "two lengths": [b"Content-Length: {whole}", b"Content-Length: 0"],
    "two lengths, the other first": [b"Content-Length: 0", b"Content-Length: {whole}"],
    "two equal lengths": [b"Content-Length: {whole}", b"Content-Length: {whole}"],
    "two lengths in one": [b"Content-Length: {whole}, 0"],
    "two equal lengths in one": [b"Content-Length: {whole}, {whole}"],
    "a length with a sign": [b"Content-Length: +{whole}"],
    "a negative length": [b"Content-Length: -1"],
    "a length with a fraction": [b"Content-Length: {whole}.0"],
    "a hexadecimal length": [b"Content-Length: 0x5"],
    "a length with a space in it": [b"Content-Length: 0 {whole}"],
    "a length in other digits": ["Content-Length: \u0661".encode()],
    "an empty length": [b"Content-Length:"],
    "a length of 65 bits": [b"Content-Length: 18446744073709551616"],
    "a space after the length's name": [b"Content-Length : {whole}"],
    "a length within a header": [b"X: y\rContent-Length: {whole}"],
    "a length after LF": [b"X: y\nContent-Length: {whole}"],
    "a length and chunks": [b"Content-Length: {whole}", b"Transfer-Encoding: chunked"],
    "chunks and a length": [b"Transfer-Encoding: chunked", b"Content-Length: {whole}"],
    **{
        f"a length and Transfer-Encoding {value!r}": [b"Content-Length: {whole}", b"Transfer-Encoding:" + value]
        for value in (
            *(b" CHUNKED", b"\tchunked", b" chunked ", b" xchunked", b" chunkedx", b' "chunked"', b" \x0bchunked"),
            *(b" chunked\x0b", b" chunked\0", b" chunked, identity", b" identity, chunked", b" chunked, chunked"),
            *(b" chunked;q=1", b" identity", b" gzip", b"", b"\r\n chunked", b" chunked\r\nTransfer-Encoding: x"),
            *(b" x\r\nTransfer-Encoding: chunked", " \u212ahunked".encode(), b" chunked,", b" , chunked"),
        )
    },
    "a length and a space after Transfer-Encoding": [b"Content-Length: {whole}", b"Transfer-Encoding : chunked"],
    "a length and a space before Transfer-Encoding": [b"Content-Length: {whole}", b" Transfer-Encoding: chunked"],
    "a length and Transfer_Encoding": [b"Content-Length: {whole}", b"Transfer_Encoding: chunked"],
    "a length and Transfer-Encoding within a header": [b"Content-Length: {whole}", b"X: y\rTransfer-Encoding: chunked"],
    "a length and Transfer-Encoding after LF": [b"Content-Length: {whole}", b"X: y\nTransfer-Encoding: chunked"],
    "a length that Connection names": [b"Content-Length: {whole}", b"Connection: Content-Length"],
    "chunks that Connection names": [b"Transfer-Encoding: chunked", b"Connection: Transfer-Encoding"],
    "a length and an upgrade": [b"Content-Length: {whole}", b"Connection: Upgrade", b"Upgrade: websocket"],
    "a length and another upgrade": [b"Content-Length: {whole}", b"Connection: Upgrade", b"Upgrade: h2c"],
    "chunks and an upgrade": [b"Transfer-Encoding: chunked", b"Connection: Upgrade", b"Upgrade: websocket"],
    "a length and an expectation": [b"Content-Length: {whole}", b"Expect: 100-continue"],
    "a length and an unknown expectation": [b"Content-Length: {whole}", b"Expect: x 100-continue"],
    "a length": [b"Content-Length: {whole}"],
}
"""Header lines that determine the length of a body. `{whole}` stands for its real length."""

FIRST_LINES = [
    b"POST /v1/sso_tokens HTTP/1.1",
    b"POST /logout HTTP/1.1",
    b"POST " + PAGE.encode() + b"?sso=x HTTP/1.1",
    b"GET " + PAGE.encode() + b"?sso=x HTTP/1.1",
    b"HEAD " + PAGE.encode() + b"?sso=x HTTP/1.1",
    b"OPTIONS " + PAGE.encode() + b"?sso=x HTTP/1.1",
]
"""Requests that are answered without reading their body."""


def bodies(hidden: bytes) -> list[bytes]:
    """Return bodies that consist of another request, or contain it after what may look like their end."""
    return [hidden, b"0\r\n\r\n" + hidden, b"%x\r\n" % len(hidden) + hidden + b"\r\n0\r\n\r\n"]


def outer(first: bytes, host: bytes, lines: Sequence[bytes], body: bytes) -> bytes:
    """Return the head of the request that hides another one in `body`."""
    return message(first, host, *(line.replace(b"{whole}", b"%d" % len(body)) for line in lines))


@pytest.mark.parametrize("lines", LENGTHS.values(), ids=LENGTHS)
def test_no_request_hides_inside_another(wire: Wire, lines: list[bytes]) -> None:
    token = wire.issue()
    hidden = message(f"GET {PAGE}?sso={token} HTTP/1.1".encode(), HOST)
    for first in FIRST_LINES:
        for number, body in enumerate(bodies(hidden)):
            head = outer(first, HOST, lines, body)
            if number == 1 and head.count(b"Transfer-Encoding: chunked\r\n") and b"{whole}" not in b"".join(lines):
                continue  # this head is correct: the body really ends before the second request
            for statuses in (wire.statuses(head + body + LAST), wire.statuses(head, body + LAST)):
                final = [status for status in statuses if status != 100]
                # Three results are safe. The request is refused; or its body is read as a body and the next request
                # follows; or it has no body, and the connection ends.
                assert len(final) <= 2, (head, body, statuses)
                assert 303 not in final, (head, body, statuses)
                assert len(final) < 2 or final[1] in {200, 400}, (head, body, statuses)
    assert wire.is_unused(token)


# --- behind a proxy --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployment(kind: str, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp(kind)
    with running_deployment(kind, sqlite_template, directory) as (deployment, _):
        yield deployment
    assert "Traceback" not in (directory / "service.log").read_text()


def hidden_in(token: str) -> bytes:
    """Return a login that the proxy would refuse, because its host is not the Studio's."""
    return message(f"GET {PAGE}?sso={token} HTTP/1.1".encode(), b"Host: hidden.example")


@pytest.mark.parametrize("lines", LENGTHS.values(), ids=LENGTHS)
def test_no_request_hides_from_a_proxy(deployment: Deployment, lines: list[bytes]) -> None:
    token = deployment.issue()
    host = b"Host: studio.example:%d" % deployment.proxy.port
    last = message(b"GET /healthz HTTP/1.1", host, b"Connection: close")
    for first in (FIRST_LINES[0], FIRST_LINES[2]):
        for body in bodies(hidden_in(token)):
            connection = deployment.proxy.connect()
            connection.settimeout(2)
            with suppress(TimeoutError):  # it may read the last request as part of a body, and wait for the rest
                received = exchanged(connection, outer(first, host, lines, body) + body + last)
                assert b"HTTP/1.1 303" not in received
    assert deployment.accepts(token)


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_no_request_hides_behind_an_upgrade(deployment: Deployment, protocol: bytes) -> None:
    """The next request on the proxy's connection to the service belongs to another client, and stays separate."""
    token = deployment.issue()
    host = b"Host: studio.example:%d" % deployment.proxy.port
    hidden = hidden_in(token)
    for body in (hidden, hidden[:-2] + b"X: "):
        for first in (FIRST_LINES[0], FIRST_LINES[2]):
            for delay in (0, 0.005, 0.01, 0.02):
                lines = [b"Connection: Upgrade", b"Upgrade: " + protocol, b"Content-Length: {whole}"]
                with closing(deployment.proxy.connect()) as connection:
                    connection.sendall(outer(first, host, lines, body))
                    time.sleep(delay)  # the service must have only the head, while the proxy still holds the connection
                    connection.sendall(body)
                    assert connection.recv(65536)[9:12] in {b"401", b"405"}
                    assert deployment.proxy.request("/session").status == 401
    assert deployment.accepts(token)


def test_the_proxy_forwards_no_upgrade_and_no_expectation(kind: str, tmp_path: Path) -> None:
    with (
        application() as service,
        application() as studio,
        proxying(kind, [f"127.0.0.1:{service.port}"], studio.port, tmp_path / "p") as proxy,
    ):
        for protocol in ("websocket", "h2c", "WebSocket", "x"):
            for target in (f"{PAGE}?sso=x", "/v1/sso_tokens", "/session", PAGE):
                proxy.request(
                    target, ("Connection", "Upgrade, close"), ("Upgrade", protocol), method="POST", body=b"hello"
                )
                proxy.request(target, ("Expect", "100-continue"), method="POST", body=b"hello")
                proxy.request(target, ("Expect", "x 100-continue"), method="POST", body=b"hello")
        seen = service.take()
    assert {request.target for request in seen} >= {b"/v1/sso_tokens", b"/session", f"{PAGE}?sso=x".encode()}
    for request in seen:
        assert not request.values("upgrade") + request.values("expect"), request
        assert "upgrade" not in ",".join(request.values("connection")).lower(), request


# --- slow clients ----------------------------------------------------------------------------------------------------


async def drip(port: int, begin: bytes, begun: asyncio.Semaphore) -> None:
    """Send `begin`, and then a byte every 0.05 s until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(begin)
        await writer.drain()
        begun.release()
        while not reader.at_eof():
            await asyncio.sleep(0.05)
            writer.write(b"a")
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        begun.release()
        writer.transport.abort()


@pytest.mark.anyio
async def test_two_hundred_slow_clients_do_not_delay_others(wire: Wire) -> None:
    """Some never end their head, others their body, others a body whose request was answered already."""
    kinds = [
        b"GET /session HTTP/1.1\r\nHost: studio.example\r\nX: ",
        b"GET /a?sso=",
        wire.post(b"/v1/sso_tokens", b"Content-Length: 10000", body=b"{"),
        message(b"POST /v1/sso_tokens HTTP/1.1", HOST, b"Content-Length: 10000", body=b"{"),
    ]
    port = urlsplit(wire.running.url).port or 0
    begun = asyncio.Semaphore(0)
    drips = [asyncio.create_task(drip(port, kinds[number % len(kinds)], begun)) for number in range(200)]
    try:
        for _ in drips:
            await begun.acquire()
        for _ in range(20):
            token = await asyncio.to_thread(wire.issue)
            login = message(f"GET {PAGE}?sso={token} HTTP/1.1".encode(), HOST, b"Connection: close")
            assert await asyncio.to_thread(wire.statuses, login) == [303]
        assert not any(task.exception() for task in drips if task.done())
    finally:
        for task in drips:
            task.cancel()
        await asyncio.gather(*drips, return_exceptions=True)
