"""A connection: uvicorn's, with limits on what a client may send before it is answered, and a close that loses nothing.

The parser behind uvicorn has no limits of its own. One client could make a worker keep a head of any size, and any
number of clients could keep connections for ever by sending a byte of it now and then.
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from sso_service.web.errors import Problem, json_error
from sso_service.web.framing import StrictProtocol
from sso_service.web.listening import UNIX

MAX_HEAD = 32 * 1024
"""Bytes of a request line with its headers: as many as nginx takes."""
MAX_BODY = 1024 * 1024
"""Bytes of a body with its framing. The application reads far less; this is for trailers, of which it never hears."""
HEAD_TIMEOUT = 10.0
"""Seconds in which a head must be complete, from its first byte on; on a new connection, from the beginning."""
LAST_CHANCE = 1.0
"""Seconds that a new connection has for a request when the server stops."""


class Protocol(StrictProtocol):
    """uvicorn's protocol on httptools, which it is as fast as: all it does for an ordinary request is to count."""

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
        self._size = 0  # bytes since the last head or body was complete
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if self.client is None:
            self.client = (UNIX, 0)
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # The parser gets no more at once than there is room for, so that what is too much is never kept.
        while data and not self.transport.is_closing():
            limit = MAX_HEAD if self._in_head else MAX_BODY
            room = limit - self._size
            piece, data = data[:room], data[room:]
            self._size += len(piece)
            super().data_received(piece)
            if self._size >= limit:
                self._too_large()
        if self._size and self._timer is None and not self._busy:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self._too_slow)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        self._size = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._size = 0
        super().on_message_complete()

    def shutdown(self) -> None:
        """Closes the connection without cutting off a request that is on its way.

        A proxy may have sent one a moment ago. If the connection ended now, the proxy could not know whether it was
        read, so it must not repeat it elsewhere, and its client would see an error. So whatever still comes is
        answered with `Connection: close`, and whatever stays idle ends as it always does: after the keep-alive timeout,
        for which a proxy is set up to have let go before.
        """
        close = (b"connection", b"close")
        if close not in self.server_state.default_headers:  # of all connections; nobody renews them any more
            self.server_state.default_headers.append(close)
        if self._busy:
            super().shutdown()
        elif self.timeout_keep_alive_task is None:
            self.loop.call_later(LAST_CHANCE, self._too_slow)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP."""
        self._refuse(Problem(400, "bad_request", msg))

    @property
    def _busy(self) -> bool:
        """A request is being answered. The time that its body takes is for the application to limit."""
        return self.cycle is not None and not self.cycle.response_complete

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._busy or self.transport.is_closing():
            return
        if self._in_head and self._size:
            self._refuse(Problem(408, "request_timeout", "The request took too long."))
        else:
            self.transport.close()

    def _too_large(self) -> None:
        if not self._in_head or self._busy:
            self.transport.close()
        elif len(self.url) > MAX_HEAD // 2:
            self._refuse(Problem(414, "uri_too_long", "The address is too long."))
        else:
            self._refuse(Problem(431, "headers_too_large", "The headers are too large."))

    def _refuse(self, problem: Problem) -> None:
        response = json_error(problem)
        headers = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        lines = [STATUS_LINE[problem.status], *(name + b": " + value + b"\r\n" for name, value in headers), b"\r\n"]
        self.transport.write(b"".join([*lines, bytes(response.body)]))
        self.transport.close()
