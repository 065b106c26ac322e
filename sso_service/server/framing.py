"""HTTP/1.1 as uvicorn speaks it, less what lets somebody in front of it read one request where it reads two."""

import asyncio
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

LINGER = 2.0
"""Seconds for which the rest of a body is still taken after its request was answered."""
_REFUSAL = "Invalid HTTP request received."


class InvalidHead(ValueError):
    """The head of a request is not one that HTTP allows. Answered with 400, and the end of the connection."""


class StrictProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with five rules of HTTP that it leaves out.

    - An offer to change the protocol (`Upgrade`, such as Java's clients make) is declined by going on as if it were not
      there (RFC 9110 section 7.8). uvicorn answers before the body, and would then take what comes of that for the next
      request: behind a proxy that passes `Upgrade` on, anybody could put a request of their own before, or around, that
      of whoever uses the connection next.
    - `CONNECT` is for proxies, and has no body either (section 9.3.6).
    - Trailers are not headers (section 6.5.1). A proxy that takes a header away does not look for it behind the body.
    - A request that is answered before its body is complete is the last one on its connection, and the answer says so
      (section 10.1.1; RFC 9112 section 9.3). Whoever was told not to send the body could take the connection for free,
      and the next request would be read as that body.
    - There is one `Host`, and only in HTTP/1.0 may be none (RFC 9112 section 3.2).
    """

    _head_without_offer = b""
    _incomplete: RequestResponseCycle | None = None
    _keep_alive = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begins the connection."""
        super().connection_made(transport)
        self._lingering = _Lingering(transport, self.loop)

    def data_received(self, data: bytes) -> None:
        """Answers what can be read, with 400 what cannot."""
        self._unset_keepalive_if_required()
        if self._lingering.closed:
            return
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                except HttpParserUpgrade as offer:
                    # The parser has left out whatever body there is. Another one reads the same head again, without the
                    # offer, and on from there.
                    data = self._head_without_offer + data[offer.args[0] :]
                    self.parser = HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                else:
                    break
        except HttpParserError:
            self.logger.warning(_REFUSAL)
            self.send_400_response(_REFUSAL)
            return
        if self._incomplete is not None or (self.cycle is not None and self.cycle.more_body):
            self._keep_what_is_complete()

    def on_headers_complete(self) -> None:
        """Begins the request. Raises `InvalidHead`."""
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts != 1 and (hosts or self.parser.get_http_version() != "1.0"):
            raise InvalidHead
        if self.parser.should_upgrade():
            self._head_without_offer = self._without_offer()
        super().on_headers_complete()
        self.headers = []  # for the trailers; the request keeps its own

    def shutdown(self) -> None:
        """Ends the connection as soon as nothing is under way on it."""
        self._keep_alive = False
        super().shutdown()

    def _should_upgrade(self) -> bool:
        # Asked by uvicorn when there is an offer: what is left of such a request is not for the application.
        return True

    def _without_offer(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise InvalidHead
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _keep_what_is_complete(self) -> None:
        """Lets the connection outlive a request only when that has come to its end. Before the application goes on."""
        if self._incomplete is not None and not self._incomplete.more_body:
            self._incomplete.keep_alive = self._keep_alive
            self._incomplete.transport = self.transport
            self._incomplete = None
        if self._incomplete is None and self.cycle.more_body:
            self._incomplete = self.cycle
            self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
            self.cycle.transport = cast(asyncio.Transport, self._lingering)


class _Lingering:
    """What of a transport an answer needs, with an end that leaves the client the time to read it.

    A connection that is closed while the client still sends is reset, and that may cost the client our answer (RFC 9112
    section 9.6).
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self.closed = False
        self.write = transport.write
        self.is_closing = transport.is_closing

    def close(self) -> None:
        if not self.closed and not self._transport.is_closing():
            self.closed = True
            self._transport.write_eof()
            self._loop.call_later(LINGER, self._transport.close)
