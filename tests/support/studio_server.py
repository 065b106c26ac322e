"""An HTTP server that records requests, in place of a Studio behind a proxy."""

import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it arrived. Header names are in lower case; trailers are included."""

    method: str
    target: bytes
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class Application(socketserver.ThreadingTCPServer):
    """An HTTP server, independent of the service, that records requests and sends the same response to each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port: int = self.server_address[1]
        self.received: list[Received] = []
        self.status = "200 OK"
        self.headers: list[tuple[str, str]] = []

    def take(self) -> list[Received]:
        """Return the requests that arrived since the last call."""
        received, self.received = self.received, []
        return received


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        application = cast(Application, self.server)
        method, target, _ = self.rfile.readline().rstrip(b"\r\n").split(b" ", 2)
        headers = self._fields()
        body = self._body(dict(headers))
        if ("transfer-encoding", "chunked") in headers:
            headers += self._fields()  # trailers
        request = Received(method.decode(), target, headers, body)
        application.received.append(request)
        if request.values("upgrade"):
            self._send(
                "101 Switching Protocols", [("Upgrade", request.values("upgrade")[0]), ("Connection", "Upgrade")]
            )
            self.wfile.write(b"echo " + self.rfile.readline())
        else:
            # A response to HEAD has a Content-Length but no body, and 204 has neither.
            length = [] if application.status.startswith("204") else [("Content-Length", "6")]
            self._send(application.status, [*application.headers, *length, ("Connection", "close")])
            if length and method != b"HEAD":
                self.wfile.write(b"Studio")

    def _send(self, status: str, headers: Sequence[tuple[str, str]]) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
        self.wfile.write("\r\n".join(lines).encode())

    def _fields(self) -> list[tuple[str, str]]:
        fields = []
        while line := self.rfile.readline().rstrip(b"\r\n"):
            name, _, value = line.decode("latin-1").partition(":")
            fields.append((name.lower(), value.strip()))
        return fields

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        pieces = []
        while length := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()  # the end of the chunk
        return b"".join(pieces)


@contextmanager
def application() -> Iterator[Application]:
    """Run a server until the end of the block."""
    with Application() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
