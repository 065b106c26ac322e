"""Fixtures of the tests of commands."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, text

from sso_service import keyring
from sso_service.database.directory import ProvisionRequest, provision
from sso_service.database.transactions import Database
from sso_service.keyring import SigningKey
from sso_service.server import supervisor
from tests.support.clock import Clock
from tests.support.command_line import EMAIL
from tests.support.data import ACCOUNT, JANE
from tests.support.databases import Query, changing
from tests.support.token_maker import TokenMaker


@pytest.fixture
def env(database_url: str, tmp_path: Path) -> dict[str, str]:
    """The settings of an operator. The database contains the accounts of `tests.support.data`."""
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}


@pytest.fixture
def sqlite_env(sqlite_template: Path, tmp_path: Path) -> dict[str, str]:
    """The same on SQLite, for tests that do not depend on the kind of database."""
    (tmp_path / "sso.db").write_bytes(sqlite_template.read_bytes())
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": "sqlite:///sso.db"}


@pytest.fixture
def query(database: Database) -> Query:
    """A function that returns the rows of a statement in the database of `env`."""

    def rows(statement: str) -> Sequence[Row[Any]]:
        with database.connect() as connection:
            return connection.execute(text(statement)).all()

    return rows


@pytest.fixture
def jane(database: Database) -> int:
    """The id of a user, an editor of `ACCOUNT`."""
    person = ProvisionRequest(EMAIL, JANE["first_name"], JANE["last_name"], ACCOUNT, int(time.time()))
    with changing(database) as connection:
        return provision(database, connection, [person])[0].user_id


@pytest.fixture
def maker(env: dict[str, str], database: Database, keys_dir: Path, jane: int, clock: Clock) -> TokenMaker:
    """Makes login tokens for `jane`."""
    [key] = keyring.load(keys_dir)[0].values()
    assert isinstance(key, SigningKey)
    return TokenMaker(env, database, keys_dir, key, jane, int(clock()))


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a command starts a server in this process."""

    def run_server(*_: object, **__: object) -> None:
        raise AssertionError("the command started a server")

    monkeypatch.setattr(supervisor, "run", run_server)
