"""Single use across the loss of the primary: clients record a history, which is checked against the database.

Three nodes of the service behind HAProxy redeem tokens while Patroni and PostgreSQL of the primary are killed. Patroni
promotes the synchronous standby, and the service has to reconnect to it. The responses to the clients must then agree
with the ledger of the new primary.
"""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.support.data import ACCOUNT, PAGE, TEAM
from tests.support.patroni import Cluster, Node, balancing, running_cluster, until
from tests.support.processes import Running, command, serving

pytestmark = [pytest.mark.anyio, pytest.mark.cluster]

TOKENS = 20_000
"""The minimum number of redeemed tokens. The primary is killed after half of them."""
BROWSERS = 24
"""Browsers that sign in concurrently, with three connections each."""
RESERVE = 400
"""Tokens issued in advance for each node, since none can be issued during the outage."""
ANSWERED_IN, RECOVERED_IN = 3.0, 30.0
"""Limits in seconds: the time to a response, and the time from the failure to the first login."""

USER, PASSWORD, DATABASE = "sso", "secret", "sso"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response to a client. Status 0: the connection ended without one. `at` is the monotonic time of its arrival."""

    status: int
    code: str
    node: str
    retry_after: str
    at: float
    seconds: float
    body: bytes

    @property
    def name(self) -> str:
        """Status and error code."""
        return f"{self.status} {self.code}".strip()

    @property
    def outcome_is_unknown(self) -> bool:
        """True if the response leaves open whether the token was consumed."""
        return self.status == 0 or self.code == "outcome_unknown"


class Connection:
    """A client's connection, reopened after it ended. `node` is the node's name if a response contains none."""

    def __init__(self, port: int, node: str = "balancer") -> None:
        self._port = port
        self._node = node
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def issue(self, api_token: str, email: str) -> Answer:
        body = json.dumps({"email": email, "first_name": "Jane", "last_name": "Doe"})
        head = f"POST /v1/sso_tokens HTTP/1.1\r\nAuthorization: Bearer {api_token}\r\nContent-Length: {len(body)}\r\n"
        return await self._request(f"{head}Host: studio.example\r\n\r\n{body}")

    async def redeem(self, token: str) -> Answer:
        return await self.get(f"{PAGE}?sso={token}")

    async def get(self, target: str) -> Answer:
        return await self._request(f"GET {target} HTTP/1.1\r\nHost: studio.example\r\nAccept: application/json\r\n\r\n")

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _request(self, request: str) -> Answer:
        started = time.monotonic()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request.encode())
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            now = time.monotonic()
            return Answer(0, "no answer", self._node, "", now, now - started, b"")
        if headers.get("connection") == "close":
            self.close()
        status, now = int(first.split()[1]), time.monotonic()
        code = json.loads(body)["error"]["code"] if status >= 400 and b'"error"' in body else ""
        node, retry_after = headers.get("x-node", self._node), headers.get("retry-after", "")
        return Answer(status, code, node, retry_after, now, now - started, body)


@dataclass
class History:
    """All responses to the clients, and nothing else."""

    issues: list[Answer] = field(default_factory=list)
    attempts: dict[str, list[Answer]] = field(default_factory=dict)
    redeemed: int = 0
    _milestones: dict[int, asyncio.Event] = field(default_factory=dict)

    async def until_redeemed(self, count: int) -> None:
        """Wait for `count` logins."""
        if self.redeemed < count:
            await self._milestones.setdefault(count, asyncio.Event()).wait()

    async def issue(self, connection: Connection, api_token: str, email: str) -> str | None:
        """Issue a token. Returns None if that failed."""
        answer = await connection.issue(api_token, email)
        self.issues.append(answer)
        if answer.status != 201:
            return None
        token: str = json.loads(answer.body)["token"]
        self.attempts[token] = []
        return token

    async def redeem(self, connection: Connection, token: str) -> Answer:
        answer = await connection.redeem(token)
        self.attempts[token].append(answer)
        if answer.status == 303:
            self.redeemed += 1
            if milestone := self._milestones.get(self.redeemed):
                milestone.set()
        return answer

    @property
    def answers(self) -> list[Answer]:
        return [*self.issues, *(answer for answers in self.attempts.values() for answer in answers)]

    @property
    def acknowledged(self) -> set[str]:
        """Tokens with a successful login."""
        return {token for token, answers in self.attempts.items() if any(a.status == 303 for a in answers)}

    @property
    def in_doubt(self) -> set[str]:
        """Tokens without a known login, at least one of whose attempts has an unknown outcome."""
        return {
            token
            for token, answers in self.attempts.items()
            if any(answer.outcome_is_unknown for answer in answers)
            and not any(answer.status == 303 for answer in answers)
        }

    def violations(self, consumed: set[bytes]) -> list[str]:
        """Describe each contradiction of single use, given the claims in the ledger at the end.

        Every token must have been redeemed until one response was definite.
        """
        found: list[str] = []
        for token, answers in self.attempts.items():
            logins = sum(answer.status == 303 for answer in answers)
            responses = ", ".join(answer.name for answer in sorted(answers, key=lambda answer: answer.at))
            if logins > 1:
                found.append(f"redeemed {logins} times: {responses}")
            if logins and claims(token) not in consumed:
                found.append(f"a login is missing in the ledger: {responses}")
            if not logins and not any(answer.outcome_is_unknown for answer in answers):
                found.append(f"consumed without a login, though every response is definite: {responses}")
        return found


@dataclass(frozen=True)
class Deployment:
    """A cluster, three nodes of the service behind a balancer, the balancer's port, and a node outside it."""

    cluster: Cluster
    api_token: str
    balanced: Mapping[str, Running]
    port: int
    idle: Running

    @property
    def nodes(self) -> list[Running]:
        return [*self.balanced.values(), self.idle]


def claims(token: str) -> bytes:
    """Return the claims of a token: the 16 bytes that the ledger stores."""
    return base64.urlsafe_b64decode(token + "=")[:16]


def consumed(primary: Node) -> set[bytes]:
    return {bytes(row[0]) for row in primary.query("SELECT claims FROM consumed_nonces", database=DATABASE)}


def port_of(node: Running) -> int:
    return int(node.url.rpartition(":")[2])


def email(number: int) -> str:
    return f"user{number}@example.com"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def env(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of nodes with a new database of the cluster, created as by an operator."""
    with cluster.primary.connect() as superuser:
        superuser.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'".encode())
        superuser.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}".encode())
    env = {
        "SSO_HOME": str(tmp_path_factory.mktemp("home")),
        "SSO_DATABASE_URL": cluster.url(USER, PASSWORD, DATABASE),
        "SSO_TOKEN_TTL": "900",  # no token may expire before its last attempt
    }
    run("init", env=env)
    run("account", "add", "One", "--id", str(ACCOUNT), env=env)
    run("team", "add", str(ACCOUNT), "Team", "--id", str(TEAM), env=env)
    return env


@pytest.fixture(scope="module")
def api_token(env: dict[str, str]) -> str:
    created = run("api-token", "create", "--account", str(ACCOUNT), "--name", "load", "--scope", "write:sso", env=env)
    return created.strip()


@pytest.fixture(scope="module")
def deployment(
    cluster: Cluster, env: dict[str, str], api_token: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Nodes that continue without a standby."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def start(name: str, url: str = env["SSO_DATABASE_URL"]) -> Running:
            settings = {**env, "SSO_DATABASE_URL": url, "SSO_REQUIRE_SYNC_STANDBY": "0"}
            return stack.enter_context(serving(settings, logs / f"{name}.log"))

        balanced = {name: start(name) for name in ("a", "b", "c")}
        port = stack.enter_context(balancing({name: node.url for name, node in balanced.items()}, logs))
        # This node has another application name, which distinguishes its commits from the others'.
        idle = start("idle", f"{env['SSO_DATABASE_URL']}&application_name=idle")
        yield Deployment(cluster, api_token, balanced, port, idle)


def run(*arguments: str, env: Mapping[str, str]) -> str:
    """Run an `sso-service` command that must succeed, and return its output."""
    done = command(*arguments, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Load:
    """Browsers that sign in through the balancer, mostly with two or three concurrent requests for each token."""

    def __init__(self, deployment: Deployment, history: History) -> None:
        self._deployment = deployment
        self._history = history
        self._requests_at_once = cycle([2, 3, 2, 3, 1])
        self._stopped = asyncio.Event()

    async def create_users(self) -> None:
        await asyncio.gather(*(self.reserve(1, user) for user in range(BROWSERS)))

    async def reserve(self, count: int, user: int) -> list[str]:
        """Issue tokens of a user for later."""
        with Connection(self._deployment.port) as connection:
            tokens = [
                await self._history.issue(connection, self._deployment.api_token, email(user)) for _ in range(count)
            ]
        issued = [token for token in tokens if token is not None]
        assert len(issued) == count, Counter(answer.name for answer in self._history.issues)
        return issued

    async def run(self) -> None:
        """Sign in repeatedly until `stop` is called."""
        await asyncio.gather(*(self._sign_in_repeatedly(user) for user in range(BROWSERS)))

    def stop(self) -> None:
        self._stopped.set()

    async def _sign_in_repeatedly(self, user: int) -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(Connection(self._deployment.port)) for _ in range(3)]
            while not self._stopped.is_set():
                token = await self._history.issue(connections[0], self._deployment.api_token, email(user))
                if token is None:
                    await asyncio.sleep(0.2)
                    continue
                concurrent = connections[: next(self._requests_at_once)]
                await asyncio.gather(*(self._history.redeem(connection, token) for connection in concurrent))

    async def settle(self) -> None:
        """Redeem each token without a login twice more."""
        history = self._history
        tokens = iter(history.attempts.keys() - history.acknowledged)

        async def redeem_remaining() -> None:
            with Connection(self._deployment.port) as one, Connection(self._deployment.port) as another:
                for token in tokens:  # shared iterator: each task takes other tokens
                    await asyncio.gather(history.redeem(one, token), history.redeem(another, token))

        await asyncio.gather(*(redeem_remaining() for _ in range(16)))


async def recovery(history: History, name: str, port: int, tokens: Sequence[str]) -> list[Answer]:
    """Redeem tokens at a port ten times a second until the first login. Returns the responses."""
    answers: list[Answer] = []
    with Connection(port, name) as connection:
        for token in tokens:
            answers.append(await history.redeem(connection, token))
            if answers[-1].status == 303:
                break
            await asyncio.sleep(0.1)
    return answers


async def kill_with_commits_in_doubt(deployment: Deployment, history: History, token: str) -> None:
    """Kill the primary while commits wait for the standby. The standby receives all of them except that of `token`.

    None of them was acknowledged. An acknowledgement before the standby's confirmation would be wrong, and so would a
    response that treats a connection lost during `COMMIT` as a failure.
    """
    primary, (standby,) = deployment.cluster.primary, deployment.cluster.others

    def sent_commit_waits() -> bool:
        return primary.has_waiting_commit("sso-service") and primary.has_sent_all

    def idle_node_waits() -> bool:
        return primary.has_waiting_commit("idle")

    # The blocking steps run in threads, so that the load continues.
    with ExitStack() as stack:
        connection = stack.enter_context(Connection(port_of(deployment.idle), "idle"))
        await asyncio.to_thread(stack.enter_context, standby.wal_receiver_paused())
        await asyncio.to_thread(until, sent_commit_waits, "a commit waits", seconds=10)
        await asyncio.to_thread(primary.pause_wal_sender)
        async with asyncio.TaskGroup() as group:
            group.create_task(history.redeem(connection, token))
            await asyncio.to_thread(until, idle_node_waits, "one more commit waits", seconds=10)
            await asyncio.to_thread(primary.kill)


async def test_a_failover_loses_no_login_and_repeats_none(deployment: Deployment) -> None:
    cluster, history = deployment.cluster, History()
    load = Load(deployment, history)
    await load.create_users()
    ports = {**{name: port_of(node) for name, node in deployment.balanced.items()}, "balancer": deployment.port}
    reserves = [await load.reserve(RESERVE, user) for user in range(len(ports))]
    (uncertain,) = await load.reserve(1, 0)
    await report_cost(deployment, load, history)

    (new,) = cluster.others
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await history.until_redeemed(TOKENS // 2)
        await kill_with_commits_in_doubt(deployment, history, uncertain)
        killed_at = time.monotonic()
        # From here on, the old primary decides nothing.
        recoveries = await asyncio.gather(*map(partial(recovery, history), ports, ports.values(), reserves))
        await history.until_redeemed(TOKENS)
        load.stop()
    after = Counter(f"{answer.node}: {answer.name}" for answer in history.answers if answer.at > killed_at)
    in_doubt = history.in_doubt
    await load.settle()
    used = in_doubt - history.acknowledged

    print(f"{history.redeemed} logins with {len(history.attempts)} tokens")
    print("responses:", *sorted(Counter(answer.name for answer in history.answers).items()))
    print("responses after the primary was killed:", *sorted(after.items()))
    print(f"tokens with unknown outcome: {len(used)} were used, {len(in_doubt - used)} were still valid")
    recovered_in = {name: answers[-1].at - killed_at for name, answers in zip(ports, recoveries, strict=True)}
    print("seconds until the first login:", *(f"{name} {seconds:.1f}" for name, seconds in recovered_in.items()))
    print(f"longest response time: {max(answer.seconds for answer in history.answers):.2f} s")

    # Single use.
    assert cluster.primary is new
    assert history.violations(consumed(new)) == []
    # The load and the failure had the intended effect.
    assert history.redeemed >= TOKENS
    by_several = [answers for answers in history.attempts.values() if len({answer.node for answer in answers}) > 1]
    assert len(by_several) > TOKENS / 2
    assert used
    assert uncertain in in_doubt - used
    # During the outage, every node answers 503 with `Retry-After` in time. Then it recovers.
    for answers in recoveries:
        assert [answer.name for answer in answers] == ["503 unavailable"] * (len(answers) - 1) + ["303"]
        assert len(answers) > 1
    assert max(recovered_in.values()) < RECOVERED_IN
    assert all(node.process.poll() is None for node in deployment.nodes)
    assert all(answer.retry_after for answer in history.answers if answer.status == 503)
    assert all(answer.seconds < ANSWERED_IN for answer in history.answers)
    assert {answer.name for answer in history.answers} == {
        *("201", "303", "401 token_consumed", "503 unavailable", "503 outcome_unknown")
    }


async def test_a_node_that_requires_a_standby_consumes_nothing_without_one(
    cluster: Cluster, env: dict[str, str], api_token: str, tmp_path: Path
) -> None:
    primary, others = cluster.primary, cluster.others
    for other in others:
        other.kill()
    until(lambda: primary.is_asynchronous_primary, "a primary without a standby")
    with ExitStack() as stack:
        node = stack.enter_context(serving({**env, "SSO_REQUIRE_SYNC_STANDBY": "1"}, tmp_path / "log"))
        history = History()
        connection = stack.enter_context(Connection(port_of(node)))
        tokens = [await history.issue(connection, api_token, email(0)) for _ in range(20)]
        assert None not in tokens
        for token in history.attempts:
            answer = await history.redeem(connection, token)
            assert (answer.name, answer.retry_after) == ("503 unavailable", "2")
        assert (await connection.get("/readyz")).status == 503
        assert consumed(primary).isdisjoint(map(claims, history.attempts))
        assert await history.issue(connection, api_token, email(0))

        started = time.monotonic()
        for other in others:
            other.start()
        cluster.wait_until_synchronous()
        print(f"seconds until the old primary was a synchronous standby: {time.monotonic() - started:.1f}")
        connection.close()  # the service has already closed its end
        assert (await connection.get("/readyz")).status == 200
        for token in history.attempts:
            first, second = [await history.redeem(connection, token) for _ in range(2)]
            assert (first.name, second.name) == ("303", "401 token_consumed")
        assert history.violations(consumed(primary)) == []
        assert node.process.poll() is None


async def test_violations_of_single_use_are_found_in_a_history() -> None:
    login, used, unavailable, unknown = (
        Answer(status, code, "a", "", 0, 0, b"")
        for status, code in (
            (303, ""),
            (401, "token_consumed"),
            (503, "unavailable"),
            (503, "outcome_unknown"),
        )
    )

    def violations(*answers: Answer, in_ledger: bool = True) -> list[str]:
        token = "A" * 43
        return History(attempts={token: list(answers)}).violations({claims(token)} if in_ledger else set())

    assert violations(login, used, unavailable, unknown) == []
    assert violations(unknown, used) == []
    assert violations(login, login) == ["redeemed 2 times: 303, 303"]
    assert violations(login, in_ledger=False) == ["a login is missing in the ledger: 303"]
    (found,) = violations(unavailable, used)
    assert found.startswith("consumed without a login")


# --- cost of a login -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources used so far: processor time (seconds), WAL (bytes), and writing transactions."""

    service: float
    primary: float
    standby: float
    wal: int
    transactions: int


def usage(deployment: Deployment) -> Usage:
    primary = deployment.cluster.primary
    ((wal, transactions),) = primary.query(
        "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,"
        " pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    )
    return Usage(
        processor_time([psutil.Process(node.process.pid) for node in deployment.nodes]),
        processor_time(primary.postgresql_processes()),
        processor_time(deployment.cluster.others[0].postgresql_processes()),
        int(wal),
        transactions,
    )


def processor_time(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a short-lived backend has ended
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def report_cost(deployment: Deployment, load: Load, history: History) -> None:
    """Print the cost of a login, sequentially and under concurrency."""
    for concurrency, count in ((1, 500), (64, 4000)):
        tokens = iter(
            [
                token
                for reserve in await asyncio.gather(*(load.reserve(count // 20, user) for user in range(20)))
                for token in reserve
            ]
        )

        async def redeem_all(tokens: Iterator[str] = tokens) -> None:
            with Connection(deployment.port) as connection:
                for token in tokens:
                    await history.redeem(connection, token)

        before, started = usage(deployment), time.monotonic()
        await asyncio.gather(*(redeem_all() for _ in range(concurrency)))
        seconds, after = time.monotonic() - started, usage(deployment)
        print(
            f"{concurrency} concurrently: {count / seconds:.0f} logins/s;"
            f" each {(after.service - before.service) / count * 1e6:.0f} us of the services' processor time,"
            f" {(after.primary - before.primary) / count * 1e6:.0f} of the primary's,"
            f" {(after.standby - before.standby) / count * 1e6:.0f} of the standby's,"
            f" {(after.wal - before.wal) / count:.0f} bytes of WAL;"
            f" {count / (after.transactions - before.transactions):.1f} in a transaction"
        )
        # Usually a tenth of this. If PostgreSQL's JIT compiled a statement, that alone would take 80 ms.
        assert (after.primary - before.primary) / count < 0.005
