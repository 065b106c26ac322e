"""Logins after the signing keys change: rotation, revocation, new keys of other nodes."""

import asyncio
import json
import threading
from pathlib import Path

import pytest

from sso_service import keyring, tokens
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import Node
from sso_service.sessions import Session
from sso_service.settings import Settings
from sso_service.web.app import create_app
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, PAGE
from tests.support.login import code, is_usable, redirects, signs_in
from tests.support.redeeming import LIFETIME

pytestmark = pytest.mark.anyio


async def test_tokens_and_sessions_remain_valid_after_a_key_rotation(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    signed_in = client.another()
    await signed_in.get(f"/?sso={await client.issue(api_token)}")
    new = keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(keyring.ROTATION_LEAD - 1)
    last, too_late = await client.issue(api_token), await client.issue(api_token)
    clock.advance(1)
    assert service.keys.ring.signing_key(int(clock())) == new
    first = await client.issue(api_token)
    clock.advance(LIFETIME - 2)
    assert await is_usable(client, last)
    assert await is_usable(client, first)
    assert (await signed_in.get("/session")).status == 200
    clock.advance(1)
    assert await code(client, f"/?sso={too_late}") == (401, "token_expired")


async def test_an_old_token_of_a_retired_key_is_expired_not_invalid(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    token = await client.issue(api_token)
    await client.get(f"/?sso={token}")
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(7200)
    assert await code(client.another(), f"/?sso={token}") == (401, "token_expired")
    assert redirects(await client.get(f"/?sso={token}"), "/")


async def test_revoking_a_key_ends_its_tokens_and_sessions_immediately(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    signed_in = client.another()
    await signed_in.get(f"/?sso={await client.issue(api_token)}")
    token, used = await client.issue(api_token), await client.issue(api_token)
    assert await is_usable(client, used)
    (new,) = keyring.revoke(keys_dir, service.keys.ring.signing_key(int(clock())).id, now=int(clock()))
    service.keys.refresh()
    assert await code(client, f"/?sso={token}") == (401, "token_invalid")
    assert await code(signed_in, f"/?sso={used}") == (401, "token_invalid")
    assert (await signed_in.get("/session")).status == 401
    clock.advance(LIFETIME)
    assert await code(client, f"/?sso={token}") == (401, "token_invalid")

    assert service.keys.ring.signing_key(int(clock())) == new
    assert await is_usable(client, await client.issue(api_token))


async def test_a_key_that_another_node_has_just_created_is_found(
    client: Client, settings: Settings, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    other_node = Node(settings, service.database, KeyDirectory(keys_dir), clock=clock)
    new = keyring.rotate(keys_dir, now=int(clock()), lead=0)
    other_client = Client(create_app(other_node))
    token = await other_client.issue(api_token)
    assert service.keys.ring.signing_key(int(clock())) != new
    assert signs_in(await client.get(f"/?sso={token}"), "/")

    another = keyring.rotate(keys_dir, now=int(clock()) + 1, lead=0)
    clock.advance(1)
    other_node.keys.refresh()
    user_id = tokens.unsafe_read_claims(token).user_id
    browser = client.another()
    browser.cookies["studio_session"] = other_node.sessions.sign(Session(user_id, ACCOUNT, int(clock())))
    assert service.keys.ring.signing_key(int(clock())) != another
    assert (await browser.get("/session")).status == 200
    other_node.close()


async def test_a_session_that_cannot_be_signed_consumes_nothing(
    client: Client, api_token: str, keys_dir: Path, service: Node, clock: Clock
) -> None:
    token = await client.issue(api_token)
    tombstone = {"id": "z", "signs_from": int(clock()), "revoked_at": int(clock())}
    (keys_dir / "z.json").write_text(json.dumps(tombstone))  # the tombstone arrived before its successor
    service.keys.refresh()
    assert (await client.get(f"{PAGE}?sso={token}")).status == 503
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303


async def test_a_hanging_key_directory_delays_only_forged_tokens(
    client: Client, api_token: str, service: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = await client.issue(api_token)
    release = threading.Event()
    monkeypatch.setattr(service.keys, "refresh_if_changed", lambda: release.wait(10))
    forged = asyncio.create_task(client.another().get(f"{PAGE}?sso={token[:-5]}AAAAA"))
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.get("/healthz")).status == 200
    assert not forged.done()
    assert (await forged).status == 401  # after a time-out the token is refused without reading the directory
    release.set()


async def test_cookies_are_parsed_literally_and_quickly(client: Client, api_token: str) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    session = client.cookies["studio_session"]
    long = 'a="' + '\\"' * 30_000 + '"'
    for sent in (f"{long}; studio_session={session}", f"x=1;studio_session={session}; studio_session=other"):
        assert (await client.get("/session", cookie=sent)).status == 200
    assert (await client.get("/session", cookie=f'studio_session="{session}"')).status == 401
