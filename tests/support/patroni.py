"""A highly available PostgreSQL: Patroni with etcd and a synchronous standby. HAProxy balances the service's nodes.

Everything listens on free loopback ports and keeps its files in one temporary directory. PostgreSQL refuses to run as
root, so root starts all programs as the user `postgres`, which Debian's package creates.
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
# The leader's key in etcd expires after `ttl` seconds. A failover starts only then, so this is most of an outage.
DYNAMIC = {
    "ttl": 20,
    "loop_wait": 2,
    "retry_timeout": 5,
    "primary_start_timeout": 0,
    "synchronous_mode": True,
    "synchronous_mode_strict": False,
}


def until(condition: Callable[[], bool], description: str, *, seconds: float = 60) -> None:
    """Poll a condition until it holds. Fails with `description` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {description}"
        time.sleep(0.05)


class Programs:
    """Starts programs as a user that PostgreSQL accepts, with their output in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._user = "postgres" if os.geteuid() == 0 else None
        self._change_owner(directory)

    def make_directory(self, name: str) -> Path:
        """Create a directory that belongs to the user of the programs."""
        path = self.directory / name
        path.mkdir(mode=0o700)
        self._change_owner(path)
        return path

    def start(self, name: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        """Start `command`, and append its output to `<name>.log`."""
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

    def _change_owner(self, path: Path) -> None:
        if self._user:
            shutil.chown(path, self._user, self._user)


class Node:
    """A PostgreSQL server and the Patroni that manages it."""

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
                # A killed primary has WAL that its standby never received. Patroni rewinds it when the node returns;
                # if that fails, Patroni recreates the node.
                "use_pg_rewind": True,
                "remove_data_directory_on_rewind_failure": True,
                "remove_data_directory_on_diverged_timelines": True,
            },
        }
        Path(self._command[1]).write_text(json.dumps(configuration, indent=1))  # JSON is also YAML

    @property
    def patroni_exited(self) -> bool:
        """True if Patroni was started and ended by itself."""
        return self._patroni is not None and self._patroni.poll() is not None

    def start(self) -> None:
        """Start Patroni, which starts PostgreSQL as primary or standby."""
        self._patroni = self._programs.start(self.name, self._command)

    def kill(self) -> None:
        """Kill Patroni and PostgreSQL with SIGKILL, as in a power cut."""
        processes = [*self._patroni_processes(), *self.postgresql_processes()]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait(processes)

    def stop(self) -> None:
        """Stop both without leaving shared memory behind. The data is no longer needed."""
        patroni, postgresql = self._patroni_processes(), self.postgresql_processes()
        for process in patroni:  # first, or it would start PostgreSQL again
            process.kill()
        for process in postgresql[:1]:
            process.send_signal(SIGQUIT)
        self._wait([*patroni, *postgresql])

    def postgresql_processes(self) -> list[psutil.Process]:
        """Return the postmaster and its children; empty if it does not run."""
        with suppress(FileNotFoundError, IndexError, ValueError, psutil.Error):
            postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
            if Path(postmaster.cwd()) == self._data:  # else the file is stale
                return [postmaster, *postmaster.children(recursive=True)]
        return []

    def query(self, statement: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement on this node and return its rows. Raises `psycopg.OperationalError` if the node is down."""
        with self.connect(database) as connection:
            return connection.execute(statement.encode()).fetchall()

    def connect(self, database: str = "postgres") -> "psycopg.Connection[tuple[Any, ...]]":
        """Connect as the superuser, in autocommit mode."""
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
        """Return the value of an SQL expression on this node; None if the node is down."""
        with suppress(psycopg.OperationalError):
            return self.query(f"SELECT {expression}")[0][0]
        return None

    @property
    def is_primary(self) -> bool:
        return self.value("pg_is_in_recovery()") is False

    @property
    def has_synchronous_standby(self) -> bool:
        """True if commits wait for a standby and one is connected."""
        return (
            self.value(
                "current_setting('synchronous_standby_names') <> ''"
                " AND EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync')"
            )
            is True
        )

    @property
    def is_asynchronous_primary(self) -> bool:
        """True if this is a primary whose commits wait for no standby."""
        return self.is_primary and self.value("current_setting('synchronous_standby_names')") == ""

    def has_waiting_commit(self, application: str) -> bool:
        """True if a transaction of `application` is durable here and waits for the standby's confirmation."""
        waiting = f"SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = '{application}'"
        return self.value(f"EXISTS ({waiting})") is True

    @property
    def has_sent_all(self) -> bool:
        """True if all durable WAL was sent to the standby."""
        return self.value("pg_current_wal_flush_lsn() <= (SELECT sent_lsn FROM pg_stat_replication)") is True

    @contextmanager
    def wal_receiver_paused(self) -> Iterator[None]:
        """Pause the WAL receiver until the end of the block. Sent WAL remains in the network's buffers."""
        ((receiver,),) = self.query("SELECT pid FROM pg_stat_wal_receiver")
        os.kill(receiver, SIGSTOP)
        try:
            yield
        finally:
            os.kill(receiver, SIGCONT)

    def pause_wal_sender(self) -> None:
        """Pause the WAL sender permanently: the standby receives nothing more. For a node that will be killed."""
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
    """Two nodes: a primary and its synchronous standby."""

    def __init__(self, programs: Programs, *, etcd_port: int) -> None:
        self.nodes = [Node(name, programs, etcd_port=etcd_port) for name in ("one", "two")]

    def url(self, user: str, password: str, database: str) -> str:
        """Return a database URL with both nodes, which connects to the writable one."""
        hosts = "&".join(f"host=127.0.0.1:{node.port}" for node in self.nodes)
        return f"postgresql://{user}:{password}@/{database}?{hosts}&target_session_attrs=read-write"

    @property
    def primary(self) -> Node:
        """The writable node. There must be exactly one."""
        (primary,) = [node for node in self.nodes if node.is_primary]
        return primary

    @property
    def others(self) -> list[Node]:
        """All other nodes."""
        primary = self.primary
        return [node for node in self.nodes if node is not primary]

    def wait_until_synchronous(self) -> None:
        """Wait until a primary has a synchronous standby."""

        def is_synchronous() -> bool:
            assert not any(node.patroni_exited for node in self.nodes)
            return any(node.has_synchronous_standby for node in self.nodes)

        until(is_synchronous, "a synchronous standby", seconds=90)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Run a cluster with a synchronous standby until the end of the block.

    Skips the test if a program is missing; fails in CI.
    """
    etcd = program("etcd")
    program("patroni")
    _postgresql_programs()
    # Not below pytest's directory, which the user `postgres` cannot enter.
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
    """Run an HAProxy that balances requests between the ready nodes of `urls`. Yields its port.

    The response header `X-Node` names the node. It is absent if no node was ready and HAProxy itself answered.
    """
    port = free_port()
    servers = "\n".join(f"    server {name} {url.removeprefix('http://')}" for name, url in urls.items())
    configuration = directory / "haproxy.cfg"
    # HAProxy retries only failed connections, which is its default: a request that was sent may have had an effect.
    no_node_is_ready = """string '{"error": {"code": "unavailable"}}' hdr Retry-After 2"""
    configuration.write_text(f"""\
defaults
    mode http
    timeout connect 1s
    timeout client 30s
    timeout server 10s
    http-error status 503 content-type application/json {no_node_is_ready}
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
    """Return the directory of PostgreSQL's programs. Debian has one for each version."""
    installed = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest_first = sorted(installed, key=lambda path: int(path.parent.parent.name), reverse=True)
    return Path(program(*map(str, newest_first), "postgres")).resolve().parent
