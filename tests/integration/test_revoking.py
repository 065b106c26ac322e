"""`POST /v1/sso_tokens/revoke`: revoke an unused login token, or report that it is already consumed."""

import asyncio
from itertools import product
from pathlib import Path

import pytest

from sso_service import tokens
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.api import (
    TOKEN_CONSUMED,
    make_api_token,
    node,
    refusal,
)
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.databases import changing
from tests.support.ledger import number_consumed
from tests.support.redeeming import CONSUMED, EXPIRED, LIFETIME, browse, consume, login, state

pytestmark = pytest.mark.anyio

URL = "/v1/sso_tokens/revoke"
EMAIL = JANE["email"]


async def revoke(client: Client, token: object, secret: str) -> Answer:
    answer = await client.post_json(URL, {"token": token}, token=secret)
    assert answer.header("set-cookie") is None
    assert str(token) not in answer.text
    return answer


def revoked(answer: Answer) -> bool:
    """True if the token was revoked unused, False if it was already consumed."""
    assert answer.status == 200, answer
    content = answer.json()
    assert content in ({"revoked": True}, {"revoked": False})
    assert isinstance(content["revoked"], bool)
    return content["revoked"] is True


# --- Revoked or already consumed -------------------------------------------------------------------------------------


async def test_a_revoked_token_is_refused_everywhere(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token, untouched = await client.issue(api_token), await client.issue(api_token)
    assert revoked(await revoke(client, token, api_token)) is True
    assert await browse(client, token) == (401, "token_consumed")
    assert refusal(await consume(client, token, verifier)) == TOKEN_CONSUMED
    assert await state(client, token, verifier) == CONSUMED
    assert number_consumed(database) == 1
    assert await browse(client, untouched) == (303, PAGE)


async def test_a_consumed_token_cannot_be_revoked(client: Client, api_token: str, verifier: str) -> None:
    by_browser, by_api, unused = [await client.issue(api_token) for _ in range(3)]
    assert await browse(client, by_browser) == (303, PAGE)
    login(await consume(client, by_api, verifier))
    assert revoked(await revoke(client, unused, api_token)) is True
    for token in (by_browser, by_api, unused):
        for _ in range(2):
            assert revoked(await revoke(client, token, api_token)) is False


async def test_revoking_a_consumed_token_does_not_end_its_session(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert revoked(await revoke(client.another(), token, api_token)) is False
    assert (await client.get("/session")).status == 200


async def wins(kind: str, client: Client, token: str, *, issuer: str, verifier: str) -> bool:
    """True if this attempt consumed the token."""
    if kind == "browser":
        outcome = await browse(client, token)
        assert outcome in {(303, PAGE), (401, "token_consumed")}
        return outcome[0] == 303
    if kind == "frontend":
        answer = await consume(client.another(), token, verifier)
        assert answer.status == 200 or refusal(answer) == TOKEN_CONSUMED
        return answer.status == 200
    return revoked(await revoke(client.another(), token, issuer))


async def test_concurrent_logins_and_revocations_have_exactly_one_winner(
    client: Client, api_token: str, verifier: str, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    issued = [await client.issue(api_token) for _ in range(12)]
    with node(database_url, keys_dir, clock) as other_node:
        # Three of each kind, so that some share a transaction.
        attempts = list(product(("browser", "frontend", "revocation"), (client, other_node))) * 3
        results = await asyncio.gather(
            *(
                wins(kind, origin, token, issuer=api_token, verifier=verifier)
                for number, token in enumerate(issued)
                # A different attempt starts first for each token.
                for kind, origin in attempts[number % 6 :] + attempts[: number % 6]
            )
        )
    for at in range(0, len(results), len(attempts)):
        assert sum(results[at : at + len(attempts)]) == 1
    for token in issued:
        assert revoked(await revoke(client, token, api_token)) is False


# --- Access ----------------------------------------------------------------------------------------------------------


async def test_the_token_of_a_disabled_user_can_be_revoked(
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
    assert await state(client, other, verifier) == EXPIRED
    assert revoked(await revoke(client, other, api_token)) is True


async def test_the_token_of_a_removed_member_can_be_revoked(
    client: Client, service: Node, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    token, other = await client.issue(api_token), await client.issue(api_token)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert revoked(await revoke(client, token, api_token)) is True
    assert revoked(await revoke(client, token, api_token)) is False
    await client.issue(api_token)  # renews the membership
    assert await browse(client, token) == (401, "token_consumed")
    assert await state(client, other, verifier) == EXPIRED
    assert revoked(await revoke(client, other, api_token)) is True

    key = service.keys.ring.signing_key(int(clock())).token_key
    of_unknown_user = tokens.sign(Claims(int(clock()) + LIFETIME, 4711, ACCOUNT, 7), key)
    assert revoked(await revoke(client, of_unknown_user, api_token)) is True


async def test_revoking_ignores_the_max_role_of_the_api_token(client: Client, database: Database) -> None:
    """An API token with a lower `max_role` may still revoke, because revoking only takes access away."""
    capped = make_api_token(database, max_role=Role.EDITOR)[1]
    token = await client.issue(capped)
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, ACCOUNT, Role.ADMIN)
    assert revoked(await revoke(client, token, capped)) is True
    assert await browse(client, token) == (401, "token_consumed")
