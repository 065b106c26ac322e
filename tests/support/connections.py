"""Lean HTTP connections to a running service, so that a load test costs the client little."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from tests.support.data import JANE, PAGE
from tests.support.processes import Running
from tests.support.waiting import PATIENCE

CUT_OFF = (ConnectionError, asyncio.IncompleteReadError)
"""The errors that a client sees when the server closes the connection without a response."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response: its status, its head as received, and its body."""

    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str:
        """The value of a header, or the empty string."""
        found = re.search(rf"^{name}: *(.*?)\r$", self.head, re.IGNORECASE | re.MULTILINE)
        return found[1] if found else ""

    @property
    def token(self) -> str:
        """The login token that was issued."""
        assert self.status == 201, self
        token: str = json.loads(self.body)["token"]
        return token

    @property
    def error(self) -> str:
        """The code of the error."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


class PersistentConnection:
    """A persistent connection with one request at a time. Kept lean, so that the load falls on the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]

    async def send(self, request: bytes) -> Reply:
        """Send `request` and return the response. Raises one of `CUT_OFF`, or `TimeoutError` after `PATIENCE`."""
        async with asyncio.timeout(PATIENCE):
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            size = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
            body = await self._reader.readexactly(int(size[1])) if size else b""
        return Reply(int(head[9:12]), head, body)


@asynccontextmanager
async def open_connection(running: Running) -> AsyncIterator[PersistentConnection]:
    """A new connection to a service, closed at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(running.url).port)
    try:
        yield PersistentConnection(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def get(target: str, cookie: str = "", **headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: studio.example", "Accept: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Cookie: {cookie}"] if cookie else []
    return "\r\n".join([*lines, "", ""]).encode()


def post(target: str, api_token: str, content: object) -> bytes:
    body = json.dumps(content)
    return (
        f"POST {target} HTTP/1.1\r\nHost: studio.example\r\nAuthorization: Bearer {api_token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def issue(api_token: str, email: str = JANE["email"]) -> bytes:
    return post("/v1/sso_tokens", api_token, JANE | {"email": email})


def login(token: str) -> bytes:
    return get(f"{PAGE}?sso={token}")


async def logged_in_again(running: Running, tokens: list[str]) -> list[int]:
    """Open the login link of each of `tokens` once more and return the statuses."""
    async with open_connection(running) as connection:
        return [(await connection.send(login(token))).status for token in tokens]
