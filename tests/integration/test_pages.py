"""Message pages of the login: texts, language, security headers, and the login token that they never show."""

import re
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from scripts.tools.ports import free_port
from sso_service import tokens
from sso_service.database import open_database
from sso_service.database.schema import accounts, memberships, users
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Scope
from sso_service.services.node import Node
from sso_service.sessions import Session
from sso_service.settings import read_settings
from sso_service.tokens import Claims
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE, PORTAL
from tests.support.databases import changing, on_sqlite
from tests.support.pages import MessagePage

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class FailedLogin:
    """A login that fails: the request, which can be repeated, and the expected status and error code."""

    name: str
    status: int
    code: str
    portal: bool
    client: Client
    target: str
    token: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    async def attempt(self, **headers: str) -> Answer:
        """Send the request with these additional headers."""
        more = [(name.replace("_", "-"), value) for name, value in headers.items()]
        return await self.client.request(self.method, self.target, headers=[*self.headers, *more], body=self.body)


def text_of(page: MessagePage) -> str:
    return " ".join(page.texts.values())


def key_of(service: Node, clock: Clock) -> bytes:
    return service.keys.ring.signing_key(int(clock())).token_key


async def failed_logins(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> list[FailedLogin]:
    """Return every kind of failed login while the service works."""
    now = int(clock())
    used, unused = await client.issue(api_token), await client.issue(api_token)
    assert (await client.another().get(f"/?sso={used}")).status == 303
    claims = tokens.unsafe_read_claims(unused)
    forged = tokens.sign(claims, bytes(32))
    overlong = tokens.sign(Claims(now + 1000, claims.user_id, ACCOUNT, 1), key_of(service, clock))
    expired = tokens.sign(Claims(now, claims.user_id, ACCOUNT, 1), key_of(service, clock))
    disabled = await client.issue(api_token, {**JANE, "email": "disabled@example.com"})
    removed = await client.issue(api_token, {**JANE, "email": "removed@example.com"})
    with changing(database) as connection:
        administration.disable_user(connection, "disabled@example.com", now=now)
        administration.remove_member(connection, "removed@example.com", ACCOUNT)

    def link(name: str, status: int, code: str, token: str, path: str = PAGE, *, portal: bool = False) -> FailedLogin:
        return FailedLogin(name, status, code, portal, client.another(), f"{path}?a=1&sso={token}", token)

    def form(name: str, status: int, code: str, *headers: tuple[str, str]) -> FailedLogin:
        body = f"token={unused}&target={PAGE}&form=x".encode()
        return FailedLogin(name, status, code, False, client.another(), "/sso/confirm", unused, "POST", headers, body)

    other_page = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"
    return [
        link("malformed", 401, "token_invalid", unused[:-1]),
        link("two tokens", 401, "token_invalid", f"{unused}&sso={unused}"),
        link("forged", 401, "token_invalid", forged),
        FailedLogin("overlong", 401, "token_invalid", False, client.another(), f"/?sso={overlong}", overlong),
        link("used", 401, "token_consumed", used, portal=True),
        link("expired", 401, "token_expired", expired, portal=True),
        link("disabled", 403, "no_access", disabled, portal=True),
        link("removed", 403, "no_access", removed, portal=True),
        link("another account's page", 403, "no_access", unused, other_page, portal=True),
        link("unknown team", 403, "no_access", unused, f"/client/{ACCOUNT}/t/43", portal=True),
        link("another account's page, forged", 401, "token_invalid", forged, other_page),
        link("no page of Studio", 403, "no_access", forged, f"/CLIENT/{ACCOUNT}/t/42/posts"),
        link("bad path", 400, "bad_path", unused, "/a//b"),
        link("bad path, forged", 400, "bad_path", forged, "/a/../b"),
        FailedLogin(
            "in a frame",
            403,
            "not_a_navigation",
            False,
            client.another(),
            f"{PAGE}?sso={unused}",
            unused,
            headers=(("sec-fetch-dest", "iframe"),),
        ),
        form("form from elsewhere", 403, "cross_origin", ("origin", "http://evil.example")),
        form("form of no question", 403, "form_invalid", ("origin", "http://studio.example")),
    ]


async def question_for(client: Client, api_token: str) -> tuple[Client, str, Answer]:
    """Return a browser in which Jane is signed in, a login token for John, and the page that asks before switching."""
    browser = client.another()
    await browser.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    return browser, token, await browser.get(f"{PAGE}?sso={token}")


# --- texts -----------------------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_failed_login_is_a_page_in_german_or_english_or_json(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    for failed in await failed_logins(client, service, database, api_token, clock):
        for lang in ("en", "de"):
            answer = await failed.attempt(accept="text/html,*/*;q=0.8", accept_language=lang)
            assert answer.status == failed.status, failed.name
            assert answer.header("content-type") == "text/html; charset=utf-8"
            assert answer.header("content-language") == lang
            page = MessagePage(answer.text)
            assert page.lang == lang
            assert page.texts["title"] == page.texts["h1"]
            assert page.form is None
        answer = await failed.attempt(accept="application/json", accept_language="de")
        assert (answer.status, answer.error) == (failed.status, failed.code), failed.name
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"code", "message"}


@on_sqlite
async def test_each_page_explains_the_reason_and_the_remedy(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    for failed in await failed_logins(client, service, database, api_token, clock):
        for lang in ("en", "de"):
            page = MessagePage((await failed.attempt(accept_language=lang)).text)
            words = page.texts["h1"], page.texts["p"]
            assert texts.setdefault((failed.code, lang), words) == words
            assert len(words[1].split()) >= 8, "a sentence, not a code"
            assert failed.code not in text_of(page)
    assert len(set(texts.values())) == len(texts), "two pages have the same text"
    for code, english, german in (
        ("token_invalid", "not valid", "ungültig"),
        ("token_expired", "expired", "abgelaufen"),
        ("token_consumed", "already used", "schon benutzt"),
        ("no_access", "no access", "keinen Zugang"),
    ):
        assert english in texts[code, "en"][0]
        assert german in texts[code, "de"][0]
    for code in ("token_invalid", "token_expired", "token_consumed"):
        assert "portal" in texts[code, "en"][1]
        assert "Portal" in texts[code, "de"][1]


LANGUAGES = [
    (None, "en"),
    ("", "en"),
    ("de", "de"),
    ("DE", "de"),
    ("de-CH", "de"),
    ("de-at-1996", "de"),
    ("en", "en"),
    ("en-GB,en;q=0.9,de;q=0.8", "en"),
    ("de-CH,de;q=0.9,en;q=0.8", "de"),
    ("en;q=0.5,de", "de"),
    ("en;q=0.5, de;q=0.9", "de"),
    ("de;q=0.5,en;q=0.9", "en"),
    ("de;q=0.5;en;q=0.9", "en"),
    ("fr,de;q=0.3", "de"),
    ("fr-CH, fr;q=0.9, de;q=0.2, en;q=0.1", "de"),
    ("fr;q=1, en;q=0.1", "en"),
    ("de;q=0", "en"),
    ("de;q=0,fr", "en"),
    ("de;q=0.000, en;q=0.001", "en"),
    ("en;q=0, de;q=0.1", "de"),
    ("de , en", "de"),
    ("en,de", "en"),
    ("de;q=0.8,en;q=0.8", "de"),
    ("de; q=0.9, en; q=0.8", "de"),
    ("de;Q=0.9,en;Q=0.8", "de"),
    ("*", "en"),
    ("fr", "en"),
    ("gsw,rm", "en"),
    ("den", "en"),
    ("d", "en"),
    ("deutsch", "en"),
    ("de;q=nonsense", "en"),
    ("de;q=nan", "en"),
    ("de;q=inf", "en"),
    ("de;q=-1", "en"),
    (",,;;=,q", "en"),
    ("\xff\xfe", "en"),
    ("../../etc/passwd", "en"),
    ("x" * 20_000, "en"),
    ("fr," * 20 + "de", "de"),
    ("fr," * 5000 + "de", "en"),  # only the first languages are read
]


@on_sqlite
async def test_a_page_is_in_the_language_that_the_browser_ranks_first(client: Client) -> None:
    for header, lang in LANGUAGES:
        headers = [] if header is None else [("accept-language", header)]
        answer = await client.request("GET", "/?sso=x", headers=headers)
        assert answer.status == 401
        assert (answer.header("content-language"), MessagePage(answer.text).lang) == (lang, lang), str(header)[:80]


ACCEPTS = [
    (None, "text/html"),
    ("", "text/html"),
    ("*/*", "text/html"),
    ("text/html", "text/html"),
    ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", "text/html"),
    ("nonsense", "text/html"),
    ("application/json", "application/json"),
    ("Application/JSON", "application/json"),
    ("application/json, */*;q=0.5", "application/json"),
    ("application/json;charset=utf-8", "application/json"),
]


@on_sqlite
async def test_a_client_gets_json_only_if_it_accepts_json_and_not_html(client: Client) -> None:
    for header, media_type in ACCEPTS:
        headers = [] if header is None else [("accept", header)]
        answer = await client.request("GET", "/?sso=x", headers=headers)
        assert (answer.header("content-type") or "").partition(";")[0] == media_type, header
        if media_type == "text/html":  # the response depends on these headers, so a cache must compare them
            assert {"accept", "accept-language"} <= set((answer.header("vary") or "").lower().split(", "))


@on_sqlite
async def test_the_question_names_the_user_who_would_be_replaced(client: Client, api_token: str) -> None:
    browser, token, _ = await question_for(client, api_token)
    headings = set()
    for lang, go_on in (("en", "Continue"), ("de", "Weiter")):
        answer = await browser.get(f"{PAGE}?sso={token}", accept_language=lang)
        page = MessagePage(answer.text)
        assert (page.lang, answer.header("content-language")) == (lang, lang)
        assert JANE["email"] in page.texts["p"]
        assert page.texts["button"] == go_on
        headings.add(page.texts["h1"])
    assert len(headings) == 2


# --- security --------------------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_page_is_not_framed_sniffed_or_cached_and_loads_nothing(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    answers = [await failed.attempt() for failed in await failed_logins(client, service, database, api_token, clock)]
    answers.append((await question_for(client, api_token))[2])
    for answer in answers:
        policy = dict(
            directive.strip().split(" ", 1) for directive in (answer.header("content-security-policy") or "").split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["base-uri"] == "'none'"
        assert policy["form-action"] == "'self'"
        (style,) = re.findall("<style>(.*?)</style>", answer.text, re.DOTALL)
        assert policy["style-src"] == f"'sha256-{b64encode(sha256(style.encode()).digest()).decode()}'"
        assert policy["img-src"] == "data:"
        assert not {"script-src", "connect-src"} & set(policy)
        assert answer.header("x-frame-options") == "DENY"
        assert answer.header("cross-origin-opener-policy") == "same-origin"
        assert answer.header("cross-origin-resource-policy") == "same-origin"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("cache-control") == "no-store"
        # With each of these policies another site never receives the URL, which may contain a login token.
        assert answer.header("referrer-policy") in {"no-referrer", "strict-origin", "origin"}
        page = MessagePage(answer.text)
        assert page.elements <= {
            *("html", "head", "meta", "title", "body", "main", "h1", "p", "a"),
            *("form", "input", "button", "style", "link"),
        }
        for tag, name, value in page.attributes:
            assert not name.startswith("on")
            assert name not in {"style", "src", "srcset", "formaction", "target", "id"}
            assert tag != "link" or name != "href" or value.startswith("data:")
            assert (tag, name) in {("a", "href"), ("link", "href")} or "//" not in value


@on_sqlite
async def test_a_failed_login_neither_signs_in_nor_signs_out_nor_redirects(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    for failed in await failed_logins(client, service, database, api_token, clock):
        for accept in ("text/html", "application/json"):
            answer = await failed.attempt(accept=accept)
            assert answer.header("location") is None
            assert answer.header("set-cookie") is None
            assert answer.header("refresh") is None
            assert answer.header("cache-control") == "no-store"
            assert answer.header("x-content-type-options") == "nosniff"


@on_sqlite
async def test_only_the_hidden_field_of_the_question_contains_the_login_token(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    for failed in await failed_logins(client, service, database, api_token, clock):
        parts = [part for part in failed.token.split("&sso=") if part]
        for accept in ("text/html", "application/json"):
            answer = await failed.attempt(accept=accept)
            for part in parts:
                assert part not in answer.text, failed.name
                assert part not in str(answer.headers), failed.name
            assert "a=1" not in answer.text, "the page repeats a part of the request"

    browser, token, answer = await question_for(client, api_token)
    assert answer.status == 200
    assert answer.text.count(token) == 1
    assert token not in str(answer.headers)
    page = MessagePage(answer.text)
    assert [(tag, name) for tag, name, value in page.attributes if token in value] == [("input", "value")]
    assert page.fields["token"] == token
    assert token not in page.fields["form"] + page.fields["target"]
    assert token not in str(browser.cookies)


HOSTILE = [
    '"><script>alert(1)</script>@example.com',
    "<img src=x onerror=alert(1)>@example.com",
    "</p></main></body></html>@example.com",
    "'\"&amp;&lt;@example.com",
    "{current}{0}{text.__class__}{{ 7*7 }}{% raw %}@example.com",
    "%s%(current)s${7*7}@example.com",
    "a@example.com\u202e<!--",
]


@on_sqlite
async def test_a_hostile_email_address_is_shown_as_plain_text(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    token = await client.issue(api_token)
    for email in HOSTILE:
        with changing(database) as connection:
            person = {"email": email, "first_name": "<b>", "last_name": "<i>", "created_at": 0}
            user_id = connection.execute(insert(users).values(**person).returning(users.c.id)).scalar_one()
            connection.execute(insert(memberships).values(user_id=user_id, account_id=ACCOUNT, role="editor"))
        client.cookies["studio_session"] = service.sessions.sign(Session(user_id, ACCOUNT, int(clock())))
        for lang in ("en", "de"):
            page = MessagePage((await client.get(f"{PAGE}?sso={token}", accept_language=lang)).text)
            assert email in page.texts["p"]
            assert not {"script", "img", "b", "i"} & page.elements


@on_sqlite
async def test_a_hostile_query_occurs_only_as_a_field_of_the_question(client: Client, api_token: str) -> None:
    browser, token, _ = await question_for(client, api_token)
    query = "a=\"><script>alert(1)</script>&b='onclick=x&c={{7*7}}{0}&amp;&lt;=%3Cscript%3E"
    answer = await browser.get(f"{PAGE}?{query}&sso={token}")
    page = MessagePage(answer.text)
    assert page.fields["target"] == f"{PAGE}?{query}"
    assert "script" not in page.elements
    assert "alert" not in text_of(page)


# --- the link to the portal ------------------------------------------------------------------------------------------


async def test_a_page_links_the_portal_only_if_the_signature_is_valid(
    client: Client, service: Node, database: Database, api_token: str, clock: Clock
) -> None:
    for failed in await failed_logins(client, service, database, api_token, clock):
        answer = await failed.attempt()
        assert MessagePage(answer.text).links == ([PORTAL] if failed.portal else []), failed.name
        if not failed.portal:
            assert "portal.example" not in answer.text + str(answer.headers), failed.name


async def test_a_page_links_no_portal_if_the_account_has_none(
    client: Client, database: Database, service: Node, clock: Clock
) -> None:
    with changing(database) as connection:
        _, secret = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="tests", scopes=frozenset({Scope.WRITE_SSO}), now=0
        )
    token = await client.issue(secret)
    answer = await client.get(f"{PAGE}?sso={token}")  # a page of another account, which has a portal
    assert answer.status == 403
    assert MessagePage(answer.text).links == []
    assert (await client.another().get(f"/?sso={token}")).status == 303
    used = await client.another().get(f"/?sso={token}")
    assert used.status == 401
    assert MessagePage(used.text).links == []
    clock.advance(300)
    expired = await client.another().get(f"/?sso={token}")
    assert expired.status == 401
    assert MessagePage(expired.text).links == []


@on_sqlite
async def test_a_page_links_a_portal_only_if_its_url_is_https(
    client: Client, database: Database, api_token: str
) -> None:
    token = await client.issue(api_token)
    assert (await client.another().get(f"/?sso={token}")).status == 303
    linked: dict[str, list[str]] = {}
    for url in ("http://portal.example/", "javascript:alert(1)", "//portal.example/", "data:text/html,x", "/x", ""):
        with changing(database) as connection:
            connection.execute(update(accounts).where(accounts.c.id == ACCOUNT).values(portal_url=url))
        answer = await client.another().get(f"/?sso={token}")
        assert answer.status == 401
        linked[url] = MessagePage(answer.text).links
    assert not any(linked.values()), linked


async def test_a_portal_url_is_linked_unchanged(client: Client, database: Database, api_token: str) -> None:
    url = "https://portal.example/a?b=1&amp=2&c='\"><script>"
    with changing(database) as connection:
        connection.execute(update(accounts).where(accounts.c.id == ACCOUNT).values(portal_url=url))
    token = await client.issue(api_token)
    await client.another().get(f"/?sso={token}")
    page = MessagePage((await client.another().get(f"/?sso={token}")).text)
    assert page.links == [url]
    assert ("a", "rel", "noreferrer") in page.attributes


# --- without a database ----------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(database_url: str, keys_dir: Path, tmp_path: Path, clock: Clock) -> Iterator[Client]:
    """A browser at a node with the same keys that cannot reach its database."""
    gone = f"sqlite:///{tmp_path / 'gone' / 'sso.db'}"
    if database_url.startswith("postgresql"):
        gone = f"postgresql://nobody@127.0.0.1:{free_port()}/gone"
    settings = read_settings({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": gone})
    service = Node(settings, open_database(settings), KeyDirectory(keys_dir), clock=clock)
    yield Client(create_app(service))
    service.close()


async def test_a_login_without_a_database_asks_to_retry_and_consumes_nothing(
    client: Client, cut_off: Client, api_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = await client.issue(api_token)
    assert (await client.get(f"/?sso={await client.issue(api_token, JOHN)}")).status == 303
    signed_in = cut_off.another()
    signed_in.cookies.update(client.cookies)
    for browser in (cut_off, signed_in):
        for lang, words in (("en", "try again"), ("de", "noch einmal")):
            answer = await browser.get(f"{PAGE}?sso={token}", accept_language=lang)
            assert answer.status == 503
            assert re.fullmatch("[1-9][0-9]*", answer.header("retry-after") or "")
            assert answer.header("set-cookie") is None
            assert answer.header("location") is None
            assert answer.header("cache-control") == "no-store"
            assert words in MessagePage(answer.text).texts["h1"]
            assert MessagePage(answer.text).lang == lang
            assert token not in answer.text
        answer = await browser.get(f"{PAGE}?sso={token}", accept="application/json")
        assert (answer.status, answer.error) == (503, "unavailable")
        assert answer.header("retry-after")
    assert token not in caplog.text
    assert (await client.another().get(f"{PAGE}?sso={token}")).status == 303


async def test_an_invalid_login_token_is_refused_even_without_a_database(
    client: Client, cut_off: Client, api_token: str
) -> None:
    token = await client.issue(api_token)
    forged = tokens.sign(tokens.unsafe_read_claims(token), bytes(32))
    for target, status in (
        (f"{PAGE}?sso={forged}", 401),
        ("/?sso=x", 401),
        (f"/?sso={token}&sso={token}", 401),
        (f"/a//b?sso={token}", 400),
        (f"/CLIENT/{ACCOUNT}?sso={token}", 403),
    ):
        assert (await cut_off.get(target)).status == status, target
    assert (await cut_off.request("HEAD", f"{PAGE}?sso={token}")).status == 200


async def test_an_expired_login_token_is_refused_even_without_a_database(
    client: Client, cut_off: Client, api_token: str, clock: Clock
) -> None:
    # Form, signature and expiry are checked first, so the result does not depend on the database.
    token = await client.issue(api_token)
    clock.advance(300)
    answer = await cut_off.get(f"{PAGE}?sso={token}", accept="application/json")
    assert (answer.status, answer.error) == (401, "token_expired")
