"""What the database says of itself, for `/readyz` and for a start that should not have happened."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, String, func, literal, select
from sqlalchemy.sql import column, table

from sso_service.database.engine import Database
from sso_service.database.ledger import floor_at
from sso_service.database.schema import SCHEMA_VERSION, consumed_floor

_alembic_version = table("alembic_version", column("version_num", String))


@dataclass(frozen=True, slots=True)
class Health:
    """The database's time (Unix seconds) and what is wrong with it, in words; empty if nothing."""

    now: int
    problem: str


def health_all(database: Database, connection: Connection, questions: Sequence[None]) -> list[Health]:
    """The database's health, the same for everybody who asks now."""
    fsync = literal("on") if database.is_sqlite else func.current_setting("fsync")
    version = select(_alembic_version.c.version_num).scalar_subquery()
    floor = select(consumed_floor.c.claims).scalar_subquery()
    required = database.require_sync_standby and not database.is_sqlite
    standby = func.current_setting("synchronous_standby_names") if required else literal("not required")
    question = select(database.now(), version, fsync, floor, standby)
    now, revision, flushed, lowest, standbys = connection.execute(question).one()
    problem = ""
    if revision != SCHEMA_VERSION:
        problem = f"the schema is {revision}, this version needs {SCHEMA_VERSION}"
    elif flushed != "on":
        problem = "fsync is off: a power cut could make used tokens good again"
    elif lowest is None or bytes(lowest) > floor_at(now):
        problem = "tokens of this moment are below the purge floor: the database's clock was ahead once"
    elif not standbys:
        problem = "there is no synchronous standby, and one is required"
    return [Health(now, problem)] * len(questions)
