"""`POST /v1/sso_tokens/verify`: what a token is worth now, for a Studio that asks. It uses nothing up."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from sso_service import keyring, tokens
from sso_service.database import administration
from sso_service.database.engine import Database
from sso_service.database.schema import consumed_floor
from sso_service.permissions import Role
from sso_service.service import Service
from sso_service.tokens import Claims
from tests.support.api import (
    INVALID_JSON,
    LIMIT,
    MISSING_TOKEN,
    NEEDS_VERIFY_SCOPE,
    TOO_LARGE,
    UNAVAILABLE,
    VERIFY,
    WRITE,
    Refusal,
    bearer,
    encoded,
    invalid,
    make_api_token,
    missing,
    padded,
    refusal,
    settled,
)
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite, watching
from tests.support.outages import away, without
from tests.support.redeeming import (
    ACTIVE,
    BAD_SIGNATURE,
    CONSUMED,
    EXPIRED,
    LIFETIME,
    MALFORMED,
    NO_ACCESS,
    VERIFY_URL,
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
    client: Client, service: Service, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
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


async def test_another_account_s_token_is_answered_exactly_like_a_forged_one(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    """Also when it is expired, consumed or of nobody: else an account could ask what happens in another."""
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    other_verifier = make_api_token(database, account_id=OTHER_ACCOUNT, scopes=VERIFY)[1]
    # Jane belongs to both accounts, John only to the other.
    await client.issue(api_token)
    foreign, used, johns = [await client.issue(other, person) for person in (JANE, JANE, JOHN)]
    assert (await client.another().get(f"/?sso={used}")).status == 303
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))

    def told(answer: Answer) -> tuple[int, list[str], object]:
        # Lengths and dates may differ; the names of the headers may not.
        return answer.status, [name for name, _ in answer.headers], {**answer.json(), "ref": None}

    forged = told(await ask(client, tokens.sign(tokens.unsafe_read_claims(foreign), bytes(32)), verifier))
    assert forged[2] == {"active": False, "reason": BAD_SIGNATURE, "ref": None}
    for token, reason in ((foreign, ACTIVE), (used, CONSUMED), (johns, NO_ACCESS)):
        assert told(await ask(client, token, verifier)) == forged
        assert await state(client, token, other_verifier) == reason
    clock.advance(LIFETIME)
    for token in (foreign, used, johns):
        assert told(await ask(client, token, verifier)) == forged
        assert await state(client, token, other_verifier) == EXPIRED


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


@on_sqlite
async def test_a_token_that_claims_to_live_longer_than_tokens_do_has_a_bad_signature(
    client: Client, service: Service, api_token: str, verifier: str, clock: Clock
) -> None:
    claims = tokens.unsafe_read_claims(await client.issue(api_token))
    latest = int(clock()) + LIFETIME + 60
    key = token_key(service, clock)
    overlong = tokens.sign(Claims(latest + 1, claims.user_id, ACCOUNT, 7), key)
    assert await state(client, tokens.sign(Claims(latest, claims.user_id, ACCOUNT, 7), key), verifier) == ACTIVE
    assert await state(client, overlong, verifier) == BAD_SIGNATURE
    assert await state(client, tokens.sign(Claims(2**32 - 1, claims.user_id, ACCOUNT, 7), key), verifier) == (
        BAD_SIGNATURE
    )
    clock.advance(1)
    assert await state(client, overlong, verifier) == ACTIVE


@on_sqlite
async def test_a_token_is_as_good_as_its_key(
    client: Client, service: Service, api_token: str, verifier: str, keys_dir: Path, clock: Clock
) -> None:
    token, used = await client.issue(api_token), await client.issue(api_token)
    assert await works(client, used)
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert await state(client, token, verifier) == ACTIVE
    assert await state(client, await client.issue(api_token), verifier) == ACTIVE

    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    for each in (token, used):
        assert await state(client, each, verifier) == BAD_SIGNATURE
    clock.advance(LIFETIME)
    for each in (token, used):
        assert await state(client, each, verifier) == BAD_SIGNATURE
    assert await state(client, await client.issue(api_token), verifier) == ACTIVE


@on_sqlite
async def test_a_token_of_a_key_that_was_rotated_out_long_ago_has_expired(
    client: Client, service: Service, api_token: str, verifier: str, keys_dir: Path, clock: Clock
) -> None:
    token = await client.issue(api_token)
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(7200)
    assert await state(client, token, verifier) == EXPIRED


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


async def test_a_token_below_the_purge_floor_has_expired(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    """Its row may be gone, so nobody can say that it was not used; it could not be consumed either."""
    token = await client.issue(api_token)
    with changing(database) as connection:
        connection.execute(update(consumed_floor).values(claims=b"\xff" * 16))
    assert await state(client, token, verifier) == EXPIRED


# --- what the database is not asked ----------------------------------------------------------------------------------


async def test_a_malformed_forged_or_expired_token_is_judged_without_asking_the_database_about_it(
    client: Client, service: Service, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
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


async def test_while_the_ledger_cannot_be_read_no_token_is_active(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await settled(client.issue(api_token))
    with without(database, "consumed_nonces"):
        assert refusal(await ask(client, token, verifier)) == UNAVAILABLE
    assert await state(client, token, verifier) == ACTIVE


async def test_while_the_database_is_away_nothing_is_said_of_any_token(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await settled(client.issue(api_token))
    with away(database):
        for text in (token, "x"):
            assert refusal(await ask(client, text, verifier)) == UNAVAILABLE
        assert refusal(await client.post_json(VERIFY_URL, {"token": token})) == MISSING_TOKEN
    assert await state(client, token, verifier) == ACTIVE


# --- the order of checking -------------------------------------------------------------------------------------------


async def test_of_several_faults_the_first_is_reported(
    client: Client, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    expired = make_api_token(database, scopes=VERIFY, expires_at=int(clock()))[1]
    revoked_id, revoked = make_api_token(database, scopes=VERIFY)
    with changing(database) as connection:
        administration.revoke_api_token(connection, revoked_id, now=int(clock()))
    scopeless = make_api_token(database, scopes=frozenset())[1]
    both = make_api_token(database, scopes=WRITE | VERIFY)[1]
    good = encoded({"token": await client.issue(api_token)})
    too_large, no_json, no_object, no_token = b"x" * (LIMIT + 1), b"x", b"[]", b"{}"

    unidentified = dict.fromkeys([too_large, no_json, no_object, no_token, good], MISSING_TOKEN)
    unprivileged = dict.fromkeys([too_large, no_json, no_object, no_token, good], NEEDS_VERIFY_SCOPE)
    entitled = {
        too_large: TOO_LARGE,
        padded(LIMIT + 1, {}): TOO_LARGE,
        padded(LIMIT + 1, {"token": "x"}): TOO_LARGE,
        no_json: INVALID_JSON,
        b"": INVALID_JSON,
        b"null": INVALID_JSON,
        b'"x"': INVALID_JSON,
        no_object: INVALID_JSON,
        no_token: missing("token"),
        encoded({"Token": "x", "sso": "x", "tokens": ["x"]}): missing("token"),
    }
    entitled |= {encoded({"token": blank}): missing("token") for blank in (None, "", " ", "\n\t ")}
    wrong_types: list[object] = [0, 1, 1.5, True, False, [], ["x"], {}, {"token": "x"}]
    entitled |= {encoded({"token": value}): invalid("token", "type") for value in wrong_types}

    cases = {(secret, body): told for secret in ("x", expired, revoked) for body, told in unidentified.items()}
    cases |= {(secret, body): told for secret in (api_token, scopeless) for body, told in unprivileged.items()}
    cases |= {(secret, body): told for secret in (verifier, platform, both) for body, told in entitled.items()}
    answers = {case: await client.request("POST", VERIFY_URL, headers=bearer(case[0]), body=case[1]) for case in cases}
    assert {case: refusal(answer) for case, answer in answers.items()} == cases
    for secret in (verifier, platform, both):
        assert (await client.request("POST", VERIFY_URL, headers=bearer(secret), body=good)).json()["active"] is True


@on_sqlite
async def test_path_and_method_come_before_the_api_token(client: Client) -> None:
    assert refusal(await client.request("POST", f"{VERIFY_URL}/x", body=b"x")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, VERIFY_URL, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"


@on_sqlite
async def test_what_is_not_asked_for_is_ignored(client: Client, api_token: str, verifier: str) -> None:
    token = await client.issue(api_token)
    extra = {"token": token, "account_id": OTHER_ACCOUNT, "email": 5, "x": "\0\ud800", "y": [None, {}]}
    for body in (encoded(extra), b'{"token": "x", ' + encoded(extra)[1:]):  # of equal names the last counts
        answer = await client.request("POST", f"{VERIFY_URL}?token=x&sso={token}", headers=bearer(verifier), body=body)
        assert answer.json()["active"] is True
        assert answer.header("set-cookie") is None
    in_query = await client.request("POST", f"{VERIFY_URL}?token={token}", headers=bearer(verifier), body=b"{}")
    assert refusal(in_query) == missing("token")
    assert await state(client, token, verifier) == ACTIVE


async def test_no_answer_and_no_log_line_shows_a_token(
    client: Client,
    api_token: str,
    verifier: str,
    database: Database,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    token = await client.issue(api_token)
    forged = tokens.sign(tokens.unsafe_read_claims(token), bytes(32))
    answers = [await ask(client, text, secret) for text in (token, forged, token + "x") for secret in (verifier, "x")]
    answers += [
        await ask(client, [token], verifier),
        await client.request("POST", VERIFY_URL, headers=bearer(verifier), body=token.encode()),
        await client.request("GET", f"{VERIFY_URL}?token={token}", headers=bearer(verifier)),
        await client.request("POST", f"{VERIFY_URL}/{token}", headers=bearer(verifier)),
    ]
    clock.advance(LIFETIME)
    answers.append(await ask(client, token, verifier))
    with away(database):
        answers.append(await ask(client, token, verifier))
    assert {answer.status for answer in answers} == {200, 400, 401, 404, 405, 422, 503}
    assert "SELECT" in caplog.text
    seen = caplog.text + "".join(answer.text + str(answer.headers) for answer in answers)
    for secret in (token, forged, verifier, api_token):
        assert secret not in seen
