"""One hostile connection, in raw bytes."""

import asyncio
import random
import socket
import struct
from collections.abc import Callable

from scripts.tools.proof.hostile.verdict import Tally

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with 0 s: `close` sends RST, and data in transit is lost."""
_SMALL = 2304
"""Bytes of the receive buffer of a client that never reads: the least that Linux allows."""


class Cut(Exception):
    """The service has closed the connection."""


class Peer:
    """A connection to the service. Everything that is sent and read is counted in `tally`.

    `pace` is the mean time between two actions, in seconds. `breach` decides for a status whether it is one that no
    request of this kind may ever get.
    """

    def __init__(self, tally: Tally, pace: float, breach: Callable[[int], bool], *, reads: bool) -> None:
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if not reads:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
        self._loop = asyncio.get_running_loop()
        self._tally = tally
        self._pace = pace
        self._breach = breach
        self._received = b""

    async def connect(self, port: int) -> None:
        """Connect. Raises `OSError`."""
        await self._loop.sock_connect(self._socket, ("127.0.0.1", port))
        self._tally.connections += 1

    async def pause(self, paces: float = 1.0) -> None:
        """Wait for about this many paces, so that the actions of all connections are spread out."""
        await asyncio.sleep(self._pace * paces * random.uniform(0.5, 1.5))

    async def send(self, data: bytes, *, requests: int = 0) -> None:
        """Send bytes that begin this many requests. Raises `OSError`."""
        self._tally.actions += 1
        self._tally.requests += requests
        await self._loop.sock_sendall(self._socket, data)

    async def status(self, *, body: bool = True) -> int:
        """Read a response, without a body if there is none, and return its status. Raises `OSError` or `Cut`."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            await self._receive()
        head = self._received[: end + 2].lower()
        length = int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r")[0] or 0) if body else 0
        while len(self._received) < end + 4 + length:
            await self._receive()
        self._received = self._received[end + 4 + length :]
        status = int(head[9:12])
        self._tally.answers[status] = self._tally.answers.get(status, 0) + 1
        self._tally.breaches += status == 500 or self._breach(status)
        return status

    async def _receive(self) -> None:
        if not (piece := await self._loop.sock_recv(self._socket, 65536)):
            raise Cut
        self._received += piece

    def end(self) -> None:
        """Send FIN: nothing more will be sent, but responses can still be read. Raises `OSError`."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Disappear: close the connection with RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._socket.close()

    def close(self) -> None:
        """Close the connection, if it is not yet closed."""
        self._socket.close()
