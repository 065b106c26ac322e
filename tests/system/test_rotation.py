"""Rotation and revocation of keys while users sign in."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path

import httpx
import pytest

from sso_service import keyring
from tests.support.data import JANE, PAGE
from tests.support.databases import on_sqlite
from tests.support.keys import forge, keys_in
from tests.support.processes import Running, command, serving
from tests.support.waiting import PATIENCE, Stopwatch

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def browsers(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that keeps no cookies and follows no redirects, like a new browser for each request."""
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE, follow_redirects=False) as client:
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        yield client


async def issue(client: httpx.AsyncClient, api_token: str) -> str:
    answer = await client.post("/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {api_token}"})
    assert answer.status_code == 201, answer.text
    token: str = answer.json()["token"]
    return token


@on_sqlite
async def test_a_new_key_of_another_node_is_accepted_at_once(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as client:
            await issue(client, api_token)  # creates the user
            for _ in range(5):
                key = keyring.rotate(keys_dir, now=int(time.time()), lead=0)
                answer = await client.get(f"{PAGE}?sso={forge(key, time.time())}")
                assert answer.status_code == 303


@on_sqlite
async def test_rotation_under_load_loses_no_login(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    statuses: list[int] = []
    rotating = asyncio.Lock()

    async def sign_in_repeatedly(client: httpx.AsyncClient) -> None:
        for _ in range(25):
            statuses.append((await client.get(f"{PAGE}?sso={await issue(client, api_token)}")).status_code)
            if len(statuses) % 10 == 0:
                async with rotating:
                    await asyncio.to_thread(keyring.rotate, keys_dir, now=int(time.time()), lead=0)

    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as client:
            await asyncio.gather(*(sign_in_repeatedly(client) for _ in range(8)))
    assert statuses == [303] * 200
    assert len(keys_in(keys_dir)) == 21


@on_sqlite
async def test_a_revocation_takes_effect_within_five_seconds(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    with serving(env, tmp_path / "log") as running:
        async with browsers(running) as client:
            outstanding = [await issue(client, api_token) for _ in range(120)]
            login = await client.get(f"{PAGE}?sso={outstanding.pop()}")
            cookie = login.headers["set-cookie"].partition(";")[0]
            assert (await client.get("/session", headers={"Cookie": cookie})).status_code == 200

            [leaked] = keys_in(keys_dir)
            revoked = await asyncio.to_thread(command, "keys", "revoke", leaked.id, env=env)
            assert revoked.returncode == 0, revoked.stderr
            start = Stopwatch(running.process.pid)
            while (await client.get(f"{PAGE}?sso={outstanding.pop()}")).status_code == 303:
                assert start.own_seconds < 5
                await asyncio.sleep(0.1)
            rest = [(await client.get(f"{PAGE}?sso={token}")).status_code for token in outstanding]
            assert set(rest) == {401}
            assert (await client.get(f"{PAGE}?sso={forge(leaked, time.time())}")).status_code == 401
            assert (await client.get("/session", headers={"Cookie": cookie})).status_code == 401
            assert (await client.get(f"{PAGE}?sso={await issue(client, api_token)}")).status_code == 303


@on_sqlite
async def test_a_fifo_delays_no_revocation_and_a_restored_key_stays_revoked(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    os.mkfifo(keys_dir / "before.json")
    [leaked] = keys_in(keys_dir)
    backup = (keys_dir / f"{leaked.id}.json").read_bytes()
    with serving(env, tmp_path / "log") as running:
        async with browsers(running) as client:
            os.mkfifo(keys_dir / "after.json")
            login = await client.get(f"{PAGE}?sso={await issue(client, api_token)}")
            cookie = {"Cookie": login.headers["set-cookie"].partition(";")[0]}
            await asyncio.to_thread(command, "keys", "revoke", leaked.id, env=env)
            start = Stopwatch(running.process.pid)
            while (await client.get("/session", headers=cookie)).status_code == 200:
                assert start.own_seconds < 5
                await asyncio.sleep(0.1)

            (keys_dir / f"{leaked.id}.json").write_bytes(backup)
            while "sso_key_files_unusable 3.0" not in (await client.get("/metrics")).text:  # it has read the file
                assert start.seconds < PATIENCE
                await asyncio.sleep(0.1)
            assert (await client.get("/session", headers=cookie)).status_code == 401
            assert (await client.get(f"{PAGE}?sso={forge(leaked, time.time())}")).status_code == 401
            assert (await client.get(f"{PAGE}?sso={await issue(client, api_token)}")).status_code == 303
            ready = await client.get("/readyz")
            assert ready.status_code == 503
            assert "'after.json' is not a regular file, 'before.json' is not a regular file" in ready.text
