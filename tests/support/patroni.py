"""PostgreSQL as it is run where nobody may lose a login: Patroni with etcd, a synchronous standby, HAProxy in front.

Everything listens on free ports of the loopback and lives in one temporary directory. PostgreSQL refuses to run as
root, so for root it all runs as the user `postgres`, whom Debian's package made.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGQUIT, SIGSTOP
from typing import Any

import psutil
import psycopg

from scripts.tools.ports import free_port
from tests.support.processes import wait_for_port
from tests.support.programs import program

SUPERUSER = {"username": "postgres", "password": "superuser"}
REPLICATION = {"username": "replicator", "password": "replicator"}
# The leader's key lives for `ttl` seconds: that is how long a dead primary is waited for, and most of an outage.
DYNAMIC = {
    "ttl": 20,
    "loop_wait": 2,
    "retry_timeout": 5,
    "primary_start_timeout": 0,
    "synchronous_mode": True,
    "synchronous_mode_strict": False,
}


def until(condition: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
    """Returns as soon as something holds that nobody announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Programs:
    """Starts programs as somebody whom PostgreSQL accepts, with their output in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._user = "postgres" if os.geteuid() == 0 else None
        self._give(directory)

    def make_directory(self, name: str) -> Path:
        """A new directory that belongs to the programs."""
        path = self.directory / name
        path.mkdir(mode=0o700)
        self._give(path)
        return path

    def start(self, name: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        """The process of `command`; what it says is appended to `<name>.log`."""
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "HOME": str(self.directory)},
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
            )

    def _give(self, path: Path) -> None:
        if self._user:
            shutil.chown(path, self._user, self._user)


class Node:
    """One PostgreSQL and the Patroni that looks after it."""

    def __init__(self, name: str, programs: Programs, *, etcd_port: int) -> None:
        self.name = name
        self.port = free_port()
        self._programs = programs
        self._patroni: subprocess.Popen[bytes] | None = None
        self._command = [program("patroni"), str(programs.directory / f"{name}.json")]
        home = programs.make_directory(name)
        self._data = home / "data"
        address = f"127.0.0.1:{self.port}"
        api = f"127.0.0.1:{free_port()}"
        configuration = {
            "scope": "sso",
            "name": name,
            "restapi": {"listen": api, "connect_address": api},
            "etcd3": {"host": f"127.0.0.1:{etcd_port}"},
            "bootstrap": {"dcs": DYNAMIC, "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"]},
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(self._data),
                "bin_dir": str(_postgresql_programs()),
                "pgpass": str(home / "pgpass"),
                "authentication": {"superuser": SUPERUSER, "replication": REPLICATION},
                "parameters": {"unix_socket_directories": str(home), "shared_buffers": "64MB"},
                "pg_hba": [
                    "local all all trust",
                    "host all all 127.0.0.1/32 scram-sha-256",
                    "host replication replicator 127.0.0.1/32 scram-sha-256",
                ],
                "basebackup": [{"checkpoint": "fast"}],
                # A primary that was killed has written what its standby never got. That is undone when it comes back;
                # if it cannot be, the node is made anew.
                "use_pg_rewind": True,
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }
        Path(self._command[1]).write_text(json.dumps(configuration, indent=1))  # which is YAML too

    @property
    def has_given_up(self) -> bool:
        """Whether Patroni was started, and ended by itself."""
        return self._patroni is not None and self._patroni.poll() is not None

    def start(self) -> None:
        """Starts Patroni, which starts PostgreSQL as what it has to be."""
        self._patroni = self._programs.start(self.name, self._command)

    def kill(self) -> None:
        """Ends Patroni and PostgreSQL between two instructions, as a power cut would."""
        victims = [*self._patroni_processes(), *self.postgresql_processes()]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        self._wait(victims)

    def stop(self) -> None:
        """Ends both without a trace in shared memory. The data is not needed any more."""
        patroni, postgresql = self._patroni_processes(), self.postgresql_processes()
        for process in patroni:  # first, or it would start PostgreSQL again
            process.kill()
        for process in postgresql[:1]:
            process.send_signal(SIGQUIT)
        self._wait([*patroni, *postgresql])

    def postgresql_processes(self) -> list[psutil.Process]:
        """The postmaster and its children; empty if there is none."""
        with suppress(FileNotFoundError, IndexError, ValueError, psutil.Error):
            postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
            if Path(postmaster.cwd()) == self._data:  # else the file outlived it, and its number is somebody else's now
                return [postmaster, *postmaster.children(recursive=True)]
        return []

    def query(self, statement: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """The rows of a statement here, whatever this node is. Raises `psycopg.OperationalError` if it is not up."""
        with self.connect(database) as connection:
            return connection.execute(statement.encode()).fetchall()

    def connect(self, database: str = "postgres") -> "psycopg.Connection[tuple[Any, ...]]":
        """A connection of the superuser, in autocommit mode."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            dbname=database,
            user=SUPERUSER["username"],
            password=SUPERUSER["password"],
            connect_timeout=2,
            autocommit=True,
        )

    def value(self, expression: str) -> Any:
        """What an SQL expression is here; None if the node is not up."""
        with suppress(psycopg.OperationalError):
            return self.query(f"SELECT {expression}")[0][0]
        return None

    @property
    def is_primary(self) -> bool:
        return self.value("pg_is_in_recovery()") is False

    @property
    def has_synchronous_standby(self) -> bool:
        """Whether commits wait for a standby, and one is there that they can wait for."""
        return (
            self.value(
                "current_setting('synchronous_standby_names') <> ''"
                " AND EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')"
            )
            is True
        )

    @property
    def is_alone(self) -> bool:
        """Whether it is a primary whose commits wait for nobody."""
        return self.is_primary and self.value("current_setting('synchronous_standby_names')") == ""

    def has_waiting_commit(self, application: str) -> bool:
        """Whether a transaction of that application is durable here and waits for the standby's word."""
        waiting = f"SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = '{application}'"
        return self.value(f"EXISTS ({waiting})") is True

    @property
    def has_sent_all(self) -> bool:
        """Whether all that is durable here is on its way to the standby."""
        return self.value("pg_current_wal_flush_lsn() <= (SELECT sent_lsn FROM pg_stat_replication)") is True

    @contextmanager
    def receiving_nothing(self) -> Iterator[None]:
        """What the primary sends is left lying in the network until the end of the block."""
        ((receiver,),) = self.query("SELECT pid FROM pg_stat_wal_receiver")
        os.kill(receiver, SIGSTOP)
        try:
            yield
        finally:
            os.kill(receiver, SIGCONT)

    def stop_sending(self) -> None:
        """From here on the standby is sent nothing. For a node that is going to be killed."""
        ((sender,),) = self.query("SELECT pid FROM pg_stat_replication")
        os.kill(sender, SIGSTOP)

    def _patroni_processes(self) -> list[psutil.Process]:
        if self._patroni is None or self._patroni.poll() is not None:
            return []
        patroni = psutil.Process(self._patroni.pid)
        return [patroni, *patroni.children(recursive=True)]

    def _wait(self, processes: Sequence[psutil.Process]) -> None:
        if self._patroni is not None:
            self._patroni.wait(10)
            self._patroni = None
        psutil.wait_procs(processes, timeout=10)


class Cluster:
    """Two nodes, one of them the primary, the other its synchronous standby."""

    def __init__(self, programs: Programs, *, etcd_port: int) -> None:
        self.nodes = [Node(name, programs, etcd_port=etcd_port) for name in ("one", "two")]

    def url(self, user: str, password: str, database: str) -> str:
        """The URL of a database that names both nodes and takes the one that can write."""
        hosts = "&".join(f"host=127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://{user}:{password}@/{database}?{hosts}&target_session_attrs=read-write"

    @property
    def primary(self) -> Node:
        """The node that can write. There must be one."""
        (primary,) = [node for node in self.nodes if node.is_primary]
        return primary

    @property
    def others(self) -> list[Node]:
        """All nodes that cannot."""
        primary = self.primary
        return [node for node in self.nodes if node is not primary]

    def wait_until_synchronous(self) -> None:
        """Returns when there is a primary that waits for a standby."""

        def is_so() -> bool:
            assert not any(node.has_given_up for node in self.nodes)
            return any(node.has_synchronous_standby for node in self.nodes)

        until(is_so, "a synchronous standby", seconds=90)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster with a synchronous standby, until the end of the block.

    Skips the test if a program is missing; in CI fails it.
    """
    etcd = program("etcd")
    program("patroni")
    _postgresql_programs()
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory() as directory:
        programs = Programs(Path(directory).resolve())
        etcd_port = free_port()
        client, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{free_port()}"
        store = programs.start(
            "etcd",
            [
                *(etcd, "--name=sso", f"--data-dir={programs.make_directory('etcd')}"),
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                f"--initial-cluster=sso={peer}",
            ],
        )
        cluster = Cluster(programs, etcd_port=etcd_port)
        try:
            for node in cluster.nodes:
                node.start()
            cluster.wait_until_synchronous()
            yield cluster
        except BaseException:
            for log in sorted(programs.directory.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")
            raise
        finally:
            for node in cluster.nodes:
                node.stop()
            store.kill()
            store.wait()


@contextmanager
def balancing(urls: Mapping[str, str], directory: Path) -> Iterator[int]:
    """The port of an HAProxy that gives each request to the next ready one of the named services.

    The answer says in `X-Node` which one that was; without it HAProxy answered, since none was ready.
    """
    port = free_port()
    servers = "\n".join(f"    server {name} {url.removeprefix('http://')}" for name, url in urls.items())
    configuration = directory / "haproxy.cfg"
    # It tries again only where it got no connection, which is its default: what was sent may have been done.
    nobody_is_ready = """string '{"error": {"code": "unavailable"}}' hdr Retry-After 2"""
    configuration.write_text(f"""\
defaults
    mode http
    timeout connect 1s
    timeout client 30s
    timeout server 10s
    http-error status 503 content-type application/json {nobody_is_ready}
listen sso
    bind 127.0.0.1:{port}
    balance roundrobin
    option httpchk
    http-check send meth GET uri /readyz
    http-check expect status 200
    http-response set-header X-Node %[srv_name]
    default-server check inter 500ms fall 2 rise 1
{servers}
""")
    process = subprocess.Popen([program("haproxy"), "-db", "-q", "-f", str(configuration)])
    try:
        wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _postgresql_programs() -> Path:
    """The directory of PostgreSQL's programs: Debian keeps each version in one of its own."""
    installed = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest_first = sorted(installed, key=lambda path: int(path.parent.parent.name), reverse=True)
    return Path(program(*map(str, newest_first), "postgres")).resolve().parent
