"""Connections and transactions to SQLite or PostgreSQL, and all that differs between the two.

Connections are in the driver's autocommit mode and transactions are spelled out, because the promise of single use
hangs on knowing when `COMMIT` was sent: before it, nothing happened; after it, only the server's word counts.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    Integer,
    String,
    Table,
    bindparam,
    cast,
    create_engine,
    event,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeEngine

BUSY_TIMEOUT = 2.0
"""Seconds for which a statement may wait: less than the deadline of an operation, so the answer is known in time."""

_POOL_SIZE = 8
_IDLE = 1.0  # seconds after which a connection is asked whether it still stands

_CONNECT_ARGUMENTS = {
    "application_name": "sso-service",
    "connect_timeout": 2,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
}
_SETTINGS = (
    "SET LOCAL lock_timeout = '500ms'; SET LOCAL statement_timeout = '2s'; "
    "SET LOCAL idle_in_transaction_session_timeout = '5s'"
)
# At least `on`, and not less where the operator has chosen `remote_apply`. SET LOCAL, so that nothing of it sticks to a
# connection that a pooler hands to someone else afterwards.
_DURABLE = (
    "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)


class Unavailable(Exception):
    """The database cannot do it now, and nothing happened."""

    retryable = False
    """True if the server itself ended the transaction for the sake of another one, so that a repetition may succeed."""
    begun = True
    """False if there was not even a transaction, so that it cannot be the fault of what was to be done in it."""


class Overloaded(Unavailable):
    """More is waiting than can be done in time, and nothing happened."""


class OutcomeUnknown(Exception):
    """`COMMIT` was sent and no answer can be trusted: it may have happened or not."""


class Database:
    """An engine with the few statements that each of the two databases spells in its own way."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self.engine = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url)
        # SQLite admits one writer. Within a process they queue here, where waiting is fair, rather than at the file,
        # where it is polling; between processes the busy timeout decides.
        self._one_writer = threading.Lock()

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection from the pool. Raises `Unavailable`."""
        try:
            connection = self.engine.connect()
        except (DBAPIError, PoolTimeout) as error:
            raise Unavailable(f"cannot connect to {self}: {_reason(error)}") from error
        with connection:
            yield connection

    @contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        """A transaction that only reads. Raises `Unavailable`."""
        begin = "BEGIN" if self.is_sqlite else f"BEGIN READ ONLY; {_SETTINGS}"
        with _transaction(connection, begin):
            yield

    @contextmanager
    def writing(self, connection: Connection) -> Iterator[None]:
        """A durable transaction. Raises `Unavailable` if nothing happened, `OutcomeUnknown` if it may have."""
        if not self.is_sqlite:
            with _transaction(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED; {_SETTINGS}; {_DURABLE}"):
                yield
            return
        if not self._one_writer.acquire(timeout=BUSY_TIMEOUT):
            raise _not_begun("another writer holds the database")
        try:
            # IMMEDIATE: a transaction that reads first and then writes would fail at once if another wrote in between.
            with _transaction(connection, "BEGIN IMMEDIATE"):
                yield
        finally:
            self._one_writer.release()

    def insert(self, table: Table) -> "postgresql.Insert | sqlite.Insert":
        """An `INSERT` that knows `ON CONFLICT DO NOTHING`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def batch(self, **columns: TypeEngine[Any]) -> FromClause:
        """The rows of a JSON array of arrays, given as the parameter `batch`, with their `position`.

        One parameter for any number of rows: the statement's text, and so its cached compilation and its prepared plan,
        is the same for each batch size.
        """
        parameter = bindparam("batch", type_=String())
        if self.is_sqlite:
            rows = func.json_each(parameter).table_valued("key", "value")
        else:
            elements = func.json_array_elements(cast(parameter, JSON))
            rows = elements.table_valued("value", with_ordinality="key").render_derived()
        values = [
            cast(rows.c.value.op("->>")(literal_column(str(index))), type_).label(name)
            for index, (name, type_) in enumerate(columns.items())
        ]
        return select(rows.c.key.label("position"), *values).select_from(rows).subquery("batch")

    def now(self) -> ColumnElement[int]:
        """The database's clock, in Unix seconds."""
        if self.is_sqlite:
            return cast(func.strftime("%s", "now"), Integer)
        return cast(func.floor(func.extract("epoch", func.clock_timestamp())), BigInteger)

    def close(self) -> None:
        """Closes the pooled connections."""
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)


@contextmanager
def _transaction(connection: Connection, begin: str) -> Iterator[None]:
    try:
        connection.exec_driver_sql(begin)
    except DBAPIError as error:
        raise _not_begun(_reason(error)) from error
    try:
        yield
    except BaseException as error:
        _roll_back(connection)
        if isinstance(error, OperationalError | InternalError | InterfaceError) or (
            isinstance(error, DBAPIError) and error.connection_invalidated
        ):
            unavailable = Unavailable(_reason(error))
            unavailable.retryable = _ended_for_another(error)
            raise unavailable from error
        raise
    _commit(connection)


def _not_begun(reason: str) -> Unavailable:
    unavailable = Unavailable(reason)
    unavailable.begun = False
    return unavailable


def _roll_back(connection: Connection) -> None:
    if connection.invalidated:
        return
    try:
        connection.exec_driver_sql("ROLLBACK")
    except DBAPIError:
        # Either there is no transaction (SQLite ends it by itself on some errors) or the connection is of no use.
        # A fresh one settles both.
        connection.invalidate()


def _commit(connection: Connection) -> None:
    """From here on there is no cancelling and no repeating: what was sent may have been done."""
    warnings: list[str] = connection.info.setdefault("warnings", [])
    warnings.clear()
    try:
        result = connection.exec_driver_sql("COMMIT")
    except DBAPIError as error:
        if _ended_for_another(error):  # the server says for certain that it rolled back
            unavailable = Unavailable(_reason(error))
            unavailable.retryable = True
            raise unavailable from error
        connection.invalidate()
        raise OutcomeUnknown(_reason(error)) from error
    # PostgreSQL answers the COMMIT of a failed transaction with ROLLBACK and no error, and one that did not wait for
    # its synchronous standby with a mere warning. Neither is the durable commit that was asked for.
    status = getattr(result.cursor, "statusmessage", "COMMIT")
    if warnings or status != "COMMIT":
        connection.invalidate()
        raise OutcomeUnknown("; ".join(warnings) or f"COMMIT was answered with {status}")


def _reason(error: BaseException) -> str:
    """The first line of what the driver said: no statement, no parameters."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _ended_for_another(error: BaseException) -> bool:
    """Serialization failure or deadlock (PostgreSQL, appendix A: 40001, 40P01)."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"40001", "40P01"}


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,  # or errors would show e-mail addresses in the log
        pool_size=_POOL_SIZE,
        pool_timeout=BUSY_TIMEOUT,
        pool_reset_on_return=None,
        connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # FULL: in WAL mode anything less may forget the last commits at a power cut, and with them who logged in.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise connection.OperationalError(f"the file system of the database does not allow WAL mode (it is {mode})")

    return engine


def _postgresql_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        pool_size=_POOL_SIZE,
        pool_timeout=BUSY_TIMEOUT,
        pool_reset_on_return=None,
        connect_args={name: value for name, value in _CONNECT_ARGUMENTS.items() if name not in url.query},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: psycopg.Connection[Any], record: Any) -> None:
        warnings: list[str] = []

        def keep_warning(diagnostic: psycopg.errors.Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.message_primary or "warning")

        connection.add_notice_handler(keep_warning)
        record.info["warnings"] = warnings
        # To be shut down from another thread when the server does not answer. A duplicate, so that this can never hit a
        # descriptor that was closed and used anew meanwhile.
        record.info["socket"] = socket.socket(fileno=os.dup(connection.fileno()))
        record.info["used_at"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping_after_a_pause(connection: psycopg.Connection[Any], record: Any, _: Any) -> None:
        # Under load the next transaction tells by itself; after a pause the server may have been restarted, and the
        # first login should not be the one to find out.
        if time.monotonic() - record.info["used_at"] > _IDLE:
            try:
                connection.execute("")
            except psycopg.Error as error:
                raise DisconnectionError from error

    @event.listens_for(engine, "checkin")
    def remember_use(connection: psycopg.Connection[Any] | None, record: Any) -> None:
        record.info["used_at"] = time.monotonic()

    @event.listens_for(engine, "close")
    def close_duplicate(connection: psycopg.Connection[Any], record: Any) -> None:
        if duplicate := record.info.pop("socket", None):
            duplicate.close()

    return engine
