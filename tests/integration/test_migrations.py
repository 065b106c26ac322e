"""Migrations: they create exactly the schema that the code declares, and run safely several times or concurrently."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import ColumnClause, Connection, column, inspect, make_url, select, text
from sqlalchemy import table as sql_table
from sqlalchemy.engine import Inspector

from sso_service.database import database_at, migrations
from sso_service.database.schema import SCHEMA_VERSION, consumed_floor, metadata
from sso_service.database.transactions import Database
from sso_service.errors import SchemaMismatch
from tests.support.processes import command


@pytest.fixture
def empty(database: Database) -> Database:
    """An empty database."""
    wipe(database)
    return database


def wipe(database: Database) -> None:
    with database.connect() as connection, database.writing(connection):
        metadata.drop_all(connection)
        connection.exec_driver_sql("DROP TABLE alembic_version")


def set_revision(database: Database, revision: str) -> None:
    with database.connect() as connection, database.writing(connection):
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def revisions(database: Database) -> list[str]:
    with database.connect() as connection:
        return list(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())


def upgrade_to(database: Database, revision: str) -> None:
    """Create the schema of an older version of this service in an empty database."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.connect() as connection, database.writing(connection):
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, revision)


def contents(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """The content of the columns of the first schema."""
    new = {
        metadata.tables["memberships"].c.sessions_from,
        metadata.tables["users"].c.sessions_from,
        metadata.tables["users"].c.search,
        metadata.tables["api_tokens"].c.created_by,
        metadata.tables["api_tokens"].c.expiry_logged_at,
    }
    with database.connect() as connection, database.reading(connection):
        return {
            table.name: [
                tuple(row)
                for row in connection.execute(
                    select(*(column for column in table.c if column not in new)).order_by(*table.primary_key)
                )
            ]
            for table in metadata.sorted_tables
        }


def indexes(database: Database, table: str) -> set[str | None]:
    with database.connect() as connection:
        return {index["name"] for index in inspect(connection).get_indexes(table)}


def test_the_migrations_create_the_tables_that_the_code_declares(empty: Database) -> None:
    assert migrations.upgrade(empty) is None
    with empty.connect() as connection:
        # SQLite has no identity columns, which Alembic reports as a difference in defaults.
        options = {"compare_server_default": not empty.is_sqlite, "target_metadata": metadata}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []


def test_the_migrations_create_the_constraints_that_the_code_declares(database: Database) -> None:
    """Alembic's comparison omits check constraints, identities and SQLite's table options."""
    with database.connect() as connection:
        migrated = _described(connection)
    wipe(database)
    with database.connect() as connection, database.writing(connection):
        metadata.create_all(connection)
    with database.connect() as connection:
        created = _described(connection)
    for table in metadata.tables:
        assert migrated[table] == created[table]


def _described(connection: Connection) -> dict[str, Any]:
    found: Inspector = inspect(connection)
    described: dict[str, Any] = {}
    for table in metadata.tables:
        described[table] = [
            [{name: str(value) for name, value in column.items()} for column in found.get_columns(table)],
            sorted(map(str, found.get_check_constraints(table))),
            sorted(map(str, found.get_foreign_keys(table))),
            sorted(map(str, found.get_unique_constraints(table))),
            # The condition of a partial index is an object.
            sorted(
                str({**index, "dialect_options": str({k: str(v) for k, v in index["dialect_options"].items()})})
                for index in found.get_indexes(table)
            ),
            str(found.get_pk_constraint(table)),
        ]
        if connection.dialect.name == "sqlite":
            query = text("SELECT sql FROM sqlite_schema WHERE name = :table")
            sql = str(connection.execute(query, {"table": table}).scalar_one()).upper()
            described[table].append(("WITHOUT ROWID" in sql, "AUTOINCREMENT" in sql))
    return described


def test_the_expected_schema_version_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_VERSION]


def test_the_floor_of_a_new_ledger_is_zero(empty: Database) -> None:
    migrations.upgrade(empty)
    with empty.connect() as connection:
        assert [bytes(row) for row in connection.execute(select(consumed_floor.c.claims)).scalars()] == [bytes(16)]


def test_a_repeated_upgrade_changes_nothing(empty: Database) -> None:
    assert migrations.current(empty) is None
    assert migrations.upgrade(empty) is None
    with empty.connect() as connection, empty.writing(connection):
        connection.execute(consumed_floor.update().values(claims=b"\x01" * 16))
    assert migrations.upgrade(empty) == SCHEMA_VERSION
    assert migrations.current(empty) == SCHEMA_VERSION
    assert revisions(empty) == [SCHEMA_VERSION]
    with empty.connect() as connection:
        assert bytes(connection.execute(select(consumed_floor.c.claims)).scalar_one()) == b"\x01" * 16


def test_an_upgrade_from_the_first_schema_keeps_all_data(empty: Database) -> None:
    upgrade_to(empty, "0001")
    assert migrations.current(empty) == "0001"
    with pytest.raises(SchemaMismatch, match=f"has schema 0001, this version needs {SCHEMA_VERSION}"):
        migrations.check(empty)
    assert "ix_memberships_account_id" not in indexes(empty, "memberships")
    rows: dict[str, list[dict[str, object]]] = {
        "accounts": [
            {"id": 1, "name": "One", "portal_url": None},
            {"id": 2**32 - 1, "name": "Last", "portal_url": "x"},
        ],
        "teams": [{"id": 42, "account_id": 1, "name": "Team"}],
        "users": [
            {
                "email": f"{n}@example.com",
                "first_name": "J\u00f6rg",
                "last_name": "D",
                "created_at": n,
                "disabled_at": n or None,
            }
            for n in range(3)
        ],
        "memberships": [
            {"user_id": 1, "account_id": 1, "role": "admin"},
            {"user_id": 1, "account_id": 2**32 - 1, "role": "editor"},
            {"user_id": 3, "account_id": 1, "role": "publisher"},
        ],
        "api_tokens": [
            {"account_id": 1, "name": "n", "digest": "d" * 64, "hint": "abcd", "scopes": "write:sso", "created_at": 1},
        ],
        "consumed_nonces": [{"claims": bytes([n]) * 16} for n in range(5)],
    }
    with empty.connect() as connection, empty.writing(connection):
        for table, values in rows.items():
            present: list[ColumnClause[Any]] = [column(name) for name in values[0]]
            connection.execute(sql_table(table, *present).insert(), values)
        connection.execute(consumed_floor.update().values(claims=b"\x01" * 16))
    before = contents(empty)
    assert [len(before[table]) for table in rows] == [2, 1, 3, 3, 1, 5]

    assert migrations.upgrade(empty) == "0001"
    migrations.check(empty)
    assert contents(empty) == before
    assert "ix_memberships_account_id" in indexes(empty, "memberships")
    with empty.connect() as connection:
        columns = (metadata.tables["users"].c[name] for name in ("search", "sessions_from"))
        assert [tuple(row) for row in connection.execute(select(*columns).order_by("sessions_from"))] == [
            (f"d j\u00f6rg d {n}@example.com", n) for n in range(3)
        ]
    with empty.connect() as connection, empty.writing(connection):
        added = metadata.tables["users"].insert().returning(metadata.tables["users"].c.id)
        person = {"email": "new@example.com", "first_name": "N", "last_name": "N", "created_at": 9}
        assert connection.execute(added, person).scalar_one() == 4, "ids continue after the upgrade"


def test_concurrent_upgrades_run_the_migrations_once(empty: Database) -> None:
    databases = [database_at(empty.url) for _ in range(4)]
    barrier = Barrier(4)

    def upgrade(database: Database) -> str | None:
        barrier.wait(10)
        return migrations.upgrade(database)

    with ThreadPoolExecutor() as threads:
        before = list(threads.map(upgrade, databases))
    assert sorted(before, key=str) == [SCHEMA_VERSION] * 3 + [None]
    assert revisions(empty) == [SCHEMA_VERSION]
    for database in databases:
        database.close()


@pytest.mark.slow
def test_concurrent_init_commands_all_succeed(empty: Database, tmp_path: Path) -> None:
    url = empty.url.render_as_string(hide_password=False)
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": url.replace("+psycopg", "")}
    with ThreadPoolExecutor() as threads:
        futures = [threads.submit(command, "init", env=env) for _ in range(2)]
        results = [future.result() for future in futures]
    assert [result.returncode for result in results] == [0, 0], results
    assert revisions(empty) == [SCHEMA_VERSION]


def test_a_failed_upgrade_leaves_nothing_behind(empty: Database) -> None:
    with empty.connect() as connection, empty.writing(connection):
        connection.exec_driver_sql("CREATE TABLE consumed_floor (other INTEGER)")  # conflicts with the last step
    with pytest.raises(Exception, match="consumed_floor"):
        migrations.upgrade(empty)
    with empty.connect() as connection:
        assert inspect(connection).get_table_names() == ["consumed_floor"]


def test_an_empty_database_is_reported_with_the_init_command(database: Database) -> None:
    migrations.check(database)
    wipe(database)
    with pytest.raises(SchemaMismatch, match="is empty; run: sso-service init"):
        migrations.check(database)


def test_a_schema_of_another_version_is_reported_with_the_remedy(database: Database) -> None:
    set_revision(database, "0000")
    with pytest.raises(
        SchemaMismatch, match=f"has schema 0000, this version needs {SCHEMA_VERSION}; run: .*db upgrade"
    ):
        migrations.check(database)


def test_an_unknown_schema_version_is_not_upgraded(database: Database) -> None:
    set_revision(database, "9999")
    with pytest.raises(SchemaMismatch, match="9999"):
        migrations.upgrade(database)
    assert revisions(database) == ["9999"]


def test_error_messages_do_not_contain_the_database_password(database: Database) -> None:
    secret = database_at(make_url("postgresql+psycopg://user:hunter2@127.0.0.1:1/sso"))
    assert "hunter2" not in str(secret)
    with pytest.raises(Exception, match="cannot connect") as caught:
        migrations.check(secret)
    assert "hunter2" not in str(caught.value)
    secret.close()
