"""An HTTP server that stands for a Studio behind a proxy."""

import socketserver
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived; header names in lower case, trailers among them."""

    method: str
    target: bytes
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class Application(socketserver.ThreadingTCPServer):
    """An HTTP server that knows nothing of us: it writes down what it gets, and answers the same to everything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.port: int = self.server_address[1]
        self.seen: list[Seen] = []
        self.status = "200 OK"
        self.headers: list[tuple[str, str]] = []

    def take(self) -> list[Seen]:
        """What arrived since it was last asked."""
        seen, self.seen = self.seen, []
        return seen


class _Conversation(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        application = cast(Application, self.server)
        method, target, _ = self.rfile.readline().rstrip(b"\r\n").split(b" ", 2)
        headers = self._fields()
        body = self._body(dict(headers))
        if ("transfer-encoding", "chunked") in headers:
            headers += self._fields()  # trailers
        seen = Seen(method.decode(), target, headers, body)
        application.seen.append(seen)
        if seen.values("upgrade"):
            self._send("101 Switching Protocols", [("Upgrade", seen.values("upgrade")[0]), ("Connection", "Upgrade")])
            self.wfile.write(b"echo " + self.rfile.readline())
        else:
            # Only its head says how long the body of an answer to HEAD would be, and 204 has none.
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
            self.rfile.readline()  # what ends a chunk
        return b"".join(pieces)


@contextmanager
def application() -> Iterator[Application]:
    with Application() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
