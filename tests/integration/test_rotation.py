"""Keys change while people sign in: no login is lost by a rotation, and none is left by a revocation."""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path

import httpx
import pytest

from sso_service import keyring
from sso_service.keyring import SigningKey
from sso_service.service import Service
from sso_service.tokens import Claims, sign
from tests.support._old import ACCOUNT, JANE, PAGE, Client, Clock, Running, command, serving

pytestmark = pytest.mark.anyio

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""What is tested does not depend on the database."""

TTL = 300


@pytest.fixture
def env(database_url: str, keys_dir: Path, tmp_path: Path) -> dict[str, str]:
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir)}


@asynccontextmanager
async def browsers(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    """Browsers none of which keeps a cookie or follows a redirect."""
    async with httpx.AsyncClient(base_url=running.url, timeout=20, follow_redirects=False) as client:
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        yield client


async def issue(client: httpx.AsyncClient, api_token: str) -> str:
    answer = await client.post("/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {api_token}"})
    assert answer.status_code == 201, answer.text
    token: str = answer.json()["token"]
    return token


def forge(key: SigningKey, now: float, user_id: int = 1) -> str:
    """A token that the holder of `key` makes, service or thief."""
    return sign(Claims(int(now) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)


def keys_in(directory: Path) -> list[SigningKey]:
    """The keys of a directory that are not revoked, newest first."""
    return keyring.KeyRing(keyring.load(directory)[0].values()).known_keys()


# --- a running service -----------------------------------------------------------------------------------------------


@ON_SQLITE
async def test_a_token_of_a_key_that_another_node_made_just_now_signs_in_at_once(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as client:
            await issue(client, api_token)  # makes the user
            for _ in range(5):
                key = keyring.rotate(keys_dir, now=int(time.time()), lead=0)
                answer = await client.get(f"{PAGE}?sso={forge(key, time.time())}")
                assert answer.status_code == 303


@ON_SQLITE
async def test_rotation_under_load_loses_no_login(
    env: dict[str, str], keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    statuses: list[int] = []
    rotating = asyncio.Lock()

    async def sign_in_again_and_again(client: httpx.AsyncClient) -> None:
        for _ in range(25):
            statuses.append((await client.get(f"{PAGE}?sso={await issue(client, api_token)}")).status_code)
            if len(statuses) % 10 == 0:
                async with rotating:
                    await asyncio.to_thread(keyring.rotate, keys_dir, now=int(time.time()), lead=0)

    with serving(env, tmp_path / "log", workers=2) as running:
        async with browsers(running) as client:
            await asyncio.gather(*(sign_in_again_and_again(client) for _ in range(8)))
    assert statuses == [303] * 200
    assert len(keys_in(keys_dir)) == 21


@ON_SQLITE
async def test_what_a_revoked_key_signed_is_refused_within_five_seconds_and_new_tokens_work(
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
            start = time.monotonic()
            while (await client.get(f"{PAGE}?sso={outstanding.pop()}")).status_code == 303:
                assert time.monotonic() - start < 5
                await asyncio.sleep(0.1)
            rest = [(await client.get(f"{PAGE}?sso={token}")).status_code for token in outstanding]
            assert set(rest) == {401}
            assert (await client.get(f"{PAGE}?sso={forge(leaked, time.time())}")).status_code == 401
            assert (await client.get("/session", headers={"Cookie": cookie})).status_code == 401
            assert (await client.get(f"{PAGE}?sso={await issue(client, api_token)}")).status_code == 303


# --- with a clock of our own -----------------------------------------------------------------------------------------


def test_rotations_by_several_nodes_at_once_each_leave_a_key_of_their_own(tmp_path: Path) -> None:
    """One that took another's place would make forgeries of what that one has signed already."""
    now = int(time.time())
    keyring.rotate(tmp_path, now=now, lead=0)
    barrier = threading.Barrier(8)

    def rotate(_: int) -> SigningKey:
        barrier.wait(10)
        return keyring.rotate(tmp_path, now=now, lead=0)

    with ThreadPoolExecutor(8) as threads:
        made = [key for _ in range(5) for key in threads.map(rotate, range(8))]
    there = {key.id: key.secret for key in keys_in(tmp_path)}
    assert len(there) == 41
    assert all(there[key.id] == key.secret for key in made)


@ON_SQLITE
async def test_no_token_is_lost_by_a_rotation_however_late_in_its_life_it_is_used(
    client: Client, service: Service, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    start = int(clock())
    clock.now = start
    keyring.rotate(keys_dir, now=start)
    service.keys.refresh()
    moments = (0, 1, 59, 60, 61, 120)
    issued: list[tuple[int, str]] = []
    for moment in moments:
        clock.now = start + moment
        issued.append((start + moment, await client.issue(api_token)))
    for made_at, token in issued:
        clock.now = made_at + TTL - 1
        assert (await client.another().get(f"{PAGE}?sso={token}")).status == 303


@ON_SQLITE
async def test_revoking_a_key_brings_no_older_key_back_to_life(
    client: Client, service: Service, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    async def signs_in(key: SigningKey) -> bool:
        return (await client.another().get(f"{PAGE}?sso={forge(key, clock())}")).status == 303

    await client.issue(api_token)  # makes the user
    [old] = keys_in(keys_dir)
    new = keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert await signs_in(old)
    assert await signs_in(new)
    clock.advance(TTL + 61)
    assert not await signs_in(old)

    [newest] = keyring.revoke(keys_dir, new.id, now=int(clock()))
    service.keys.refresh()
    for _ in range(3):
        assert not await signs_in(old)
        assert not await signs_in(new)
        assert await signs_in(newest)
        clock.advance(86_400)
    keyring.prune(keys_dir, now=int(clock()), lifetime=service.settings.session_ttl)
    service.keys.refresh()
    assert not await signs_in(old)
    assert not await signs_in(new)
    assert await signs_in(newest)
    assert (await client.another().get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303


@ON_SQLITE
async def test_a_key_revoked_while_its_predecessor_still_verifies_gives_that_one_no_more_time(
    client: Client, service: Service, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    async def status(key: SigningKey) -> int:
        return (await client.another().get(f"{PAGE}?sso={forge(key, clock())}")).status

    await client.issue(api_token)
    [old] = keys_in(keys_dir)
    start = clock.now = int(clock())
    new = keyring.rotate(keys_dir, now=start, lead=0)
    clock.advance(100)
    keyring.revoke(keys_dir, new.id, now=int(clock()))
    service.keys.refresh()
    assert (await status(old), await status(new)) == (303, 401)
    clock.now = start + TTL + 60 - 1
    assert await status(old) == 303
    clock.now = start + TTL + 60
    assert await status(old) == 401


@ON_SQLITE
async def test_after_everything_was_revoked_nothing_from_before_works_and_everything_new_does(
    client: Client, service: Service, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    token = await client.issue(api_token)
    signed_in = client.another()
    assert (await signed_in.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
    before = keys_in(keys_dir)

    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    assert (await signed_in.get("/session")).status == 401
    for old in (token, *(forge(key, clock()) for key in before)):
        assert (await client.another().get(f"{PAGE}?sso={old}")).status == 401
    for _ in range(3):
        assert (await client.another().get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
        clock.advance(61)


@ON_SQLITE
async def test_a_session_outlives_the_key_that_signed_it_and_ends_with_its_revocation(
    client: Client, service: Service, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
    [old] = keys_in(keys_dir)
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(service.settings.session_ttl - 1)
    assert (await client.get("/session")).status == 200
    keyring.revoke(keys_dir, old.id, now=int(clock()))
    service.keys.refresh()
    assert (await client.get("/session")).status == 401
