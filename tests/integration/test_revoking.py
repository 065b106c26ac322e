"""`POST /v1/sso_tokens/revoke`: an intranet takes a token back, and learns whether somebody was faster."""

import asyncio
import logging
from collections.abc import Callable
from itertools import product
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
    NEEDS_WRITE_SCOPE,
    OUTCOME_UNKNOWN,
    TOKEN_CONSUMED,
    TOKEN_EXPIRED,
    TOKEN_INVALID,
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
    node,
    refusal,
    settled,
)
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.ledger import number_consumed
from tests.support.outages import away, lost_table, read_only
from tests.support.redeeming import ACTIVE, CONSUMED, EXPIRED, LIFETIME, browse, consume, login, state

pytestmark = pytest.mark.anyio

URL = "/v1/sso_tokens/revoke"
EMAIL = JANE["email"]


async def revoke(client: Client, token: object, secret: str) -> Answer:
    answer = await client.post_json(URL, {"token": token}, token=secret)
    assert answer.header("set-cookie") is None
    assert str(token) not in answer.text
    return answer


def revoked(answer: Answer) -> bool:
    """True if the token was taken back unused, False if somebody had used it."""
    assert answer.status == 200, answer
    content = answer.json()
    assert content in ({"revoked": True}, {"revoked": False})
    assert isinstance(content["revoked"], bool)
    return content["revoked"] is True


# --- taken back or too late ------------------------------------------------------------------------------------------


async def test_an_unused_token_that_is_taken_back_lets_nobody_in(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token, untouched = await client.issue(api_token), await client.issue(api_token)
    assert revoked(await revoke(client, token, api_token)) is True
    assert await browse(client, token) == (401, "token_consumed")
    assert refusal(await consume(client, token, verifier)) == TOKEN_CONSUMED
    assert await state(client, token, verifier) == CONSUMED
    assert number_consumed(database) == 1
    assert await browse(client, untouched) == (303, PAGE)


async def test_a_token_that_was_used_before_is_not_taken_back(client: Client, api_token: str, verifier: str) -> None:
    by_browser, by_api, by_us = [await client.issue(api_token) for _ in range(3)]
    assert await browse(client, by_browser) == (303, PAGE)
    login(await consume(client, by_api, verifier))
    assert revoked(await revoke(client, by_us, api_token)) is True
    for token in (by_browser, by_api, by_us):
        for _ in range(2):
            assert revoked(await revoke(client, token, api_token)) is False


async def test_taking_back_a_token_signs_nobody_out(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert revoked(await revoke(client.another(), token, api_token)) is False
    assert (await client.get("/session")).status == 200


async def wins(way: str, client: Client, token: str, *, issuer: str, verifier: str) -> bool:
    """True if it was this attempt that used the token up."""
    if way == "a browser":
        told = await browse(client, token)
        assert told in {(303, PAGE), (401, "token_consumed")}
        return told[0] == 303
    if way == "a frontend":
        answer = await consume(client.another(), token, verifier)
        assert answer.status == 200 or refusal(answer) == TOKEN_CONSUMED
        return answer.status == 200
    return revoked(await revoke(client.another(), token, issuer))


async def test_of_logins_and_revocations_at_once_exactly_one_wins(
    client: Client, api_token: str, verifier: str, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    issued = [await client.issue(api_token) for _ in range(12)]
    with node(database_url, keys_dir, clock) as other_node:
        # Three times, so that some meet in one transaction.
        attempts = list(product(("a browser", "a frontend", "a revocation"), (client, other_node))) * 3
        results = await asyncio.gather(
            *(
                wins(way, origin, token, issuer=api_token, verifier=verifier)
                for number, token in enumerate(issued)
                # In turn, another is first.
                for way, origin in attempts[number % 6 :] + attempts[: number % 6]
            )
        )
    for at in range(0, len(results), len(attempts)):
        assert sum(results[at : at + len(attempts)]) == 1
    for token in issued:
        assert revoked(await revoke(client, token, api_token)) is False


# --- whoever the token is for ----------------------------------------------------------------------------------------


async def test_the_token_of_a_disabled_user_can_be_taken_back_and_stays_so(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token, other = await client.issue(api_token), await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert revoked(await revoke(client, token, api_token)) is True
    assert revoked(await revoke(client, token, api_token)) is False
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert await browse(client, token) == (401, "token_consumed")
    assert await state(client, token, verifier) == CONSUMED
    assert await state(client, other, verifier) == ACTIVE


async def test_the_token_of_who_is_no_member_any_more_can_be_taken_back_and_stays_so(
    client: Client, service: Service, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token, other = await client.issue(api_token), await client.issue(api_token)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert revoked(await revoke(client, token, api_token)) is True
    assert revoked(await revoke(client, token, api_token)) is False
    await client.issue(api_token)  # makes them a member again
    assert await browse(client, token) == (401, "token_consumed")
    assert await state(client, other, verifier) == ACTIVE

    key = service.keys.ring.signing_key(int(clock())).token_key
    of_nobody = tokens.sign(Claims(int(clock()) + LIFETIME, 4711, ACCOUNT, 7), key)
    assert revoked(await revoke(client, of_nobody, api_token)) is True


async def test_taking_back_gives_no_power_and_needs_none(client: Client, database: Database) -> None:
    """What an API token with a cap may not issue, it may still stop: safety is for everybody."""
    capped = make_api_token(database, max_role=Role.EDITOR)[1]
    token = await client.issue(capped)
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, ACCOUNT, Role.ADMIN)
    assert revoked(await revoke(client, token, capped)) is True
    assert await browse(client, token) == (401, "token_consumed")


# --- tokens that cannot be taken back --------------------------------------------------------------------------------


async def test_an_expired_token_needs_no_taking_back(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    taken, late, unused = [await client.issue(api_token) for _ in range(3)]
    clock.advance(LIFETIME - 0.5)
    assert revoked(await revoke(client, taken, api_token)) is True
    clock.advance(0.5)
    for token in (taken, late, unused):
        assert refusal(await revoke(client, token, api_token)) == TOKEN_EXPIRED
        assert await state(client, token, verifier) == EXPIRED
    assert number_consumed(database) == 1


async def test_a_token_below_the_purge_floor_has_expired(client: Client, api_token: str, database: Database) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        connection.execute(update(consumed_floor).values(claims=b"\xff" * 16))
    assert refusal(await revoke(client, token, api_token)) == TOKEN_EXPIRED
    assert number_consumed(database) == 0


async def test_a_token_that_is_not_ours_is_invalid_and_consumes_nothing(
    client: Client, service: Service, api_token: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    claims = tokens.unsafe_read_claims(token)
    key = service.keys.ring.signing_key(int(clock()))
    for text in (
        "x",
        token[:-1],
        token + "A",
        f"{token}\n",
        token[:-1] + "B",
        "A" * 43,
        "\0",
        "\ud800",
        *(tokens.sign(claims, wrong) for wrong in (bytes(32), key.secret, key.session_key, key.form_key)),
        tokens.sign(Claims(int(clock()) + LIFETIME + 61, claims.user_id, ACCOUNT, 7), key.token_key),
    ):
        answer = await client.post_json(URL, {"token": text}, token=api_token)
        assert refusal(answer) == TOKEN_INVALID, text
    assert number_consumed(database) == 0
    assert await browse(client, token) == (303, PAGE)


async def test_another_account_s_token_is_answered_exactly_like_a_forged_one_and_stays_good(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    await client.issue(api_token)  # so that Jane belongs to both accounts
    foreign, used, taken = [await client.issue(other) for _ in range(3)]
    assert (await client.another().get(f"/?sso={used}")).status == 303
    assert revoked(await revoke(client, taken, other)) is True
    forged = await revoke(client, tokens.sign(tokens.unsafe_read_claims(foreign), bytes(32)), api_token)
    assert refusal(forged) == TOKEN_INVALID
    for token in (foreign, used, taken):
        assert await revoke(client, token, api_token) == forged
    assert (await client.another().get(f"/?sso={foreign}")).status == 303
    clock.advance(LIFETIME)
    for token in (foreign, used, taken):
        assert await revoke(client, token, api_token) == forged
        assert refusal(await revoke(client, token, other)) == TOKEN_EXPIRED


@on_sqlite
async def test_what_a_revoked_key_signed_is_invalid_and_what_a_rotated_one_signed_is_not(
    client: Client, service: Service, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    token, other = await client.issue(api_token), await client.issue(api_token)
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert revoked(await revoke(client, token, api_token)) is True
    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    for each in (token, other):
        assert refusal(await revoke(client, each, api_token)) == TOKEN_INVALID


# --- who may ---------------------------------------------------------------------------------------------------------


async def test_of_several_faults_the_first_is_reported_and_consumes_nothing(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    expired = make_api_token(database, expires_at=int(clock()))[1]
    scopeless = make_api_token(database, scopes=frozenset())[1]
    platform = make_api_token(database, account_id=None, scopes=VERIFY)[1]
    both = make_api_token(database, scopes=WRITE | VERIFY)[1]
    good, too_large = encoded({"token": token}), encoded({"token": token}).ljust(LIMIT + 1)
    cases = {(secret, body): MISSING_TOKEN for secret in ("x", expired) for body in (too_large, b"x", b"{}", good)}
    cases |= {
        (secret, body): NEEDS_WRITE_SCOPE
        for secret in (verifier, platform, scopeless)
        for body in (too_large, b"x", b"{}", good)
    }
    for secret in (api_token, both):
        cases |= {
            (secret, too_large): TOO_LARGE,
            (secret, b"x"): INVALID_JSON,
            (secret, b"[" + good + b"]"): INVALID_JSON,
            (secret, b"{}"): missing("token"),
            (secret, b'{"token": null}'): missing("token"),
            (secret, b'{"token": " \\t"}'): missing("token"),
            (secret, encoded({"token": [token]})): invalid("token", "type"),
            (secret, encoded({"token": 5})): invalid("token", "type"),
            (secret, encoded({"sso": token})): missing("token"),
        }
    answers = {case: await client.request("POST", URL, headers=bearer(case[0]), body=case[1]) for case in cases}
    assert {case: refusal(answer) for case, answer in answers.items()} == cases
    assert number_consumed(database) == 0
    assert revoked(await revoke(client, token, both)) is True


@on_sqlite
async def test_path_and_method_come_before_the_api_token(client: Client) -> None:
    assert refusal(await client.request("POST", f"{URL}/x", body=b"x")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, URL, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"


# --- when the database cannot say yes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database_url", "fault"),
    [("sqlite", lost_table), ("sqlite", away), ("postgresql", lost_table), ("postgresql", read_only)],
    indirect=["database_url"],
)
async def test_while_the_database_cannot_write_nothing_is_said_to_be_taken_back(
    client: Client, api_token: str, database: Database, fault: Callable[[Database], Any]
) -> None:
    token = await settled(client.issue(api_token))
    with fault(database):
        assert refusal(await revoke(client, token, api_token)) == UNAVAILABLE
    assert revoked(await revoke(client, token, api_token)) is True


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_commit_that_loses_its_connection_is_answered_as_outcome_unknown(
    client: Client, api_token: str, database: Database, after: bool
) -> None:
    token = await settled(client.issue(api_token))
    consuming: list[str] = []

    def lose_connection(cursor: Any, statement: str, *_: object) -> None:
        if statement == "COMMIT" and consuming:
            if after:
                cursor.execute(statement)
            cursor.connection.close()
            raise database.engine.dialect.loaded_dbapi.OperationalError("the connection was lost")
        if "INSERT INTO consumed_nonces" in statement:
            consuming.append(statement)

    event.listen(database.engine, "do_execute", lose_connection)
    answer = await revoke(client, token, api_token)
    event.remove(database.engine, "do_execute", lose_connection)
    assert refusal(answer) == OUTCOME_UNKNOWN
    assert number_consumed(database) == after
    assert revoked(await revoke(client, token, api_token)) is not after


# --- secrets ---------------------------------------------------------------------------------------------------------


async def test_no_answer_and_no_log_line_shows_a_token(
    client: Client, api_token: str, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    token, unused = await client.issue(api_token), await client.issue(api_token)
    forged = tokens.sign(tokens.unsafe_read_claims(token), bytes(32))
    answers = [await revoke(client, each, api_token) for each in (token, token, forged, token + "x")]
    answers.append(await revoke(client, unused, "x"))
    with away(database):
        answers.append(await revoke(client, unused, api_token))
    clock.advance(LIFETIME)
    answers.append(await revoke(client, unused, api_token))
    assert {answer.status for answer in answers} == {200, 401, 410, 422, 503}
    assert "INSERT INTO consumed_nonces" in caplog.text
    seen = caplog.text + "".join(answer.text + str(answer.headers) for answer in answers)
    for secret in (token, unused, forged, api_token):
        assert secret not in seen
