"""Copying a database keeps all users, API tokens and consumed login tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import insert, make_url, select, update

from sso_service.database import copying, migrations, open_database
from sso_service.database.directory import ProvisionRequest, provision
from sso_service.database.ledger import floor_at
from sso_service.database.schema import consumed_floor, consumed_nonces, metadata
from sso_service.database.transactions import Database
from sso_service.errors import Conflict, SchemaMismatch
from sso_service.permissions import Role, Scope
from sso_service.settings import read_settings
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.command_line import run
from tests.support.data import ACCOUNT, OTHER_ACCOUNT

PEOPLE = 2500


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database without a schema."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'new.db'}"
    else:
        server: str = request.getfixturevalue("postgresql")
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS copied WITH (FORCE)")
            connection.execute("CREATE DATABASE copied")
        url = make_url(server).set(database="copied").render_as_string(hide_password=False)
    database = open_database(read_settings({"SSO_DATABASE_URL": url}))
    yield database
    database.close()


@pytest.fixture
def populated(database: Database) -> Database:
    """A database with rows in every table, and more of them than one copied batch holds."""
    people = [ProvisionRequest(f"p{n}@example.com", "Pé", f"N°{n}", ACCOUNT, 1_900_000_000) for n in range(PEOPLE)]
    with database.connect() as connection, database.writing(connection):
        provision(database, connection, people)
        administration.set_role(connection, "p7@example.com", ACCOUNT, Role.ADMIN)
        administration.disable_user(connection, "p8@example.com", now=1_900_000_001)
        administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="Intranet", scopes=frozenset(Scope), now=1, expires_at=2**40
        )
        used = [{"claims": Claims(2_000_000_000 + n, n, 1, n).pack()} for n in range(PEOPLE)]
        connection.execute(insert(consumed_nonces), used)
        connection.execute(update(consumed_floor).values(claims=floor_at(1_999_999_999)))
    return database


def contents(database: Database) -> dict[str, list[Any]]:
    with database.connect() as connection, database.reading(connection):
        return {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=str)
            for table in metadata.sorted_tables
        }


def test_a_copy_contains_every_row_of_every_table(populated: Database, target: Database) -> None:
    copied = copying.copy(populated, target)
    before, after = contents(populated), contents(target)
    assert after == before
    assert copied == {name: len(rows) for name, rows in after.items()}
    assert min(copied.values()) > 0


def test_a_copy_does_not_reuse_ids_for_new_users(populated: Database, target: Database) -> None:
    copying.copy(populated, target)
    last = max(row[0] for row in contents(target)["users"])
    with target.connect() as connection, target.writing(connection):
        person = ProvisionRequest("new@example.com", "New", "Person", ACCOUNT, 1)
        assert provision(target, connection, [person])[0].user_id > last
        administration.create_api_token(connection, account_id=ACCOUNT, name="n", scopes=frozenset(Scope), now=1)


def test_a_database_with_content_is_not_overwritten(populated: Database, target: Database) -> None:
    migrations.upgrade(target)
    with target.connect() as connection, target.writing(connection):
        administration.add_account(connection, "Existing", account_id=5)
    before = contents(target)
    with pytest.raises(Conflict, match=r"accounts .* is not empty"):
        copying.copy(populated, target)
    assert contents(target) == before


def test_a_source_without_the_expected_schema_is_refused(target: Database, tmp_path: Path) -> None:
    empty = open_database(read_settings({"SSO_DATABASE_URL": f"sqlite:///{tmp_path / 'empty.db'}"}))
    with pytest.raises(SchemaMismatch):
        copying.copy(empty, target)
    empty.close()


def test_the_copy_command_reports_its_results_and_the_next_steps(
    populated: Database, target: Database, tmp_path: Path
) -> None:
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": populated.url.render_as_string(hide_password=False)}
    done = run("db", "copy", "--to", target.url.render_as_string(hide_password=False), env=env)
    assert done.code == 0, done.err
    assert f"users: {PEOPLE}" in done.out
    assert "keys revoke --all" in done.out
    assert contents(target) == contents(populated)
    again = run("db", "copy", "--to", target.url.render_as_string(hide_password=False), env=env)
    assert (again.code, again.err.count("\n")) == (1, 1)
