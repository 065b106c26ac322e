"""SQLite: one file, one writer at a time, every commit flushed to disk."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

from sqlalchemy import (
    URL,
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
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.types import TypeEngine

from sso_service.database.transactions import (
    BUSY_TIMEOUT,
    LOGIN_POOL,
    PAGE_POOL,
    Database,
    Pool,
    json_batch,
    send_commit,
    transaction,
)
from sso_service.errors import OutcomeUnknown, Unavailable

_POLL = 0.002  # seconds between two attempts to become the writer


class SqliteDatabase(Database):
    """An SQLite file in WAL mode with `synchronous=FULL`."""

    is_sqlite = True
    breaks_cheaply = True

    def __init__(self, url: URL, *, pool: Pool = LOGIN_POOL) -> None:
        super().__init__(url, _engine(url, pool))
        # SQLite admits one writer. Threads of this process queue here instead of polling the file. There are few of
        # them, because each kind of operation has one transaction at a time. Between processes the busy timeout
        # decides.
        self._one_writer = threading.Lock()

    def _with_small_pool(self) -> "SqliteDatabase":
        pages = type(self)(self.url, pool=PAGE_POOL)
        pages._one_writer = self._one_writer
        return pages

    def breaker(self, connection: Connection, *, reading: bool) -> Callable[[], object] | None:
        raw = connection.connection.dbapi_connection
        return partial(_interrupt, raw) if reading and isinstance(raw, sqlite3.Connection) else None

    @contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        try:
            with transaction(
                connection, partial(connection.exec_driver_sql, "BEGIN"), partial(send_commit, connection)
            ):
                yield
        except OutcomeUnknown as error:
            raise Unavailable(str(error)) from error  # it only read, so nothing can have happened

    @contextmanager
    def writing(self, connection: Connection) -> Iterator[None]:
        deadline = time.monotonic() + BUSY_TIMEOUT
        if not self._one_writer.acquire(timeout=BUSY_TIMEOUT):
            raise Unavailable("another writer holds the database", begun=False)
        try:
            begin = partial(_begin_immediately, connection, deadline)
            with transaction(connection, begin, partial(send_commit, connection)):
                yield
        finally:
            self._one_writer.release()

    consuming = writing

    @contextmanager
    def purging(self, connection: Connection) -> Iterator[bool]:
        with _locked(f"{self.url.database}-purge") as alone:
            if not alone:
                yield False
                return
            with self.writing(connection):
                yield True

    def insert(self, table: Table) -> sqlite.Insert:
        return sqlite.insert(table)

    def batch(self, **columns: TypeEngine[Any]) -> FromClause:
        given = func.json_each(bindparam("batch", type_=String())).table_valued("key", "value")
        return json_batch(given, given.c.key, columns)

    def pairs(self, position: ColumnElement[int], number: ColumnElement[int]) -> ColumnElement[str]:
        return func.json_group_array(func.json_array(position, number), type_=String())

    def size(self, table: Table) -> ColumnElement[int]:
        return select(func.count()).select_from(table).scalar_subquery()

    def now(self) -> ColumnElement[int]:
        return cast(func.strftime("%s", "now"), Integer)


def _interrupt(raw: sqlite3.Connection) -> None:
    with suppress(sqlite3.ProgrammingError):  # it was closed
        raw.interrupt()


def _engine(url: URL, pool: Pool) -> Engine:
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,  # otherwise errors would show e-mail addresses in the log
        pool_size=pool.size,
        max_overflow=pool.more,
        pool_timeout=BUSY_TIMEOUT,
        pool_reset_on_return=None,
        connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # FULL: in WAL mode a lower level may lose the last commits in a power cut, and with them consumed tokens.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise connection.OperationalError(f"the file system of the database does not allow WAL mode (it is {mode})")
        _refuse_read_only(connection)

    return engine


def _refuse_read_only(connection: sqlite3.Connection) -> None:
    """Raise `sqlite3.OperationalError` if the connection cannot write.

    If a file is not writable, SQLite opens it read-only and reports that only at the first write. The connection stays
    read-only even when the file becomes writable again. So do all other connections of this process, because they share
    the index of the write-ahead log.
    """
    connection.execute("PRAGMA busy_timeout = 0")
    connection.execute("BEGIN")
    try:
        connection.execute("PRAGMA user_version = 0")  # its present value, and rolled back
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # busy: another connection writes, so it is writable
            raise
    finally:
        connection.execute("ROLLBACK")
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")


def _begin_immediately(connection: Connection, deadline: float) -> None:
    """Begin a write transaction as soon as no other process has one, or raise at `deadline` (monotonic seconds).

    IMMEDIATE, because a transaction that reads first and then writes fails if another one wrote in between. SQLite's
    own waiting backs off to 100 ms, so that under load a waiting process finds the database locked each time. This
    polls more often.
    """
    raw: Any = connection.connection.dbapi_connection
    raw.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                return
            except OperationalError as error:
                busy = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)
    finally:
        raw.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")


@contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Yield whether this caller holds the lock file at `path`, until the end of the block. The file stays empty."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            yield False
        else:
            yield True
