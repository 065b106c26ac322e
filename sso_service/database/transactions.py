"""Connections and transactions, and the interface behind which SQLite and PostgreSQL differ.

Connections are in the driver's autocommit mode and transactions are written out, because the promise of single use
depends on knowing when `COMMIT` was sent: before it, nothing happened; after it, only the server's answer counts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Executable,
    FromClause,
    Table,
    cast,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeEngine

from sso_service.errors import OutcomeUnknown, Unavailable

BUSY_TIMEOUT = 2.0
"""Seconds that a statement may wait. Below the deadline of an operation, so the outcome is known in time."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The connections of a pool: it keeps `size` open, and opens up to `more` under load."""

    size: int
    more: int


LOGIN_POOL = Pool(8, 6)
"""Connections of a process for logins, issuing, access checks, health checks and purging."""
PAGE_POOL = Pool(3, 1)
"""Connections of a process for pages, which can only wait for each other."""


class Database(ABC):
    """A database with the few statements that SQLite and PostgreSQL express differently.

    `url` is the SQLAlchemy URL. With `require_sync_standby`, tokens are consumed only while PostgreSQL waits for a
    synchronous standby. All threads share the connections of `engine`.
    """

    is_sqlite = False
    breaks_cheaply = False
    """Whether a connection survives that its statement was ended by `breaker`."""

    def __init__(self, url: URL, engine: Engine, *, require_sync_standby: bool = False) -> None:
        self.url = url
        self.engine = engine
        self.require_sync_standby = require_sync_standby
        self._pages: Database | None = None

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Yield a connection from the pool. Raises `Unavailable`."""
        try:
            connection = self.engine.connect()
        # InvalidRequestError: one connection after another was closed before its first use. OSError: no descriptors.
        except (DBAPIError, InvalidRequestError, PoolTimeout, OSError) as error:
            raise Unavailable(f"cannot connect to {self}: {reason(error)}") from error
        with connection:
            yield connection

    def for_pages(self) -> "Database":
        """Return the same database with a small pool of its own, for pages: they cannot delay logins.

        A statement of a page may take 1 s on PostgreSQL. `close` closes both pools.
        """
        if self._pages is None:
            self._pages = self._with_small_pool()
        return self._pages

    @abstractmethod
    def _with_small_pool(self) -> "Database":
        """Return the same database for pages, as a new object."""

    @abstractmethod
    def breaker(self, connection: Connection, *, reading: bool) -> Callable[[], object] | None:
        """Return a function with which another thread ends the statement that `connection` runs, without waiting.

        The function may be called until `connection` is returned to the pool. With `reading` False, the result is None
        where a statement cannot be ended safely, because it may be a `COMMIT`.
        """

    # --- transactions

    @abstractmethod
    def reading(self, connection: Connection) -> AbstractContextManager[None]:
        """Run the block in a transaction that only reads. Raises `Unavailable`."""

    @abstractmethod
    def writing(self, connection: Connection) -> AbstractContextManager[None]:
        """Run the block in a durable transaction.

        Raises `Unavailable` if nothing happened, `OutcomeUnknown` if the transaction may have been committed.
        """

    @abstractmethod
    def consuming(self, connection: Connection) -> AbstractContextManager[None]:
        """Run the block in a transaction that survives a failover where a synchronous standby is required.

        Raises what `writing` raises.
        """

    @abstractmethod
    def purging(self, connection: Connection) -> AbstractContextManager[bool]:
        """Run the block in a durable transaction that yields True for one caller at a time, and False for all others.

        The lock only avoids duplicate work: correctness does not depend on it. It ends with the transaction, so it
        works behind PgBouncer. Raises what `writing` raises.
        """

    # --- SQL

    @abstractmethod
    def insert(self, table: Table) -> "postgresql.Insert | sqlite.Insert":
        """Return an `INSERT` that supports `ON CONFLICT DO NOTHING`."""

    @abstractmethod
    def batch(self, **columns: TypeEngine[Any]) -> FromClause:
        """Return the rows of a JSON array of arrays, the parameter `batch`, with their `position` from 0.

        One parameter serves any number of rows, so the text of the statement, its cached compilation and its prepared
        plan are the same for each batch size. `batch_parameter` makes the parameter.
        """

    @abstractmethod
    def pairs(self, position: ColumnElement[int], number: ColumnElement[int]) -> ColumnElement[str]:
        """Aggregate `position` and `number` of all rows into one value: a JSON array of arrays."""

    @abstractmethod
    def size(self, table: Table) -> ColumnElement[int]:
        """Return the number of rows: PostgreSQL's own estimate, or a count."""

    @abstractmethod
    def now(self) -> ColumnElement[int]:
        """Return the database's clock in Unix seconds."""

    # --- the rest

    def close(self) -> None:
        """Close the pooled connections, those of pages as well."""
        self.engine.dispose()
        if self._pages is not None:
            self._pages.close()

    def __str__(self) -> str:
        return self.url.set(query={}).render_as_string(hide_password=True)  # a query can contain a password too


@contextmanager
def transaction(
    connection: Connection,
    begin: Callable[[], object],
    commit: Callable[[], object],
    *,
    has_failed: Callable[[Connection], bool] = lambda connection: False,
) -> Iterator[None]:
    """Run the block between `begin` and `commit`, or roll back.

    `has_failed` reports whether the connection is in a failed transaction. Raises `Unavailable` if nothing happened,
    what `commit` raises, or what the block raised where that is the fault of its own values.
    """
    try:
        begin()
    except DBAPIError as error:
        raise Unavailable(reason(error), begun=False) from error
    try:
        yield
    except BaseException as error:
        roll_back(connection)
        # A constraint or a value is the operation's own fault. Everything else is the database's: unreachable, full,
        # read-only, damaged, in recovery, or without a table that it should have.
        if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError | DataError):
            raise Unavailable(reason(error), retryable=ended_for_another(error)) from error
        raise
    # PostgreSQL answers the COMMIT of a failed transaction with ROLLBACK, and does not report that as an error.
    if has_failed(connection):
        roll_back(connection)
        raise Unavailable("a statement of the transaction had failed")
    commit()


def send_commit(connection: Connection, statement: str = "COMMIT", *, refusal: str = "") -> None:
    """Send `COMMIT`. From here on nothing is cancelled or retried: the transaction may have been committed.

    `statement` may contain a check before the `COMMIT`, which fails with the SQLSTATE `refusal`. Raises
    `OutcomeUnknown`, or `Unavailable` if the server reports that it did not commit.
    """
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if refusal and getattr(error.orig, "sqlstate", None) == refusal:  # the COMMIT behind the check was not run
            roll_back(connection)
            raise Unavailable(reason(error)) from error
        if ended_for_another(error):  # the server states that it rolled back
            raise Unavailable(reason(error), retryable=True) from error
        connection.invalidate()
        raise OutcomeUnknown(reason(error)) from error


def roll_back(connection: Connection) -> None:
    """End the transaction. A connection that cannot do that is thrown away."""
    if connection.invalidated:
        return
    try:
        connection.exec_driver_sql("ROLLBACK")
    except DBAPIError:
        # Either there is no transaction (SQLite ends it by itself after some errors) or the connection is broken.
        # A fresh connection settles both.
        connection.invalidate()


def reason(error: BaseException) -> str:
    """Return the first line of the driver's message, without statement and parameters."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def ended_for_another(error: BaseException) -> bool:
    """Return whether it is a serialization failure or a deadlock (PostgreSQL, appendix A: 40001, 40P01)."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) in {"40001", "40P01"}


def json_batch(given: FromClause, position: ColumnElement[int], columns: Mapping[str, TypeEngine[Any]]) -> FromClause:
    """Return `position` and `columns` of the JSON arrays in the column `value` of `given`, for `Database.batch`."""
    values = [
        cast(given.c.value.op("->>")(literal_column(str(index))), type_).label(name)
        for index, (name, type_) in enumerate(columns.items())
    ]
    return select(position.label("position"), *values).select_from(given).subquery("batch")


def batch_parameter(rows: Iterable[Sequence[object]]) -> dict[str, str]:
    """Return the parameter from which `Database.batch` reads its rows."""
    return {"batch": msgspec.json.encode(list(rows)).decode()}


def rows(connection: Connection, statement: Executable, parameters: Mapping[str, object]) -> Sequence[tuple[Any, ...]]:
    """Return the rows of a batch as the driver's own tuples, without a row object for each."""
    result = connection.execute(statement, parameters)
    with closing(result):
        cursor = result.cursor
        return cursor.fetchall() if cursor is not None else []
