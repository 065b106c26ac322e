"""Upgrading a database to the schema of this version, with Alembic."""

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from sso_service.database.schema import SCHEMA_VERSION
from sso_service.database.transactions import Database
from sso_service.errors import SchemaMismatch

_LOCK = 0x55_0C_0DE  # any number, the same in every process
_OURS = "SELECT version_num FROM alembic_version"


def current(database: Database) -> str | None:
    """Return the schema's revision, or None for an empty database. Raises `Unavailable`."""
    with database.connect() as connection, database.reading(connection):
        return _revision(connection)


def check(database: Database) -> None:
    """Raise `SchemaMismatch` unless the schema is that of this version, or `Unavailable`."""
    if (revision := current(database)) != SCHEMA_VERSION:
        state = "is empty" if revision is None else f"has schema {revision}, this version needs {SCHEMA_VERSION}"
        remedy = "sso-service init" if revision is None else "sso-service db upgrade"
        raise SchemaMismatch(f"the database {database} {state}; run: {remedy}")


def upgrade(database: Database, *, before_creation: Callable[[], object] = lambda: None) -> str | None:
    """Upgrade the schema. Return the revision before the upgrade, or None if the database was empty.

    One process upgrades, others wait for it. The upgrade is complete or not made at all. `before_creation` is called
    before the schema of a new database is committed; if it raises, no schema is created. Raises `Unavailable`, or
    `SchemaMismatch` for a schema that is newer than this version.
    """
    if (before := current(database)) == SCHEMA_VERSION:
        return before
    from alembic import command  # noqa: PLC0415 - needed only here, and importing it would slow down every worker's start
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    with database.connect() as connection, database.writing(connection):
        if not database.is_sqlite:  # SQLite's write transaction excludes others by itself
            connection.execute(text("SET LOCAL lock_timeout = '60s'"))
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        before = _revision(connection)
        if before != SCHEMA_VERSION:
            config = Config()
            config.set_main_option("script_location", str(Path(__file__).parent))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise SchemaMismatch(f"the database {database} cannot be upgraded: {error}") from error
        if before is None:
            before_creation()
        return before


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text(_OURS)).scalar()
