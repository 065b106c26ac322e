"""The protocol of a connection with an application that waits or sends much, on both event loops."""

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from sso_service.observability import metrics
from sso_service.server import capacity, protocol, sending
from sso_service.server.framing import MAX_HEADERS
from sso_service.server.protocol import MAX_HELD, Protocol
from tests.support.waiting import PATIENCE, until

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": loop}) for loop in (False, True)]),
]

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LARGE = 4 * 1024 * 1024
seen: ContextVar[str] = ContextVar("seen", default="")


def get(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: studio.example", *lines, "", ""]).encode()


class Application:
    """Answers `/wait...` once it is released, `/large` with 4 MiB, and everything else at once, with the path."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.contexts: list[str] = []
        self.disconnected: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.started.append(path)
        self.contexts.append(seen.get())
        seen.set(path)
        body = b"a" * LARGE if path == "/large" else path.encode()
        if path.startswith("/wait"):
            await receive()
            waiting = {asyncio.ensure_future(receive()), asyncio.ensure_future(self.release.wait())}
            done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in pending:
                each.cancel()
            if {"type": "http.disconnect"} in [each.result() for each in done]:
                self.disconnected.append(path)
                return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


class Service:
    """The protocol with the application above, on a free port."""

    def __init__(self) -> None:
        self.app = Application()
        self.state = ServerState()
        self.port = 0

    @property
    def connections(self) -> list[Protocol]:
        return [each for each in self.state.connections if isinstance(each, Protocol)]

    @asynccontextmanager
    async def connect(self, *, receive_buffer: int | None = None) -> AsyncIterator[Streams]:
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", self.port))
        streams = await asyncio.open_connection(sock=client, limit=1024)
        try:
            yield streams
        finally:
            streams[1].transport.abort()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    config = uvicorn.Config(service.app, http=Protocol, lifespan="off", log_config=None)
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: Protocol(config, service.state, {}), "127.0.0.1", 0)
    service.port = server.sockets[0].getsockname()[1]
    yield service
    server.close()
    for connection in service.connections:
        connection.transport.abort()
    await until(lambda: not service.state.connections)


async def rest(streams: Streams) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return await streams[0].read()


def stalled() -> float:
    [sample, *_] = next(iter(metrics.CONNECTIONS_STALLED.collect())).samples
    return sample.value


async def test_nothing_is_parsed_while_a_request_is_unanswered(service: Service) -> None:
    async with service.connect() as streams:
        streams[1].write(get("/wait1") + get("/wait2") + get("/last", "Connection: close"))
        await until(lambda: bool(service.app.started))
        streams[1].write(b"NONSENSE\r\n\r\n")
        await asyncio.sleep(0.1)
        assert service.app.started == ["/wait1"]
        service.app.release.set()
        answer = await rest(streams)
    assert service.app.started == ["/wait1", "/wait2", "/last"]
    assert answer.index(b"/wait1") < answer.index(b"/wait2") < answer.index(b"/last")
    assert answer.count(b"HTTP/1.1 ") == 3
    assert service.app.contexts == ["", "", ""]


async def test_an_invalid_request_is_refused_after_the_one_before(service: Service) -> None:
    async with service.connect() as streams:
        streams[1].write(get("/wait") + b"NONSENSE\r\n\r\n")
        await until(lambda: bool(service.app.started))
        service.app.release.set()
        answer = await rest(streams)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 400 ") == 1


async def test_a_client_that_sends_without_end_is_stopped(service: Service) -> None:
    async with service.connect() as (_, writer):
        writer.write(get("/wait"))
        await until(lambda: bool(service.app.started))
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    writer.write(get("/a") * 1000)
                    await writer.drain()
        [connection] = service.connections
        assert MAX_HELD < len(connection._held) <= MAX_HELD + 256 * 1024
        assert service.app.started == ["/wait"]


async def test_requests_wait_until_the_client_has_read_the_response(service: Service) -> None:
    async with service.connect(receive_buffer=4096) as streams:
        streams[1].write(get("/large") * 9 + get("/last", "Connection: close"))
        await until(lambda: service.connections[0].flow.write_paused if service.connections else False)
        await asyncio.sleep(0.1)
        assert service.app.started == ["/large"]
        assert service.connections[0].transport._transport.get_write_buffer_size() <= LARGE + 1024
        answer = await rest(streams)
    assert answer.count(b"HTTP/1.1 200 ") == 10
    assert len(answer) > 9 * LARGE


@pytest.mark.parametrize("behind", [b"", get("/a") * 100], ids=["alone", "with requests behind it"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_is_noticed_while_it_waits(
    service: Service, monkeypatch: pytest.MonkeyPatch, how: str, behind: bytes
) -> None:
    monkeypatch.setattr(protocol, "HALF_CLOSED_TIMEOUT", 0.05)
    client = socket.create_connection(("127.0.0.1", service.port))
    client.sendall(get("/wait") + behind)
    await until(lambda: bool(service.app.started))
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await until(lambda: service.app.disconnected == ["/wait"])
    assert service.app.started == ["/wait"]
    await until(lambda: not service.state.connections)


async def test_a_half_closed_client_gets_all_responses(service: Service) -> None:
    async with service.connect() as streams:
        streams[1].write(get("/wait") + get("/a") + get("/b") + b"GET /half")
        streams[1].write_eof()
        await until(lambda: bool(service.app.started))
        await asyncio.sleep(0.1)
        service.app.release.set()
        assert (await rest(streams)).count(b"HTTP/1.1 200 ") == 3
    assert service.app.started == ["/wait", "/a", "/b"]
    assert service.app.disconnected == []


@pytest.mark.parametrize("last", ["Connection: close", "X: y"])
@pytest.mark.parametrize("ended", [False, True], ids=["open", "half-closed"])
async def test_a_client_that_does_not_read_is_cut_off(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, last: str, ended: bool
) -> None:
    assert sending.SEND_TIMEOUT == 30.0
    monkeypatch.setattr(sending, "SEND_TIMEOUT", 0.3)
    monkeypatch.setattr(sending, "_STEP", 0.02)
    before = stalled()
    async with service.connect(receive_buffer=4096) as (reader, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport for both directions
        writer.write(get("/large", last))
        if ended:
            writer.write_eof()
        await until(lambda: bool(service.app.started))
        await until(lambda: not service.state.connections)
    assert stalled() == before + 1
    assert caplog.messages == []
    del reader


async def test_a_slow_client_that_reads_is_not_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SEND_TIMEOUT", 1.0)
    monkeypatch.setattr(sending, "_STEP", 0.05)
    begun = asyncio.get_running_loop().time()
    async with service.connect(receive_buffer=65536) as (reader, writer):
        writer.write(get("/large", "Connection: close"))
        received = 0
        while piece := await reader.read(LARGE // 64):
            received += len(piece)
            await asyncio.sleep(0.002)
            if received < LARGE // 2 and asyncio.get_running_loop().time() - begun < 1.5:
                await asyncio.sleep(0.05)
    assert received > LARGE


async def test_connections_above_the_limit_are_closed_at_once(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = capacity.Capacity()
    full.limit = 2
    monkeypatch.setattr(protocol, "CAPACITY", full)
    async with service.connect() as first, service.connect() as second:
        await until(lambda: len(service.connections) == 2)
        for _ in range(3):
            async with service.connect() as third:
                third[1].write(get("/a"))
                with suppress(ConnectionError):
                    assert await rest(third) == b""
        for streams in (first, second):
            streams[1].write(get("/a", "Connection: close"))
            assert b"HTTP/1.1 200 " in await rest(streams)
    await until(lambda: not service.state.connections)
    async with service.connect() as streams:
        streams[1].write(get("/a", "Connection: close"))
        assert b"HTTP/1.1 200 " in await rest(streams)
    assert caplog.messages == ["Refused 1 connections above the limit of 2"]
    assert service.app.started == ["/a"] * 3


async def test_a_client_that_has_gone_before_it_is_accepted_is_not_trusted(service: Service) -> None:
    """Without an address it would pass for a client of the unix socket, which is trusted like a proxy."""
    client = socket.create_connection(("127.0.0.1", service.port))
    client.sendall(get("/a", "X-Forwarded-For: 192.0.2.1"))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # the event loop has not run since, so the connection is not accepted yet
    async with service.connect() as streams:
        streams[1].write(get("/b", "Connection: close"))
        await rest(streams)
    assert service.app.started == ["/b"]


async def test_many_small_headers_are_refused(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    few = [f"X{number}: y" for number in range(MAX_HEADERS - 2)]
    for lines, answer in ((few, b"200"), ([*few, "X: y"], b"431")):
        async with service.connect() as streams:
            streams[1].write(get("/a", "Connection: close", *lines))
            assert (await rest(streams)).startswith(b"HTTP/1.1 " + answer)
    async with service.connect() as streams:  # the head is not complete
        streams[1].write(get("/a", *few, "X: y", "X: y", "X: y")[:-2])
        assert (await rest(streams)).startswith(b"HTTP/1.1 431")
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []
