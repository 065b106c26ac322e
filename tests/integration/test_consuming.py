"""`POST /v1/sso_tokens/consume`: a login for Studios with sessions of their own, once, by whichever way."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
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
    OUTCOME_UNKNOWN,
    TOKEN_CONSUMED,
    TOKEN_EXPIRED,
    TOKEN_INVALID,
    TOO_LARGE,
    UNAVAILABLE,
    VERIFY,
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
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.ledger import number_consumed
from tests.support.outages import away, lost_table, read_only
from tests.support.redeeming import ACTIVE, CONSUME_URL, CONSUMED, LIFETIME, browse, consume, login, state, token_key

pytestmark = pytest.mark.anyio

EMAIL = JANE["email"]

NO_ACCESS = Refusal(403, "no_access")


# --- once ------------------------------------------------------------------------------------------------------------


async def test_a_token_is_consumed_once_and_answered_as_it_was_verified(
    client: Client, api_token: str, verifier: str
) -> None:
    token = await client.issue(api_token)
    verified = (await client.post_json("/v1/sso_tokens/verify", {"token": token}, token=verifier)).json()
    assert login(await consume(client, token, verifier)) == verified
    assert verified["user"] == {"id": tokens.unsafe_read_claims(token).user_id, **JANE}
    for _ in range(3):
        assert refusal(await consume(client, token, verifier)) == TOKEN_CONSUMED
    assert await state(client, token, verifier) == CONSUMED


async def test_the_role_is_the_one_of_now(client: Client, api_token: str, verifier: str, database: Database) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, ACCOUNT, Role.ADMIN)
    content = login(await consume(client, token, verifier))
    assert content["role"] == "admin"
    assert "settings:edit" in content["permissions"]
    assert content["permissions"] == sorted(content["permissions"])


async def test_a_token_is_for_the_browser_or_for_the_api_and_not_for_both(
    client: Client, api_token: str, verifier: str, platform: str
) -> None:
    for secret in (verifier, platform):
        by_api, by_browser = await client.issue(api_token), await client.issue(api_token)
        login(await consume(client, by_api, secret))
        assert await browse(client, by_api) == (401, "token_consumed")
        assert await browse(client, by_browser) == (303, PAGE)
        assert refusal(await consume(client, by_browser, secret)) == TOKEN_CONSUMED
        assert refusal(await consume(client, by_api, secret)) == TOKEN_CONSUMED


async def test_twenty_requests_at_once_on_two_nodes_let_one_in(
    client: Client, api_token: str, verifier: str, database_url: str, keys_dir: Path, clock: Clock, database: Database
) -> None:
    issued = [await client.issue(api_token) for _ in range(3)]
    with node(database_url, keys_dir, clock) as other_node:
        answers = await asyncio.gather(
            *(
                consume(origin.another(), token, verifier)
                for _ in range(10)
                for token in issued
                for origin in (client, other_node)
            )
        )
    counted = Counter(login(answer)["ref"] if answer.status == 200 else refusal(answer)[:2] for answer in answers)
    assert counted == Counter([*map(tokens.ref, issued), *[TOKEN_CONSUMED[:2]] * 57])
    assert number_consumed(database) == 3


async def test_of_many_browsers_and_frontends_at_once_one_gets_in(
    client: Client, api_token: str, verifier: str
) -> None:
    for token in [await client.issue(api_token) for _ in range(5)]:
        browsers, answers = await asyncio.gather(
            asyncio.gather(*(browse(client, token) for _ in range(10))),
            asyncio.gather(*(consume(client.another(), token, verifier) for _ in range(10))),
        )
        ways_in = browsers.count((303, PAGE)) + sum(answer.status == 200 for answer in answers)
        assert ways_in == 1
        assert set(browsers) <= {(303, PAGE), (401, "token_consumed")}
        assert all(answer.status == 200 or refusal(answer) == TOKEN_CONSUMED for answer in answers)


# --- tokens that do not work -----------------------------------------------------------------------------------------


async def test_a_token_is_good_until_the_second_of_its_expiry(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    used, unused = await client.issue(api_token), await client.issue(api_token)
    clock.advance(LIFETIME - 0.5)
    login(await consume(client, used, verifier))
    clock.advance(0.5)
    for token in (used, unused):
        assert refusal(await consume(client, token, verifier)) == TOKEN_EXPIRED
    assert number_consumed(database) == 1


async def test_a_token_that_is_not_ours_is_invalid_and_consumes_nothing(
    client: Client, service: Service, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    claims = tokens.unsafe_read_claims(token)
    key = service.keys.ring.signing_key(int(clock()))
    invalid_tokens = [
        "x",
        token[:-1],
        token + "A",
        f" {token}",
        f"{token}\n",
        token[:-1] + "B",
        token.swapcase(),
        "A" * 43,
        "\0",
        "\ud800",
        "\u00e9" * 43,
        *(tokens.sign(claims, wrong) for wrong in (bytes(32), key.secret, key.session_key, key.form_key)),
        tokens.sign(Claims(int(clock()) + LIFETIME + 61, claims.user_id, ACCOUNT, 7), key.token_key),
    ]
    for secret in (verifier, platform):
        for text in invalid_tokens:
            answer = await client.post_json(CONSUME_URL, {"token": text}, token=secret)
            assert refusal(answer) == TOKEN_INVALID, text
    assert number_consumed(database) == 0
    login(await consume(client, token, verifier))


async def test_another_account_s_token_is_answered_exactly_like_a_forged_one(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    other_verifier = make_api_token(database, account_id=OTHER_ACCOUNT, scopes=VERIFY)[1]
    await client.issue(api_token)  # so that Jane belongs to both accounts
    foreign, used = await client.issue(other), await client.issue(other)
    assert login(await consume(client, used, other_verifier))["account_id"] == OTHER_ACCOUNT
    forged = await consume(client, tokens.sign(tokens.unsafe_read_claims(foreign), bytes(32)), verifier)
    assert refusal(forged) == TOKEN_INVALID
    for token in (foreign, used):
        assert await consume(client, token, verifier) == forged
    login(await consume(client, foreign, other_verifier))
    clock.advance(LIFETIME)
    for token in (foreign, used):
        assert await consume(client, token, verifier) == forged
        assert refusal(await consume(client, token, other_verifier)) == TOKEN_EXPIRED


async def test_a_platform_api_token_consumes_for_every_account(
    client: Client, api_token: str, platform: str, database: Database
) -> None:
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    for secret, account_id in ((api_token, ACCOUNT), (other, OTHER_ACCOUNT)):
        token = await client.issue(secret)
        assert login(await consume(client, token, platform))["account_id"] == account_id
        assert refusal(await consume(client, token, platform)) == TOKEN_CONSUMED


@on_sqlite
async def test_what_a_revoked_key_signed_is_invalid(
    client: Client, service: Service, api_token: str, verifier: str, keys_dir: Path, clock: Clock
) -> None:
    token = await client.issue(api_token)
    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    assert refusal(await consume(client, token, verifier)) == TOKEN_INVALID
    login(await consume(client, await client.issue(api_token), verifier))


@on_sqlite
async def test_a_key_that_another_node_made_just_now_costs_no_login(
    client: Client, service: Service, api_token: str, verifier: str, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    new = keyring.rotate(keys_dir, now=int(clock()), lead=0)
    with node(database_url, keys_dir, clock) as other_node:
        token, another = await other_node.issue(api_token), await other_node.issue(api_token)
    assert service.keys.ring.signing_key(int(clock())) != new
    assert await state(client, token, verifier) == ACTIVE
    login(await consume(client, another, verifier))


# --- who has no access consumes nothing ------------------------------------------------------------------------------


async def test_who_has_no_access_consumes_nothing(
    client: Client, service: Service, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    token, later = await client.issue(api_token), await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    for secret in (verifier, platform):
        assert refusal(await consume(client, token, secret)) == NO_ACCESS
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    login(await consume(client, token, verifier))

    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    for secret in (verifier, platform):
        assert refusal(await consume(client, later, secret)) == NO_ACCESS
        nobody = Claims(int(clock()) + LIFETIME, 4711, ACCOUNT, 7)
        assert refusal(await consume(client, tokens.sign(nobody, token_key(service, clock)), secret)) == NO_ACCESS
    assert number_consumed(database) == 1
    await client.issue(api_token)  # makes them a member again
    login(await consume(client, later, platform))


async def test_a_used_token_of_who_has_no_access_is_used_and_an_expired_one_has_expired(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    used, unused = await client.issue(api_token), await client.issue(api_token)
    login(await consume(client, used, verifier))
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert refusal(await consume(client, used, verifier)) == TOKEN_CONSUMED
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert refusal(await consume(client, used, verifier)) == TOKEN_CONSUMED
    clock.advance(LIFETIME)
    for token in (used, unused):
        assert refusal(await consume(client, token, verifier)) == TOKEN_EXPIRED


async def test_a_token_below_the_purge_floor_has_expired(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        connection.execute(update(consumed_floor).values(claims=b"\xff" * 16))
    assert refusal(await consume(client, token, verifier)) == TOKEN_EXPIRED
    assert number_consumed(database) == 0


# --- when the database cannot say yes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database_url", "fault"),
    [
        ("sqlite", lost_table),
        ("sqlite", away),
        ("postgresql", lost_table),
        ("postgresql", read_only),
        ("postgresql", away),
    ],
    indirect=["database_url"],
)
async def test_while_the_database_cannot_write_it_is_503_and_the_token_is_good_afterwards(
    client: Client, api_token: str, verifier: str, database: Database, fault: Callable[[Database], Any]
) -> None:
    token = await settled(client.issue(api_token))
    assert await settled(state(client, token, verifier)) == ACTIVE  # the hour of the API token's last use is noted now
    with fault(database):
        for _ in range(2):
            assert refusal(await consume(client, token, verifier)) == UNAVAILABLE
        assert refusal(await client.post_json(CONSUME_URL, {"token": token})) == MISSING_TOKEN
    login(await consume(client, token, verifier))
    assert refusal(await consume(client, token, verifier)) == TOKEN_CONSUMED


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_commit_that_loses_its_connection_lets_nobody_in_and_says_that_the_outcome_is_unknown(
    client: Client, api_token: str, verifier: str, database: Database, after: bool
) -> None:
    token = await settled(client.issue(api_token))
    assert await settled(state(client, token, verifier)) == ACTIVE
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
    answer = await consume(client, token, verifier)
    event.remove(database.engine, "do_execute", lose_connection)
    assert refusal(answer) == OUTCOME_UNKNOWN
    assert number_consumed(database) == after
    again = await consume(client, token, verifier)
    assert again.status == (410 if after else 200)


# --- the order of checking -------------------------------------------------------------------------------------------


async def test_of_several_faults_the_first_is_reported_and_consumes_nothing(
    client: Client, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    expired = make_api_token(database, scopes=VERIFY, expires_at=int(clock()))[1]
    scopeless = make_api_token(database, scopes=frozenset())[1]
    good, too_large = encoded({"token": token}), encoded({"token": token}).ljust(LIMIT + 1)
    cases = {(secret, body): MISSING_TOKEN for secret in ("x", expired) for body in (too_large, b"x", b"{}", good)}
    cases |= {
        (secret, body): NEEDS_VERIFY_SCOPE
        for secret in (api_token, scopeless)
        for body in (too_large, b"x", b"{}", good)
    }
    for secret in (verifier, platform):
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
    answers = {case: await client.request("POST", CONSUME_URL, headers=bearer(case[0]), body=case[1]) for case in cases}
    assert {case: refusal(answer) for case, answer in answers.items()} == cases
    assert refusal(await client.request("POST", f"{CONSUME_URL}?token={token}", body=good)) == MISSING_TOKEN
    assert number_consumed(database) == 0
    login(await consume(client, token, verifier))


@on_sqlite
async def test_path_and_method_come_before_the_api_token(client: Client) -> None:
    assert refusal(await client.request("POST", f"{CONSUME_URL}/x", body=b"x")) == Refusal(404, "not_found")
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, CONSUME_URL, body=b"x" * (LIMIT + 1))
        assert refusal(answer) == Refusal(405, "method_not_allowed")
        assert answer.header("allow") == "POST"


async def test_a_browser_s_session_is_no_api_token_and_an_api_token_no_session(
    client: Client, api_token: str, verifier: str
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    token = await client.issue(api_token)
    assert "studio_session" in client.cookies
    assert refusal(await client.post_json(CONSUME_URL, {"token": token})) == MISSING_TOKEN
    login(await consume(client, token, verifier))
    assert (await client.another().get("/session", authorization=f"Bearer {verifier}")).status == 401


async def test_no_answer_and_no_log_line_shows_a_token(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="sqlalchemy")
    token, unused = await client.issue(api_token), await client.issue(api_token)
    forged = tokens.sign(tokens.unsafe_read_claims(token), bytes(32))
    answers = [await consume(client, each, verifier) for each in (token, token, forged, token + "x")]
    answers.append(await consume(client, unused, "x"))
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    answers.append(await consume(client, unused, verifier))
    clock.advance(LIFETIME)
    answers.append(await consume(client, unused, verifier))
    with away(database):
        answers.append(await consume(client, unused, verifier))
    assert {answer.status for answer in answers} == {200, 401, 403, 410, 422, 503}
    assert "INSERT INTO consumed_nonces" in caplog.text
    seen = caplog.text + "".join(answer.text + str(answer.headers) for answer in answers)
    for secret in (token, unused, forged, verifier, api_token):
        assert secret not in seen
