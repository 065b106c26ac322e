"""HTTP/1.1 framing: uvicorn's protocol without the gaps that make a proxy and this service see different requests."""

import asyncio
from dataclasses import replace
from http import HTTPStatus
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sso_service.http import error_body, error_headers, has_broken_encoding, percent_decoded
from sso_service.problems import problem
from sso_service.server.sending import ClientTransport

MAX_HEADERS = 100
"""Header lines of a request, at most, as in Apache. Each of them is read about ten times.

An address in `X-Forwarded-For` counts as a line. uvicorn parses one after the other until it is not a trusted proxy's,
so a client that knows the network of the proxies could keep it busy for 12 ms.
"""


class InvalidHead(ValueError):
    """The head of a request breaks a rule of HTTP. Raised inside the parser, which then reports an error."""


class _Trailers(list[Any]):
    """The list into which uvicorn puts trailers. It stays empty, so endless trailers take no memory."""

    def append(self, _: object) -> None:
        """Drop a trailer."""


_TRAILERS = _Trailers()


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
    incomplete: RequestResponseCycle | None = None
    """The request whose body is incomplete. Its connection is closed after the response."""
    _keep_alive = False
    """Whether the connection of `incomplete` may be kept once the body is complete."""

    transport: ClientTransport  # type: ignore[assignment]  # set in connection_made, with all that uvicorn uses of it
    expected = 0
    """Bytes of the present body that are still to come, if `Content-Length` declares them."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Begin the connection."""
        super().connection_made(cast(asyncio.Transport, ClientTransport(transport, self.loop)))

    def feed(self, data: bytes) -> None:
        """Parse `data` and start the request in it. Data that is not HTTP is answered with 400."""
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
        if b"content-length" in names:  # digits: the parser has checked it
            self.expected = int(self.headers[names.index(b"content-length")][1])
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
        self.headers = _TRAILERS  # the request keeps its own list

    def shutdown(self) -> None:
        """Close the connection as soon as no request is in progress."""
        self._keep_alive = False
        super().shutdown()

    def refuse(self, code: str) -> None:
        """Answer with the error `code` of the table of problems, and close the connection."""
        if self.transport.is_closing():
            return
        if self.busy:  # the request's own body is invalid
            if self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # so that this is the only response
            self.cycle.message_event.set()
        refusal = problem(code)
        body = error_body(refusal)
        closing = replace(refusal, headers={**refusal.headers, "Connection": "close"})
        headers = [*self.server_state.default_headers, *error_headers(closing, body)]
        first_line = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n".encode()
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([first_line, *lines, b"\r\n", body]))
        self.transport.linger = True  # the client may be sending the rest
        self.transport.close()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered. The application limits the time that its body may take."""
        return self.cycle is not None and not self.cycle.response_complete

    def begin_body(self) -> None:
        """Close the connection after the response, unless the body is complete by then."""
        if self.incomplete is None:
            self.incomplete = self.cycle
            self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False

    def end_body(self) -> None:
        """Keep the connection after the response: the body is complete."""
        if self.incomplete is not None and not self.incomplete.more_body:
            self.incomplete.keep_alive = self._keep_alive
            self.incomplete = None

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


def _decoded(url: bytes) -> dict[str, object]:
    """Return the parts of the ASGI scope that depend on the target. Raises `InvalidHead` if its path is not valid.

    uvicorn gets the same result in a hundred times the time: 8 ms for a path of 30 KB.
    """
    parsed = parse_url(url)
    if has_broken_encoding(parsed.path):
        raise InvalidHead
    path = percent_decoded(parsed.path).decode("utf-8", "replace")
    return {"path": path, "raw_path": parsed.path, "query_string": parsed.query or b""}
