"""Signing in through the middleware: login links, the user in the scope, and refusals."""

from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.client.middleware import SSOLogin, SSOUser
from sso_service.database.transactions import Database
from sso_service.permissions import Role, permissions
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE, TEAM
from tests.support.databases import changing
from tests.support.frontend import fastapi_frontend, frontend, refusal_of, sign_in
from tests.support.hostile_links import (
    DESTINATIONS,
    HOSTILE_QUERIES,
    NOT_CANONICAL,
    PREFETCHES,
    UNUSUAL,
    refused,
    stays_on_this_host,
)
from tests.support.python_client import FORGED, SERVICE_URL
from tests.support.wire import Wire

pytestmark = pytest.mark.anyio

IsUnused = Callable[[str], Awaitable[bool]]
EDITOR = permissions(Role.EDITOR)


async def test_a_login_link_signs_in_and_redirects_to_the_clean_url(
    browser: Client, client: Client, api_token: str
) -> None:
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
        "id": "1",
        "email": JANE["email"],
        "account": ACCOUNT,
        "query": "",
    }


@pytest.mark.parametrize("make", [frontend, fastapi_frontend])
async def test_permissions_satisfy_the_decorator_requires(
    make: Callable[..., ASGIApp],
    client: Client,
    api_token: str,
    transport: httpx.ASGITransport,
    verifier: str,
    database: Database,
    clock: Clock,
) -> None:
    browser = Client(make(api_token=verifier, transport=transport, clock=clock))
    assert [(await browser.get(path)).status for path in ("/edit", "/settings")] == [403, 403]
    await sign_in(browser, client, api_token)
    assert [(await browser.get(path)).status for path in ("/edit", "/settings")] == [204, 403]
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    assert (await browser.get("/settings")).status == 403  # the session keeps the role of its login
    await sign_in(browser, client, api_token)
    assert (await browser.get("/settings")).status == 204


async def test_the_scope_contains_the_user_that_the_service_returned(
    client: Client, api_token: str, transport: httpx.ASGITransport, verifier: str, clock: Clock
) -> None:
    seen: list[SSOUser] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["user"])
        await Response()(scope, receive, send)

    browser = Client(SSOLogin(app, service_url=SERVICE_URL, api_token=verifier, transport=transport, clock=clock))
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
async def test_the_redirect_keeps_everything_but_the_token(
    browser: Client, client: Client, api_token: str, before: str, after: str
) -> None:
    answer = await browser.get(before.replace("=T", f"={await client.issue(api_token)}", 1))
    assert (answer.status, answer.header("location")) == (303, after)


async def test_no_login_link_redirects_to_another_host(browser: Client, client: Client, api_token: str) -> None:
    token = (await client.issue(api_token)).encode()
    targets = [path + b"?sso=T" for path in UNUSUAL]
    for target in targets + [path + b"?" + query for path in (b"/", PAGE.encode()) for query in HOSTILE_QUERIES]:
        answer = await browser.another().get(target.replace(b"sso=T", b"sso=" + token))
        assert answer.status in {303, 400}, target[:80]
        assert stays_on_this_host(answer), target[:80]
        if answer.status == 303:
            token = (await client.issue(api_token)).encode()


async def test_without_a_raw_path_the_decoded_path_is_used(browser: Client, client: Client, api_token: str) -> None:
    app = browser.app

    async def without_raw_path(scope: Scope, receive: Receive, send: Send) -> None:
        await app({name: value for name, value in scope.items() if name != "raw_path"}, receive, send)

    browser.app = without_raw_path
    answer = await browser.get(f"/b%C3%BCro?sso={await client.issue(api_token)}")
    assert (answer.status, answer.header("location")) == (303, "/b%C3%BCro")
    assert await refusal_of(browser, f"//evil.example?sso={await client.issue(api_token)}") == (400, "bad_path")


async def test_requests_without_a_login_token_reach_the_application(browser: Client) -> None:
    for target in ("/a//b?x=1", "/x?sso_switch=1", "/x?SSO=1", "/x?q=sso=1"):
        assert (await browser.get(target)).json()["query"] == target.partition("?")[2]


# --- requests that consume nothing -----------------------------------------------------------------------------------


async def test_a_path_that_is_not_canonical_is_refused_and_consumes_nothing(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
) -> None:
    token = await client.issue(api_token)
    too_many = [b"/a" * 65, b"/x?" + b"a&" * 199 + b"a"]
    for path in NOT_CANONICAL + too_many:
        target = path + (b"&" if b"?" in path else b"?") + b"sso=" + token.encode()
        assert await refusal_of(browser, target) == (400, "bad_path"), path
    assert await is_unused(token)
    # Other requests are the application's own.
    assert (await browser.get("/x?" + "a&" * 5000)).status == 200


async def test_a_path_of_another_account_is_refused_and_consumes_nothing(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
) -> None:
    token = await client.issue(api_token)
    for path in (
        f"/client/{OTHER_ACCOUNT}",
        f"/client/{OTHER_ACCOUNT}/t/77/posts",
        "/client",
        "/Client/123",
        "/client/0123",
    ):
        assert await refusal_of(browser, f"{path}?sso={token}") == (403, "no_access"), path
    assert await is_unused(token)
    assert (await browser.get(f"/client/{ACCOUNT}/t/{TEAM}?sso={token}")).status == 303


async def test_a_repeated_login_token_is_refused(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
) -> None:
    token, another = await client.issue(api_token), await client.issue(api_token)
    for query in (f"sso={token}&sso={another}", f"sso={token}&s%73o={token}", f"sso=&sso={token}"):
        assert await refusal_of(browser, f"{PAGE}?{query}") == (401, "token_invalid"), query
    assert await is_unused(token)
    assert await is_unused(another)


async def test_only_a_persons_navigation_consumes(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
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


async def test_other_methods_reach_the_application(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
) -> None:
    token = await client.issue(api_token)
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = await browser.request(method, f"/x?a=1&sso={token}", body=b"a=1")
        assert (answer.status, answer.json()["query"]) == (200, f"a=1&sso={token}")
    assert await is_unused(token)


# --- refused login tokens --------------------------------------------------------------------------------------------


async def test_a_refusal_names_its_reason(
    browser: Client, client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    used, late, disabled = [await client.issue(api_token, person) for person in (JANE, JANE, JOHN)]
    await browser.another().get(f"{PAGE}?sso={used}")
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    assert await refusal_of(browser, f"{PAGE}?sso={used}") == (401, "token_consumed")
    assert await refusal_of(browser, f"{PAGE}?sso={disabled}") == (403, "no_access")
    assert await refusal_of(browser, f"{PAGE}?sso={FORGED}") == (401, "token_invalid")
    for malformed in ("", "x", "%00", "\xff".encode("latin-1"), used + "A", used[:-1] + "%41"):
        target = f"{PAGE}?sso=".encode() + (malformed if isinstance(malformed, bytes) else malformed.encode())
        assert await refusal_of(browser, target) == (401, "token_invalid"), malformed
    clock.advance(300)
    assert await refusal_of(browser, f"{PAGE}?sso={late}") == (401, "token_expired")


async def test_a_refusal_is_a_page_in_the_browsers_language(browser: Client) -> None:
    german = await browser.get(f"{PAGE}?sso={FORGED}", accept_language="de-CH")
    english = await browser.get(f"{PAGE}?sso={FORGED}")
    assert (german.status, german.header("content-type")) == (401, "text/html; charset=utf-8")
    assert "Dieser Anmeldelink ist ungültig" in german.text
    assert "This login link is not valid" in english.text
    for answer in (german, english):
        assert refused(answer)
        assert FORGED not in answer.text


async def test_a_login_token_of_another_account_is_invalid(
    client: Client, other_api_token: str, transport: httpx.ASGITransport, verifier: str, clock: Clock
) -> None:
    browser = Client(frontend(api_token=verifier, transport=transport, clock=clock))
    assert await refusal_of(browser, f"/?sso={await client.issue(other_api_token)}") == (401, "token_invalid")


async def test_the_path_must_belong_to_the_account_of_the_login() -> None:
    login = (
        '{"ref":"a","user":{"id":1,"email":"a@b.example","first_name":"A","last_name":"B"},"account_id":124,'
        '"role":"admin","permissions":[],"expires_at":1900000000}'
    )
    browser = Client(frontend(api_token="t", transport=Wire((200, login.encode()))))
    assert await refusal_of(browser, f"/client/123?sso={FORGED}") == (403, "no_access")
