"""The transport of a connection, which neither cuts off a client that still reads nor waits for one that does not."""

import asyncio
import sys
from contextlib import suppress

from sso_service.observability import metrics

LINGER = 2.0
"""Seconds for which a client may still send after its last response."""
SEND_TIMEOUT = 30.0
"""Seconds without progress after which a client is assumed not to read its response."""
_STEP = 1.0
"""Seconds between two looks at a response that waits for its client."""


class ClientTransport:
    """The part of a transport that uvicorn uses, with a different `close`.

    Closing a connection while the client still sends resets it, and a reset may discard the response on the client's
    side before it was read (RFC 9112 section 9.6). With `linger`, `close` therefore ends only this side, and drops
    the data that still arrives for a moment.

    asyncio flushes a closed transport without a time limit. A client that never reads would keep its connection and
    its response indefinitely, so both are dropped once nothing has left the buffer for 30 s. A slow client that reads
    is not affected.
    """

    __slots__ = (
        *("_left", "_lingering", "_loop", "_progress", "_timer", "_transport", "abort", "ended"),
        *("get_extra_info", "held", "linger", "pause_reading", "write"),
    )

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._left = 0
        """Bytes that waited for the client at the last look."""
        self._progress = 0.0
        """The time at which there were fewer."""
        self._lingering = False
        self.ended = False
        """Whether the client sends no more, so there is nothing to read."""
        self.held = False
        """Whether reading stays paused although uvicorn resumes it."""
        self.linger = False
        """Whether the client still sends when `close` is called."""
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.write = transport.write

    def is_closing(self) -> bool:
        """Return whether the connection is closed or about to be."""
        return self._lingering or self._transport.is_closing()

    def resume_reading(self) -> None:
        """Continue to read, unless the connection is `held` or `ended`."""
        if not self.held and not self.ended:
            self._transport.resume_reading()

    def close(self) -> None:
        """Close the connection once everything is sent; with `linger` a moment later."""
        if self.is_closing():
            return
        if self.ended or not self.linger:
            self.finish()
            return
        self._lingering = True
        with suppress(OSError):  # the client has gone
            self._transport.write_eof()
            self._transport.resume_reading()
        self._loop.call_later(LINGER, self.finish)

    def finish(self) -> None:
        """Close the connection once everything is sent."""
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self.watch()

    def watch(self) -> None:
        """Abort the connection if the bytes that wait for the client stay where they are."""
        if self._timer is None:
            self._left = self._waiting()
            self.progressed()
            self._timer = self._loop.call_later(_STEP, self._look)

    def progressed(self) -> None:
        """Note that the client has read something."""
        self._progress = self._loop.time()

    def forget(self) -> None:
        """Stop watching: the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        left = self._waiting()
        if not left:
            return
        if left < self._left:
            self.progressed()
        self._left = left
        if self._loop.time() - self._progress < SEND_TIMEOUT:
            self._timer = self._loop.call_later(_STEP, self._look)
        else:
            metrics.CONNECTIONS_STALLED.inc()
            self.abort()

    def _waiting(self) -> int:
        """Return the bytes in the buffer, with those that the kernel has not delivered. 0 once the buffer is empty.

        The kernel reports room in its own buffer only when a third of it is free, and through a unix socket it may be
        large. The buffer here alone would not shrink for minutes while a slow client reads.
        """
        size = self._transport.get_write_buffer_size()
        if not size:
            return 0
        try:
            import fcntl  # noqa: PLC0415 - does not exist on Windows
            import termios  # noqa: PLC0415 - the same

            queued = fcntl.ioctl(self.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        except (ImportError, OSError):
            return size
        return size + int.from_bytes(queued, sys.byteorder)
