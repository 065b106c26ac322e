"""The promise: exactly one redemption of a token succeeds, whatever happens. Over HTTP, with real databases."""

import asyncio
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.cookiejar import DefaultCookiePolicy
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, select

from sso_service.database.engine import Database
from sso_service.database.schema import consumed_nonces
from sso_service.service import Service
from tests.support._old import JANE, PAGE, Answer, Client, Running, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
def env(database_url: str, keys_dir: Path, tmp_path: Path) -> dict[str, str]:
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir)}


@asynccontextmanager
async def browsers(running: Running) -> AsyncIterator[Iterator[httpx.AsyncClient]]:
    """Browsers in turn, none of which keeps a cookie or follows a redirect."""
    async with AsyncExitStack() as stack:
        made = [httpx.AsyncClient(base_url=running.url, timeout=20, follow_redirects=False) for _ in range(10)]
        for browser in made:
            browser.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            await stack.enter_async_context(browser)
        yield cycle(made)


async def issue(client: httpx.AsyncClient, api_token: str) -> str:
    answer = await client.post("/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {api_token}"})
    assert answer.status_code == 201, answer.text
    token: str = answer.json()["token"]
    return token


async def open_link(client: httpx.AsyncClient, token: str) -> int:
    """The status of opening a login link; with a session if it is 303, without one otherwise."""
    answer = await client.get(f"{PAGE}?sso={token}")
    assert ("studio_session" in answer.headers.get("set-cookie", "")) == (answer.status_code == 303)
    return answer.status_code


async def test_fifty_tokens_redeemed_by_twenty_requests_each_at_once_make_fifty_logins(
    env: dict[str, str], tmp_path: Path, api_token: str
) -> None:
    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as some:
            tokens = [await issue(next(some), api_token) for _ in range(50)]
            statuses: list[tuple[str, int]] = []
            for start in range(0, 50, 5):
                links = tokens[start : start + 5] * 20
                answers = await asyncio.gather(*(open_link(next(some), token) for token in links))
                statuses += zip(links, answers, strict=True)
    assert Counter(statuses) == {(token, status): n for token in tokens for status, n in ((303, 1), (401, 19))}


async def test_a_service_that_is_killed_in_the_middle_of_logins_lets_no_token_work_twice(
    env: dict[str, str], tmp_path: Path, api_token: str
) -> None:
    logins: Counter[str] = Counter()
    answered = 0
    few = asyncio.Semaphore(10)

    async def visit(client: httpx.AsyncClient, token: str) -> None:
        nonlocal answered
        async with few:
            try:
                logins[token] += await open_link(client, token) == 303
                answered += 1
            except httpx.TransportError:
                return  # nobody can tell
            if answered == 40:
                kill(running.process.pid)

    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as some:
            tokens = [await issue(next(some), api_token) for _ in range(120)]
            await asyncio.gather(*(visit(next(some), token) for token in tokens))
    before = logins.copy()
    assert 40 <= before.total() < 120  # some got in and some did not

    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as some:
            for _ in range(2):
                await asyncio.gather(*(visit(next(some), token) for token in tokens))
    assert max(logins.values()) == 1
    assert logins.total() > before.total()  # what was not used is still good


def kill(pid: int) -> None:
    """SIGKILL to a process of ours and all that it started, it first, so that it starts nothing anew."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(pid, signal.SIGKILL)
    for child in children:
        kill(int(child))


async def test_issuing_a_thousand_tokens_for_a_known_user_writes_nothing(
    client: Client, service: Service, database: Database, api_token: str
) -> None:
    await first_token(client, service, api_token)
    written: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def note(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE", "BEGIN I")):
            written.append(statement)

    before = files_of(database)
    for _ in range(10):
        await asyncio.gather(*(client.issue(api_token) for _ in range(100)))
    assert files_of(database) == before
    assert written == []


async def first_token(client: Client, service: Service, api_token: str) -> str:
    """A token for a person who is known by now. The hour of use, which is written beside the request, is written."""
    token = await client.issue(api_token)
    await asyncio.gather(*service._background)
    return token


def files_of(database: Database) -> list[bytes]:
    """The content of an SQLite database and its log."""
    path = Path(str(database.url.database))
    return [path.read_bytes(), Path(f"{path}-wal").read_bytes()] if database.is_sqlite else []


# --- when the database cannot say yes --------------------------------------------------------------------------------


def session_in(answer: Answer) -> bool:
    return "studio_session" in (answer.header("set-cookie") or "")


def consumed(database: Database) -> int:
    with database.connect() as connection:
        return len(connection.execute(select(consumed_nonces)).all())


@contextmanager
def lost_table(database: Database) -> Iterator[None]:
    _run(database, "ALTER TABLE consumed_nonces RENAME TO elsewhere")
    yield
    _run(database, "ALTER TABLE elsewhere RENAME TO consumed_nonces")


@contextmanager
def read_only(database: Database) -> Iterator[None]:
    """As after a failover, when the old primary is a standby now."""
    _run(database, f"ALTER DATABASE {database.url.database} SET default_transaction_read_only = on")
    database.close()
    yield
    _run(database, f"SET transaction_read_only = off; ALTER DATABASE {database.url.database} RESET ALL")
    database.close()


@contextmanager
def read_only_file(database: Database) -> Iterator[None]:
    """As on a file system that was mounted anew to be read only, and connections that were opened then."""
    path = str(database.url.database)
    if os.geteuid() or subprocess.run(["chattr", "+i", path], check=False).returncode:
        pytest.skip("only root, and only on some file systems, can keep everybody from writing to a file")
    try:
        database.close()
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextmanager
def damaged_table(database: Database) -> Iterator[None]:
    path = Path(str(database.url.database))
    with database.connect() as connection:
        find = "SELECT rootpage FROM sqlite_schema WHERE name = 'consumed_nonces'"
        start = (connection.exec_driver_sql(find).scalar_one() - 1) * 4096
    database.close()  # the last connection leaves no log behind, so the file is all there is
    sound = path.read_bytes()
    path.write_bytes(sound[:start] + b"\xff" * 4096 + sound[start + 4096 :])
    yield
    database.close()
    path.write_bytes(sound)


def _run(database: Database, statement: str) -> None:
    with database.connect() as connection:
        connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("database_url", "fault"),
    [
        ("sqlite", lost_table),
        ("sqlite", damaged_table),
        ("sqlite", read_only_file),
        ("postgresql", lost_table),
        ("postgresql", read_only),
    ],
    indirect=["database_url"],
)
async def test_while_the_ledger_cannot_be_written_the_answer_is_503_and_the_token_is_good_afterwards(
    client: Client, service: Service, database: Database, api_token: str, fault: Callable[[Database], Any]
) -> None:
    token = await first_token(client, service, api_token)
    with fault(database):
        answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
        assert not session_in(answer)
        assert answer.status == 503, answer
        assert answer.header("retry-after")
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.another().get(f"{PAGE}?sso={token}")).status == 401


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_login_whose_commit_loses_its_connection_is_none_and_says_that_the_outcome_is_unknown(
    client: Client, service: Service, database: Database, api_token: str, after: bool
) -> None:
    token = await first_token(client, service, api_token)

    def lose_connection(cursor: Any, statement: str, *_: object) -> None:
        if statement == "COMMIT" and consuming:
            if after:
                cursor.execute(statement)
            cursor.connection.close()
            raise database.engine.dialect.loaded_dbapi.OperationalError("the connection was lost")
        if "consumed_nonces" in statement:
            consuming.append(statement)

    consuming: list[str] = []
    event.listen(database.engine, "do_execute", lose_connection)
    answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
    event.remove(database.engine, "do_execute", lose_connection)
    assert not session_in(answer)
    assert (answer.status, answer.error) == (503, "outcome_unknown")
    assert answer.header("retry-after")
    assert consumed(database) == after
    again = [(await client.another().get(f"{PAGE}?sso={token}")).status for _ in range(2)]
    assert again == ([401, 401] if after else [303, 401])
