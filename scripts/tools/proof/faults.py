"""What goes wrong during a trial, all of it drawn from the seed: what, when, where, and for how long."""

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
    "kill-node": "kill -9 of a node's processes, all at once",
    "kill-database": "kill -9 of PostgreSQL, or of one of its processes",
    "pause-worker": "a worker is stopped for a while",
    "pause-node": "a node is stopped, as in a move to another machine, for up to longer than tokens live",
    "disk-full": "the database's file system is full",
    "read-only": "nothing can be written to the database",
    "clock": "a node's clock is set forward or back",
    "connection": "connections of clients are cut between request and answer",
    "network": "the network to PostgreSQL is slow, silent or cut",
    "keys": "keys are rotated and revoked",
    "separation": "a node reads another key directory for a while",
}
"""What there is."""

_KILLS = ("kill-worker", "kill-node", "kill-database")
_BACKGROUND = ("connection", "keys", "separation")
_BY_THE_WAY = 0.004
"""The share of requests through a proxy whose connection is cut."""


class Faults:
    """Breaks and mends. `write` takes the records of it; `retention` is how long the ledger remembers (seconds)."""

    def __init__(
        self,
        kinds: Sequence[str],
        *,
        seed: int,
        store: Store,
        nodes: Sequence[Node],
        doors: Sequence[tuple[Node, Proxy]],
        networks: Sequence[tuple[Node, Proxy]],
        keys: Path,
        ttl: int,
        retention: int,
        pace: float,
        write: Callable[[AnyRecord], None],
    ) -> None:
        self._seed = seed
        self._store = store
        self._nodes = nodes
        self._doors = doors
        self._networks = networks
        self._common = keys
        self._ttl = ttl
        self._retention = retention
        self._pace = pace
        self._write = write
        self._begin = time.monotonic()
        self._separate: dict[str, Path] = {}
        # Two of a kind at once would mend each other.
        self._disk = asyncio.Lock()
        self._standstill = {node.name: asyncio.Lock() for node in nodes}
        self.kills = 0
        self.left_out = {kind: why for kind in kinds if (why := self._impossible(kind))}
        self._kinds = [kind for kind in kinds if kind not in self.left_out]

    def _impossible(self, kind: str) -> str:
        """Why a fault cannot be, or the empty string."""
        on_sqlite = self._store.server is None
        if on_sqlite and kind in {"kill-database", "network"}:
            return "SQLite has no server"
        if (kind == "disk-full" or (kind == "read-only" and on_sqlite)) and self._store.volume is None:
            return self._store.no_volume
        return ""

    # --- when ---

    async def run(self) -> None:
        """Breaks things until it is cancelled; what is broken then is mended."""
        if "connection" in self._kinds:
            for node, proxy in self._doors:
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
            # A generator of its own for each, so that what one draws, which depends on the processes that there are,
            # changes nothing about what comes after.
            fault: Callable[[random.Random], Awaitable[None]] = getattr(self, "_" + kind.replace("-", "_"))
            await fault(random.Random(draw.random()))

    async def _watch(self) -> None:
        """Starts again what ended: nodes and database are services that their machine looks after."""
        while True:
            await asyncio.sleep(0.2)
            for node in self._nodes:
                if not node.runs:
                    self._say("fault", "exit", node.name)
                    self._write(Fault(start=time.monotonic(), end=time.monotonic(), kind="exit", node=node.name))
                    node.start()
            server = self._store.server
            if server is not None and not server.runs:
                with suppress(TimeoutError):
                    await asyncio.to_thread(server.start)

    @asynccontextmanager
    async def _fault(self, kind: str, node: str = "", pid: int = 0, what: str = "") -> AsyncIterator[None]:
        start = time.monotonic()
        self._say(kind, node or "all", what)
        try:
            yield
        finally:
            self._write(Fault(start=start, end=time.monotonic(), kind=kind, node=node, pid=pid))

    def _say(self, *words: str) -> None:
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

    # --- a process stands still ---

    async def _pause_worker(self, draw: random.Random) -> None:
        # After five seconds its supervisor takes it for dead, and kills it.
        node, seconds = draw.choice(self._nodes), draw.choice((draw.uniform(0.1, 4.5), draw.uniform(5, 12)))
        if workers := node.workers():
            await self._pause("pause-worker", node, [draw.choice(workers)], seconds)

    async def _pause_node(self, draw: random.Random) -> None:
        longest = self._ttl + 8  # as long as it takes for what it has read to expire, and for its key to be revoked
        node, seconds = draw.choice(self._nodes), draw.choice((draw.uniform(1, 8), draw.uniform(self._ttl, longest)))
        if supervisor := node.supervisor:
            # The supervisor is the first to stand still and the last to go on, or it would miss its workers.
            await self._pause("pause-node", node, [supervisor, *node.workers()], seconds)

    async def _pause(self, kind: str, node: Node, processes: list[psutil.Process], seconds: float) -> None:
        stands_still = self._fault(kind, node.name, processes[-1].pid, f"{seconds:.1f} s")
        async with self._standstill[node.name], stands_still:
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
        seconds, thorough = draw.uniform(1, 4), draw.random() < 0.3
        if self._store.server is not None:
            await self._read_only_postgresql(seconds)
        elif thorough:
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
        """All nodes are started on a file system that becomes writable only later."""
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
                await self._tell_server("ALTER SYSTEM SET default_transaction_read_only = on")
                await asyncio.sleep(seconds)
            finally:
                await self._tell_server("ALTER SYSTEM RESET default_transaction_read_only")

    async def _tell_server(self, statement: str) -> None:
        """Changes a setting; also if the server has to be started for it first."""
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
        # Back further than the ledger remembers: what was used, and is forgotten, looks good again. Never that far
        # forward, since the floor would be raised over all that is issued until that time comes.
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
            if draw.random() >= _BY_THE_WAY:
                return None
            now = time.monotonic()
            self._write(Fault(start=now, end=now, kind="connection", node=node.name))
            return draw.choice((0.0, draw.uniform(0, 0.1)))

        return cut

    async def _network(self, draw: random.Random) -> None:
        how, seconds = draw.choice(("slow", "silent", "cut")), draw.uniform(1, 8)
        some = self._networks if draw.random() < 0.3 else [draw.choice(self._networks)]
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
        """A key is rotated or revoked, in the directory of all or in that of a node that is separated."""
        directory = draw.choice([self._common, *self._separate.values()])
        now = int(time.time())
        if draw.random() < 0.8:
            lead = draw.choice((0, 0, 1, 3))
            keyring.rotate(directory, now=now, lead=lead)
            self._say("keys", _names(self._readers(directory)), f"rotated, to sign in {lead} s")
            return
        entries, _ = keyring.load(directory)
        living = keyring.KeyRing(entries.values()).verifying_keys(now, self._ttl)
        key = living[0] if draw.random() < 0.6 else draw.choice(living)
        keyring.revoke(directory, key.id, now=now)
        self._revoked(key.id, self._readers(directory))

    def _revoked(self, key_id: str, nodes: Sequence[Node]) -> None:
        self._say("keys", _names(nodes), f"revoked {key_id}")
        self._write(Revocation(at=time.monotonic(), key_id=key_id, nodes=tuple(node.name for node in nodes)))

    def _readers(self, directory: Path) -> list[Node]:
        return [node for node in self._nodes if node.keys.resolve() == directory.resolve()]

    async def _separation(self, draw: random.Random) -> None:
        node = draw.choice(self._nodes)
        own = self._common.with_name(f"keys-of-{node.name}-alone")
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(self._common, own)
        start = time.monotonic()
        self._say("separation", node.name)
        node.read_keys_of(own)
        self._separate[node.name] = own
        try:
            await asyncio.sleep(draw.uniform(6, 16))
        finally:
            # In one turn of the loop, so that no key changes meanwhile.
            del self._separate[node.name]
            buried = _bring_together(own, self._common)
            node.read_keys_of(self._common)
            self._write(Separation(start=start, end=time.monotonic(), node=node.name))
            self._say("separation", node.name, "is over")
            for key_id in buried:
                self._revoked(key_id, [other for other in self._nodes if other is not node])


def _names(nodes: Sequence[Node]) -> str:
    return ",".join(node.name for node in nodes)


def _bring_together(own: Path, common: Path) -> list[str]:
    """What a synchronisation does that is back: keys and tombstones of `own` come to `common`; who was buried there."""
    theirs, ours = keyring.load(common)[0], keyring.load(own)[0]
    buried = []
    for key_id, entry in ours.items():
        revoked = not isinstance(entry, SigningKey)
        if key_id not in theirs or (revoked and isinstance(theirs[key_id], SigningKey)):
            copy = common / f".{key_id}.copy"
            shutil.copy(own / f"{key_id}.json", copy)
            copy.replace(common / f"{key_id}.json")
            if revoked:
                buried.append(key_id)
    return buried
