"""The database's health, for `/readyz` and before `serve` starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, String, func, literal, select
from sqlalchemy.sql import column, table

from sso_service.database.group_commit import GroupCommit
from sso_service.database.ledger import FLOOR, floor_at
from sso_service.database.schema import SCHEMA_VERSION
from sso_service.database.transactions import Database

_alembic_version = table("alembic_version", column("version_num", String))


@dataclass(frozen=True, slots=True)
class Health:
    """The database's time (Unix seconds) and its problem in words, empty if there is none."""

    now: int
    problem: str


class HealthChecks(GroupCommit[None, Health]):
    """Checks the database's health. One query serves all requests that arrive together."""

    kind = "health"
    transaction = "reading"

    def run_batch(self, connection: Connection, ops: Sequence[None]) -> list[Health]:
        return [check_health(self.database, connection)] * len(ops)


def check_health(database: Database, connection: Connection) -> Health:
    """Return the database's time and its most important problem."""
    fsync = literal("on") if database.is_sqlite else func.current_setting("fsync")
    version = select(_alembic_version.c.version_num).scalar_subquery()
    required = database.require_sync_standby and not database.is_sqlite
    standby = func.current_setting("synchronous_standby_names") if required else literal("not required")
    question = select(database.now(), version, fsync, FLOOR.scalar_subquery(), standby)
    now, revision, flushed, lowest, standbys = connection.execute(question).one()
    problem = ""
    if revision != SCHEMA_VERSION:
        problem = f"the schema is {revision}, this version needs {SCHEMA_VERSION}"
    elif flushed != "on":
        problem = "fsync is off: after a power cut used tokens could be accepted again"
    elif lowest is None or bytes(lowest) > floor_at(now):
        problem = "new tokens are below the purge floor: the database's clock was ahead at some time"
    elif not standbys:
        problem = "there is no synchronous standby, and one is required"
    return Health(now, problem)
