"""One connection: uvicorn's protocol with limits on what a client may send, and a shutdown that loses no request.

The parser behind uvicorn has no limits of its own. One client could make a worker keep a head of any size. Any number
of clients could hold connections open by sending a byte now and then. And uvicorn parses and queues every request that
arrives while another is unanswered, so one client that sends and never reads could fill the memory.
"""

import asyncio
from contextvars import Context
from socket import AF_INET, AF_INET6
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from sso_service.server.capacity import CAPACITY
from sso_service.server.framing import MAX_HEADERS, InvalidHead, StrictProtocol
from sso_service.server.listening import UNIX

MAX_HEAD = 32 * 1024
"""Bytes of a request line with its headers, as in nginx."""
MAX_BLANK_LINES = 128
"""Blank lines before a head or in a chunked body. Data is divided at each, which takes a few microseconds."""
MAX_BODY = 1024 * 1024
"""Bytes of a body with its framing. The application's limit is far lower; this one also covers chunk extensions and
trailers, which never reach the application."""
MAX_HELD = 32 * 1024
"""Bytes behind an unanswered request with which the connection is still read. Only then does it notice that the client
has gone."""
HEAD_TIMEOUT = 10.0
"""Seconds in which a head must be complete: from its first byte, and on a new connection from the beginning."""
HALF_CLOSED_TIMEOUT = 2.0
"""Seconds in which the response to a client that sends no more must begin. TCP does not reveal whether such a client
still reads. Some do (`nc -N`), but most have gone."""
SHUTDOWN_TIMEOUT = 1.0
"""Seconds that a new connection has left for its first request when the server stops."""
SHUTDOWN_LIMIT = 8.0
"""Seconds after which a connection is cut off when the server stops. uvicorn cancels what is left after 10, and would
log a traceback for each."""
_END = b"\r\n\r\n"
"""The end of a head, and of a chunked body. The parser refuses lines that end otherwise."""


class Protocol(StrictProtocol):
    """The connection with its limits. One request at a time: nothing is parsed while another is unanswered.

    Data that arrives early is held unparsed, and beyond `MAX_HELD` it is left to the kernel, whose full buffer stops
    the client. An ordinary request costs no more than the search for the end of its head.
    """

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
        self._tail = b""
        """The last bytes of an incomplete head or chunked body, in which its end may have begun."""
        self._blank_lines = 0
        """Blank lines since the last request was complete."""
        self._unanswered = False
        """Whether a request is complete and its response is not."""
        self._held = b""
        """Data that is parsed once the present request is answered."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin the connection and the time-out of its first head."""
        full = len(self.connections) >= CAPACITY.limit
        super().connection_made(transport)
        if full:
            CAPACITY.refuse()
            self.transport.abort()
        elif self.client is None:
            if transport.get_extra_info("socket").family in (AF_INET, AF_INET6):
                # The client has gone already. Its request must not pass for one through the unix socket.
                self.transport.abort()
            self.client = (UNIX, 0)
        self._timer = self.loop.call_later(HEAD_TIMEOUT, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        self._held = b""
        self._stop_timer()
        self.transport.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse `data`, or hold it while a request is unanswered."""
        self._unset_keepalive_if_required()
        if self.transport.is_closing():  # this data is dropped, but not for as long as the client likes
            self._size += len(data)
            if self._size > MAX_BODY:
                self.transport.finish()
            return
        if self._held:
            self._hold(self._held + data)
        else:
            self._parse(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn always closes
        """Answer the requests that are complete, and close the connection. Return whether there are any."""
        self.transport.ended = True
        if (self._unanswered or self._held) and not self.transport.is_closing():
            self._finish_half_closed()
        else:
            self.transport.finish()
        return not self.transport.is_closing()

    def pause_writing(self) -> None:
        """Stop the application, and watch whether the client reads."""
        super().pause_writing()
        self.transport.watch()

    def resume_writing(self) -> None:
        """Let the application continue."""
        super().resume_writing()
        self.transport.progressed()
        self._continue_soon()

    def on_headers_complete(self) -> None:
        """Begin to count the body, and start the request. Raises `InvalidHead`."""
        if self._unanswered:  # impossible: data is divided where requests end
            self.transport.abort()
            raise InvalidHead
        self._stop_timer()
        self._in_head = False
        self._size = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Begin to count the next head."""
        super().on_message_complete()
        if self.incomplete is not None:
            self.end_body()
        if not self.parser.should_upgrade():  # otherwise another parser is about to read the head again
            self._in_head = True
            self._size = 0
            self._tail = b""
            self._blank_lines = 0
            self._unanswered = self.busy

    def on_response_complete(self) -> None:
        """Continue with the data that was held."""
        super().on_response_complete()
        self._unanswered = False
        self._continue_soon()

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
        self.loop.call_later(SHUTDOWN_LIMIT, self.transport.abort)
        if self.busy:
            super().shutdown()
        elif self.timeout_keep_alive_task is None:
            self.loop.call_later(SHUTDOWN_TIMEOUT, self._time_out)

    def _parse(self, data: bytes) -> None:
        """Parse `data` up to the end of a request, but never more than the limits allow. Hold the rest."""
        start = 0
        # The parser gets at most as many bytes as the limit leaves, so it never stores more than the limit.
        while start < len(data):
            if self._unanswered or self.flow.write_paused:
                self._hold(data[start:])
                break
            limit = MAX_HEAD if self._in_head else MAX_BODY
            end = min(self._boundary(data, start), start + limit - self._size)
            piece, start = data[start:end], end
            self._size += len(piece)
            self.feed(piece)
            if self.transport.is_closing():
                return
            if self._size >= limit or (self._in_head and self._size and len(self.headers or ()) > MAX_HEADERS):
                self._too_large()
                return
            if self._blank_lines > MAX_BLANK_LINES:
                self.refuse("bad_request")
                return
        if self.cycle is not None and self.cycle.more_body:
            self.begin_body()
        if self._size and self._timer is None and not self.busy:
            self._timer = self.loop.call_later(HEAD_TIMEOUT, self._time_out)
        self.transport.linger = self.incomplete is not None or bool(self._held)

    def _boundary(self, data: bytes, start: int) -> int:
        """Return the index in `data` up to which no more than one request can end, and none before that index."""
        if self.expected:
            end = min(start + self.expected, len(data))
            self.expected -= end - start
            return end
        if self._tail and (found := (self._tail + data[start : start + 3]).find(_END)) >= 0:
            end = start + found + len(_END) - len(self._tail)
        elif (found := data.find(_END, start)) >= 0:
            end = found + len(_END)
        else:
            self._tail = (self._tail + data[max(start, len(data) - 3) :])[-3:]
            return len(data)
        self._tail = b""
        self._blank_lines += 1
        return end

    def _hold(self, data: bytes) -> None:
        """Keep `data` for later, and stop reading if it is more than `MAX_HELD`."""
        self._held = data
        if len(data) > MAX_HELD and not self.transport.held:
            self.transport.held = True
            self.transport.pause_reading()

    def _continue_soon(self) -> None:
        if self._held:
            self._unset_keepalive_if_required()
            # In a context of its own: the present one belongs to the request that was answered.
            self.loop.call_soon(self._continue, context=Context())

    def _continue(self) -> None:
        """Parse the data that was held, and read more."""
        if self.transport.is_closing():
            return
        held, self._held = self._held, b""
        self._parse(held)
        if self.transport.held and len(self._held) <= MAX_HELD:
            self.transport.held = False
            if not self.flow.read_paused:
                self.transport.resume_reading()
        if self.transport.ended:
            self._finish_half_closed()

    def _finish_half_closed(self) -> None:
        """Close the connection after the last response to a client that sends no more."""
        if self._unanswered:
            if not self._held:
                self.cycle.keep_alive = False
            self._stop_timer()
            self._timer = self.loop.call_later(HALF_CLOSED_TIMEOUT, self._time_out)
        elif not self._held:
            self.transport.finish()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.busy:
            if self.transport.ended and not self.cycle.response_started:
                self.transport.finish()
        elif self._in_head and self._size:
            self.refuse("request_timeout")
        else:
            self.transport.close()

    def _too_large(self) -> None:
        if not self._in_head or self.busy:
            self.transport.finish()
        elif len(self.url) > MAX_HEAD // 2:
            self.refuse("uri_too_long")
        else:
            self.refuse("headers_too_large")
