"""The middleware for frontends: login links, sessions, and what the application gets to know."""

import asyncio
import hashlib
import hmac
import html
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from itsdangerous import URLSafeTimedSerializer
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.tools.ports import free_port
from sso_service.client import AsyncSSOClient
from sso_service.client.middleware import SSOLogin, SSOUser
from sso_service.database.transactions import Database
from sso_service.errors import InvalidForm
from sso_service.permissions import Role, permissions
from sso_service.services.node import Node
from sso_service.sessions import check_form_token
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.api import VERIFY, make_api_token
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE, TEAM
from tests.support.databases import changing
from tests.support.frontend import frontend
from tests.support.hostile_links import (
    DESTINATIONS,
    HOSTILE_QUERIES,
    NOT_CANONICAL,
    ODD,
    PREFETCHES,
    refused,
    stays_on_this_host,
)
from tests.support.python_client import SERVICE_URL
from tests.support.wire import Wire, listening, says_nothing, told

pytestmark = pytest.mark.anyio

EDITOR = permissions(Role.EDITOR)
FORGED = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """One kind of database: the middleware asks none, and the service's own tests say that it answers alike on both."""
    shutil.copy(sqlite_template, tmp_path / "sso.db")
    return f"sqlite:///{tmp_path / 'sso.db'}"


@pytest.fixture
def transport(service: Node) -> httpx.ASGITransport:
    """The way to the real application of the service."""
    return httpx.ASGITransport(create_app(service))


@pytest.fixture
def verify_token(database: Database) -> str:
    """The secret of an API token of `ACCOUNT` with the scope `verify:sso`."""
    return make_api_token(database, scopes=VERIFY)[1]


@pytest.fixture
def platform_token(database: Database) -> str:
    """The secret of an API token for all accounts, likewise."""
    return make_api_token(database, account_id=None, scopes=VERIFY)[1]


@pytest.fixture
def browser(transport: httpx.ASGITransport, platform_token: str, clock: Clock) -> Client:
    """A browser in front of a frontend for all accounts."""
    return Client(frontend(api_token=platform_token, transport=transport, clock=clock))


@pytest.fixture
def other_api_token(database: Database) -> str:
    return make_api_token(database, account_id=OTHER_ACCOUNT)[1]


@pytest.fixture
def is_unused(transport: httpx.ASGITransport, platform_token: str) -> Callable[[str], Any]:
    """Whether a login token is still good."""

    async def is_unused(token: str) -> bool:
        async with AsyncSSOClient(SERVICE_URL, platform_token, transport=transport) as client:
            return (await client.verify(token)).active

    return is_unused


async def email_of(browser: Client) -> str | None:
    """Who is signed in, as the application sees it."""
    email: str | None = (await browser.get("/who")).json().get("email")
    return email


async def sign_in(browser: Client, client: Client, api_token: str, person: dict[str, str] = JANE) -> str:
    """Signs `person` in; returns the token that was used for it."""
    token = await client.issue(api_token, person)
    assert (await browser.get(f"/who?sso={token}")).status == 303
    assert await email_of(browser) == person["email"]
    return token


async def code(browser: Client, target: str | bytes) -> tuple[int, str]:
    """Status and error code of a login that is refused."""
    answer = await browser.get(target, accept="application/json")
    assert refused(answer)
    assert answer.header("cache-control") == "no-store"
    return answer.status, answer.error


# --- signing in ------------------------------------------------------------------------------------------------------


async def test_a_link_signs_in_and_leads_to_the_clean_url(browser: Client, client: Client, api_token: str) -> None:
    assert (await browser.get("/who")).json() == {"scopes": [], "name": "", "query": ""}
    token = await client.issue(api_token)
    answer = await browser.get(f"{PAGE}?chromeless=1&sso={token}&b")
    assert (answer.status, answer.header("location"), answer.body) == (303, f"{PAGE}?chromeless=1&b", b"")
    assert (answer.header("cache-control"), answer.header("referrer-policy")) == ("no-store", "no-referrer")
    name, _, rest = (answer.header("set-cookie") or "").partition("=")
    assert name == "sso_session"
    assert {part.strip().lower() for part in rest.split(";")[1:]} == {
        "max-age=900",
        "path=/",
        "httponly",
        "samesite=lax",
    }
    assert (await browser.get("/who")).json() == {
        "scopes": ["authenticated", *EDITOR],
        "name": "Jane Doe",
        "email": JANE["email"],
        "account": ACCOUNT,
        "query": "",
    }


async def test_permissions_open_what_starlette_requires_them_for(
    browser: Client, client: Client, api_token: str, database: Database
) -> None:
    assert [(await browser.get(path)).status for path in ("/edit", "/settings")] == [403, 403]
    await sign_in(browser, client, api_token)
    assert [(await browser.get(path)).status for path in ("/edit", "/settings")] == [204, 403]
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    assert (await browser.get("/settings")).status == 403  # until the next login, or the end of the session
    await sign_in(browser, client, api_token)
    assert (await browser.get("/settings")).status == 204


async def test_the_user_is_all_that_the_service_said(
    client: Client, api_token: str, transport: httpx.ASGITransport, verify_token: str, clock: Clock
) -> None:
    seen: list[SSOUser] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["user"])
        await Response()(scope, receive, send)

    browser = Client(SSOLogin(app, service_url=SERVICE_URL, api_token=verify_token, transport=transport, clock=clock))
    await browser.get(f"/?sso={await client.issue(api_token)}")
    assert seen == []
    await browser.get("/")
    (user,) = seen
    assert isinstance(user, SSOUser)
    assert (user.id, user.identity, user.is_authenticated) == (1, "1", True)
    assert (user.email, user.first_name, user.last_name, user.display_name) == (*JANE.values(), "Jane Doe")
    assert (user.account_id, user.role, user.permissions) == (ACCOUNT, "editor", tuple(EDITOR))


async def test_the_cookie_is_secure_on_https(browser: Client, client: Client, api_token: str) -> None:
    browser.scheme = "https"
    answer = await browser.get(f"/?sso={await client.issue(api_token)}")
    assert "; secure" in (answer.header("set-cookie") or "").lower()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/?sso=T", "/"),
        ("/a/?sso=T", "/a/"),
        ("/a?&sso=T&", "/a?&"),
        ("/b%C3%BCro?x=%2F+%zz&sso=T&x&=;y", "/b%C3%BCro?x=%2F+%zz&x&=;y"),
        ("/a?sso_switch=x&sso=T&sso_switch=y&b=1", "/a?b=1"),
        ("/a?sso%5fswitch=x&s%73o=T&sso_switc=h", "/a?sso_switc=h"),
    ],
)
async def test_everything_but_the_token_stays_byte_for_byte(
    browser: Client, client: Client, api_token: str, before: str, after: str
) -> None:
    answer = await browser.get(before.replace("=T", f"={await client.issue(api_token)}", 1))
    assert (answer.status, answer.header("location")) == (303, after)


async def test_no_link_leads_to_another_host(browser: Client, client: Client, api_token: str) -> None:
    token = (await client.issue(api_token)).encode()
    targets = [path + b"?sso=T" for path in ODD]
    for target in targets + [path + b"?" + query for path in (b"/", PAGE.encode()) for query in HOSTILE_QUERIES]:
        answer = await browser.another().get(target.replace(b"sso=T", b"sso=" + token))
        assert answer.status in {303, 400}, target[:80]
        assert stays_on_this_host(answer), target[:80]
        if answer.status == 303:
            token = (await client.issue(api_token)).encode()


async def test_an_application_whose_server_tells_no_raw_path_goes_by_the_path(
    browser: Client, client: Client, api_token: str
) -> None:
    app = browser.app

    async def without_raw_path(scope: Scope, receive: Receive, send: Send) -> None:
        await app({name: value for name, value in scope.items() if name != "raw_path"}, receive, send)

    browser.app = without_raw_path
    answer = await browser.get(f"/b%C3%BCro?sso={await client.issue(api_token)}")
    assert (answer.status, answer.header("location")) == (303, "/b%C3%BCro")
    assert await code(browser, f"//evil.example?sso={await client.issue(api_token)}") == (400, "bad_path")


async def test_what_has_no_token_in_it_is_the_applications(browser: Client) -> None:
    for target in ("/a//b?x=1", "/x?sso_switch=1", "/x?SSO=1", "/x?q=sso=1"):
        assert (await browser.get(target)).json()["query"] == target.partition("?")[2]


# --- what consumes nothing -------------------------------------------------------------------------------------------


async def test_a_path_that_is_not_canonical_is_refused_and_consumes_nothing(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    token = await client.issue(api_token)
    for path in NOT_CANONICAL:
        assert await code(browser, path + b"?sso=" + token.encode()) == (400, "bad_path"), path
    assert await is_unused(token)


async def test_a_path_of_another_account_is_refused_and_consumes_nothing(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    token = await client.issue(api_token)
    for path in (
        f"/client/{OTHER_ACCOUNT}",
        f"/client/{OTHER_ACCOUNT}/t/77/posts",
        "/client",
        "/Client/123",
        "/client/0123",
    ):
        assert await code(browser, f"{path}?sso={token}") == (403, "no_access"), path
    assert await is_unused(token)
    assert (await browser.get(f"/client/{ACCOUNT}/t/{TEAM}?sso={token}")).status == 303


async def test_two_tokens_are_none(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    token, another = await client.issue(api_token), await client.issue(api_token)
    for query in (f"sso={token}&sso={another}", f"sso={token}&s%73o={token}", f"sso=&sso={token}"):
        assert await code(browser, f"{PAGE}?{query}") == (401, "token_invalid"), query
    assert await is_unused(token)
    assert await is_unused(another)


async def test_only_a_persons_navigation_consumes(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    token = await client.issue(api_token)
    answer = await browser.request("HEAD", f"{PAGE}?sso={token}")
    assert (answer.status, answer.body, refused(answer)) == (200, b"", True)
    for headers in PREFETCHES:
        answer = await browser.request("GET", f"{PAGE}?sso={token}", headers=headers)
        assert (answer.status, refused(answer), answer.header("cache-control")) == (503, True, "no-store"), headers
    for values in DESTINATIONS:
        sent = [*(("sec-fetch-dest", value) for value in values), ("accept", "application/json")]
        answer = await browser.request("GET", f"{PAGE}?sso={token}", headers=sent)
        assert (answer.status, answer.error, refused(answer)) == (403, "not_a_navigation", True), values
    assert await is_unused(token)
    answer = await browser.get(f"{PAGE}?sso={token}", sec_fetch_dest="document", sec_fetch_site="cross-site")
    assert answer.status == 303


async def test_other_methods_are_the_applications(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    token = await client.issue(api_token)
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = await browser.request(method, f"/x?a=1&sso={token}", body=b"a=1")
        assert (answer.status, answer.json()["query"]) == (200, f"a=1&sso={token}")
    assert await is_unused(token)


# --- tokens that do not work -----------------------------------------------------------------------------------------


async def test_a_token_that_does_not_work_says_why(
    browser: Client, client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    used, late, johns = [await client.issue(api_token, person) for person in (JANE, JANE, JOHN)]
    await browser.another().get(f"{PAGE}?sso={used}")
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    assert await code(browser, f"{PAGE}?sso={used}") == (401, "token_consumed")
    assert await code(browser, f"{PAGE}?sso={johns}") == (403, "no_access")
    assert await code(browser, f"{PAGE}?sso={FORGED}") == (401, "token_invalid")
    for malformed in ("", "x", "%00", "\xff".encode("latin-1"), used + "A", used[:-1] + "%41"):
        target = f"{PAGE}?sso=".encode() + (malformed if isinstance(malformed, bytes) else malformed.encode())
        assert await code(browser, target) == (401, "token_invalid"), malformed
    clock.advance(300)
    assert await code(browser, f"{PAGE}?sso={late}") == (401, "token_expired")


async def test_a_refusal_is_a_page_in_the_language_of_its_reader(browser: Client) -> None:
    german = await browser.get(f"{PAGE}?sso={FORGED}", accept_language="de-CH")
    english = await browser.get(f"{PAGE}?sso={FORGED}")
    assert (german.status, german.header("content-type")) == (401, "text/html; charset=utf-8")
    assert "Dieser Anmeldelink ist ungültig" in german.text
    assert "This login link is not valid" in english.text
    for answer in (german, english):
        assert refused(answer)
        assert FORGED not in answer.text


async def test_a_frontend_of_one_account_knows_no_token_of_another(
    client: Client, other_api_token: str, transport: httpx.ASGITransport, verify_token: str, clock: Clock
) -> None:
    browser = Client(frontend(api_token=verify_token, transport=transport, clock=clock))
    assert await code(browser, f"/?sso={await client.issue(other_api_token)}") == (401, "token_invalid")


async def test_the_account_that_the_service_names_counts() -> None:
    login = (
        '{"ref":"a","user":{"id":1,"email":"a@b.example","first_name":"A","last_name":"B"},"account_id":124,'
        '"role":"admin","permissions":[],"expires_at":1900000000}'
    )
    browser = Client(frontend(api_token="t", transport=Wire((200, login.encode()))))
    assert await code(browser, f"/client/123?sso={FORGED}") == (403, "no_access")


# --- who is signed in already ----------------------------------------------------------------------------------------


async def test_back_button_and_double_click_do_no_harm(
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
        # The same person in another account: what was used for that is no reason to be here.
        assert (await browser.get(f"/?sso={elsewhere}", accept="application/json")).status == 401
        browser.cookies = dict(cookies)
        clock.advance(300)  # now all have expired


async def test_the_same_person_changes_accounts_without_being_asked(
    browser: Client, client: Client, api_token: str, other_api_token: str
) -> None:
    await sign_in(browser, client, api_token)
    answer = await browser.get(f"/client/{OTHER_ACCOUNT}?sso={await client.issue(other_api_token)}")
    assert answer.status == 303
    assert (await browser.get("/who")).json()["account"] == OTHER_ACCOUNT


def link_in(answer: Answer) -> str:
    """The link of the page that asks before it switches."""
    assert answer.status == 200
    assert refused(answer)
    (href,) = re.findall(r'<a [^>]*href="([^"]*)"', answer.text)
    return html.unescape(href)


async def test_nobody_is_switched_without_being_asked(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
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


async def test_the_question_is_asked_in_german_too(browser: Client, client: Client, api_token: str) -> None:
    await sign_in(browser, client, api_token)
    question = await browser.get(f"/?sso={await client.issue(api_token, JOHN)}", accept_language="de")
    assert "Benutzer wechseln?" in question.text
    assert f"Du bist als {JANE['email']} angemeldet." in question.text
    assert question.header("content-language") == "de"


async def test_the_link_of_the_question_is_what_the_browser_asked_for(
    browser: Client, client: Client, api_token: str
) -> None:
    await sign_in(browser, client, api_token)
    token = await client.issue(api_token, JOHN)
    question = await browser.get(b"/b\xc3\xbcro?a=\xff#&b=%zz+%26&sso_switch=old&sso=" + token.encode())
    link = link_in(question)
    assert link.isascii()
    assert "#" not in link
    assert link.startswith(f"/b%C3%BCro?a=%FF%23&b=%zz+%26&sso={token}&sso_switch=")
    assert "old" not in link
    assert (await browser.get(link)).header("location") == "/b%C3%BCro?a=%FF%23&b=%zz+%26"


async def test_a_proof_is_good_for_one_token_one_session_and_five_minutes(
    browser: Client, client: Client, api_token: str, clock: Clock, is_unused: Callable[[str], Any]
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


async def test_each_purpose_has_a_key_of_its_own_that_is_made_from_the_api_token(
    browser: Client, client: Client, api_token: str, platform_token: str, clock: Clock
) -> None:
    await sign_in(browser, client, api_token)
    token = await client.issue(api_token, JOHN)
    proof = link_in(await browser.get(f"/?sso={token}")).partition("sso_switch=")[2]
    session = browser.cookies["sso_session"]

    key = hmac.digest(platform_token.encode(), b"sso-login-middleware/v1", "sha256")
    how = {"key_derivation": "none", "digest_method": hashlib.sha256}
    content = URLSafeTimedSerializer(key, signer_kwargs=how).loads(session)
    assert content == [1, *JANE.values(), ACCOUNT, "editor", EDITOR]
    with pytest.raises(InvalidForm):
        check_form_token(proof, token, b"", session, [key], now=int(clock()))

    # Neither is good for what the other is good for.
    link_in(await browser.get(f"/?sso={token}&sso_switch={session}"))
    browser.cookies["sso_session"] = proof
    assert await email_of(browser) is None


# --- the session -----------------------------------------------------------------------------------------------------


async def test_a_session_ends_after_its_time(
    client: Client, api_token: str, transport: httpx.ASGITransport, verify_token: str, clock: Clock
) -> None:
    for max_age, options in ((900, {}), (60, {"max_age": 60, "cookie": "__Host-mine"})):
        clock.now = int(clock.now)
        browser = Client(frontend(api_token=verify_token, transport=transport, clock=clock, **options))
        await sign_in(browser, client, api_token)
        assert list(browser.cookies) == [options.get("cookie", "sso_session")]
        clock.advance(max_age - 1)
        assert await email_of(browser) == JANE["email"]
        clock.advance(1)
        assert await email_of(browser) is None


async def test_workers_agree_without_more_configuration_and_their_clocks_may_differ(
    client: Client, api_token: str, transport: httpx.ASGITransport, verify_token: str, clock: Clock
) -> None:
    browser = Client(frontend(api_token=verify_token, transport=transport, clock=clock))
    await sign_in(browser, client, api_token)
    for seconds, expected in ((-59, JANE["email"]), (-120, None)):
        other_clock = Clock(clock.now + seconds)
        browser.app = frontend(api_token=verify_token, transport=transport, clock=other_clock)
        assert await email_of(browser) == expected


async def test_what_the_api_token_did_not_sign_is_nobodys_session(
    browser: Client, client: Client, api_token: str, transport: httpx.ASGITransport, verify_token: str, clock: Clock
) -> None:
    await sign_in(browser, client, api_token)
    cookie = browser.cookies["sso_session"]
    payload, timestamp, signature = cookie.split(".")[-3:]
    for value in (
        "",
        "x",
        cookie + "A",
        cookie[:-1],
        f"{payload}.{timestamp}.{signature[::-1]}",
        f"{payload}.{timestamp}A.{signature}",
        f"A{cookie}",
        "\xe4\xf6",
        URLSafeTimedSerializer("secret").dumps([1, JANE["email"], "Jane", "Doe", ACCOUNT, "admin", []]),
    ):
        browser.cookies["sso_session"] = value
        answer = await browser.get("/who")
        assert answer.json()["scopes"] == [], value
    browser.cookies["sso_session"] = cookie
    browser.app = frontend(api_token=verify_token, transport=transport, clock=clock)
    assert await email_of(browser) is None  # signed with another API token


async def test_the_longest_session_fits_into_a_cookie(
    client: Client, api_token: str, transport: httpx.ASGITransport, verify_token: str, database: Database, clock: Clock
) -> None:
    letters = "".join(chr(0x1F300 + 7 * number % 1000) for number in range(200))
    person = {"email": f"{'a' * 60}@{'b' * 60}.{'c' * 60}.{'d' * 60}.example", "first_name": letters[:100]}
    person["last_name"] = letters[100:]
    await client.issue(api_token, person)
    with changing(database) as connection:
        administration.set_role(connection, person["email"], ACCOUNT, Role.ADMIN)
    browser = Client(frontend(api_token=verify_token, transport=transport, clock=clock))
    await sign_in(browser, client, api_token, person)
    assert (await browser.get("/who")).json()["name"] == f"{letters[:100]} {letters[100:]}"
    assert len(f"sso_session={browser.cookies['sso_session']}") < 4000  # browsers take 4096 with all attributes


async def test_a_websocket_knows_who_is_there_and_signs_nobody_in(
    browser: Client, client: Client, api_token: str, is_unused: Callable[[str], Any]
) -> None:
    async def connect(cookie: str, query: bytes) -> str:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "websocket",
            "scheme": "ws",
            "path": "/ws",
            "raw_path": b"/ws",
            "query_string": query,
            "headers": [(b"host", b"studio.example"), (b"cookie", f"sso_session={cookie}".encode())],
            "subprotocols": [],
        }
        await browser.app(scope, receive, send)
        assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send", "websocket.close"]
        content: bytes = sent[1]["bytes"]
        return content.decode()

    await sign_in(browser, client, api_token)
    token = await client.issue(api_token)
    assert JANE["email"] in await connect(browser.cookies["sso_session"], f"sso={token}".encode())
    assert "authenticated" not in await connect("", f"sso={token}".encode())
    assert await is_unused(token)


@pytest.mark.parametrize(
    "options",
    [
        {"max_age": 901},
        {"max_age": 0},
        {"max_age": -1},
        {"cookie": "a b"},
        {"cookie": ""},
        {"cookie": "a;b"},
        {"service_url": "sso.example"},
        {"api_token": ""},
        {"timeout": 0},
    ],
)
def test_what_cannot_work_is_refused_when_the_application_starts(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        SSOLogin(Response(), **{"service_url": SERVICE_URL, "api_token": "t", **options})


# --- when the service does not do its work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected", "retry_after"),
    [
        ((503, told("unavailable"), {"Retry-After": "7"}), "unavailable", "7"),
        ((503, told("overloaded")), "overloaded", "2"),
        ((503, told("outcome_unknown"), {"Retry-After": "2"}), "outcome_unknown", "2"),
        ((502, b"<html>Bad gateway</html>"), "outcome_unknown", "2"),
        ((200, b"<html>Hello</html>"), "outcome_unknown", "2"),
        ((200, b"{}"), "outcome_unknown", "2"),
        ((302, b"", {"Location": "https://login.example/"}), "outcome_unknown", "2"),
        ((500, told("internal_error")), "outcome_unknown", "2"),
        ((401, told("missing_token")), "unavailable", "2"),
        ((403, told("insufficient_scope")), "unavailable", "2"),
        ((404, told("not_found")), "unavailable", "2"),
        (httpx.ConnectError("refused"), "unavailable", "2"),
        (httpx.ReadError("reset"), "outcome_unknown", "2"),
    ],
)
async def test_a_service_that_fails_is_told_as_such_and_logged_once(
    caplog: pytest.LogCaptureFixture, reply: Any, expected: str, retry_after: str
) -> None:
    wire = Wire(reply)
    browser = Client(frontend(api_token="wf_live_secret", transport=wire))
    answer = await browser.get(f"{PAGE}?sso={FORGED}", accept="application/json")
    assert (answer.status, answer.error, answer.header("retry-after")) == (503, expected, retry_after)
    assert (refused(answer), answer.header("cache-control"), len(wire.requests)) == (True, "no-store", 1)
    (record,) = [record for record in caplog.records if record.name == "sso_service.client.middleware"]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert FORGED not in caplog.text
    assert "secret" not in caplog.text

    page = await browser.get(f"{PAGE}?sso={FORGED}", accept_language="de")
    assert (page.status, page.header("retry-after")) == (503, retry_after)
    unknown = "Wir wissen nicht, ob dieser Link benutzt wurde" in page.text
    assert unknown == (expected == "outcome_unknown")
    assert ("Der Link wurde nicht benutzt." in page.text) == (not unknown)


async def test_a_service_that_is_away_or_silent_costs_nobody_their_session(
    browser: Client, client: Client, api_token: str, platform_token: str, clock: Clock
) -> None:
    await sign_in(browser, client, api_token)
    async with listening(says_nothing) as (url, got):
        for where, expected in ((f"http://127.0.0.1:{free_port()}", "unavailable"), (url, "outcome_unknown")):
            browser.app = frontend(service_url=where, api_token=platform_token, timeout=0.2, clock=clock)
            assert await email_of(browser) == JANE["email"]
            token = await client.issue(api_token)
            assert await code(browser, f"{PAGE}?sso={token}") == (503, expected)
            assert await email_of(browser) == JANE["email"]
    assert len(got) == 1


# --- connections and event loops -------------------------------------------------------------------------------------


class Counted(httpx.ASGITransport):
    """A transport that counts how often it is closed."""

    closed = 0

    async def aclose(self) -> None:
        self.closed += 1


@asynccontextmanager
async def living(app: ASGIApp, state: dict[str, Any] | None) -> AsyncIterator[None]:
    """Does for `app` what a server does when it starts and stops."""
    incoming, outgoing = asyncio.Queue[Message](), asyncio.Queue[Message]()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, **({} if state is None else {"state": state})}
    life = asyncio.ensure_future(app(scope, incoming.get, outgoing.put))
    await incoming.put({"type": "lifespan.startup"})
    assert (await outgoing.get())["type"] == "lifespan.startup.complete"
    yield
    await incoming.put({"type": "lifespan.shutdown"})
    assert (await outgoing.get())["type"] == "lifespan.shutdown.complete"
    await life


async def test_one_client_serves_for_as_long_as_the_server_lives(
    service: Node, client: Client, api_token: str, verify_token: str, clock: Clock
) -> None:
    transport = Counted(create_app(service))
    app = frontend(api_token=verify_token, transport=transport, clock=clock)
    state: dict[str, Any] = {}

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    browser = Client(with_state)
    before = transport.closed
    async with living(app, state):
        for _ in range(3):
            await sign_in(browser, client, api_token)
        assert transport.closed == before
    assert transport.closed == before + 1


@pytest.mark.parametrize("state", [None, {}])
async def test_without_a_servers_state_each_login_closes_its_own(
    service: Node,
    client: Client,
    api_token: str,
    verify_token: str,
    clock: Clock,
    state: dict[str, Any] | None,
) -> None:
    transport = Counted(create_app(service))
    app = frontend(api_token=verify_token, transport=transport, clock=clock)
    browser = Client(app)
    await sign_in(browser, client, api_token)
    await sign_in(browser, client, api_token)
    assert transport.closed == 2
    async with living(app, state):
        await sign_in(browser, client, api_token)
    assert transport.closed == 4
