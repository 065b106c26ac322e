"""`POST /v1/sso_tokens/verify`: check a login token without consuming it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from sso_service import tokens
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.api import (
    LIMIT,
    make_api_token,
    settled,
)
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite, watching
from tests.support.outages import without
from tests.support.redeeming import (
    ACTIVE,
    BAD_SIGNATURE,
    CONSUMED,
    EXPIRED,
    LIFETIME,
    MALFORMED,
    NO_ACCESS,
    ask,
    ref,
    state,
    token_key,
)

pytestmark = pytest.mark.anyio

EMAIL = JANE["email"]


async def signs_in(client: Client, token: str) -> bool:
    """True if `token` signs in a fresh browser. Consumes the token."""
    answer = await client.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401, 403}
    return answer.status == 303


# --- Valid tokens ----------------------------------------------------------------------------------------------------


async def test_a_valid_token_is_verified_with_user_account_role_and_expiry(
    client: Client, api_token: str, verifier: str, platform: str, clock: Clock
) -> None:
    clock.now = int(clock.now) + 0.9
    token = await client.issue(api_token)
    expected: dict[str, Any] = {
        "active": True,
        "ref": ref(token),
        "user": {"id": tokens.unsafe_read_claims(token).user_id, **JANE},
        "account_id": ACCOUNT,
        "role": "editor",
        "permissions": ["ideas:edit", "ideas:view", "posts:edit", "posts:view"],
        "expires_at": int(clock()) + LIFETIME,
    }
    for secret in (verifier, platform):
        answer = await ask(client, token, secret)
        assert answer.status == 200
        assert answer.json() == expected
        assert token not in answer.text


async def test_verifying_reports_the_current_role_and_permissions(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await client.issue(api_token)
    content = ("posts", "ideas", "areas", "topics", "templates")
    for role, sections in ((Role.PUBLISHER, content), (Role.ADMIN, (*content, "settings"))):
        with changing(database) as connection:
            administration.set_role(connection, EMAIL, ACCOUNT, role)
        answer = (await ask(client, token, verifier)).json()
        actions = ("view", "edit", "create", "delete", "publish")
        assert answer["role"] == role
        assert answer["permissions"] == sorted(f"{section}:{action}" for section in sections for action in actions)


async def test_a_platform_api_token_verifies_tokens_of_every_account(
    client: Client, api_token: str, platform: str, database: Database
) -> None:
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    here, there = await client.issue(api_token), await client.issue(other)
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, OTHER_ACCOUNT, Role.PUBLISHER)
    for token, account_id, role in ((here, ACCOUNT, "editor"), (there, OTHER_ACCOUNT, "publisher")):
        content = (await ask(client, token, platform)).json()
        assert (content["active"], content["account_id"], content["role"]) == (True, account_id, role)
        assert content["user"]["email"] == EMAIL


async def test_verifying_consumes_nothing_and_writes_nothing(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await settled(client.issue(api_token))
    assert await settled(state(client, token, verifier)) == ACTIVE  # records the API token's hour of use
    with watching(database) as fingerprint:
        before = fingerprint()
        answers = await settled(asyncio.gather(*(state(client.another(), token, verifier) for _ in range(20))))
        assert set(answers) == {ACTIVE}
        assert fingerprint() == before
        assert await signs_in(client, token)
        assert fingerprint() != before  # proves that the check above can fail


async def test_every_reason_for_an_inactive_token_is_reported(
    client: Client, service: Node, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    used, good, disabled, removed = [
        await client.issue(api_token, {**JANE, "email": f"{name}@example.com"})
        for name in ("used", "good", "disabled", "removed")
    ]
    assert await signs_in(client, used)
    with changing(database) as connection:
        administration.disable_user(connection, "disabled@example.com", now=int(clock()))
        administration.remove_member(connection, "removed@example.com", ACCOUNT)
    claims = tokens.unsafe_read_claims(good)
    key = token_key(service, clock)
    expired = tokens.sign(Claims(int(clock()), claims.user_id, ACCOUNT, 7), key)
    unknown_user = tokens.sign(Claims(claims.expires_at, 4711, ACCOUNT, 7), key)
    expected = {
        good: ACTIVE,
        good[:-1]: MALFORMED,
        tokens.sign(claims, bytes(32)): BAD_SIGNATURE,
        expired: EXPIRED,
        used: CONSUMED,
        disabled: NO_ACCESS,
        removed: NO_ACCESS,
        unknown_user: NO_ACCESS,
    }
    for secret in (verifier, platform):
        assert {token: await state(client, token, secret) for token in expected} == expected


# --- Inactive tokens -------------------------------------------------------------------------------------------------


@on_sqlite
async def test_malformed_and_forged_texts_are_reported_as_such(client: Client, api_token: str, verifier: str) -> None:
    token = await client.issue(api_token)
    malformed = [
        "x",
        token[:-1],
        token + "A",
        token + "=",
        token + "\n",
        f" {token}",
        f"{token} ",
        f"{token},{token}",
        "%" + token[1:],
        "/" + token[1:],
        "+" * 43,
        token[:-1] + "B",  # the spare bits are not zero
        token[:-1] + chr(0x212A),  # the Kelvin sign, which lower-cases to k
        "\0",
        "\x7f\x85",
        "\u00e9" * 43,
        "\U0001f600" * 43,
        "\u0661" * 43,
        "null",
        "A" * (LIMIT - 100),
    ]
    assert {text: await state(client, text, verifier) for text in malformed} == dict.fromkeys(malformed, MALFORMED)
    for lone in ("\ud800", token + "\udc00", "\udfff" * 43):
        answer = await ask(client, lone, verifier)
        assert answer.status == 200
        assert answer.json().keys() == {"active", "reason", "ref"}
        assert (answer.json()["active"], answer.json()["reason"]) == (False, MALFORMED)
    changed = [
        "A" * 43,
        token.swapcase()[:-1] + "A",
        token[:20] + ("A" if token[20] != "A" else "B") + token[21:],
        token[-43:-1] + ("A" if token[-1] != "A" else "E"),
    ]
    assert {text: await state(client, text, verifier) for text in changed} == dict.fromkeys(changed, BAD_SIGNATURE)
    assert await state(client, token, verifier) == ACTIVE


async def test_a_consumed_token_is_never_active_again(
    client: Client, api_token: str, verifier: str, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    token, unused = await client.issue(api_token), await client.issue(api_token)
    assert await signs_in(client, token)
    for elapsed, reason, unused_state in (
        (0, CONSUMED, ACTIVE),
        (LIFETIME - 1, CONSUMED, ACTIVE),
        (LIFETIME, EXPIRED, EXPIRED),
        (LIFETIME + 7200, EXPIRED, EXPIRED),
        (LIFETIME - 1, CONSUMED, ACTIVE),  # the clock is set back
        (-60, CONSUMED, ACTIVE),
        (-61, BAD_SIGNATURE, BAD_SIGNATURE),  # the lifetime would exceed the maximum
    ):
        with shifted(clock, elapsed):
            assert await state(client, token, verifier) == reason, elapsed
            assert await state(client, unused, verifier) == unused_state, elapsed


@contextmanager
def shifted(clock: Clock, seconds: float) -> Iterator[None]:
    clock.advance(seconds)
    yield
    clock.advance(-seconds)


async def test_access_is_checked_now_and_a_consumed_token_stays_consumed(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    token, used = await client.issue(api_token), await client.issue(api_token)
    assert await signs_in(client, used)

    async def states() -> tuple[str, str]:
        return await state(client, token, verifier), await state(client, used, verifier)

    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert await states() == (NO_ACCESS, CONSUMED)
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert await states() == (EXPIRED, CONSUMED)
    token = await client.issue(api_token)
    assert await states() == (ACTIVE, CONSUMED)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert await states() == (NO_ACCESS, CONSUMED)
    clock.advance(LIFETIME + 1)  # the second token was dated a second ahead, because the user was signed out
    assert await states() == (EXPIRED, EXPIRED)
    clock.advance(-LIFETIME - 1)
    again = await client.issue(api_token)  # renews the membership
    assert await states() == (EXPIRED, CONSUMED)
    assert await state(client, again, verifier) == ACTIVE


async def test_signing_out_everywhere_ends_unused_tokens(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.sign_out_user(connection, EMAIL, now=int(clock()))
    assert await state(client, token, verifier) == EXPIRED
    assert await state(client, await client.issue(api_token), verifier) == ACTIVE


# --- Database queries ------------------------------------------------------------------------------------------------


async def test_a_malformed_forged_or_expired_token_costs_no_database_query(
    client: Client, service: Node, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    token = await settled(client.issue(api_token))
    claims = tokens.unsafe_read_claims(token)
    key = token_key(service, clock)
    expected = {
        "x": MALFORMED,
        tokens.sign(claims, bytes(32)): BAD_SIGNATURE,
        tokens.sign(Claims(int(clock()) + 1000, claims.user_id, ACCOUNT, 7), key): BAD_SIGNATURE,
        tokens.sign(Claims(int(clock()), claims.user_id, ACCOUNT, 7), key): EXPIRED,
    }
    queries: list[tuple[str, str]] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def record(_c: object, _r: object, statement: str, parameters: object, *_: object) -> None:
        if "SELECT" in statement:
            queries.append((statement, repr(parameters)))

    for secret in (verifier, platform):
        assert await settled(state(client, token, secret)) == ACTIVE
    with without(database, "consumed_nonces", "consumed_floor"):
        for secret in (verifier, platform):
            # The only query looks up the API token, and it is the same for all tokens.
            recorded = []
            for each, reason in expected.items():
                queries.clear()
                assert await state(client, each, secret) == reason
                recorded.append(queries.copy())
            assert recorded == [recorded[0]] * len(expected)
            assert len(recorded[0]) == 1
    queries.clear()
    assert await state(client, token, verifier) == ACTIVE
    assert len(queries) > 1  # proves that the check above can fail
