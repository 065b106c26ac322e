"""Restarts without failed requests: several nodes in turn, or one node on a socket that stays open."""

import asyncio
import json
import signal
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import cast

import pytest

from scripts.tools.ports import free_port
from sso_service.database.transactions import Database
from tests.support.connections import PersistentConnection, Reply, issue, login
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.ledger import claims_of, consumed_claims
from tests.support.processes import Running, serving
from tests.support.programs import program
from tests.support.proxies import HOST, PROXIES, Proxy, proxying, started
from tests.support.studio_server import application
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.anyio


# --- load ------------------------------------------------------------------------------------------------------------


class Load:
    """Clients that issue and sign in without a pause through `port`. A request that does not succeed ends the test."""

    def __init__(self, port: int, api_token: str, tls: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._api_token = api_token
        self._tls = tls
        self.logins: list[str] = []
        self.over = False

    async def sign_in(self, name: str, *, keep: bool) -> None:
        """Sign in a new user each time. With `keep`, use one connection as long as possible, otherwise new ones."""
        async with AsyncExitStack() as stack:
            line: PersistentConnection | None = None

            async def send(request: bytes) -> Reply:
                nonlocal line
                if (connection := line) is None:
                    line = connection = await stack.enter_async_context(self._line())
                reply = await connection.send(request)
                if not keep or reply.header("connection") == "close":
                    await stack.aclose()
                    line = None
                return reply

            while not self.over:
                # A new user each time: if a proxy repeated the request on another node, the user would exist there.
                issued = await send(issue(self._api_token, f"{name}-{len(self.logins)}@example.com"))
                assert issued.status == 201, (name, issued)
                assert json.loads(issued.body)["user_created"] is True
                entered = await send(login(issued.token))
                assert entered.status == 303, (name, entered)
                self.logins.append(issued.token)

    async def repeat_logins(self) -> set[int]:
        """Return the statuses of one more login with each of the last tokens."""
        async with self._line() as line:
            return {(await line.send(login(token))).status for token in self.logins[-50:]}

    @asynccontextmanager
    async def _line(self) -> AsyncIterator[PersistentConnection]:
        name = HOST if self._tls else None
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls, server_hostname=name)
        try:
            yield PersistentConnection(reader, writer)
        finally:
            writer.transport.abort()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@contextmanager
def stopped_cleanly(running: Running) -> Iterator[None]:
    """At the end of the block, stop the node by SIGTERM. It must end in time and without errors in its log."""
    yield
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE) in {0, -signal.SIGTERM}
    log = running.log.read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log


def starter(
    env: dict[str, str], log: Path, *, workers: int, port: int | None = None, fd: int | None = None
) -> Callable[[], ExitStack]:
    """Return a function that starts a node. Closing the result of that function stops the node."""

    def start() -> ExitStack:
        with ExitStack() as stack:
            node = stack.enter_context(serving(env, log, workers=workers, port=port, fd=fd))
            stack.enter_context(stopped_cleanly(node))
            return stack.pop_all()

    return start


# --- several nodes ---------------------------------------------------------------------------------------------------

HAPROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 20s
    timeout server 15s
    default-server check inter 200ms fall 2 rise 1

frontend all
    bind 127.0.0.1:{port}
    default_backend nodes

backend nodes
    balance roundrobin
    option httpchk
    http-check send meth GET uri /readyz
    http-check expect status 200
    server first 127.0.0.1:{first}
    server second 127.0.0.1:{second}
"""


@contextmanager
def haproxy(ports: Sequence[int], directory: Path) -> Iterator[int]:
    """Run HAProxy in front of two nodes, configured as in the documentation, and yield its port."""
    directory.mkdir()
    port = free_port()
    (directory / "haproxy.cfg").write_text(HAPROXY.format(port=port, first=ports[0], second=ports[1]))
    with started([program("haproxy"), "-f", "haproxy.cfg"], port, directory, {}):
        yield port


@on_postgresql
async def test_a_restart_of_two_nodes_in_turn_fails_or_repeats_no_request(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    for kind in ("nginx", "caddy", "haproxy"):
        program(kind)
    env |= {"SSO_DRAIN": "2", "SSO_STUDIO_PAGES": "0"}
    ports = [free_port(), free_port()]
    starters = [starter(env, tmp_path / f"node-{port}", port=port, workers=2) for port in ports]
    with ExitStack() as stack:
        nodes = [stack.enter_context(start()) for start in starters]
        studio = stack.enter_context(application())
        loads = [Load(stack.enter_context(haproxy(ports, tmp_path / "haproxy")), api_token)]
        for kind in PROXIES:
            services = [f"127.0.0.1:{port}" for port in ports]
            proxy: Proxy = stack.enter_context(proxying(kind, services, studio.port, tmp_path / kind))
            loads.append(Load(proxy.port, api_token, proxy.tls))

        async with asyncio.TaskGroup() as group:
            for number, load in enumerate(loads):
                for client in range(4):
                    group.create_task(load.sign_in(f"visitor-{number}-{client}", keep=client > 0))
            for _ in range(2):
                for number, start in enumerate(starters):
                    await until(lambda: all(len(load.logins) > 20 for load in loads))
                    await asyncio.to_thread(nodes[number].close)
                    nodes[number] = stack.enter_context(await asyncio.to_thread(start))
                    await until(lambda: ready(ports[number]))  # noqa: B023 - ends before the next round
                    await asyncio.sleep(1.5)  # a little longer than a proxy avoids a node that was down
            for load in loads:
                load.over = True

        logins = [token for load in loads for token in load.logins]
        print([len(load.logins) for load in loads])  # shown by -rP
        assert {claims_of(token) for token in logins} == consumed_claims(database)
        for load in loads:
            assert await load.repeat_logins() == {401}


def ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
    connection.close()
    return status == 200


@on_sqlite
async def test_a_stopping_node_reports_not_ready_and_serves_until_drained(
    env: dict[str, str], tmp_path: Path, api_token: str
) -> None:
    port = free_port()
    with serving(env | {"SSO_DRAIN": "2"}, tmp_path / "log", port=port, workers=2) as running:
        load = Load(port, api_token)
        running.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        await until(lambda: not ready(port), seconds=2)
        running.process.send_signal(signal.SIGTERM)
        while time.monotonic() < stopped + 1.9:
            load.over = False
            asyncio.get_running_loop().call_later(0.1, setattr, load, "over", True)
            await load.sign_in(f"late-{time.monotonic()}", keep=False)
            assert not await asyncio.to_thread(ready, port)
        assert len(load.logins) > 5
        assert await asyncio.to_thread(running.process.wait, 10) in {0, -signal.SIGTERM}
        with pytest.raises(ConnectionRefusedError):
            ready(port)
    assert "Traceback" not in running.log.read_text()


class CrashingNode(socketserver.ThreadingTCPServer):
    """A node that reports ready, reads each other request, and closes the connection without a response."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ClosingHandler)
        self.requests: list[str] = []


class _ClosingHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = self.rfile.readline().rpartition(b" ")[0]
        if request == b"GET /readyz":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif request:
            cast(CrashingNode, self.server).requests.append(request.decode())


@pytest.mark.parametrize("kind", PROXIES)
def test_a_request_that_one_node_has_read_is_not_sent_to_another(kind: str, tmp_path: Path) -> None:
    with CrashingNode() as first, CrashingNode() as second, application() as studio:
        for node in (first, second):
            threading.Thread(target=node.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        services = [f"127.0.0.1:{node.server_address[1]}" for node in (first, second)]
        requests = [f"GET /?sso={'A' * 43}", "POST /?sso=A", "POST /v1/sso_tokens", "POST /sso/confirm"]
        with proxying(kind, services, studio.port, tmp_path / kind) as proxy:
            for request in requests:
                method, target = request.split()
                answer = proxy.request(target, method=method, body=b"{}" if method == "POST" else b"")
                assert answer.status in {502, 503}
                time.sleep(1.2)  # until the proxy uses both nodes again
        for node in (first, second):
            node.shutdown()
        assert sorted(first.requests + second.requests) == sorted(requests)


def test_nginx_goes_to_another_node_if_one_refuses_connections(tmp_path: Path) -> None:
    with application() as service, application() as studio:
        services = [f"127.0.0.1:{port}" for port in (free_port(), free_port(), service.port)]
        with proxying("nginx", services, studio.port, tmp_path / "nginx") as proxy:
            for request in (f"GET /?sso={'A' * 43}", "POST /?sso=A", "POST /v1/sso_tokens", "GET /session"):
                method, target = request.split()
                for _ in range(3):
                    answer = proxy.request(target, method=method, body=b"{}" if method == "POST" else b"")
                    assert answer.status == 200, request
                    [seen] = service.take()
                    assert seen.body == (b"{}" if method == "POST" else b"")
                time.sleep(1.2)  # until the proxy tries them again


# --- one node, on a socket that stays open ---------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_restart_behind_an_open_socket_fails_no_request(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str, workers: int
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener, ExitStack() as stack:
        load = Load(listener.getsockname()[1], api_token)
        start = starter(env, tmp_path / "log", fd=listener.fileno(), workers=workers)
        node = stack.enter_context(start())
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(load.sign_in(f"visitor-{number}", keep=number % 2 == 0))
            for _ in range(2):
                before = len(load.logins)
                await until(lambda: len(load.logins) > before + 100)  # noqa: B023 - ends before the next round
                await asyncio.to_thread(node.close)
                node = stack.enter_context(await asyncio.to_thread(start))
            load.over = True
        assert {claims_of(token) for token in load.logins} == consumed_claims(database)
        assert await load.repeat_logins() == {401}


@on_sqlite
async def test_sighup_replaces_workers_without_failed_requests(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    port = free_port()
    with serving(env, tmp_path / "log", port=port, workers=2) as running:
        load = Load(port, api_token)
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(load.sign_in(f"visitor-{number}", keep=number % 2 == 0))
            await until(lambda: len(load.logins) > 100)
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: running.log.read_text().count("Finished server process") == 2, seconds=30)
            before = len(load.logins)
            await until(lambda: len(load.logins) > before + 100)
            load.over = True
        assert {claims_of(token) for token in load.logins} == consumed_claims(database)
    assert "Traceback" not in running.log.read_text()
