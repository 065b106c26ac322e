"""The three compared systems: each is a running server with the data that requests to it need."""

import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from sqlalchemy import Table

from scripts.tools.bench import conventional as app
from scripts.tools.bench.servers import Server, serving
from scripts.tools.bench.stores import ACCOUNT, SQLITE, Store
from sso_service import keyring, sessions, tokens
from sso_service.keyring import SigningKey
from sso_service.sessions import Session
from sso_service.tokens import Claims

LIFETIME = 300
_PER_SECOND = 2000
"""Login tokens that expire in the same second, as if issued at this rate. Rows are in the order of expiry."""

# The same options that `sso-service serve` passes to uvicorn.
_OPTIONS = "--no-access-log --no-server-header --ws none --forwarded-allow-ips 127.0.0.1 --timeout-graceful-shutdown 10"
_UVICORN = ["uvicorn", "--factory", "--port", "{port}", *_OPTIONS.split()]


class System(ABC):
    """A system under test. `share` is the part of the ceiling's rate that it certainly does not exceed."""

    name: str
    share: float
    remembers = True
    """Whether the system refuses a used token."""

    def __init__(self, server: Server, store: Store | None) -> None:
        self.server = server
        self.store = store
        self.secret = store.secret if store else secrets.token_urlsafe(32)
        self.people = store.people if store else 20_000

    @property
    def label(self) -> str:
        """The name, and the database if there is one."""
        return f"{self.name}, {self.store.kind}" if self.store else self.name

    @abstractmethod
    def tokens(self, count: int) -> list[str]:
        """Return new login tokens for random users, as if issued within the last seconds."""

    @abstractmethod
    def cookie(self, user_id: int) -> str:
        """Return a valid session cookie of this user."""


class Ceiling(System):
    """The framework alone."""

    name = "ceiling"
    share = 1.5
    remembers = False

    def tokens(self, count: int) -> list[str]:
        return [secrets.token_urlsafe(32) for _ in range(count)]

    def cookie(self, user_id: int) -> str:
        return sessions.dump_session(Session(user_id, ACCOUNT, int(time.time())), secrets.token_bytes(32))


class Ours(System):
    """The product."""

    name = "ours"
    share = 1.3

    def __init__(self, server: Server, store: Store, key: SigningKey) -> None:
        super().__init__(server, store)
        self._key = key

    def tokens(self, count: int) -> list[str]:
        per_second = max(_PER_SECOND, count // 100)  # no token may expire before it is used
        first = int(time.time()) + LIFETIME - count // per_second
        key = self._key.token_key
        return [
            tokens.sign(
                Claims(first + number // per_second, random.randint(1, self.people), ACCOUNT, random.getrandbits(32)),
                key,
            )
            for number in range(count)
        ]

    def cookie(self, user_id: int) -> str:
        return sessions.dump_session(Session(user_id, ACCOUNT, int(time.time())), self._key.session_key)


class Conventional(System):
    """The conventional service."""

    name = "conventional"
    share = 0.4

    def __init__(self, server: Server, store: Store, secret: str) -> None:
        super().__init__(server, store)
        self._serializer = app.serializer(secret)
        self._store = store

    def tokens(self, count: int) -> list[str]:
        expires_at = int(time.time()) + LIFETIME
        made = [secrets.token_urlsafe(32) for _ in range(count)]
        rows: list[dict[str, object]] = [
            {
                "token_hash": app.token_hash(token),
                "user_id": random.randint(1, self.people),
                "account_id": ACCOUNT,
                "expires_at": expires_at,
            }
            for token in made
        ]
        self._store.insert(cast(Table, app.LoginToken.__table__), rows)
        return made

    def cookie(self, user_id: int) -> str:
        return str(self._serializer.dumps([user_id, ACCOUNT]))


@contextmanager
def ceiling(directory: Path, core: int) -> Iterator[Ceiling]:
    """Run the application of constant answers on `core`."""
    with serving([*_UVICORN, "scripts.tools.bench.ceiling:create_app"], {}, directory / "ceiling.log", core) as server:
        yield Ceiling(server, None)


@contextmanager
def ours(store: Store, directory: Path, core: int) -> Iterator[Ours]:
    """Run `sso-service serve` with its defaults on this database and `core`."""
    home = directory / f"home-{secrets.token_hex(4)}"
    keys = home / "keys"
    keys.mkdir(parents=True)
    key = keyring.rotate(keys, now=int(time.time()), lead=0)
    environment = {"SSO_HOME": str(home), "SSO_DATABASE_URL": store.url}
    with serving(["sso_service", "serve"], environment, home / "log", core) as server:
        yield Ours(server, store, key)


@contextmanager
def conventional(store: Store, directory: Path, core: int) -> Iterator[Conventional]:
    """Run the conventional service on this database and `core`. It adds its own table to the database."""
    cast(Table, app.LoginToken.__table__).create(store.engine)
    secret = secrets.token_urlsafe(32)
    driver = "sqlite+aiosqlite" if store.kind == SQLITE else "postgresql+asyncpg"
    url = store.sqlalchemy_url.set(drivername=driver).render_as_string(hide_password=False)
    environment = {"BENCH_DATABASE_URL": url, "BENCH_SECRET": secret}
    log = directory / f"conventional-{store.kind}.log"
    with serving([*_UVICORN, "scripts.tools.bench.conventional:create_app"], environment, log, core) as server:
        yield Conventional(server, store, secret)
