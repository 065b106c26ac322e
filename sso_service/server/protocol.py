"""One connection: uvicorn's protocol with limits on what a client may send, and a shutdown that loses no request.

The parser behind uvicorn has no limits of its own. One client could make a worker keep a head of any size. Any number
of clients could hold connections open by sending a byte now and then.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from sso_service.server.framing import StrictProtocol
from sso_service.server.listening import UNIX

MAX_HEAD = 32 * 1024
"""Bytes of a request line with its headers, as in nginx."""
MAX_BODY = 1024 * 1024
"""Bytes of a body with its framing. The application's limit is far lower; this one also covers chunk extensions and
trailers, which never reach the application."""
HEAD_TIMEOUT = 10.0
"""Seconds in which a head must be complete: from its first byte, and on a new connection from the beginning."""
SHUTDOWN_TIMEOUT = 1.0
"""Seconds that a new connection has left for its first request when the server stops."""


class Protocol(StrictProtocol):
    """The connection with its limits. An ordinary request costs no more than the counting of its bytes."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.url = b""
        self._in_head = True
        self._size = 0
        """Bytes since the last head or body was complete."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin the connection and the time-out of its first head."""
        super().connection_made(transport)
        if self.client is None:
            self.client = (UNIX, 0)
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse `data`, but never more than the limits allow."""
        # The parser gets at most as many bytes as the limit leaves, so it never stores more than the limit.
        while data and not self.transport.is_closing():
            limit = MAX_HEAD if self._in_head else MAX_BODY
            room = limit - self._size
            piece, data = data[:room], data[room:]
            self._size += len(piece)
            super().data_received(piece)
            if self._size >= limit:
                self._too_large()
        if self._size and self._timer is None and not self._busy:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self._time_out)

    def on_headers_complete(self) -> None:
        """Begin to count the body, and start the request. Raises `InvalidHead`."""
        self._stop_timer()
        self._in_head = False
        self._size = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Begin to count the next head."""
        self._in_head = True
        self._size = 0
        super().on_message_complete()

    def shutdown(self) -> None:
        """Close the connection without cutting off a request that is already on its way.

        A proxy may have sent a request a moment ago. If the connection ended now, the proxy could not know whether the
        request was read. So it must not repeat the request on another node, and its client would get an error.
        Therefore requests that still arrive are answered with `Connection: close`. Idle connections end as usual, after
        the keep-alive time-out; proxies are configured to close theirs earlier.
        """
        close = (b"connection", b"close")
        # All connections share this list. uvicorn replaces it every second, but not while it stops.
        if close not in self.server_state.default_headers:
            self.server_state.default_headers.append(close)
        if self._busy:
            super().shutdown()
        elif self.timeout_keep_alive_task is None:
            self.loop.call_later(SHUTDOWN_TIMEOUT, self._time_out)

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered. The application limits the time that its body may take."""
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self._busy or self.transport.is_closing():
            return
        if self._in_head and self._size:
            self.refuse("request_timeout")
        else:
            self.transport.close()

    def _too_large(self) -> None:
        if not self._in_head or self._busy:
            self.transport.close()
        elif len(self.url) > MAX_HEAD // 2:
            self.refuse("uri_too_long")
        else:
            self.refuse("headers_too_large")
