"""HTTP/1.1 as uvicorn speaks it, less what lets somebody in front of it read one request where it reads two."""

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_REFUSAL = "Invalid HTTP request received."


class InvalidHead(ValueError):
    """The head of a request is not one that HTTP allows. Answered with 400, and the end of the connection."""


class StrictProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with four rules of HTTP that it leaves out.

    - An offer to change the protocol (`Upgrade`, such as Java's clients make) is declined by going on as if it were not
      there (RFC 9110 section 7.8). uvicorn answers before the body, and would then take what comes of that for the next
      request: behind a proxy that passes `Upgrade` on, anybody could put a request of their own before, or around, that
      of whoever uses the connection next.
    - `CONNECT` is for proxies, and has no body either (section 9.3.6).
    - Trailers are not headers (section 6.5.1). A proxy that takes a header away does not look for it behind the body.
    - There is one `Host` in HTTP/1.1 (RFC 9112 section 3.2), and no version but 1.0 and 1.1 is one that we speak.
    """

    def data_received(self, data: bytes) -> None:
        """Answers what can be read, with 400 what cannot."""
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                except HttpParserUpgrade as offer:
                    # The parser has left out whatever body there is. Another one reads on, from the same head without
                    # the offer; `headers` of it, since the raw bytes may have come in several pieces.
                    data = self._head_without_offer() + data[offer.args[0] :]
                    self.parser = HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                else:
                    break
        except HttpParserError:
            self.logger.warning(_REFUSAL)
            self.send_400_response(_REFUSAL)

    def on_headers_complete(self) -> None:
        """Begins the request. Raises `InvalidHead`."""
        version = self.parser.get_http_version()
        hosts = [name for name, _ in self.headers if name == b"host"]
        if version not in {"1.0", "1.1"} or (len(hosts) != 1 and (hosts or version == "1.1")):
            raise InvalidHead
        if self.parser.get_method() == b"CONNECT":
            raise InvalidHead
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self.headers = []  # for the trailers; the request keeps its own

    def on_message_complete(self) -> None:
        """Ends the body, if the parser has not just left it out."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])
