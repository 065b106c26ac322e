"""A minimal HTTP client with persistent connections. It is cheap, so that the service gets most of the CPU."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

_IDLE = 3.0
"""Seconds after which an idle connection is no longer used. The service closes it after five."""


class NotSent(Exception):
    """The connection failed, so the request was not sent."""


class Lost(Exception):
    """The request was sent, but no response arrived."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    head: bytes
    body: bytes


class _Connection(asyncio.Protocol):
    """A connection with one request at a time."""

    def __init__(self) -> None:
        self.free_since = 0.0
        self.usable = True
        self._received = b""
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport has the interface but not the type

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = self._received[:end].lower()
        size = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r")[0] or 0)
        if len(self._received) < end + 4 + size:
            return
        answer = Answer(int(head[9:12]), self._received[:end], self._received[end + 4 : end + 4 + size])
        self._received = b""
        if b"\r\nconnection: close" in head:
            self.close()
        if not self._answer.done():
            self._answer.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Lost())

    async def send(self, request: bytes, seconds: float) -> Answer:
        """Send a request and return the response within `seconds`. Raises `Lost`."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self._transport.write(request)
        alarm = loop.call_later(seconds, self.close)
        try:
            return await self._answer
        finally:
            alarm.cancel()
            self._answer = None
            self.free_since = loop.time()

    def close(self) -> None:
        """Reset the connection."""
        self.usable = False
        assert self._transport is not None
        self._transport.abort()


@dataclass
class Endpoint:
    """A port of a node, or of a proxy in front of it, with its connections and the number of requests in flight."""

    node: str
    port: int
    in_flight: int = 0
    _idle: list[_Connection] = field(default_factory=list)

    async def send(self, request: bytes, *, seconds: float, before_sending: Callable[[], None]) -> Answer:
        """Send a request and return the response within `seconds`.

        `before_sending` is called just before the request is sent. Raises `NotSent` or `Lost`.
        """
        self.in_flight += 1
        try:
            connection = await self._connect()
            before_sending()
            answer = await connection.send(request, seconds)
            if connection.usable:
                self._idle.append(connection)
            return answer
        finally:
            self.in_flight -= 1

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and loop.time() - connection.free_since < _IDLE:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(2):
                _, made = await loop.create_connection(_Connection, "127.0.0.1", self.port)
        except (OSError, TimeoutError):
            raise NotSent from None
        return made
