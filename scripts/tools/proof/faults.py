"""The faults during a trial. Their kinds, times, places and durations all depend on the seed."""

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil

from scripts.tools.proof.history import AnyRecord, Fault, Pause, Revocation, Separation
from scripts.tools.proof.node import Node
from scripts.tools.proof.proxy import Proxy
from scripts.tools.proof.store import Store
from sso_service import keyring
from sso_service.keyring import SigningKey

KINDS = {
    "kill-worker": "kill -9 of a worker",
    "kill-node": "kill -9 of all processes of a node at once",
    "kill-database": "kill -9 of PostgreSQL, or of one of its processes",
    "pause-worker": "a worker is paused for a while",
    "pause-node": "a node is paused, as in a live migration, for up to longer than the lifetime of tokens",
    "disk-full": "the database's file system is full",
    "read-only": "the database cannot be written",
    "clock": "a node's clock is set forward or back",
    "connection": "connections of clients are cut between request and answer",
    "network": "the network to PostgreSQL is slow, silent or cut",
    "keys": "keys are rotated and revoked",
    "separation": "a node reads another key directory for a while",
}
"""Every kind of fault."""

_KILLS = ("kill-worker", "kill-node", "kill-database")
_BACKGROUND = ("connection", "keys", "separation")
_CUT_SHARE = 0.004
"""The share of requests through a proxy after which the connection is cut."""


class Faults:
    """Injects faults and repairs them.

    `write` stores their records. `retention` is the number of seconds for which the ledger keeps a consumed token.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        *,
        seed: int,
        store: Store,
        nodes: Sequence[Node],
        client_proxies: Sequence[tuple[Node, Proxy]],
        database_proxies: Sequence[tuple[Node, Proxy]],
        keys: Path,
        ttl: int,
        retention: int,
        pace: float,
        write: Callable[[AnyRecord], None],
    ) -> None:
        self._seed = seed
        self._store = store
        self._nodes = nodes
        self._client_proxies = client_proxies
        self._database_proxies = database_proxies
        self._common = keys
        self._ttl = ttl
        self._retention = retention
        self._pace = pace
        self._write = write
        self._begin = time.monotonic()
        self._separate: dict[str, Path] = {}
        # Two faults of the same kind at once would end each other.
        self._disk = asyncio.Lock()
        self._pausing = {node.name: asyncio.Lock() for node in nodes}
        self.kills = 0
        self.left_out = {kind: why for kind in kinds if (why := self._reason_against(kind))}
        self._kinds = [kind for kind in kinds if kind not in self.left_out]

    def _reason_against(self, kind: str) -> str:
        """Return the reason why this kind of fault is not possible, or the empty string."""
        on_sqlite = self._store.server is None
        if on_sqlite and kind in {"kill-database", "network"}:
            return "SQLite has no server"
        if (kind == "disk-full" or (kind == "read-only" and on_sqlite)) and self._store.volume is None:
            return self._store.no_volume
        return ""

    # --- schedule ---

    async def run(self) -> None:
        """Inject faults until cancelled, and repair whatever is broken then."""
        if "connection" in self._kinds:
            for node, proxy in self._client_proxies:
                proxy.cut_after_request = self._cutter(node, random.Random(f"{self._seed} connection {node.name}"))
        kills = {kind: weight for kind, weight in zip(_KILLS, (8, 1, 1), strict=True) if kind in self._kinds}
        others = {kind: 1 for kind in self._kinds if kind not in _KILLS + _BACKGROUND}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            for name, weights, pause in (
                ("kills", kills, (0.5, 3.5)),
                ("others", others, (0.5, 3.0)),
                ("more", others, (0.5, 6.0)),
                ("keys", {"keys": 1}, (2.0, 7.0)),
                ("separation", {"separation": 1}, (4.0, 12.0)),
            ):
                if weights.keys() & set(self._kinds):
                    group.create_task(self._track(random.Random(f"{self._seed} {name}"), weights, pause))

    async def _track(self, draw: random.Random, weights: dict[str, int], pause: tuple[float, float]) -> None:
        while True:
            await asyncio.sleep(draw.uniform(*pause) * self._pace)
            [kind] = draw.choices(list(weights), list(weights.values()))
            # Each fault has its own generator. The number of values that one fault draws depends on the running
            # processes, and must not affect later faults.
            fault: Callable[[random.Random], Awaitable[None]] = getattr(self, "_" + kind.replace("-", "_"))
            await fault(random.Random(draw.random()))

    async def _watch(self) -> None:
        """Restart nodes and database when they exit, as a service manager would."""
        while True:
            await asyncio.sleep(0.2)
            for node in self._nodes:
                if not node.runs:
                    self._print("fault", "exit", node.name)
                    self._write(Fault(start=time.monotonic(), end=time.monotonic(), kind="exit", node=node.name))
                    node.start()
            server = self._store.server
            if server is not None and not server.runs:
                with suppress(TimeoutError):
                    await asyncio.to_thread(server.start)

    @asynccontextmanager
    async def _fault(self, kind: str, node: str = "", pid: int = 0, what: str = "") -> AsyncIterator[None]:
        start = time.monotonic()
        self._print(kind, node or "all", what)
        try:
            yield
        finally:
            self._write(Fault(start=start, end=time.monotonic(), kind=kind, node=node, pid=pid))

    def _print(self, *words: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s]", *words, flush=True)

    # --- kill -9 ---

    async def _kill_worker(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        if workers := node.workers():
            worker = draw.choice(workers)
            async with self._fault("kill-worker", node.name, worker.pid):
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
                    self.kills += 1

    async def _kill_node(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        async with self._fault("kill-node", node.name):
            node.kill()
            self.kills += 1
            node.start()

    async def _kill_database(self, draw: random.Random) -> None:
        server = self._store.server
        assert server is not None
        backends = server.backends()
        one = draw.random() < 0.4 and backends
        async with self._fault("kill-database", what="one of its processes" if one else ""):
            if one:
                with suppress(psutil.NoSuchProcess):
                    draw.choice(backends).kill()
            else:
                await asyncio.to_thread(server.kill)
            self.kills += 1
            with suppress(TimeoutError):
                await asyncio.to_thread(server.start)

    # --- pauses ---

    async def _pause_worker(self, draw: random.Random) -> None:
        # After five seconds the supervisor considers the worker dead and kills it.
        node, seconds = draw.choice(self._nodes), draw.choice((draw.uniform(0.1, 4.5), draw.uniform(5, 12)))
        if workers := node.workers():
            await self._pause("pause-worker", node, [draw.choice(workers)], seconds)

    async def _pause_node(self, draw: random.Random) -> None:
        longest = self._ttl + 8  # long enough for tokens that it has read to expire, and for their key to be revoked
        node, seconds = draw.choice(self._nodes), draw.choice((draw.uniform(1, 8), draw.uniform(self._ttl, longest)))
        if supervisor := node.supervisor:
            # The supervisor is paused first and resumed last. Otherwise it would replace its workers.
            await self._pause("pause-node", node, [supervisor, *node.workers()], seconds)

    async def _pause(self, kind: str, node: Node, processes: list[psutil.Process], seconds: float) -> None:
        fault = self._fault(kind, node.name, processes[-1].pid, f"{seconds:.1f} s")
        async with self._pausing[node.name], fault:
            starts: dict[psutil.Process, float] = {}
            try:
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        starts[process] = time.monotonic()
                        process.suspend()
                await asyncio.sleep(seconds)
            finally:
                for process in reversed(processes):
                    with suppress(psutil.NoSuchProcess):
                        process.resume()
                    if process in starts:
                        end = time.monotonic()
                        self._write(Pause(start=starts[process], end=end, node=node.name, pid=process.pid))

    # --- the disk ---

    async def _disk_full(self, draw: random.Random) -> None:
        volume = self._store.volume
        assert volume is not None
        async with self._disk, self._fault("disk-full"):
            try:
                await asyncio.to_thread(volume.fill)
                await asyncio.sleep(draw.uniform(1, 4))
            finally:
                volume.free()
            if self._store.server:
                with suppress(TimeoutError):
                    await asyncio.to_thread(self._store.server.start)

    async def _read_only(self, draw: random.Random) -> None:
        seconds, from_the_start = draw.uniform(1, 4), draw.random() < 0.3
        if self._store.server is not None:
            await self._read_only_postgresql(seconds)
        elif from_the_start:
            await self._read_only_from_the_start(seconds)
        else:
            volume, files = self._store.volume, self._store.files
            assert volume is not None
            async with self._disk, self._fault("read-only"):
                try:
                    volume.protect(files, protected=True)
                    await asyncio.sleep(seconds)
                finally:
                    volume.protect(files, protected=False)

    async def _read_only_from_the_start(self, seconds: float) -> None:
        """Start all nodes on a read-only file system, which becomes writable later."""
        volume = self._store.volume
        assert volume is not None
        async with self._disk, self._fault("read-only", what="from the start"):
            for node in self._nodes:
                node.kill()
            try:
                volume.remount(read_only=True)
                for node in self._nodes:
                    node.start()
                await asyncio.sleep(seconds + 2)
            finally:
                volume.remount(read_only=False)

    async def _read_only_postgresql(self, seconds: float) -> None:
        async with self._fault("read-only"):
            try:
                await self._set_on_server("ALTER SYSTEM SET default_transaction_read_only = on")
                await asyncio.sleep(seconds)
            finally:
                await self._set_on_server("ALTER SYSTEM RESET default_transaction_read_only")

    async def _set_on_server(self, statement: str) -> None:
        """Change a setting, if necessary after the server has been started for it."""
        server = self._store.server
        assert server is not None
        while True:
            with suppress(Exception):
                await asyncio.to_thread(server.execute, statement)
                await asyncio.to_thread(server.execute, "SELECT pg_reload_conf()")
                return
            await asyncio.sleep(0.2)

    # --- the clock ---

    async def _clock(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        # Back by more than the ledger keeps tokens: a consumed token that was purged looks valid again. Never as far
        # forward: the floor would rise above all tokens that are issued until that time.
        far = self._retention + self._ttl
        offset = draw.choice(
            (draw.randint(3, self._ttl * 3), -draw.randint(3, self._ttl * 3), -draw.randint(far, far + 60))
        )
        async with self._fault("clock", node.name, what=f"{offset:+d} s"):
            node.set_clock(offset)
            try:
                await asyncio.sleep(draw.uniform(4, 12))
            finally:
                node.set_clock(0)

    # --- the network ---

    def _cutter(self, node: Node, draw: random.Random) -> Callable[[], float | None]:
        def cut() -> float | None:
            if draw.random() >= _CUT_SHARE:
                return None
            now = time.monotonic()
            self._write(Fault(start=now, end=now, kind="connection", node=node.name))
            return draw.choice((0.0, draw.uniform(0, 0.1)))

        return cut

    async def _network(self, draw: random.Random) -> None:
        how, seconds = draw.choice(("slow", "silent", "cut")), draw.uniform(1, 8)
        some = self._database_proxies if draw.random() < 0.3 else [draw.choice(self._database_proxies)]
        node = some[0][0].name if len(some) == 1 else ""
        async with self._fault(f"network-{how}", node, what=f"{seconds:.1f} s"):
            try:
                for _, proxy in some:
                    match how:
                        case "slow":
                            proxy.delay = draw.uniform(0.005, 0.3)
                        case "silent":
                            proxy.silent = True
                        case "cut":
                            proxy.refuses = True
                            proxy.cut()
                await asyncio.sleep(seconds)
            finally:
                for _, proxy in some:
                    proxy.delay, proxy.silent, proxy.refuses = 0.0, False, False

    # --- keys ---

    async def _keys(self, draw: random.Random) -> None:
        """Rotate or revoke a key, in the common directory or in that of a separated node."""
        directory = draw.choice([self._common, *self._separate.values()])
        now = int(time.time())
        if draw.random() < 0.8:
            lead = draw.choice((0, 0, 1, 3))
            keyring.rotate(directory, now=now, lead=lead)
            self._print("keys", _names(self._readers(directory)), f"rotated, to sign in {lead} s")
            return
        entries, _ = keyring.load(directory)
        living = keyring.KeyRing(entries.values()).verifying_keys(now, self._ttl)
        key = living[0] if draw.random() < 0.6 else draw.choice(living)
        keyring.revoke(directory, key.id, now=now)
        self._revoked(key.id, self._readers(directory))

    def _revoked(self, key_id: str, nodes: Sequence[Node]) -> None:
        self._print("keys", _names(nodes), f"revoked {key_id}")
        self._write(Revocation(at=time.monotonic(), key_id=key_id, nodes=tuple(node.name for node in nodes)))

    def _readers(self, directory: Path) -> list[Node]:
        return [node for node in self._nodes if node.keys.resolve() == directory.resolve()]

    async def _separation(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        own = self._common.with_name(f"keys-of-{node.name}-alone")
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(self._common, own)
        start = time.monotonic()
        self._print("separation", node.name)
        node.read_keys_of(own)
        self._separate[node.name] = own
        try:
            await asyncio.sleep(draw.uniform(6, 16))
        finally:
            # Within one turn of the event loop, so that no other task changes a key in between.
            del self._separate[node.name]
            revoked_ids = _synchronise(own, self._common)
            node.read_keys_of(self._common)
            self._write(Separation(start=start, end=time.monotonic(), node=node.name))
            self._print("separation", node.name, "is over")
            for key_id in revoked_ids:
                self._revoked(key_id, [other for other in self._nodes if other is not node])


def _names(nodes: Sequence[Node]) -> str:
    return ",".join(node.name for node in nodes)


def _synchronise(own: Path, common: Path) -> list[str]:
    """Copy the keys and tombstones of `own` to `common`, as a synchronisation would. Return the revoked ids."""
    common_entries, own_entries = keyring.load(common)[0], keyring.load(own)[0]
    revoked_ids = []
    for key_id, entry in own_entries.items():
        revoked = not isinstance(entry, SigningKey)
        if key_id not in common_entries or (revoked and isinstance(common_entries[key_id], SigningKey)):
            copy = common / f".{key_id}.copy"
            shutil.copy(own / f"{key_id}.json", copy)
            copy.replace(common / f"{key_id}.json")
            if revoked:
                revoked_ids.append(key_id)
    return revoked_ids
