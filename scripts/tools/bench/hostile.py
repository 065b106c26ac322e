"""The cost of hostile input: processor time of the service's event loop for each KiB that a client sends."""

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from scripts.tools.bench.places import Place, places
from scripts.tools.bench.servers import serving
from scripts.tools.bench.stores import ACCOUNT, SQLITE, store
from sso_service import keyring, sessions
from sso_service.sessions import Session

LIMIT = 1000 / 8
"""Microseconds of the event loop that a KiB may cost: a millisecond for 8 KiB. A shorter request counts as 8 KiB."""

_PEOPLE = 1000
_REQUESTS = 4
"""Requests in a round."""
_TIMEOUT = 20.0


@dataclass(frozen=True)
class HostileCost:
    """The cost of a place filled with a piece. `microseconds` are per request, of `size` bytes.

    `empty_microseconds` are those of the request with an empty place, if it has the same status: the cost of the page,
    for example.
    """

    place: str
    fill: str
    size: int
    status: int
    microseconds: float
    empty_microseconds: float

    @property
    def per_kib(self) -> float:
        """Microseconds per KiB, without those of the empty place."""
        return max(0.0, self.microseconds - self.empty_microseconds) / max(self.size / 1024, 8)

    @property
    def kept(self) -> bool:
        """Whether the limit is kept."""
        return self.per_kib <= LIMIT


class Site:
    """A running service, and one connection to it."""

    def __init__(self, port: int, event_loop: Path, cookie: str, secret: str) -> None:
        self._port = port
        self._event_loop = event_loop
        self._connection: socket.socket | None = None
        self.places = list(places(cookie, secret))
        begin = self._used()
        time.sleep(1)
        self._idle = self._used() - begin
        """Processor seconds that the event loop uses in a second without requests."""

    def cost(self, place: Place, fill: bytes, *, empty: HostileCost | None = None, rounds: int = 7) -> HostileCost:
        """Measure a place with this content. The least of the rounds counts: other processes only add to it."""
        request = place.request(fill)
        status = self.ask(request)
        measured = []
        for _ in range(rounds):
            begin, begun = self._used(), time.monotonic()
            for _ in range(_REQUESTS):
                self.ask(request)
            used = self._used() - begin - self._idle * (time.monotonic() - begun)
            measured.append(max(0.0, used) / _REQUESTS * 1e6)
        without = empty.microseconds if empty is not None and empty.status == status else 0.0
        return HostileCost(place.name, _shown(fill), len(request), status, min(measured), without)

    def costs(self, place: Place) -> list[HostileCost]:
        """Measure a place with each of its pieces, or as it is if it has none."""
        if not place.pieces:
            return [self.cost(place, b"")]
        empty = self.cost(place, b"")
        return [self.cost(place, place.repeated(piece), empty=empty) for piece in place.pieces]

    def ask(self, request: bytes) -> int:
        """Send a request and read the response. Return its status, 0 if the connection was closed without one."""
        connection = self._connection or socket.create_connection(("127.0.0.1", self._port), _TIMEOUT)
        self._connection = None
        received = b""
        try:
            connection.sendall(request)
            while (end := _end(received)) is None or len(received) < end:
                if not (more := connection.recv(1 << 20)):
                    break
                received += more
        except OSError:  # the service closed it while the request was sent
            connection.close()
        else:
            self._connection = connection
            if not received or b"\r\nconnection: close" in received.lower():
                connection.close()
                self._connection = None
        return int(received[9:12] or 0)

    def _used(self) -> float:
        """Return the processor seconds of the thread with the event loop, which is the first one of the process."""
        time.sleep(0.002)  # until it has finished with the last request
        return int(self._event_loop.read_text().split()[0]) / 1e9


def _end(received: bytes) -> int | None:
    """Return the length of the response, or None until its head is complete."""
    head, blank, _ = received.partition(b"\r\n\r\n")
    if not blank:
        return None
    lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(head) + 4 + int(lengths[0] if lengths else 0)


def _shown(fill: bytes) -> str:
    """Return the beginning of `fill` in printable ASCII."""
    shown = ascii(fill[:40].decode("latin-1"))[1:-1]
    return shown if len(fill) <= 40 else f"{shown[:60]}..."


@contextmanager
def site(directory: Path, core: int) -> Iterator[Site]:
    """Run the service on `core`, with an SQLite database of a few users."""
    home = directory / f"hostile-{secrets.token_hex(4)}"
    (home / "keys").mkdir(parents=True)
    key = keyring.rotate(home / "keys", now=int(time.time()), lead=0)
    with store(SQLITE, directory, None, people=_PEOPLE) as made:
        with made.engine.begin() as connection:
            connection.execute(text("UPDATE memberships SET role = 'admin' WHERE user_id = 1"))
        environment = {
            "SSO_HOME": str(home),
            "SSO_DATABASE_URL": made.url,
            "SSO_CORS_ORIGINS": "https://portal.example",
            "SSO_TRUSTED_PROXIES": "127.0.0.0/8,10.0.0.0/8",
        }
        with serving(["sso_service", "serve"], environment, home / "log", core) as server:
            cookie = sessions.dump_session(Session(1, ACCOUNT, int(time.time())), key.session_key)
            yield Site(server.port, Path(f"/proc/{server.pid}/schedstat"), cookie, made.secret)


def measure_hostile(running: Site, log: Callable[[str], None]) -> list[HostileCost]:
    """Measure every place with every piece, in the order of the places."""
    costs = []
    for place in running.places:
        found = running.costs(place)
        worst = max(found, key=lambda cost: cost.per_kib)
        log(f"{worst.per_kib:7.1f} µs/KiB  {worst.place}: {worst.fill}")
        costs += found
    return costs
