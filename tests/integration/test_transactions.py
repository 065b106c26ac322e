"""Transactions: durability, limits, and settings that override those of the database."""

import psycopg
import pytest
from sqlalchemy import Connection, make_url, select

from sso_service.database import database_at
from sso_service.database.schema import consumed_nonces
from sso_service.database.transactions import Database
from sso_service.errors import Unavailable
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.waiting import Stopwatch

pytestmark = pytest.mark.anyio
_SETTINGS = (
    "lock_timeout",
    "statement_timeout",
    "idle_in_transaction_session_timeout",
    "synchronous_commit",
    "transaction_isolation",
)


def settings_of(connection: Connection) -> list[str]:
    query = ", ".join(f"current_setting('{name}')" for name in _SETTINGS)
    return list(connection.exec_driver_sql(f"SELECT {query}").one())


@on_postgresql
@pytest.mark.parametrize(
    ("default", "inside"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_writing_transactions_override_unsafe_database_defaults(database_url: str, default: str, inside: str) -> None:
    made = make_url(database_url)
    with psycopg.connect(database_url, autocommit=True) as admin:
        for name, value in (
            ("synchronous_commit", default),
            ("default_transaction_isolation", "serializable"),
            ("lock_timeout", "7s"),
            ("statement_timeout", "8s"),
            ("idle_in_transaction_session_timeout", "9s"),
        ):
            admin.execute(f"ALTER DATABASE {made.database} SET {name} = '{value}'".encode())
    database = database_at(made.set(drivername="postgresql+psycopg"))
    before = ["7s", "8s", "9s", default, "serializable"]
    with database.connect() as connection:
        assert settings_of(connection) == before
        for fails in (False, True):
            try:
                with database.writing(connection):
                    assert settings_of(connection) == ["500ms", "2s", "5s", inside, "read committed"]
                    if fails:
                        raise KeyError
            except KeyError:
                pass
            assert settings_of(connection) == before
    database.close()


@on_postgresql
def test_a_reading_transaction_is_bounded_and_cannot_write(database: Database) -> None:
    with database.connect() as connection:
        before = settings_of(connection)
        with database.reading(connection):
            assert settings_of(connection)[:3] == ["500ms", "2s", "5s"]
        assert settings_of(connection) == before
        with pytest.raises(Unavailable), database.reading(connection):
            connection.execute(consumed_nonces.insert().values(claims=bytes(16)))
    with database.connect() as connection:
        assert connection.execute(select(consumed_nonces)).all() == []


@on_sqlite
def test_every_sqlite_connection_flushes_each_commit_and_checks_foreign_keys(database: Database) -> None:
    names = ("journal_mode", "synchronous", "foreign_keys")
    with database.connect() as one, database.connect() as two, database.connect() as three:
        for connection in (one, two, three):
            values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]
            assert values == ["wal", 2, 1]


@pytest.mark.slow
@on_sqlite
def test_an_sqlite_write_acquires_its_lock_before_it_reads(database: Database) -> None:
    """A transaction that starts with a read fails, without waiting, if another one writes in between."""
    rival = database_at(database.url)
    with database.connect() as connection, database.writing(connection):
        connection.execute(select(consumed_nonces)).all()
        with rival.connect() as other:
            start = Stopwatch()
            with pytest.raises(Unavailable), rival.writing(other):
                pass
            assert start.seconds > 1
        connection.execute(consumed_nonces.insert().values(claims=bytes(16)))
    rival.close()
