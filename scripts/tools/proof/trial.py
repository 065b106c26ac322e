"""A trial: a database, nodes, load and faults, until the plan is done. Its result is a history."""

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec

from scripts.tools.proof.faults import Faults
from scripts.tools.proof.history import AnyRecord, Kind, Run, write_line
from scripts.tools.proof.load import Plan, Progress
from scripts.tools.proof.node import ROOT, Node
from scripts.tools.proof.proxy import Proxy
from scripts.tools.proof.store import Store, store
from sso_service import keyring

WORKERS = 2
LOADS = 2

CLOCK_ERROR = 3
"""Lifetimes of a token by which a clock may be ahead. The ledger keeps consumed tokens for two lifetimes more, in the
same proportion as an hour to five minutes. So the floor refuses no token that is valid on any node's clock.
"""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a trial. `pace` is a factor for the time between faults."""

    kind: Kind
    seed: int
    tokens: int
    redemptions: int
    seconds: float
    faults: tuple[str, ...]
    nodes: int
    ttl: int
    clients: int
    pace: float
    broken: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The results of a trial in addition to its history."""

    seconds: float
    load_seconds: float
    kills: int
    rows: int
    left_out: dict[str, str]


async def run_trial(options: Options, history: Path) -> Outcome:
    """Run a trial. Only its `history` and the logs of the nodes beside it remain."""
    begin = time.monotonic()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proof-")))
        made = stack.enter_context(store(options.kind))
        decisions, keys = directory / "decisions", directory / "keys"
        decisions.mkdir()
        keys.mkdir()
        keyring.rotate(keys, now=int(time.time()), lead=0)
        driver = stack.enter_context((directory / "driver.jsonl").open("wb", buffering=0))

        def write(record: AnyRecord) -> None:
            driver.write(write_line(record))

        retention = (CLOCK_ERROR + 2) * options.ttl
        write(Run(seed=options.seed, database=options.kind, token_ttl=options.ttl, retention=retention))
        nodes: list[Node] = []
        client_proxies: list[tuple[Node, Proxy]] = []
        database_proxies: list[tuple[Node, Proxy]] = []
        endpoints: list[tuple[str, int]] = []
        for name in "abcdefghi"[: options.nodes]:
            env = {
                "SSO_HOME": str(directory),
                "SSO_DATABASE_URL": made.url,
                "SSO_TOKEN_TTL": str(options.ttl),
                "PROOF_DECISIONS": str(decisions),
                "PROOF_RETENTION": str(retention),
                "PROOF_BROKEN": options.broken,
            }
            database_proxy = None
            if made.server:
                database_proxy = Proxy(made.server.socket)
                env["SSO_DATABASE_URL"] = made.url_at(await stack.enter_async_context(_listening(database_proxy)))
            node = Node(name, directory, env, workers=WORKERS)
            stack.callback(node.kill)
            nodes.append(node)
            if database_proxy:
                database_proxies.append((node, database_proxy))
            client_proxy = Proxy(("127.0.0.1", node.port))
            client_proxies.append((node, client_proxy))
            # Most requests go directly to the node, because the proxy for faults is slow.
            endpoints += [(name, node.port)] * 5 + [(name, await stack.enter_async_context(_listening(client_proxy)))]
            node.read_keys_of(keys)
            node.start()
        for node in nodes:
            await asyncio.to_thread(node.wait_until_it_answers)
        faults = Faults(
            options.faults,
            seed=options.seed,
            store=made,
            nodes=nodes,
            client_proxies=client_proxies,
            database_proxies=database_proxies,
            keys=keys,
            ttl=options.ttl,
            retention=retention,
            pace=options.pace,
            write=write,
        )
        loads = [
            await stack.enter_async_context(_load(_plan(options, made, endpoints, retention, directory, number)))
            for number in range(LOADS)
        ]
        load_seconds = await _run_load(loads, faults, made, nodes)
        for node in nodes:
            await asyncio.to_thread(node.stop)
        database = made.read()
        write(database)
        _join(directory, history)
        for node in nodes:
            shutil.copy(node.log, history.with_suffix(f".{node.name}.log"))
    seconds = time.monotonic() - begin
    return Outcome(
        seconds=seconds,
        load_seconds=load_seconds,
        kills=faults.kills,
        rows=len(database.consumed),
        left_out=faults.left_out,
    )


@asynccontextmanager
async def _listening(proxy: Proxy) -> AsyncIterator[int]:
    port = await proxy.start()
    try:
        yield port
    finally:
        await proxy.close()


def _plan(
    options: Options, made: Store, endpoints: Sequence[tuple[str, int]], retention: int, directory: Path, number: int
) -> Plan:
    return Plan(
        seed=f"{options.seed} load {number}",
        endpoints=list(endpoints),
        api_tokens=made.api_tokens,
        platform=made.platform,
        ttl=options.ttl,
        retention=retention,
        tokens=options.tokens // LOADS,
        redemptions=options.redemptions // LOADS,
        seconds=options.seconds,
        clients=options.clients // LOADS,
        history=str(directory / f"load-{number}.jsonl"),
    )


class _Load:
    """A process of the load, and its progress."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.progress = Progress()

    async def work(self) -> None:
        """Return when the plan is done."""
        assert self._process.stdout is not None
        while (line := await self._process.stdout.readline()).strip():
            self.progress = msgspec.json.decode(line, type=Progress)
        assert line, "a load process has failed"

    async def settle(self) -> None:
        """Let the process redeem its tokens with an unknown outcome, and return when it has exited."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        await self._process.stdout.read()
        assert await self._process.wait() == 0, "a load process has failed"


@asynccontextmanager
async def _load(plan: Plan) -> AsyncIterator[_Load]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.tools.proof.load", msgspec.json.encode(plan).decode()),
        cwd=ROOT,
        env={**os.environ},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield _Load(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _run_load(loads: Sequence[_Load], faults: Faults, made: Store, nodes: Sequence[Node]) -> float:
    """Run the load under faults, repair everything, and let the load settle. Return the seconds under load."""
    begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        background = group.create_task(faults.run()), group.create_task(_print_progress(loads, begin))
        await asyncio.gather(*(load.work() for load in loads))
        for task in background:
            task.cancel()
    seconds = time.monotonic() - begin
    if made.server:
        await asyncio.to_thread(made.server.start)
    for node in nodes:
        if not node.runs:
            node.start()
        await asyncio.to_thread(node.wait_until_it_answers)
    for load in loads:
        await load.settle()
    return seconds


async def _print_progress(loads: Sequence[_Load], begin: float) -> None:
    before = 0
    while True:
        await asyncio.sleep(10)
        done = [load.progress for load in loads]
        redemptions = sum(each.redemptions for each in done)
        print(
            f"[{time.monotonic() - begin:6.1f} s] {sum(each.issued for each in done)} issued, {redemptions} presented "
            f"({(redemptions - before) / 10:.0f}/s), {sum(each.successes for each in done)} succeeded, "
            f"{sum(each.lost for each in done)} answers lost",
            flush=True,
        )
        before = redemptions


def _join(directory: Path, history: Path) -> None:
    """Join all parts into one history."""
    with history.open("wb") as whole:
        # The driver's part is first because it begins with the run.
        for part in (directory / "driver.jsonl", *directory.glob("load-*"), *(directory / "decisions").iterdir()):
            with part.open("rb") as lines:
                # The last line can be incomplete if its writer was killed.
                whole.writelines(line for line in lines if line.endswith(b"\n"))
