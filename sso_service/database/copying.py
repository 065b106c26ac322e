"""Copying everything from one database to another, of either kind."""

from typing import Any

from sqlalchemy import Connection, Table, bindparam, func, insert, select, text, update
from sqlalchemy.exc import DataError, IntegrityError

from sso_service.database import migrations
from sso_service.database.schema import consumed_floor, metadata
from sso_service.database.transactions import Database, reason
from sso_service.errors import Conflict

_AT_ONCE = 1000


def copy(source: Database, target: Database) -> dict[str, int]:
    """Copy everything into `target`, which gets the schema and must be empty. Return the number of rows by table.

    The copy is complete or not made at all, and consistent at one moment. If the source stays in use afterwards, its
    ledger and the copy's differ. Raises `SchemaMismatch`, `Conflict`, `Unavailable` or `OutcomeUnknown`.
    """
    migrations.check(source)
    migrations.upgrade(target)
    with source.connect() as reader, target.connect() as writer, source.reading(reader), target.writing(writer):
        if not source.is_sqlite:  # one snapshot of all tables; SQLite's readers always have one
            reader.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        for database, connection in ((source, reader), (target, writer)):
            if not database.is_sqlite:
                connection.execute(text("SET LOCAL statement_timeout = 0; SET LOCAL enable_seqscan = on"))
        return {table.name: _copy_table(table, reader, target, writer) for table in metadata.sorted_tables}


def _copy_table(table: Table, reader: Connection, target: Database, writer: Connection) -> int:
    if table is consumed_floor:  # every database has one row already
        floor = reader.execute(select(table.c.claims)).scalar_one()
        return writer.execute(update(table).values(claims=floor)).rowcount
    if writer.execute(select(func.count()).select_from(table)).scalar_one():
        raise Conflict(f"the table {table.name} of the database {target} is not empty")
    copied = 0
    result = reader.execute(select(table).execution_options(stream_results=True))
    for rows in result.mappings().partitions(_AT_ONCE):
        try:
            writer.execute(_insertion(table), [dict(row) for row in rows])
        except (IntegrityError, DataError) as error:  # such as a key that another process has inserted in the meantime
            raise Conflict(f"the database {target} refuses rows of the table {table.name}: {reason(error)}") from error
        copied += len(rows)
    if table.autoincrement_column is not None and not target.is_sqlite:
        _continue_ids_after_last(table, writer)
    return copied


def _insertion(table: Table) -> Any:
    # Without RETURNING, which SQLAlchemy would otherwise add for ids.
    return insert(table).inline().values({column.name: bindparam(column.name) for column in table.columns})


def _continue_ids_after_last(table: Table, writer: Connection) -> None:
    """Let PostgreSQL continue after the last id. A reused id would give the sessions of one user to another.

    Rows of tables that number themselves are never deleted, so the greatest id is the last one.
    """
    column = table.autoincrement_column
    assert column is not None  # nosec B101 # noqa: S101 - the caller has checked it
    last = select(func.max(column)).scalar_subquery()
    sequence = func.pg_get_serial_sequence(table.name, column.name)
    writer.execute(select(func.setval(sequence, func.coalesce(last, 1), last.is_not(None))))
