"""Keys change while people sign in: no login is lost by a rotation, and none is left by a revocation."""

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


@on_sqlite
async def test_no_token_is_lost_by_a_rotation_however_late_in_its_life_it_is_used(
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
    for made_at, token in issued:
        clock.now = made_at + TTL - 1
        assert (await client.another().get(f"{PAGE}?sso={token}")).status == 303


@on_sqlite
async def test_revoking_a_key_brings_no_older_key_back_to_life(
    client: Client, service: Node, keys_dir: Path, api_token: str, clock: Clock
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


@on_sqlite
async def test_a_key_revoked_while_its_predecessor_still_verifies_gives_that_one_no_more_time(
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
async def test_after_everything_was_revoked_nothing_from_before_works_and_everything_new_does(
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
async def test_a_session_outlives_the_key_that_signed_it_and_ends_with_its_revocation(
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
