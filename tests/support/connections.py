"""Connections to a running service that cost the load generator little."""

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
"""What a client sees of a request that the other side will not answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A response: its status, its head as it came, and its body."""

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


class Line:
    """One connection that is kept, with one request at a time: as lean as can be, so that the load is the service's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]

    async def send(self, request: bytes) -> Reply:
        """The answer to `request`. Raises one of `CUT_OFF`, or `TimeoutError` after `PATIENCE` seconds."""
        async with asyncio.timeout(PATIENCE):
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            size = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
            body = await self._reader.readexactly(int(size[1])) if size else b""
        return Reply(int(head[9:12]), head, body)


@asynccontextmanager
async def line(running: Running) -> AsyncIterator[Line]:
    """A connection of one's own to a service."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(running.url).port)
    try:
        yield Line(reader, writer)
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
    """The statuses of one more login with each of `tokens`."""
    async with line(running) as connection:
        return [(await connection.send(login(token))).status for token in tokens]
