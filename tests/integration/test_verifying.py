"""`POST /v1/sso_tokens/verify`: what a token is worth now, for a Studio that asks. It uses nothing up."""

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


async def works(client: Client, token: str) -> bool:
    """True if `token` signs in a browser that nobody is signed in at. Consumes it."""
    answer = await client.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401, 403}
    return answer.status == 303


# --- a token that is good --------------------------------------------------------------------------------------------


async def test_a_good_token_is_answered_with_all_that_a_session_needs(
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


async def test_role_and_permissions_are_those_of_now(
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


async def test_a_platform_api_token_verifies_for_every_account_and_says_which(
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
    assert await settled(state(client, token, verifier)) == ACTIVE  # the hour of the API token's last use is noted now
    with watching(database) as mark:
        before = mark()
        answers = await settled(asyncio.gather(*(state(client.another(), token, verifier) for _ in range(20))))
        assert set(answers) == {ACTIVE}
        assert mark() == before
        assert await works(client, token)
        assert mark() != before  # or this test could not fail


async def test_each_reason_is_told(
    client: Client, service: Node, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    used, good, disabled, removed = [
        await client.issue(api_token, {**JANE, "email": f"{name}@example.com"})
        for name in ("used", "good", "disabled", "removed")
    ]
    assert await works(client, used)
    with changing(database) as connection:
        administration.disable_user(connection, "disabled@example.com", now=int(clock()))
        administration.remove_member(connection, "removed@example.com", ACCOUNT)
    claims = tokens.unsafe_read_claims(good)
    key = token_key(service, clock)
    expired = tokens.sign(Claims(int(clock()), claims.user_id, ACCOUNT, 7), key)
    nobody = tokens.sign(Claims(claims.expires_at, 4711, ACCOUNT, 7), key)
    expected = {
        good: ACTIVE,
        good[:-1]: MALFORMED,
        tokens.sign(claims, bytes(32)): BAD_SIGNATURE,
        expired: EXPIRED,
        used: CONSUMED,
        disabled: NO_ACCESS,
        removed: NO_ACCESS,
        nobody: NO_ACCESS,
    }
    for secret in (verifier, platform):
        assert {token: await state(client, token, secret) for token in expected} == expected


# --- when a token is not good, and why -------------------------------------------------------------------------------


@on_sqlite
async def test_any_text_is_judged(client: Client, api_token: str, verifier: str) -> None:
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
        token[:-1] + chr(0x212A),  # a Kelvin sign, which is a K to some
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
    assert await works(client, token)
    for passed, reason, of_unused in (
        (0, CONSUMED, ACTIVE),
        (LIFETIME - 1, CONSUMED, ACTIVE),
        (LIFETIME, EXPIRED, EXPIRED),
        (LIFETIME + 7200, EXPIRED, EXPIRED),
        (LIFETIME - 1, CONSUMED, ACTIVE),  # a clock that jumps back
        (-60, CONSUMED, ACTIVE),
        (-61, BAD_SIGNATURE, BAD_SIGNATURE),  # from now on it would live longer than tokens do
    ):
        with shifted(clock, passed):
            assert await state(client, token, verifier) == reason, passed
            assert await state(client, unused, verifier) == of_unused, passed


@contextmanager
def shifted(clock: Clock, seconds: float) -> Iterator[None]:
    clock.advance(seconds)
    yield
    clock.advance(-seconds)


async def test_access_is_what_holds_now_and_a_consumed_token_is_consumed_whoever_has_access(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    token, used = await client.issue(api_token), await client.issue(api_token)
    assert await works(client, used)

    async def states() -> tuple[str, str]:
        return await state(client, token, verifier), await state(client, used, verifier)

    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert await states() == (NO_ACCESS, CONSUMED)
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert await states() == (ACTIVE, CONSUMED)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert await states() == (NO_ACCESS, CONSUMED)
    clock.advance(LIFETIME)
    assert await states() == (EXPIRED, EXPIRED)
    clock.advance(-LIFETIME)
    await client.issue(api_token)  # makes them a member again
    assert await states() == (ACTIVE, CONSUMED)


async def test_signing_out_everywhere_ends_sessions_and_no_token(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.sign_out_user(connection, EMAIL, now=int(clock()))
    assert await state(client, token, verifier) == ACTIVE


# --- what the database is not asked ----------------------------------------------------------------------------------


async def test_a_malformed_forged_or_expired_token_is_judged_without_asking_the_database_about_it(
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
    asked: list[tuple[str, str]] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def note(_c: object, _r: object, statement: str, parameters: object, *_: object) -> None:
        if "SELECT" in statement:
            asked.append((statement, repr(parameters)))

    for secret in (verifier, platform):
        assert await settled(state(client, token, secret)) == ACTIVE
    with without(database, "consumed_nonces", "consumed_floor"):
        for secret in (verifier, platform):
            # To all of them the same: who holds this API token?
            questions = []
            for each, reason in expected.items():
                asked.clear()
                assert await state(client, each, secret) == reason
                questions.append(asked.copy())
            assert questions == [questions[0]] * len(expected)
            assert len(questions[0]) == 1
    asked.clear()
    assert await state(client, token, verifier) == ACTIVE
    assert len(asked) > 1  # or this test could not fail
