"""The open loop: requests are sent when they are due, whether or not the ones before were answered.

A closed loop waits with the next request while the server is slow, and so leaves out just the requests that would have
had to wait (coordinated omission). Here each latency counts from when the request was due.
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
    """The latencies of the answers, in seconds, and the statuses that came."""

    sent: int
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def percentile(self, percent: float) -> float | None:
        """A percentile of the latency, in milliseconds, of all that was sent; None if that was never answered."""
        ordered = sorted(self.latencies)
        position = int(self.sent * percent / 100)
        return ordered[position] * 1000 if position < len(ordered) else None


class _Connection(asyncio.Protocol):
    """One request at a time; a response ends where its `Content-Length` says."""

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
                await asyncio.sleep(0)  # behind schedule: still let answers in
            self._send(request, due)
        with suppress(TimeoutError):  # `sent` tells how many answers are missing
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
    """Sends each of `requests` once, `rate` of them in each second."""

    async def measure() -> OpenLoop:
        return await _Client(requests, rate).run(port)

    # Timers of `epoll` go by milliseconds, those of `select` by microseconds.
    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
            return runner.run(measure())
    finally:
        gc.enable()
