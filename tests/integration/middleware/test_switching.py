"""Login links in a browser where a user is signed in already."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable

import pytest
from itsdangerous import URLSafeTimedSerializer

from sso_service.errors import InvalidForm
from sso_service.permissions import Role, permissions
from sso_service.sessions import check_form_token
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE
from tests.support.frontend import email_of, link_in, sign_in

pytestmark = pytest.mark.anyio

IsUnused = Callable[[str], Awaitable[bool]]
EDITOR = permissions(Role.EDITOR)


async def test_back_button_and_double_click_are_harmless(
    browser: Client, client: Client, api_token: str, other_api_token: str, clock: Clock
) -> None:
    used = await sign_in(browser, client, api_token)
    late, elsewhere = await client.issue(api_token), await client.issue(other_api_token)
    await browser.another().get(f"/?sso={elsewhere}")
    cookies = dict(browser.cookies)
    for _ in range(2):
        answer = await browser.get(f"{PAGE}?a=1&sso={used}")
        assert (answer.status, answer.header("location")) == (303, f"{PAGE}?a=1")
        assert answer.header("set-cookie") is None
        answer = await browser.get(f"{PAGE}?sso={late}")
        assert (answer.status, answer.header("location")) == (303, PAGE)
        # A used token of the same user in another account does not sign in here.
        assert (await browser.get(f"/?sso={elsewhere}", accept="application/json")).status == 401
        browser.cookies = dict(cookies)
        clock.advance(300)  # now all tokens have expired


async def test_the_same_user_changes_accounts_without_a_question(
    browser: Client, client: Client, api_token: str, other_api_token: str
) -> None:
    await sign_in(browser, client, api_token)
    answer = await browser.get(f"/client/{OTHER_ACCOUNT}?sso={await client.issue(other_api_token)}")
    assert answer.status == 303
    assert (await browser.get("/who")).json()["account"] == OTHER_ACCOUNT


async def test_another_user_is_signed_in_only_after_a_question(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
) -> None:
    await sign_in(browser, client, api_token)
    token = await client.issue(api_token, JOHN)
    question = await browser.get(f"/a%22b?x=<y>&sso={token}&z='")
    assert question.header("content-type") == "text/html; charset=utf-8"
    assert question.header("cache-control") == "no-store"
    assert question.header("referrer-policy") == "no-referrer"
    assert "frame-ancestors 'none'" in (question.header("content-security-policy") or "")
    assert f"You are signed in as {JANE['email']}." in question.text
    assert "<y>" not in question.text
    assert await is_unused(token)
    assert await email_of(browser) == JANE["email"]

    answer = await browser.get(link_in(question))
    assert (answer.status, answer.header("location")) == (303, "/a%22b?x=<y>&z='")
    assert await email_of(browser) == JOHN["email"]


async def test_the_question_is_available_in_german(browser: Client, client: Client, api_token: str) -> None:
    await sign_in(browser, client, api_token)
    question = await browser.get(f"/?sso={await client.issue(api_token, JOHN)}", accept_language="de")
    assert "Benutzer wechseln?" in question.text
    assert f"Du bist als {JANE['email']} angemeldet." in question.text
    assert question.header("content-language") == "de"


async def test_the_link_of_the_question_keeps_path_and_query(browser: Client, client: Client, api_token: str) -> None:
    await sign_in(browser, client, api_token)
    token = await client.issue(api_token, JOHN)
    question = await browser.get(b"/b\xc3\xbcro?a=\xff#&b=%zz+%26&sso_switch=old&sso=" + token.encode())
    link = link_in(question)
    assert link.isascii()
    assert "#" not in link
    assert link.startswith(f"/b%C3%BCro?a=%FF%23&b=%zz+%26&sso={token}&sso_switch=")
    assert "old" not in link
    assert (await browser.get(link)).header("location") == "/b%C3%BCro?a=%FF%23&b=%zz+%26"


async def test_a_proof_is_valid_for_one_token_one_session_and_5_minutes(
    browser: Client, client: Client, api_token: str, clock: Clock, is_unused: IsUnused
) -> None:
    await sign_in(browser, client, api_token)
    clock.advance(1)
    attacker = browser.another()
    await sign_in(attacker, client, api_token)
    assert browser.cookies["sso_session"] != attacker.cookies["sso_session"]
    token, another = await client.issue(api_token, JOHN), await client.issue(api_token, JOHN)
    link = link_in(await browser.get(f"/?sso={token}"))
    proof = link.partition("sso_switch=")[2]
    planted = link_in(await attacker.get(f"/?sso={token}"))
    for wrong in (
        planted,
        f"/?sso={another}&sso_switch={proof}",
        f"/?sso={token}&sso_switch=",
        f"/?sso={token}&sso_switch=1",
        f"/?sso={token}&sso_switch=%ff",
        f"/?sso={token}&sso_switch={browser.cookies['sso_session']}",
        f"{link}&sso_switch={proof}",
        f"{link[:-2]}AA",
    ):
        assert link_in(await browser.get(wrong)) != wrong
    assert await is_unused(token)
    assert await is_unused(another)
    assert await email_of(browser) == JANE["email"]

    clock.advance(299)
    other_link = link_in(await browser.get(f"/?sso={another}"))
    cookies = dict(browser.cookies)
    assert (await browser.get(link)).status == 303
    browser.cookies = cookies
    clock.advance(300)
    link_in(await browser.get(other_link))


async def test_session_and_proof_have_separate_keys_from_the_api_token(
    browser: Client, client: Client, api_token: str, platform: str, clock: Clock
) -> None:
    await sign_in(browser, client, api_token)
    token = await client.issue(api_token, JOHN)
    proof = link_in(await browser.get(f"/?sso={token}")).partition("sso_switch=")[2]
    session = browser.cookies["sso_session"]

    key = hmac.digest(platform.encode(), b"sso-login-middleware/v1", "sha256")
    options = {"key_derivation": "none", "digest_method": hashlib.sha256}
    content = URLSafeTimedSerializer(key, signer_kwargs=options).loads(session)
    assert content == [1, *JANE.values(), ACCOUNT, "editor", EDITOR]
    with pytest.raises(InvalidForm):
        check_form_token(proof, token, b"", session, [key], now=int(clock()))

    # Neither is accepted in place of the other.
    link_in(await browser.get(f"/?sso={token}&sso_switch={session}"))
    browser.cookies["sso_session"] = proof
    assert await email_of(browser) is None
