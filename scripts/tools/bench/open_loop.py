"""The open loop: each request is sent when it is due, even if earlier ones are still unanswered.

A closed loop sends the next request only after an answer. While the server is slow, it omits the very requests that
would have to wait (coordinated omission). Here each latency is measured from the time when the request was due.
"""

import asyncio
import gc
import selectors
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

_CONNECTIONS = 64
_DRAIN = 5.0
"""Seconds to wait for the last answers."""


@dataclass
class OpenLoop:
    """The latencies of the answers in seconds, and the number of answers by status."""

    sent: int
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def percentile(self, percent: float) -> float | None:
        """Return a percentile of the latency of all sent requests in milliseconds, or None if it was never answered."""
        ordered = sorted(self.latencies)
        position = int(self.sent * percent / 100)
        return ordered[position] * 1000 if position < len(ordered) else None


class _Connection(asyncio.Protocol):
    """A connection with one request at a time. A response ends as its `Content-Length` states."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._received = b""
        self._due = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes, due: float) -> None:
        assert self._transport is not None
        self._due = due
        self._received = b""
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end:
            _, _, length = head.lower().partition(b"content-length: ")
            if len(body) >= int(length.partition(b"\r\n")[0] or 0):
                self._client.answered(self, int(head[9:12]), self._due)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


class _Client:
    def __init__(self, requests: Sequence[bytes], rate: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._requests = requests
        self._rate = rate
        self._idle: deque[_Connection] = deque()
        self._late: deque[tuple[bytes, float]] = deque()
        self._done = asyncio.Event()
        self.result = OpenLoop(len(requests))

    async def run(self, port: int) -> OpenLoop:
        connections = []
        for _ in range(_CONNECTIONS):
            _, connection = await self._loop.create_connection(lambda: _Connection(self), "127.0.0.1", port)
            connections.append(connection)
        self._idle.extend(connections)
        begin = self._loop.time() + 0.1
        for number, request in enumerate(self._requests):
            due = begin + number / self._rate
            if (wait := due - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            elif number % 100 == 0:
                await asyncio.sleep(0)  # behind schedule: let the event loop read answers
            self._send(request, due)
        with suppress(TimeoutError):  # `sent` shows how many answers are missing
            await asyncio.wait_for(self._done.wait(), _DRAIN)
        for connection in connections:
            connection.close()
        return self.result

    def _send(self, request: bytes, due: float) -> None:
        if self._idle:
            self._idle.popleft().send(request, due)
        else:
            self._late.append((request, due))

    def answered(self, connection: _Connection, status: int, due: float) -> None:
        self.result.latencies.append(self._loop.time() - due)
        self.result.statuses[status] += 1
        if self._late:
            connection.send(*self._late.popleft())
        else:
            self._idle.append(connection)
        if len(self.result.latencies) == len(self._requests):
            self._done.set()

    def lost(self, connection: _Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)


def open_loop(port: int, requests: Sequence[bytes], *, rate: float) -> OpenLoop:
    """Send each of `requests` once, `rate` of them per second."""

    async def measure() -> OpenLoop:
        return await _Client(requests, rate).run(port)

    # Timers of `epoll` have a resolution of milliseconds, those of `select` of microseconds.
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
            return runner.run(measure())
    finally:
        gc.enable()
