"""What tests share: the accounts in every database, a clock, a client, and a service in processes of its own."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import psutil
import psycopg
import pytest
from sqlalchemy import Connection, make_url
from starlette.types import ASGIApp, Message

from sso_service.database.engine import Database

ACCOUNT, TEAM = 123, 42
OTHER_ACCOUNT, OTHER_TEAM = 999, 77
PORTAL = "https://portal.example/start"
PAGE = f"/client/{ACCOUNT}/t/{TEAM}/posts"
JANE = {"email": "jane.doe@example.com", "first_name": "Jane", "last_name": "Doe"}
JOHN = {"email": "john.roe@example.com", "first_name": "John", "last_name": "Roe"}


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: status, headers in lower case, body. Its id is no header here, since it is another each time."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    request_id: str = field(default="", compare=False)

    def header(self, name: str) -> str | None:
        """The only occurrence of a header, or None."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) < 2, f"{name} occurs {len(values)} times"
        return values[0] if values else None

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        """The body as JSON, which its type must say it is."""
        assert self.header("content-type") == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of the JSON error."""
        code: str = self.json()["error"]["code"]
        return code


class Client:
    """Calls the application with exactly these bytes, as no HTTP library would, and keeps cookies."""

    def __init__(self, app: ASGIApp, *, scheme: str = "http", host: str = "studio.example") -> None:
        self.app = app
        self.scheme = scheme
        self.host = host
        self.cookies: dict[str, str] = {}

    def another(self) -> "Client":
        """Another browser at the same application."""
        return Client(self.app, scheme=self.scheme, host=self.host)

    async def request(
        self,
        method: str,
        target: str | bytes,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        pieces: Sequence[bytes] | None = None,
        ends: asyncio.Event | None = None,
    ) -> Answer:
        """The answer to a request for `target` (path and query, raw). `pieces` sends the body in several messages.

        The end of the body comes once `ends` is set, if that is given.
        """
        raw = target.encode() if isinstance(target, str) else target
        path, _, query = raw.partition(b"?")
        sent = [("host", self.host), *((name.lower(), value) for name, value in headers)]
        if self.cookies and not any(name == "cookie" for name, _ in sent):
            sent.append(("cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items())))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": self.scheme,
            "path": _decode(path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent],
            "client": ("192.0.2.1", 50000),
            "server": (self.host, 80),
        }
        parts = list(pieces) if pieces is not None else [body]
        incoming: list[Message] = [
            {"type": "http.request", "body": part, "more_body": ends is not None or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        outgoing: list[Message] = []

        async def receive() -> Message:
            nonlocal ends
            if ends is not None and not incoming:
                await ends.wait()
                ends = None
                return {"type": "http.request", "body": b"", "more_body": False}
            return incoming.pop(0) if incoming else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            outgoing.append(message)

        await self.app(scope, receive, send)
        start = outgoing[0]
        received = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
        answer = Answer(
            start["status"],
            [(name, value) for name, value in received if name != "x-request-id"],
            b"".join(message.get("body", b"") for message in outgoing[1:]),
            "".join(value for name, value in received if name == "x-request-id"),
        )
        self._keep_cookies(answer)
        return answer

    async def get(self, target: str | bytes, **headers: str) -> Answer:
        """GET; `accept_language="de"` is the header `Accept-Language: de`."""
        return await self.request("GET", target, headers=_dashed(headers))

    async def post_json(self, target: str, content: object, *, token: str | None = None) -> Answer:
        """POST of JSON with an API token."""
        headers = [("content-type", "application/json")]
        if token is not None:
            headers.append(("authorization", f"Bearer {token}"))
        return await self.request("POST", target, headers=headers, body=json.dumps(content).encode())

    async def issue(self, token: str, person: Mapping[str, str] = JANE) -> str:
        """A login token for `person`."""
        answer = await self.post_json("/v1/sso_tokens", person, token=token)
        assert answer.status == 201, answer
        issued: str = answer.json()["token"]
        return issued

    def _keep_cookies(self, answer: Answer) -> None:
        for name, value in answer.headers:
            if name == "set-cookie":
                key, _, content = value.partition(";")[0].partition("=")
                if "Max-Age=0" in value:
                    self.cookies.pop(key, None)
                else:
                    self.cookies[key] = content


def _dashed(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), value) for name, value in headers.items()]


def _decode(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")


@contextmanager
def changing(database: Database) -> Iterator[Connection]:
    """A connection for what an operator changes, committed at the end of the block."""
    with database.connect() as connection, database.writing(connection):
        yield connection


@contextmanager
def closed(url: str) -> Iterator[None]:
    """PostgreSQL ends every connection to this database, and takes no new one until the end of the block."""
    name = make_url(url).database
    server = make_url(url).set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


@dataclass(frozen=True, slots=True)
class Running:
    """A service in processes of its own."""

    url: str
    process: "subprocess.Popen[str]"
    log: Path


def program(*names: str) -> str:
    """The path of a program that a test needs. Without it the test is skipped, and in CI fails."""
    for name in names:
        if path := shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin"):
            return path
    if os.environ.get("CI"):
        pytest.fail(f"{names[0]} is not installed")
    pytest.skip(f"{names[0]} is not installed")


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def a_database_that(state: str, directory: Path) -> Iterator[str]:
    """The URL of a database that `state` describes, with a password in it where there can be one."""
    if state == "is a directory":
        yield f"sqlite:///{directory}"
    elif state == "is something else":
        (directory / "photo.db").write_bytes(b"\x89PNG\r\n\x1a\n" * 1000)
        yield f"sqlite:///{directory / 'photo.db'}"
    elif state == "is empty":
        yield f"sqlite:///{directory / 'new.db'}"
    elif state == "refuses to connect":
        yield f"postgresql://studio:hunter2@127.0.0.1:{free_port()}/sso"
    else:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"postgresql://studio:hunter2@127.0.0.1:{silent.getsockname()[1]}/sso"


@contextmanager
def renamed(path: Path) -> Iterator[None]:
    """There is nothing at `path` until the end of the block."""
    elsewhere = path.with_suffix(".away")
    path.rename(elsewhere)
    yield
    elsewhere.rename(path)


def command(*arguments: str, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """What `sso-service <arguments>` does, with these variables."""
    return subprocess.run(
        [sys.executable, "-m", "sso_service", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for_port(port: int) -> None:
    """Returns when somebody listens on `port`: uvicorn says that it has started a moment before."""
    _wait_for(socket.AF_INET, ("127.0.0.1", port))


def _wait_for(family: socket.AddressFamily, address: tuple[str, int] | str) -> None:
    deadline = time.monotonic() + 10
    while True:
        with socket.socket(family) as probe:
            try:
                probe.connect(address)
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        time.sleep(0.01)


def _stop(process: "subprocess.Popen[str]") -> None:
    """Ends the service and its workers, the hard way if it does not go by itself."""
    if process.poll() is not None:
        return
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        for each in (process, *workers):
            each.kill()
        process.wait()


@contextmanager
def serving(
    env: Mapping[str, str],
    log: Path,
    workers: int = 1,
    port: int | None = None,
    uds: Path | None = None,
    fd: int | None = None,
) -> Iterator[Running]:
    """`sso-service serve` until the end of the block, on a free port if nothing else is said; output goes to `log`."""
    port = port or free_port()
    arguments = ["--workers", str(workers)]
    arguments += [] if uds is None else ["--uds", str(uds)]
    arguments += [] if fd is None else ["--fd", str(fd)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sso_service", "serve", *arguments],
            env={**os.environ, **env, "SSO_PORT": str(port)},
            pass_fds=[] if fd is None else [fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            seen = 0
            for line in process.stdout:
                output.write(line)
                output.flush()
                seen += "Application startup complete" in line
                if seen == workers:
                    break
            else:
                raise AssertionError(f"the service did not start: {log.read_text()}")
            with subprocess.Popen(["cat"], stdin=process.stdout, stdout=output):
                try:
                    if uds is not None:
                        _wait_for(socket.AF_UNIX, str(uds))
                    elif fd is None:
                        wait_for_port(port)
                    yield Running(f"http://127.0.0.1:{port}", process, log)
                finally:
                    _stop(process)
        finally:
            _stop(process)
            process.stdout.close()
