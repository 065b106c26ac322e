"""Keys change while users sign in: a rotation loses no login, and a revocation invalidates every one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sso_service import keyring
from sso_service.keyring import SigningKey
from sso_service.services.node import Node
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import PAGE
from tests.support.databases import on_sqlite
from tests.support.keys import TTL, forge, keys_in

pytestmark = pytest.mark.anyio


def test_simultaneous_rotations_create_different_keys(tmp_path: Path) -> None:
    """If one key replaced another, tokens that the other has signed would be refused as forged."""
    now = int(time.time())
    keyring.rotate(tmp_path, now=now, lead=0)
    barrier = threading.Barrier(8)

    def rotate(_: int) -> SigningKey:
        barrier.wait(10)
        return keyring.rotate(tmp_path, now=now, lead=0)

    with ThreadPoolExecutor(8) as threads:
        created = [key for _ in range(5) for key in threads.map(rotate, range(8))]
    present = {key.id: key.secret for key in keys_in(tmp_path)}
    assert len(present) == 41
    assert all(present[key.id] == key.secret for key in created)


@on_sqlite
async def test_a_rotation_does_not_shorten_the_life_of_login_tokens(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
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
    for issued_at, token in issued:
        clock.now = issued_at + TTL - 1
        assert (await client.another().get(f"{PAGE}?sso={token}")).status == 303


@on_sqlite
async def test_revoking_a_key_does_not_reactivate_an_older_key(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
) -> None:
    async def signs_in(key: SigningKey) -> bool:
        return (await client.another().get(f"{PAGE}?sso={forge(key, clock())}")).status == 303

    await client.issue(api_token)  # creates the user
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


@on_sqlite
async def test_revoking_a_key_does_not_extend_its_predecessor(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
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


@on_sqlite
async def test_revoking_all_keys_invalidates_only_what_they_signed(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
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


@on_sqlite
async def test_a_session_survives_a_rotation_but_not_a_revocation(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
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
