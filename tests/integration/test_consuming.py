"""`POST /v1/sso_tokens/consume`: one login for a Studio with sessions of its own."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from sso_service import tokens
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.api import (
    MISSING_TOKEN,
    TOKEN_CONSUMED,
    TOKEN_EXPIRED,
    Refusal,
    make_api_token,
    node,
    refusal,
)
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing
from tests.support.ledger import number_consumed
from tests.support.redeeming import CONSUME_URL, CONSUMED, LIFETIME, browse, consume, login, state, token_key

pytestmark = pytest.mark.anyio

EMAIL = JANE["email"]

NO_ACCESS = Refusal(403, "no_access")


# --- Single use ------------------------------------------------------------------------------------------------------


async def test_a_token_is_consumed_once_with_the_content_of_verifying(
    client: Client, api_token: str, verifier: str
) -> None:
    token = await client.issue(api_token)
    verified = (await client.post_json("/v1/sso_tokens/verify", {"token": token}, token=verifier)).json()
    assert login(await consume(client, token, verifier)) == verified
    assert verified["user"] == {"id": tokens.unsafe_read_claims(token).user_id, **JANE}
    for _ in range(3):
        assert refusal(await consume(client, token, verifier)) == TOKEN_CONSUMED
    assert await state(client, token, verifier) == CONSUMED


async def test_consuming_reports_the_current_role(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, ACCOUNT, Role.ADMIN)
    content = login(await consume(client, token, verifier))
    assert content["role"] == "admin"
    assert "settings:edit" in content["permissions"]
    assert content["permissions"] == sorted(content["permissions"])


async def test_a_token_is_redeemed_either_in_the_browser_or_through_the_api(
    client: Client, api_token: str, verifier: str, platform: str
) -> None:
    for secret in (verifier, platform):
        by_api, by_browser = await client.issue(api_token), await client.issue(api_token)
        login(await consume(client, by_api, secret))
        assert await browse(client, by_api) == (401, "token_consumed")
        assert await browse(client, by_browser) == (303, PAGE)
        assert refusal(await consume(client, by_browser, secret)) == TOKEN_CONSUMED
        assert refusal(await consume(client, by_api, secret)) == TOKEN_CONSUMED


async def test_twenty_concurrent_requests_on_two_nodes_consume_once(
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


async def test_concurrent_browsers_and_frontends_consume_once(client: Client, api_token: str, verifier: str) -> None:
    for token in [await client.issue(api_token) for _ in range(5)]:
        browsers, answers = await asyncio.gather(
            asyncio.gather(*(browse(client, token) for _ in range(10))),
            asyncio.gather(*(consume(client.another(), token, verifier) for _ in range(10))),
        )
        logins = browsers.count((303, PAGE)) + sum(answer.status == 200 for answer in answers)
        assert logins == 1
        assert set(browsers) <= {(303, PAGE), (401, "token_consumed")}
        assert all(answer.status == 200 or refusal(answer) == TOKEN_CONSUMED for answer in answers)


# --- Platform API tokens ---------------------------------------------------------------------------------------------


async def test_a_platform_api_token_consumes_tokens_of_every_account(
    client: Client, api_token: str, platform: str, database: Database
) -> None:
    other = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    for secret, account_id in ((api_token, ACCOUNT), (other, OTHER_ACCOUNT)):
        token = await client.issue(secret)
        assert login(await consume(client, token, platform))["account_id"] == account_id
        assert refusal(await consume(client, token, platform)) == TOKEN_CONSUMED


# --- Refusals consume nothing ----------------------------------------------------------------------------------------


async def test_a_user_without_access_consumes_nothing(
    client: Client, service: Node, api_token: str, verifier: str, platform: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    for secret in (verifier, platform):
        assert refusal(await consume(client, token, secret)) == NO_ACCESS
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert refusal(await consume(client, token, verifier)) == TOKEN_EXPIRED
    login(await consume(client, await client.issue(api_token), verifier))

    later = await client.issue(api_token)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    for secret in (verifier, platform):
        assert refusal(await consume(client, later, secret)) == NO_ACCESS
        unknown_user = Claims(int(clock()) + LIFETIME, 4711, ACCOUNT, 7)
        assert refusal(await consume(client, tokens.sign(unknown_user, token_key(service, clock)), secret)) == NO_ACCESS
    assert number_consumed(database) == 1
    again = await client.issue(api_token)  # renews the membership
    assert refusal(await consume(client, later, platform)) == TOKEN_EXPIRED
    login(await consume(client, again, platform))


async def test_consumed_and_expired_are_reported_before_missing_access(
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


# --- Authentication --------------------------------------------------------------------------------------------------


async def test_session_cookies_and_api_tokens_are_not_interchangeable(
    client: Client, api_token: str, verifier: str
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    token = await client.issue(api_token)
    assert "studio_session" in client.cookies
    assert refusal(await client.post_json(CONSUME_URL, {"token": token})) == MISSING_TOKEN
    login(await consume(client, token, verifier))
    assert (await client.another().get("/session", authorization=f"Bearer {verifier}")).status == 401
