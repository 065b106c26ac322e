"""Connections and transactions to SQLite or PostgreSQL, and all that differs between the two.

Connections are in the driver's autocommit mode and transactions are spelled out, because the promise of single use
hangs on knowing when `COMMIT` was sent: before it, nothing happened; after it, only the server's word counts.
"""

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import msgspec
import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    ExceptionContext,
    Executable,
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
from sqlalchemy.exc import DataError, DBAPIError, DisconnectionError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeEngine

BUSY_TIMEOUT = 2.0
"""Seconds for which a statement may wait: less than the deadline of an operation, so the answer is known in time."""

_POOL_SIZE = 8
_POLL = 0.002  # seconds between two attempts to become SQLite's writer
_PREPARE_AFTER = 5  # executions on one connection
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.25  # seconds between two attempts to connect to a server that is away
_PURGE_LOCK = 0x55_0C_0D1  # any number, the same in every process

_CONNECT_ARGUMENTS = {
    "application_name": "sso-service",
    "connect_timeout": 2,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
    "prepare_threshold": None,  # nothing is prepared until `_prepare_if_direct` says so
}
_SETTINGS = (
    "SET LOCAL lock_timeout = '500ms'; SET LOCAL statement_timeout = '2s'; "
    "SET LOCAL idle_in_transaction_session_timeout = '5s'; "
    # A batch looks up rows by key, but PostgreSQL cannot know how many and guesses a hundred, for which it would rather
    # read a whole table of twenty thousand.
    "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off; "
    # Where there is no other way than a sequential scan, `off` makes it look so dear that PostgreSQL before 18 compiles
    # the statement first: 85 ms for a login.
    "SET LOCAL jit = off"
)
# At least `on`, and not less where the operator has chosen `remote_apply`. SET LOCAL, so that nothing of it sticks to a
# connection that a pooler hands to someone else afterwards.
_DURABLE = (
    "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)


# In one message with COMMIT, so that the setting cannot change in between: PostgreSQL reads it anew only between
# messages. Patroni empties it when there is no standby, and a commit then waits for nobody.
_COMMIT_WITH_STANDBY = """
DO $$ BEGIN
    IF current_setting('synchronous_standby_names') = '' THEN
        RAISE EXCEPTION USING ERRCODE = 'SSO01', MESSAGE = 'there is no synchronous standby';
    END IF;
END $$; COMMIT
"""


class Unavailable(Exception):
    """The database cannot do it now, and nothing happened.

    `retryable`: the server itself ended the transaction for the sake of another one, so a repetition may succeed. Not
    `begun`: there was not even a transaction, so it cannot be the fault of what was to be done in it.
    """

    def __init__(self, message: str, *, retryable: bool = False, begun: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.begun = begun


class Overloaded(Unavailable):
    """More is waiting than can be done in time, and nothing happened."""


class OutcomeUnknown(Exception):
    """`COMMIT` was sent and no answer can be trusted: it may have happened or not."""


class Database:
    """An engine with the few statements that each of the two databases spells in its own way."""

    def __init__(self, url: URL, *, require_sync_standby: bool = False) -> None:
        self.url = url
        self.require_sync_standby = require_sync_standby
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
        except (DBAPIError, PoolTimeout, OSError) as error:  # OSError: out of file descriptors
            raise Unavailable(f"cannot connect to {self}: {reason(error)}") from error
        with connection:
            yield connection

    @contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        """A transaction that only reads. Raises `Unavailable`."""
        begin = "BEGIN" if self.is_sqlite else f"BEGIN READ ONLY; {_SETTINGS}"
        try:
            with _transaction(connection, begin):
                yield
        except OutcomeUnknown as error:
            raise Unavailable(str(error)) from error  # nothing can have happened

    @contextmanager
    def consuming(self, connection: Connection) -> Iterator[None]:
        """A durable transaction, also across a failover if a synchronous standby is required. Raises as `writing`."""
        commit = _COMMIT_WITH_STANDBY if self.require_sync_standby and not self.is_sqlite else "COMMIT"
        with self.writing(connection, commit):
            yield

    @contextmanager
    def writing(self, connection: Connection, commit: str = "COMMIT") -> Iterator[None]:
        """A durable transaction. Raises `Unavailable` if nothing happened, `OutcomeUnknown` if it may have."""
        if not self.is_sqlite:
            with _transaction(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED; {_SETTINGS}; {_DURABLE}", commit):
                yield
            return
        deadline = time.monotonic() + BUSY_TIMEOUT
        if not self._one_writer.acquire(timeout=BUSY_TIMEOUT):
            raise Unavailable("another writer holds the database", begun=False)
        try:
            with _transaction(connection, partial(_begin_immediately, connection, deadline)):
                yield
        finally:
            self._one_writer.release()

    @contextmanager
    def purging(self, connection: Connection) -> Iterator[bool]:
        """A durable transaction that is True for one at a time. Whoever gets False has nothing to do in it.

        Nothing rests on this but that no work is done twice. It ends with the transaction, so PgBouncer may be between.
        That ends with the process, and if it is paused, PostgreSQL ends it after five seconds. (With SQLite all writers
        have to wait for one that is paused in a transaction.) Raises as `writing`.
        """
        if not self.is_sqlite:
            with self.writing(connection):
                yield connection.execute(select(func.pg_try_advisory_xact_lock(_PURGE_LOCK))).scalar_one()
            return
        with _locked(f"{self.url.database}-purge") as alone:
            if not alone:
                yield False
                return
            with self.writing(connection):
                yield True

    def insert(self, table: Table) -> "postgresql.Insert | sqlite.Insert":
        """An `INSERT` that knows `ON CONFLICT DO NOTHING`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def batch(self, **columns: TypeEngine[Any]) -> FromClause:
        """The rows of a JSON array of arrays, given as the parameter `batch`, with their `position`, from 0.

        One parameter for any number of rows: the statement's text, and so its cached compilation and its prepared plan,
        is the same for each batch size.
        """
        parameter = bindparam("batch", type_=String())
        if self.is_sqlite:
            given = func.json_each(parameter).table_valued("key", "value")
        else:
            elements = func.json_array_elements(cast(parameter, JSON))
            given = elements.table_valued("value", with_ordinality="key").render_derived()
        values = [
            cast(given.c.value.op("->>")(literal_column(str(index))), type_).label(name)
            for index, (name, type_) in enumerate(columns.items())
        ]
        position = given.c.key if self.is_sqlite else given.c.key - 1
        return select(position.label("position"), *values).select_from(given).subquery("batch")

    def pairs(self, position: ColumnElement[int], number: ColumnElement[int]) -> ColumnElement[str]:
        """All rows' `position` and `number` in one value: a JSON array of arrays."""
        if self.is_sqlite:
            return func.json_group_array(func.json_array(position, number), type_=String())
        return cast(func.json_agg(func.json_build_array(position, number)), String)

    def size(self, table: Table) -> ColumnElement[int]:
        """The number of rows: PostgreSQL's own running estimate, or counted."""
        if self.is_sqlite:
            return select(func.count()).select_from(table).scalar_subquery()
        return func.pg_stat_get_live_tuples(cast(table.name, postgresql.REGCLASS), type_=BigInteger())

    def now(self) -> ColumnElement[int]:
        """The database's clock, in Unix seconds."""
        if self.is_sqlite:
            return cast(func.strftime("%s", "now"), Integer)
        return cast(func.floor(func.extract("epoch", func.clock_timestamp())), BigInteger)

    def close(self) -> None:
        """Closes the pooled connections."""
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.set(query={}).render_as_string(hide_password=True)  # a query can hold a password too


def batch_parameter(rows: Iterable[Sequence[object]]) -> dict[str, str]:
    """The parameter that `Database.batch` reads its rows from."""
    return {"batch": msgspec.json.encode(list(rows)).decode()}


def rows(connection: Connection, statement: Executable, parameters: Mapping[str, object]) -> Sequence[tuple[Any, ...]]:
    """The rows of a batch as the driver gives them: its tuples, without a row object made of each."""
    result = connection.execute(statement, parameters)
    with closing(result):
        cursor = result.cursor
        return cursor.fetchall() if cursor is not None else []


@contextmanager
def _transaction(connection: Connection, begin: str | Callable[[], None], commit: str = "COMMIT") -> Iterator[None]:
    try:
        if isinstance(begin, str):
            connection.exec_driver_sql(begin)
        else:
            begin()
    except DBAPIError as error:
        raise Unavailable(reason(error), begun=False) from error
    try:
        _prepare_if_direct(connection)
        yield
    except BaseException as error:
        _roll_back(connection)
        # A constraint or a value is the operation's own fault. All else is the database's: unreachable, full,
        # read-only, damaged, in recovery, or without a table that it should have.
        if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError | DataError):
            raise Unavailable(reason(error), retryable=_ended_for_another(error)) from error
        raise
    # PostgreSQL would answer the COMMIT of a failed transaction with ROLLBACK, and call that no error.
    if _has_failed(connection):
        _roll_back(connection)
        raise Unavailable("a statement of the transaction had failed")
    _commit(connection, commit)


def _has_failed(connection: Connection) -> bool:
    raw = connection.connection.dbapi_connection
    return isinstance(raw, psycopg.Connection) and raw.info.transaction_status is TransactionStatus.INERROR


def _prepare_if_direct(connection: Connection) -> None:
    """Has psycopg prepare what it executes often, which halves the time of a batch, unless there is a pooler between.

    PgBouncer gives each transaction another of the server's processes, which knows nothing of what was prepared in the
    last one. It hands out process numbers of its own, so the server's answer differs from what we were told when we
    connected. Asked within the first transaction, where a server that does not answer is not waited for.
    """
    raw = connection.connection.dbapi_connection
    if isinstance(raw, psycopg.Connection) and "direct" not in connection.info:
        direct = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == raw.info.backend_pid
        connection.info["direct"] = direct
        raw.prepare_threshold = _PREPARE_AFTER if direct else None


@contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Whether the file at `path` is ours until the end of the block: one at a time has it. It stays empty."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            yield False
        else:
            yield True


def _begin_immediately(connection: Connection, deadline: float) -> None:
    """Begins a write transaction of SQLite, at once or when other processes let go of it before `deadline`.

    IMMEDIATE, since a transaction that reads first and then wants to write fails if another wrote in between. SQLite's
    own waiting backs off to 100 ms, which under load means that whoever waits finds it taken each time; we look more
    often.
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


def _roll_back(connection: Connection) -> None:
    if connection.invalidated:
        return
    try:
        connection.exec_driver_sql("ROLLBACK")
    except DBAPIError:
        # Either there is no transaction (SQLite ends it by itself on some errors) or the connection is of no use.
        # A fresh one settles both.
        connection.invalidate()


def _commit(connection: Connection, commit: str) -> None:
    """From here on there is no cancelling and no repeating: what was sent may have been done."""
    warnings: list[str] = connection.info.setdefault("warnings", [])
    warnings.clear()
    try:
        connection.exec_driver_sql(commit)
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "SSO01":  # it came before the COMMIT, which was not run then
            _roll_back(connection)
            raise Unavailable(reason(error)) from error
        if _ended_for_another(error):  # the server says for certain that it rolled back
            raise Unavailable(reason(error), retryable=True) from error
        connection.invalidate()
        raise OutcomeUnknown(reason(error)) from error
    # A commit that did not wait for its synchronous standby is reported with a mere warning. It is not the durable one
    # that was asked for.
    if warnings:
        connection.invalidate()
        raise OutcomeUnknown("; ".join(warnings))


def reason(error: BaseException) -> str:
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
        # SQLite's own knows only ASCII, and who searches for MÜLLER means Müller.
        connection.create_function("lower", 1, lambda text: text and str(text).lower(), deterministic=True)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise connection.OperationalError(f"the file system of the database does not allow WAL mode (it is {mode})")
        _refuse_to_only_read(connection)

    return engine


def _refuse_to_only_read(connection: sqlite3.Connection) -> None:
    """Raises `sqlite3.OperationalError` if the connection may only read.

    SQLite opens what it cannot write for reading, and says so when something is to be written. The connection stays
    like that when the file can be written again, and with it all others of this process, which share the log's index.
    """
    connection.execute("PRAGMA busy_timeout = 0")
    connection.execute("BEGIN")
    try:
        connection.execute("PRAGMA user_version = 0")  # what it is already, and not for long
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # somebody else writes, so it can be written
            raise
    finally:
        connection.execute("ROLLBACK")
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT * 1000:.0f}")


class _Reconnecting:
    """Makes connections, and while the server cannot be reached, one by one and with growing pauses.

    Else each batch that is turned away would be one more attempt, and a server that has a hard time would have a harder
    one. Whoever comes during a pause waits for its end, and if somebody else tries then, gets what was wrong the last
    time. Connections that are there go on. A new one is good when it was used and came back whole: PgBouncer accepts
    connections also without a server.
    """

    def __init__(self, engine: Engine) -> None:
        self._lock = threading.Lock()
        self._pause = 0.0  # 0: all is well
        self._not_before = 0.0
        self._failure = ""
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "handle_error", self._note_loss)
        event.listen(engine, "checkin", self._note_return)

    def _connect(self, dialect: Dialect, record: Any, arguments: tuple[Any, ...], parameters: dict[str, Any]) -> Any:
        if self._pause:
            time.sleep(max(0.0, self._not_before - time.monotonic()))
        with self._lock:
            if self._pause:
                if time.monotonic() < self._not_before:
                    raise psycopg.OperationalError(self._failure)
                # This attempt is for all: before the next pause is over, nobody makes another.
                self._pause_until_next(min(2 * self._pause, _LONGEST_PAUSE))
        try:
            connection = dialect.connect(*arguments, **parameters)
        except psycopg.Error as error:
            self._note_failure(error)
            raise
        record.info["untried"] = True
        return connection

    def _note_loss(self, context: ExceptionContext) -> None:
        connection = context.connection
        if context.is_disconnect and connection and not connection.invalidated and "untried" in connection.info:
            self._note_failure(context.original_exception)

    def _note_return(self, connection: psycopg.Connection[Any] | None, record: Any) -> None:
        if connection is not None and record.info.pop("untried", False):
            self._pause = 0.0

    def _note_failure(self, error: BaseException) -> None:
        with self._lock:
            self._failure = str(error)
            if not self._pause:
                self._pause_until_next(_FIRST_PAUSE)

    def _pause_until_next(self, pause: float) -> None:
        self._pause = pause
        self._not_before = time.monotonic() + pause


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
    _Reconnecting(engine)

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

    @event.listens_for(engine, "checkout")
    def refuse_a_dead_connection(connection: psycopg.Connection[Any], record: Any, _: Any) -> None:
        # An idle connection has nothing to say: if there is something to be read, it is the server's farewell. A look
        # costs no round trip and cannot hang, as asking the server would.
        try:
            record.info["socket"].recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise DisconnectionError from error
        raise DisconnectionError

    @event.listens_for(engine, "close")
    def close_duplicate(connection: psycopg.Connection[Any], record: Any) -> None:
        if duplicate := record.info.pop("socket", None):
            duplicate.close()

    return engine
