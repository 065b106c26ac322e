"""Login links that are opened while a user is signed in."""

import pytest

from sso_service import tokens
from sso_service.database.transactions import Database
from sso_service.permissions import Scope
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing
from tests.support.ledger import number_consumed
from tests.support.login import EMAIL, SESSION_LIFETIME, code, is_usable, redirects, signs_in
from tests.support.redeeming import LIFETIME

pytestmark = pytest.mark.anyio


@pytest.fixture
def other_api_token(database: Database) -> str:
    """The secret of an API token of `OTHER_ACCOUNT` with the scope `write:sso`."""
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="tests", scopes=frozenset({Scope.WRITE_SSO}), now=0
        )
    return secret


async def test_a_used_or_expired_link_redirects_if_its_user_is_signed_in(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    used, unused = await client.issue(api_token), await client.issue(api_token)
    assert signs_in(await client.get(f"{PAGE}?a=1&sso={used}"), f"{PAGE}?a=1")
    before = number_consumed(database)
    for _ in range(2):
        assert redirects(await client.get(f"{PAGE}?a=1&sso={used}"), f"{PAGE}?a=1")
    clock.advance(LIFETIME)
    assert redirects(await client.get(f"{PAGE}?a=1&sso={used}"), f"{PAGE}?a=1")
    assert redirects(await client.get(f"/?sso={unused}"), "/")
    assert number_consumed(database) == before
    assert (await client.get("/session")).status == 200


async def test_a_used_or_expired_link_opens_no_more_than_a_fresh_one(
    client: Client, api_token: str, clock: Clock
) -> None:
    token = await client.issue(api_token)
    assert signs_in(await client.get(f"/?sso={token}"), "/")
    foreign, teamless = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts", f"/client/{ACCOUNT}/t/{OTHER_TEAM}/posts"
    assert await code(client, f"{foreign}?sso={token}") == (403, "no_access")
    assert await code(client, f"{teamless}?sso={token}") == (403, "no_access")
    assert await code(client, f"/a//b?sso={token}") == (400, "bad_path")
    clock.advance(LIFETIME)
    assert await code(client, f"{foreign}?sso={token}") == (403, "no_access")
    assert (await code(client, f"{teamless}?sso={token}"))[0] in {401, 403}
    assert await code(client, f"/a//b?sso={token}") == (400, "bad_path")


async def test_a_forged_or_malformed_link_is_refused_even_when_signed_in(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    await client.get(f"/?sso={token}")
    claims = tokens.unsafe_read_claims(token)
    assert await code(client, f"/?sso={tokens.sign(claims, bytes(32))}") == (401, "token_invalid")
    assert await code(client, f"/?sso={token}&sso={token}") == (401, "token_invalid")
    assert (await client.get("/session")).status == 200


async def test_a_fresh_link_is_consumed_even_when_signed_in(client: Client, api_token: str) -> None:
    await client.get(f"/?sso={await client.issue(api_token)}")
    token = await client.issue(api_token)
    assert (await client.get(f"{PAGE}?sso={token}")).header("location") == PAGE
    assert not await is_usable(client, token)


async def test_a_used_link_is_refused_after_its_session_has_ended(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    tab, old = client.another(), client.another()
    token, older = await client.issue(api_token), await client.issue(api_token)
    await old.get(f"/?sso={older}")
    await tab.get(f"/?sso={token}")
    with changing(database) as connection:
        administration.sign_out_user(connection, EMAIL, now=int(clock()))
    assert await code(tab, f"/?sso={token}") == (401, "token_consumed")

    fresh = await client.issue(api_token)
    assert signs_in(await tab.get(f"/?sso={fresh}"), "/")
    assert (await tab.get("/session")).status == 200, "signed in after the sign-out, in the same second"
    clock.advance(SESSION_LIFETIME + 1)
    assert await code(tab, f"/?sso={fresh}") == (401, "token_expired")
    old.cookies["studio_session"] = tab.cookies["studio_session"][:-1]
    assert await code(old, f"/?sso={older}") == (401, "token_expired")


async def test_only_a_fresh_link_of_another_account_switches_the_account(
    client: Client, api_token: str, other_api_token: str, clock: Clock
) -> None:
    here, there = await client.issue(api_token), await client.issue(other_api_token)
    unused = await client.issue(other_api_token)
    page = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"
    assert signs_in(await client.get(f"{PAGE}?sso={here}"), PAGE)
    assert signs_in(await client.get(f"{page}?sso={there}"), page)
    assert (await client.get("/session")).json()["account_id"] == OTHER_ACCOUNT

    for path in ("/", PAGE):
        assert await code(client, f"{path}?sso={here}") == (401, "token_consumed")
    assert redirects(await client.get(f"{page}?sso={there}"), page)
    assert signs_in(await client.get(f"/?sso={await client.issue(api_token)}"), "/")
    assert (await client.get("/session")).json()["account_id"] == ACCOUNT
    for path in ("/", page):
        assert await code(client, f"{path}?sso={there}") == (401, "token_consumed")
    clock.advance(LIFETIME + 1)  # links of a user who joins another account are dated a second ahead
    for path in ("/", page):
        assert await code(client, f"{path}?sso={unused}") == (401, "token_expired")
    assert (await client.get("/session")).json()["account_id"] == ACCOUNT
