"""HTTP/1.1 framing: uvicorn's protocol without the gaps that make a proxy and this service see different requests."""

import asyncio
from dataclasses import replace
from http import HTTPStatus
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sso_service.http import error_body, error_headers, has_broken_encoding, percent_decoded
from sso_service.problems import problem

MAX_HEADERS = 100
"""Header lines of a request, at most, as in Apache. Each of them is looked at about ten times.

An address in `X-Forwarded-For` counts as a line. uvicorn parses one after the other until it is not a trusted proxy's,
so a client that knows the network of the proxies could keep it busy for 12 ms.
"""
LINGER = 2.0
"""Seconds for which the rest of a body is still accepted after its request was answered."""


class InvalidHead(ValueError):
    """The head of a request breaks a rule of HTTP. Raised inside the parser, which then reports an error."""


class StrictProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools with six rules of HTTP that uvicorn does not enforce.

    - The header `Upgrade` (Java's HTTP client sends it) is ignored, as RFC 9110 section 7.8 allows. uvicorn would
      respond before the body arrives and parse the body as the next request. Behind a proxy that forwards `Upgrade`, an
      attacker could insert a request before that of another client on the same connection, or enclose it in one.
    - `CONNECT` is for proxies and has no body either, so it is refused (section 9.3.6).
    - Trailers are not headers (section 6.5.1). A proxy that removes a header does not look for it after the body.
    - A request that is answered before its body is complete is the last one on its connection, and the response says so
      (section 10.1.1; RFC 9112 section 9.3). A proxy that was told not to send the body may reuse the connection, and
      the next request would be read as that body.
    - A head has at most 100 lines, and a path is percent-encoded correctly (section 3; RFC 3986 section 2.1).
    - There is exactly one `Host`; only HTTP/1.0 requests may have none (RFC 9112 section 3.2).
    """

    _head_without_upgrade = b""
    fault = "bad_request"
    """The problem of a request that the parser refuses."""
    _incomplete: RequestResponseCycle | None = None
    """The request whose body is incomplete. Its connection is closed after the response."""
    _keep_alive = False
    """Whether the connection of `_incomplete` may be kept once the body is complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin the connection."""
        super().connection_made(transport)
        self._lingering = _LingeringTransport(transport, self.loop)

    def data_received(self, data: bytes) -> None:
        """Parse `data` and start the requests in it. Data that is not HTTP is answered with 400."""
        self._unset_keepalive_if_required()
        if self._lingering.closed:
            return
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                except HttpParserUpgrade as upgrade:
                    # The parser has stopped after the head and would skip the body. A new parser reads the same head
                    # without the upgrade, and continues with the data after it.
                    data = self._head_without_upgrade + data[upgrade.args[0] :]
                    self.parser = HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                else:
                    break
        except HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.refuse(self.fault)
            return
        if self._incomplete is not None or (self.cycle is not None and self.cycle.more_body):
            self._update_keep_alive()

    def on_headers_complete(self) -> None:
        """Start the request. Raises `InvalidHead`."""
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts != 1 and (hosts or self.parser.get_http_version() != "1.0"):
            raise InvalidHead
        lines = len(names)
        if b"x-forwarded-for" in names:
            lines += sum(value.count(b",") for name, value in self.headers if name == b"x-forwarded-for")
        if lines > MAX_HEADERS:
            self.fault = "headers_too_large"
            raise InvalidHead
        if self.parser.should_upgrade():
            self._head_without_upgrade = self._without_upgrade()
        url, decoded = self.url, None
        if b"%" in url:
            decoded = _decoded(url)
            self.url = url.replace(b"%", b"_")  # so that uvicorn decodes nothing
        super().on_headers_complete()
        if decoded:
            self.url = url
            self.scope.update(decoded)  # type: ignore[typeddict-item]  # the application has not seen the scope yet
        self.headers = []  # collects the trailers; the request keeps its own list

    def shutdown(self) -> None:
        """Close the connection as soon as no request is in progress."""
        self._keep_alive = False
        super().shutdown()

    def refuse(self, code: str) -> None:
        """Answer with the error `code` of the table of problems, and close the connection."""
        refusal = problem(code)
        body = error_body(refusal)
        closing = replace(refusal, headers={**refusal.headers, "Connection": "close"})
        headers = [*self.server_state.default_headers, *error_headers(closing, body)]
        first_line = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n".encode()
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([first_line, *lines, b"\r\n", body]))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # uvicorn asks this about each upgrade request. True stops it from starting the request: that happens when the
        # second parser of `data_received` has read the head without the upgrade.
        return True

    def _without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise InvalidHead
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _update_keep_alive(self) -> None:
        """Keep the connection only if the body is complete by now. Runs before the application continues."""
        if self._incomplete is not None and not self._incomplete.more_body:
            self._incomplete.keep_alive = self._keep_alive
            self._incomplete.transport = self.transport
            self._incomplete = None
        if self._incomplete is None and self.cycle.more_body:
            self._incomplete = self.cycle
            self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
            self.cycle.transport = cast(asyncio.Transport, self._lingering)


def _decoded(url: bytes) -> dict[str, object]:
    """Return the parts of the ASGI scope that depend on the target. Raises `InvalidHead` if its path is not valid.

    uvicorn gets the same result in a hundred times the time: 8 ms for a path of 30 KB.
    """
    parsed = parse_url(url)
    if has_broken_encoding(parsed.path):
        raise InvalidHead
    path = percent_decoded(parsed.path).decode("utf-8", "replace")
    return {"path": path, "raw_path": parsed.path, "query_string": parsed.query or b""}


class _LingeringTransport:
    """The part of a transport that a response uses, with a `close` that lets the client read the response first.

    Closing a connection while the client still sends resets it, and a reset may discard the response on the client's
    side before it was read (RFC 9112 section 9.6).
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
