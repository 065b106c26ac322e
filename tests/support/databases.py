"""Databases of the tests: select the kind, change and read the content."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import BigInteger, ColumnElement, Connection, Row, bindparam, make_url

from sso_service.database import open_database
from sso_service.database.postgresql import PostgresqlDatabase
from sso_service.database.sqlite import SqliteDatabase
from sso_service.database.transactions import Database
from sso_service.settings import Settings
from tests.support.clock import Clock

# For tests that apply to one kind of database only.
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)

Query = Callable[[str], Sequence[Row[Any]]]
"""A function that returns the rows of an SQL statement."""


@contextmanager
def changing(database: Database) -> Iterator[Connection]:
    """A connection for changes that an operator would make. The block is one transaction."""
    with database.connect() as connection, database.writing(connection):
        yield connection


@contextmanager
def watching(database: Database) -> Iterator[Callable[[], object]]:
    """A function whose result changes whenever a table or a sequence is written to."""
    with database.connect() as connection:
        if database.is_sqlite:
            yield lambda: connection.exec_driver_sql("PRAGMA data_version").scalar_one()
        else:
            tables = ("users", "memberships", "api_tokens", "consumed_nonces")
            rows = [f"SELECT '{table}', ctid::text, xmin::text FROM {table}" for table in tables]
            rows.append("SELECT sequencename, last_value::text, '' FROM pg_sequences")
            yield lambda: sorted(map(tuple, connection.exec_driver_sql(" UNION ALL ".join(rows)).all()))


class _ClockedDatabase(Database):
    """A database whose clock a test controls."""

    clock: Clock

    def now(self) -> ColumnElement[int]:
        return bindparam(None, callable_=lambda: int(self.clock()), type_=BigInteger(), unique=True)


class _ClockedSqlite(_ClockedDatabase, SqliteDatabase):
    pass


class _ClockedPostgresql(_ClockedDatabase, PostgresqlDatabase):
    pass


def database_with_clock(settings: Settings, clock: Clock) -> Database:
    """Return the database of the settings, with `clock` as its clock."""
    with closing(open_database(settings)) as real:
        kind = _ClockedSqlite if real.is_sqlite else _ClockedPostgresql
        database = kind(real.url)
    database.clock = clock
    return database


def emptied(url: str) -> None:
    """Empty a database, so that it is as before the first `init`."""
    if make_url(url).get_backend_name() == "sqlite":
        Path(str(make_url(url).database)).write_bytes(b"")
        return
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
