"""A client that keeps its connections, as lean as can be: the load has to leave the machine to the service."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

_IDLE = 3.0
"""Seconds after which a connection is not used any more; the service closes it after five."""


class NotSent(Exception):
    """Nobody listens there, so nothing was asked."""


class Lost(Exception):
    """It was sent, and no answer came."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response."""

    status: int
    head: bytes
    body: bytes


class _Line(asyncio.Protocol):
    """A connection, with one request at a time."""

    def __init__(self) -> None:
        self.free_since = 0.0
        self.usable = True
        self._received = b""
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

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

    async def ask(self, request: bytes, patience: float) -> Answer:
        """The answer to a request, within `patience` seconds. Raises `Lost`."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        self._transport.write(request)
        alarm = loop.call_later(patience, self.close)
        try:
            return await self._answer
        finally:
            alarm.cancel()
            self._answer = None
            self.free_since = loop.time()

    def close(self) -> None:
        """Resets it."""
        self.usable = False
        assert self._transport is not None
        self._transport.abort()


@dataclass
class Door:
    """A way to a node: its port, or that of a proxy before it. `in_flight` requests are on their way."""

    node: str
    port: int
    in_flight: int = 0
    _idle: list[_Line] = field(default_factory=list)

    async def ask(self, request: bytes, *, patience: float, sending: Callable[[], None]) -> Answer:
        """The answer to a request, within `patience` seconds; `sending` is called just before it is sent.

        Raises `NotSent` or `Lost`.
        """
        self.in_flight += 1
        try:
            line = await self._line()
            sending()
            answer = await line.ask(request, patience)
            if line.usable:
                self._idle.append(line)
            return answer
        finally:
            self.in_flight -= 1

    async def _line(self) -> _Line:
        loop = asyncio.get_running_loop()
        while self._idle:
            line = self._idle.pop()
            if line.usable and loop.time() - line.free_since < _IDLE:
                return line
            line.close()
        try:
            async with asyncio.timeout(2):
                _, made = await loop.create_connection(_Line, "127.0.0.1", self.port)
        except (OSError, TimeoutError):
            raise NotSent from None
        return made
