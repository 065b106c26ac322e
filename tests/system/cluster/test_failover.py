"""Single use across the loss of the primary: a history is recorded by clients, and checked without asking the service.

Three nodes of the service behind HAProxy redeem tokens while Patroni and PostgreSQL of the primary are killed. Patroni
promotes the synchronous standby; the service has to find it by itself. What the clients were told then has to agree
with what the new primary knows.
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
"""Tokens that are redeemed at least; the primary is killed when half of them are."""
PEOPLE = 24
"""Browsers that sign in at the same time, with three connections each."""
RESERVE = 400
"""Tokens for each node that are kept for the outage, when there are no new ones."""
ANSWERED_IN, RECOVERED_IN = 3.0, 30.0

USER, PASSWORD, DATABASE = "sso", "secret", "sso"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client was told. Status 0: nothing, the connection ended. `at` is monotonic, when the answer came."""

    status: int
    code: str
    node: str
    retry_after: str
    at: float
    seconds: float
    body: bytes

    @property
    def name(self) -> str:
        """What it is counted as."""
        return f"{self.status} {self.code}".strip()

    @property
    def says_nothing_happened(self) -> bool:
        return self.status == 503 and self.code == "unavailable"

    @property
    def says_nothing(self) -> bool:
        """Whether the token may be used or not, as far as the client knows."""
        return self.status == 0 or self.code == "outcome_unknown"


class Connection:
    """A client's connection, made anew when it ended. `node` is who answers if the answer does not say."""

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
        began = time.monotonic()
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
            return Answer(0, "no answer", self._node, "", now, now - began, b"")
        if headers.get("connection") == "close":
            self.close()
        status, now = int(first.split()[1]), time.monotonic()
        code = json.loads(body)["error"]["code"] if status >= 400 and b'"error"' in body else ""
        node, retry_after = headers.get("x-node", self._node), headers.get("retry-after", "")
        return Answer(status, code, node, retry_after, now, now - began, body)


@dataclass
class History:
    """All that the clients were told, and nothing else."""

    issues: list[Answer] = field(default_factory=list)
    attempts: dict[str, list[Answer]] = field(default_factory=dict)
    redeemed: int = 0
    _milestones: dict[int, asyncio.Event] = field(default_factory=dict)

    async def until_redeemed(self, count: int) -> None:
        """Returns when there were `count` logins."""
        if self.redeemed < count:
            await self._milestones.setdefault(count, asyncio.Event()).wait()

    async def issue(self, connection: Connection, api_token: str, email: str) -> str | None:
        """A token, or None."""
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
        """Tokens that somebody was told to be signed in with."""
        return {token for token, answers in self.attempts.items() if any(a.status == 303 for a in answers)}

    @property
    def in_doubt(self) -> set[str]:
        """Tokens with which nobody is known to be signed in, but somebody may be."""
        return {
            token
            for token, answers in self.attempts.items()
            if any(answer.says_nothing for answer in answers) and not any(answer.status == 303 for answer in answers)
        }

    def violations(self, consumed: set[bytes]) -> list[str]:
        """What could not have happened if each token were good once, given the claims that the ledger has at the end.

        Every token must have been tried until somebody had a clear answer.
        """
        found: list[str] = []
        for token, answers in self.attempts.items():
            logins = sum(answer.status == 303 for answer in answers)
            told = ", ".join(answer.name for answer in sorted(answers, key=lambda answer: answer.at))
            if logins > 1:
                found.append(f"redeemed {logins} times: {told}")
            if logins and claims(token) not in consumed:
                found.append(f"a login is forgotten: {told}")
            if not logins and not any(answer.says_nothing for answer in answers):
                found.append(f"used up without a login, though no answer left that open: {told}")
        return found


@dataclass(frozen=True)
class Deployment:
    """Three nodes of the service over a cluster, the balancer's port, and a node that gets nothing from it."""

    cluster: Cluster
    api_token: str
    balanced: Mapping[str, Running]
    port: int
    idle: Running

    @property
    def nodes(self) -> list[Running]:
        return [*self.balanced.values(), self.idle]


def claims(token: str) -> bytes:
    """The sixteen bytes that the ledger keeps of a token."""
    return base64.urlsafe_b64decode(token + "=")[:16]


def consumed(primary: Node) -> set[bytes]:
    return {bytes(row[0]) for row in primary.query("SELECT claims FROM consumed_nonces", database=DATABASE)}


def port_of(node: Running) -> int:
    return int(node.url.rpartition(":")[2])


def email(number: int) -> str:
    return f"person{number}@example.com"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def env(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings of nodes on a new database of the cluster, which is as an operator would make it."""
    with cluster.primary.connect() as superuser:
        superuser.execute(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'".encode())
        superuser.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}".encode())
    env = {
        "SSO_HOME": str(tmp_path_factory.mktemp("home")),
        "SSO_DATABASE_URL": cluster.url(USER, PASSWORD, DATABASE),
        "SSO_TOKEN_TTL": "900",  # nothing is to expire before it was tried again
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
    """Nodes that go on when there is no standby left."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def start(name: str, url: str = env["SSO_DATABASE_URL"]) -> Running:
            settings = {**env, "SSO_DATABASE_URL": url, "SSO_REQUIRE_SYNC_STANDBY": "0"}
            return stack.enter_context(serving(settings, logs / f"{name}.log"))

        balanced = {name: start(name) for name in ("a", "b", "c")}
        port = stack.enter_context(balancing({name: node.url for name, node in balanced.items()}, logs))
        # PostgreSQL is told another name of this one, so that its commits can be told from the others'.
        idle = start("idle", f"{env['SSO_DATABASE_URL']}&application_name=idle")
        yield Deployment(cluster, api_token, balanced, port, idle)


def run(*arguments: str, env: Mapping[str, str]) -> str:
    """What an `sso-service` command prints."""
    done = command(*arguments, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Load:
    """People who sign in through the balancer, most of them by two or three requests at once."""

    def __init__(self, deployment: Deployment, history: History) -> None:
        self._deployment = deployment
        self._history = history
        self._requests_at_once = cycle([2, 3, 2, 3, 1])
        self._over = asyncio.Event()

    async def make_people_known(self) -> None:
        await asyncio.gather(*(self.reserve(1, person) for person in range(PEOPLE)))

    async def reserve(self, count: int, person: int) -> list[str]:
        """Tokens of a person for later."""
        with Connection(self._deployment.port) as connection:
            tokens = [
                await self._history.issue(connection, self._deployment.api_token, email(person)) for _ in range(count)
            ]
        issued = [token for token in tokens if token is not None]
        assert len(issued) == count, Counter(answer.name for answer in self._history.issues)
        return issued

    async def run(self) -> None:
        """Goes on until it is stopped."""
        await asyncio.gather(*(self._sign_in_again_and_again(person) for person in range(PEOPLE)))

    def stop(self) -> None:
        self._over.set()

    async def _sign_in_again_and_again(self, person: int) -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(Connection(self._deployment.port)) for _ in range(3)]
            while not self._over.is_set():
                token = await self._history.issue(connections[0], self._deployment.api_token, email(person))
                if token is None:
                    await asyncio.sleep(0.2)
                    continue
                at_once = connections[: next(self._requests_at_once)]
                await asyncio.gather(*(self._history.redeem(connection, token) for connection in at_once))

    async def settle(self) -> None:
        """Tries each token that signed nobody in twice more."""
        history = self._history
        tokens = iter(history.attempts.keys() - history.acknowledged)

        async def try_again() -> None:
            with Connection(self._deployment.port) as one, Connection(self._deployment.port) as another:
                for token in tokens:  # shared: each token is taken by one of us
                    await asyncio.gather(history.redeem(one, token), history.redeem(another, token))

        await asyncio.gather(*(try_again() for _ in range(16)))


async def recovery(history: History, name: str, port: int, tokens: Sequence[str]) -> list[Answer]:
    """What is answered there, asked ten times a second for a login, until somebody is signed in."""
    answers: list[Answer] = []
    with Connection(port, name) as connection:
        for token in tokens:
            answers.append(await history.redeem(connection, token))
            if answers[-1].status == 303:
                break
            await asyncio.sleep(0.1)
    return answers


async def kill_with_commits_in_doubt(deployment: Deployment, history: History, token: str) -> None:
    """Kills the primary when it has commits that its standby gets, and one, of `token`, that it never will.

    Nobody was told of any of them. An acknowledgement that does not wait would be wrong now, and so would be an answer
    that takes the loss of a connection during `COMMIT` for a failure.
    """
    primary, (standby,) = deployment.cluster.primary, deployment.cluster.others

    def sent_commit_waits() -> bool:
        return primary.has_waiting_commit("sso-service") and primary.has_sent_all

    def idle_node_waits() -> bool:
        return primary.has_waiting_commit("idle")

    # All in other threads, so that meanwhile the load goes on.
    with ExitStack() as stack:
        connection = stack.enter_context(Connection(port_of(deployment.idle), "idle"))
        await asyncio.to_thread(stack.enter_context, standby.receiving_nothing())
        await asyncio.to_thread(until, sent_commit_waits, "a commit waits", seconds=10)
        await asyncio.to_thread(primary.stop_sending)
        async with asyncio.TaskGroup() as group:
            group.create_task(history.redeem(connection, token))
            await asyncio.to_thread(until, idle_node_waits, "one more commit waits", seconds=10)
            await asyncio.to_thread(primary.kill)


async def test_a_failover_forgets_no_login_repeats_none_and_ends_by_itself(deployment: Deployment) -> None:
    cluster, history = deployment.cluster, History()
    load = Load(deployment, history)
    await load.make_people_known()
    ports = {**{name: port_of(node) for name, node in deployment.balanced.items()}, "balancer": deployment.port}
    reserves = [await load.reserve(RESERVE, person) for person in range(len(ports))]
    (doubtful,) = await load.reserve(1, 0)
    await report_cost(deployment, load, history)

    (new,) = cluster.others
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        await history.until_redeemed(TOKENS // 2)
        await kill_with_commits_in_doubt(deployment, history, doubtful)
        killed_at = time.monotonic()
        # What is asked from now on is not decided by the old primary any more.
        recoveries = await asyncio.gather(*map(partial(recovery, history), ports, ports.values(), reserves))
        await history.until_redeemed(TOKENS)
        load.stop()
    after = Counter(f"{answer.node}: {answer.name}" for answer in history.answers if answer.at > killed_at)
    in_doubt = history.in_doubt
    await load.settle()
    used = in_doubt - history.acknowledged

    print(f"{history.redeemed} logins with {len(history.attempts)} tokens")
    print("answers:", *sorted(Counter(answer.name for answer in history.answers).items()))
    print("answers after the primary was killed:", *sorted(after.items()))
    print(f"tokens whose use was in doubt: {len(used)} were used, {len(in_doubt - used)} were good once more")
    recovered_in = {name: answers[-1].at - killed_at for name, answers in zip(ports, recoveries, strict=True)}
    print("seconds until the first login:", *(f"{name} {seconds:.1f}" for name, seconds in recovered_in.items()))
    print(f"longest answer: {max(answer.seconds for answer in history.answers):.2f} s")

    # The promise.
    assert cluster.primary is new
    assert history.violations(consumed(new)) == []
    # It was a test of what it is to test.
    assert history.redeemed >= TOKENS
    by_several = [answers for answers in history.attempts.values() if len({answer.node for answer in answers}) > 1]
    assert len(by_several) > TOKENS / 2
    assert used
    assert doubtful in in_doubt - used
    # The outage: each node says of itself that it cannot, soon, and when to come back; and then it can.
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


async def test_without_a_standby_a_node_that_requires_one_consumes_nothing_until_there_is_one_again(
    cluster: Cluster, env: dict[str, str], api_token: str, tmp_path: Path
) -> None:
    primary, others = cluster.primary, cluster.others
    for other in others:
        other.kill()
    until(lambda: primary.is_alone, "a primary without a standby")
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

        began = time.monotonic()
        for other in others:
            other.start()
        cluster.wait_until_synchronous()
        print(f"seconds until the old primary was a synchronous standby: {time.monotonic() - began:.1f}")
        connection.close()  # the service did so long ago
        assert (await connection.get("/readyz")).status == 200
        for token in history.attempts:
            first, second = [await history.redeem(connection, token) for _ in range(2)]
            assert (first.name, second.name) == ("303", "401 token_consumed")
        assert history.violations(consumed(primary)) == []
        assert node.process.poll() is None


async def test_what_breaks_the_promise_is_found_in_a_history() -> None:
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
    assert violations(login, in_ledger=False) == ["a login is forgotten: 303"]
    (found,) = violations(unavailable, used)
    assert found.startswith("used up without a login")


# --- what a login costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spent:
    """What was used so far: seconds of processor time, bytes of WAL, transactions that wrote."""

    service: float
    primary: float
    standby: float
    wal: int
    transactions: int


def spent(deployment: Deployment) -> Spent:
    primary = deployment.cluster.primary
    ((wal, transactions),) = primary.query(
        "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,"
        " pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
    )
    return Spent(
        processor_time([psutil.Process(node.process.pid) for node in deployment.nodes]),
        processor_time(primary.postgresql_processes()),
        processor_time(deployment.cluster.others[0].postgresql_processes()),
        int(wal),
        transactions,
    )


def processor_time(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a backend of somebody who has only asked something
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def report_cost(deployment: Deployment, load: Load, history: History) -> None:
    """Prints what one login costs, one after the other and many at once."""
    for at_once, count in ((1, 500), (64, 4000)):
        tokens = iter(
            [
                token
                for reserve in await asyncio.gather(*(load.reserve(count // 20, person) for person in range(20)))
                for token in reserve
            ]
        )

        async def redeem_all(tokens: Iterator[str] = tokens) -> None:
            with Connection(deployment.port) as connection:
                for token in tokens:
                    await history.redeem(connection, token)

        before, began = spent(deployment), time.monotonic()
        await asyncio.gather(*(redeem_all() for _ in range(at_once)))
        seconds, after = time.monotonic() - began, spent(deployment)
        print(
            f"{at_once} at once: {count / seconds:.0f} logins/s;"
            f" each {(after.service - before.service) / count * 1e6:.0f} us of the services' processor time,"
            f" {(after.primary - before.primary) / count * 1e6:.0f} of the primary's,"
            f" {(after.standby - before.standby) / count * 1e6:.0f} of the standby's,"
            f" {(after.wal - before.wal) / count:.0f} bytes of WAL;"
            f" {count / (after.transactions - before.transactions):.1f} in a transaction"
        )
        # A tenth of it, usually. Compiling a statement, as PostgreSQL does with what it takes for dear, is 80 ms.
        assert (after.primary - before.primary) / count < 0.005
