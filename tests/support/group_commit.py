"""Group commits on a table of notes, with steps that block or fail."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import psycopg
from sqlalchemy import Connection, event, text

from sso_service.database.group_commit import GroupCommit, Transaction
from sso_service.database.transactions import Database

SHORT = 0.4
"""A deadline in seconds that is short enough to wait for in a test."""


Step = Callable[[Connection, Sequence[int]], object]
Work = Callable[[Connection, Sequence[int]], list[int]]


class _NoteWrites(GroupCommit[int, int]):
    kind = "test"
    transaction: ClassVar[Transaction] = "writing"

    def __init__(self, work: Work, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._work = work

    def run_batch(self, connection: Connection, ops: Sequence[int]) -> list[int]:
        return self._work(connection, ops)


class _NoteReads(_NoteWrites):
    transaction = "reading"


class Harness:
    """A group commit whose operation `n` inserts the note `n` and returns `10 * n`.

    `batches` holds the operations of each transaction. If `step` is set, it runs at the end of each.
    """

    def __init__(self, database: Database, *, threads: int = 16, reads: bool = False, **options: Any) -> None:
        self.database = database
        self.batches: list[list[int]] = []
        self.step: Step | None = None
        self.threads = ThreadPoolExecutor(threads)
        self.reads = reads
        self.commits = (_NoteReads if reads else _NoteWrites)(self._work, database, self.threads, **options)

    def submit(self, op: int) -> "asyncio.Task[int]":
        return asyncio.create_task(self.commits.submit(op))

    async def submit_all(self, ops: Sequence[int]) -> list[int | BaseException]:
        return await asyncio.gather(*map(self.submit, ops), return_exceptions=True)

    def _work(self, connection: Connection, ops: Sequence[int]) -> list[int]:
        self.batches.append(list(ops))
        for op in ops if not self.reads else ():
            connection.execute(text("INSERT INTO notes VALUES (:n)"), {"n": op})
        if self.step is not None:
            self.step(connection, ops)
        return [10 * op for op in ops]


class BlockingStep:
    """A step that blocks inside the transaction, when it first runs, until it is released."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._released = threading.Event()

    def __call__(self, *_: object) -> None:
        self._entered.set()
        assert self._released.wait(10)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 10)

    def release(self) -> None:
        self._released.set()


def endless(connection: Connection, *_: object) -> None:
    """Run a query that takes minutes unless it is interrupted."""
    connection.exec_driver_sql(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) "
        "SELECT count(*) FROM n WHERE i < 0"
    )


def execute(database: Database, *statements: str) -> None:
    with database.connect() as connection, database.writing(connection):
        for statement in statements:
            connection.exec_driver_sql(statement)


def notes(database: Database) -> list[int]:
    with database.connect() as connection:
        return list(connection.execute(text("SELECT n FROM notes ORDER BY n")).scalars())


def superuser(database: Database) -> "psycopg.Connection[Any]":
    """A connection to PostgreSQL that bypasses the code under test."""
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True)


def trigger(database: Database, body: str, *, at_commit: bool) -> None:
    """Run `body` (PL/pgSQL) for each note, either immediately or when its transaction commits."""
    deferred = "DEFERRABLE INITIALLY DEFERRED" if at_commit else ""
    function = f"RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$"
    with superuser(database) as connection:
        connection.execute("CREATE SEQUENCE attempts")
        connection.execute(f"CREATE FUNCTION fault() {function}".encode())
        connection.execute(
            f"CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON notes {deferred} "
            "FOR EACH ROW EXECUTE FUNCTION fault()".encode()
        )


@contextmanager
def commit_that_fails(database: Database, *, after: bool) -> Iterator[list[str]]:
    """Lose the connection at COMMIT, either before or after it is executed. Yields the COMMITs so far."""
    sent: list[str] = []

    def fail(cursor: Any, statement: str, *_: object) -> None:
        if statement != "COMMIT":
            return
        sent.append(statement)
        if after:
            cursor.execute(statement)
        cursor.connection.close()
        raise database.engine.dialect.loaded_dbapi.OperationalError("the connection was lost")

    event.listen(database.engine, "do_execute", fail)
    yield sent
    event.remove(database.engine, "do_execute", fail)
