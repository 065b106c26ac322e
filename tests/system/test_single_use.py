"""The promise of single use, by a service in processes of its own."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.cookiejar import DefaultCookiePolicy
from itertools import cycle
from pathlib import Path

import httpx
import pytest

from tests.support.data import JANE, PAGE
from tests.support.processes import Running, serving
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def browsers(running: Running) -> AsyncIterator[Iterator[httpx.AsyncClient]]:
    """Browsers in turn, none of which keeps a cookie or follows a redirect."""
    async with AsyncExitStack() as stack:
        made = [httpx.AsyncClient(base_url=running.url, timeout=PATIENCE, follow_redirects=False) for _ in range(10)]
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
