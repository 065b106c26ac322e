"""PostgreSQL: settings of each transaction, durability with and without a standby, connections that are lost."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    String,
    Table,
    bindparam,
    cast,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.types import TypeEngine

from sso_service.database.reconnecting import Reconnecting
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

_PREPARE_AFTER = 5  # executions on one connection
_PURGE_LOCK = 0x55_0C_0D1  # any number, the same in every process

_CONNECT_ARGUMENTS = {
    "application_name": "sso-service",
    "connect_timeout": 2,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5000,
    "prepare_threshold": None,  # nothing is prepared until `_prepare_if_direct` allows it
}
_TIMEOUTS = (
    "SET LOCAL lock_timeout = '500ms'; SET LOCAL statement_timeout = '{timeout}'; "
    "SET LOCAL idle_in_transaction_session_timeout = '5s'; "
)
_LOGIN_SETTINGS = (
    f"{_TIMEOUTS.format(timeout='2s')}"
    # A batch looks up rows by key. PostgreSQL cannot know how many and assumes a hundred, for which it would scan a
    # whole table of twenty thousand.
    "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_seqscan = off; "
    # Where only a sequential scan is possible, `off` makes it look so expensive that PostgreSQL before 18 compiles the
    # statement first: 85 ms for a login.
    "SET LOCAL jit = off"
)
# A page may read many rows. PostgreSQL plans it freely, and for the account at hand: one plan for all would suit the
# largest. A statement is given up after a second, because its thread is one of few.
_PAGE_SETTINGS = f"{_TIMEOUTS.format(timeout='1s')}SET LOCAL jit = off; SET LOCAL plan_cache_mode = force_custom_plan"
# At least `on`, and not lower where the operator has chosen `remote_apply`. SET LOCAL, so that the setting does not
# stay on a connection that a pooler hands to another client afterwards.
_DURABLE = (
    "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
    "WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)"
)
# The check is in one message with COMMIT, so that the setting cannot change in between: PostgreSQL re-reads it only
# between messages. Patroni empties it when there is no standby, and a commit then does not wait.
_NO_STANDBY = "SSO01"  # an error code that PostgreSQL does not use
_COMMIT_WITH_STANDBY = f"""
DO $$ BEGIN
    IF current_setting('synchronous_standby_names') = '' THEN
        RAISE EXCEPTION USING ERRCODE = '{_NO_STANDBY}', MESSAGE = 'there is no synchronous standby';
    END IF;
END $$; COMMIT
"""


class PostgresqlDatabase(Database):
    """A PostgreSQL server, perhaps behind PgBouncer in transaction mode."""

    def __init__(
        self,
        url: URL,
        *,
        require_sync_standby: bool = False,
        pool: Pool = LOGIN_POOL,
        settings: str = _LOGIN_SETTINGS,
    ) -> None:
        super().__init__(url, _engine(url, pool), require_sync_standby=require_sync_standby)
        self._settings = settings

    def _with_small_pool(self) -> "PostgresqlDatabase":
        return type(self)(
            self.url, require_sync_standby=self.require_sync_standby, pool=PAGE_POOL, settings=_PAGE_SETTINGS
        )

    def breaker(self, connection: Connection, *, reading: bool) -> Callable[[], object] | None:
        return partial(_shut_down, connection.info["socket"])

    @contextmanager
    def reading(self, connection: Connection) -> Iterator[None]:
        try:
            with _transaction(connection, f"BEGIN READ ONLY; {self._settings}"):
                yield
        except OutcomeUnknown as error:
            raise Unavailable(str(error)) from error  # it only read, so nothing can have happened

    def writing(self, connection: Connection) -> AbstractContextManager[None]:
        return _transaction(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._settings}; {_DURABLE}")

    def consuming(self, connection: Connection) -> AbstractContextManager[None]:
        commit = _COMMIT_WITH_STANDBY if self.require_sync_standby else "COMMIT"
        return _transaction(connection, f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._settings}; {_DURABLE}", commit)

    @contextmanager
    def purging(self, connection: Connection) -> Iterator[bool]:
        with self.writing(connection):
            yield connection.execute(select(func.pg_try_advisory_xact_lock(_PURGE_LOCK))).scalar_one()

    def insert(self, table: Table) -> postgresql.Insert:
        return postgresql.insert(table)

    def batch(self, **columns: TypeEngine[Any]) -> FromClause:
        elements = func.json_array_elements(cast(bindparam("batch", type_=String()), JSON))
        given = elements.table_valued("value", with_ordinality="key").render_derived()
        return json_batch(given, given.c.key - 1, columns)

    def pairs(self, position: ColumnElement[int], number: ColumnElement[int]) -> ColumnElement[str]:
        return cast(func.json_agg(func.json_build_array(position, number)), String)

    def size(self, table: Table) -> ColumnElement[int]:
        return func.pg_stat_get_live_tuples(cast(table.name, postgresql.REGCLASS), type_=BigInteger())

    def now(self) -> ColumnElement[int]:
        return cast(func.floor(func.extract("epoch", func.clock_timestamp())), BigInteger)


def _shut_down(connected: socket.socket) -> None:
    # The server gets no message: the thread stops waiting, and its connection is thrown away.
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


@contextmanager
def _transaction(connection: Connection, begin: str, commit: str = "COMMIT") -> Iterator[None]:
    with transaction(
        connection,
        partial(connection.exec_driver_sql, begin),
        partial(_commit, connection, commit),
        has_failed=_has_failed,
    ):
        _prepare_if_direct(connection)
        yield


def _has_failed(connection: Connection) -> bool:
    raw = connection.connection.dbapi_connection
    return isinstance(raw, psycopg.Connection) and raw.info.transaction_status is TransactionStatus.INERROR


def _commit(connection: Connection, commit: str) -> None:
    warnings: list[str] = connection.info.setdefault("warnings", [])
    warnings.clear()
    send_commit(connection, commit, refusal=_NO_STANDBY)
    # A commit that did not wait for its synchronous standby is reported with a warning only. It may not survive a
    # failover.
    if warnings:
        connection.invalidate()
        raise OutcomeUnknown("; ".join(warnings))


def _prepare_if_direct(connection: Connection) -> None:
    """Let psycopg prepare frequent statements, which halves the time of a batch, unless there is a pooler in between.

    PgBouncer gives each transaction another server process, which lacks the statements that were prepared in the last
    one. It also assigns process numbers of its own, so the server's number then differs from the one that the driver
    received when it connected. The check runs in the first transaction, where the wait for a server is limited.
    """
    raw = connection.connection.dbapi_connection
    if isinstance(raw, psycopg.Connection) and "direct" not in connection.info:
        direct = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() == raw.info.backend_pid
        connection.info["direct"] = direct
        raw.prepare_threshold = _PREPARE_AFTER if direct else None


def _engine(url: URL, pool: Pool) -> Engine:
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        pool_size=pool.size,
        max_overflow=pool.more,
        pool_timeout=BUSY_TIMEOUT,
        pool_reset_on_return=None,
        connect_args={name: value for name, value in _CONNECT_ARGUMENTS.items() if name not in url.query},
    )
    Reconnecting(engine)

    @event.listens_for(engine, "connect")
    def configure(connection: psycopg.Connection[Any], record: Any) -> None:
        warnings: list[str] = []

        def keep_warning(diagnostic: psycopg.errors.Diagnostic) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                warnings.append(diagnostic.message_primary or "warning")

        connection.add_notice_handler(keep_warning)
        record.info["warnings"] = warnings
        # Another thread shuts this socket down when the server does not answer. It is a duplicate, because the original
        # descriptor could have been closed and reused by then.
        record.info["socket"] = socket.socket(fileno=os.dup(connection.fileno()))

    @event.listens_for(engine, "checkout")
    def refuse_dead_connection(connection: psycopg.Connection[Any], record: Any, _: Any) -> None:
        # Readable data on an idle connection means that the server has closed it. This check costs no round trip and
        # cannot hang, as a query could.
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
