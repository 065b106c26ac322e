"""Studio pages: access by role, content, addresses, embedding, and user input that stays plain text."""

import re
from base64 import b64encode
from hashlib import sha256
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import delete, insert, update

from sso_service.database.schema import accounts, teams, users
from sso_service.database.transactions import Database
from sso_service.permissions import ACTIONS, SECTIONS, Role, Scope, may, may_view
from sso_service.services.node import Node
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, TEAM
from tests.support.databases import changing, on_sqlite
from tests.support.pages import Page
from tests.support.studio import (
    API_TOKENS,
    HOME,
    HTML,
    MEMBERS,
    SAME_ORIGIN,
    SETTINGS,
    add_members,
    page_of,
    see,
    signed_in,
    submit,
    with_settings,
)

pytestmark = pytest.mark.anyio

each_role = pytest.mark.parametrize("role", list(Role))

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> &amp; %(name)s {{ 7*7 }}"
JSON = ("accept", "application/json")


async def pages_of_an_admin(database: Database, admin: Client) -> list[str]:
    """Return the address of one page of each kind."""
    with changing(database) as connection:
        (jane,) = connection.execute(users.select().where(users.c.email == JANE["email"])).all()
        (token, *_) = administration.list_api_tokens_of(connection, ACCOUNT, now=0, limit=9)
    return [
        f"{HOME}/posts",
        API_TOKENS,
        f"{API_TOKENS}/{token.id}/revoke",
        MEMBERS,
        f"{MEMBERS}/{jane.id}/remove",
    ]


# --- access ----------------------------------------------------------------------------------------------------------


@each_role
async def test_a_role_sees_its_sections_and_links_to_no_others(
    client: Client, database: Database, api_token: str, role: Role
) -> None:
    browser = await signed_in(client, database, api_token, role)
    allowed = [section for section in SECTIONS if may_view(role, section)]
    for section in SECTIONS:
        if section not in allowed:
            refused = await page_of(browser, f"{HOME}/{section}", 403)
            assert refused.words("h1") == "Your role may not see this"
            assert refused.links == []
            answer = await browser.request("GET", f"{HOME}/{section}", headers=[JSON])
            assert (answer.status, answer.error) == (403, "no_access")
        elif section == "settings":
            answer = await see(browser, SETTINGS)
            assert (answer.status, answer.header("location")) == (303, API_TOKENS)
        else:
            page = await page_of(browser, f"{HOME}/{section}")
            assert page.words("h1") == section.capitalize()
            assert page.sections == [f"{HOME}/{each}" for each in allowed]


@on_sqlite
@each_role
async def test_a_page_shows_user_account_team_role_and_permissions(
    client: Client, database: Database, api_token: str, role: Role
) -> None:
    browser = await signed_in(client, database, api_token, role)
    for section in (section for section in SECTIONS if may_view(role, section) and section != "settings"):
        page = await page_of(browser, f"{HOME}/{section}")
        assert page.words("dd") == f"Jane Doe, {JANE['email']} One Team {role.capitalize()}"
        shown = {text.split()[-1].lower(): allowed == "may" for allowed, text in page.actions}
        assert shown == {action: may(role, section, action) for action in ACTIONS}


async def test_a_changed_role_applies_from_the_next_request(client: Client, database: Database, api_token: str) -> None:
    browser = await signed_in(client, database, api_token, Role.EDITOR)
    await page_of(browser, f"{HOME}/areas", 403)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.PUBLISHER)
    await page_of(browser, f"{HOME}/areas")
    await page_of(browser, MEMBERS, 403)


async def test_other_accounts_and_their_teams_are_not_accessible(
    client: Client, database: Database, api_token: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    for path in (
        f"/client/{OTHER_ACCOUNT}",
        f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/settings/team",
        f"/client/{OTHER_ACCOUNT}/t/{TEAM}/posts",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}/settings/api-tokens",
        f"/client/{ACCOUNT}/t/4294967295/posts",
    ):
        page = await page_of(admin, path, 403)
        assert page.words("h1") == "You have no access here"
        answer = await submit(admin, path)
        assert answer.status == 403, path


@on_sqlite
async def test_a_request_without_a_session_gets_a_page_or_json(client: Client) -> None:
    for path in ("/", f"/client/{ACCOUNT}", HOME, f"{HOME}/posts", SETTINGS, MEMBERS, f"{HOME}/nothing"):
        assert (await page_of(client, path, 401)).words("h1") == "You are not signed in"
        for headers in ([JSON], [], [("accept", "*/*")]):
            answer = await client.request("GET", path, headers=headers)
            assert (answer.status, answer.error) == (401, "not_signed_in")
        assert (await submit(client, path)).status == 401
    german = await client.request("GET", "/", headers=[HTML, ("accept-language", "de")])
    assert Page(german.text).words("h1") == "Du bist nicht angemeldet"


async def test_a_disabled_removed_or_signed_out_user_sees_no_page(
    client: Client, database: Database, api_token: str, clock: Clock
) -> None:
    people = [{**JANE, "email": f"{name}@example.com"} for name in ("disabled", "removed", "out")]
    browsers = [await signed_in(client, database, api_token, Role.ADMIN, person) for person in people]
    with changing(database) as connection:
        administration.disable_user(connection, "disabled@example.com", now=int(clock()))
        administration.remove_member(connection, "removed@example.com", ACCOUNT)
        administration.sign_out_user(connection, "out@example.com", now=int(clock()))
    for browser in browsers:
        assert (await see(browser, f"{HOME}/posts")).status == 401
        assert (await see(browser, API_TOKENS)).status == 401


# --- addresses -------------------------------------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("query", ["", "?chromeless=1"])
async def test_an_unknown_address_gets_a_page_with_404(
    client: Client, database: Database, api_token: str, query: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    for path in (
        "/nothing",
        "/favicon.ico",
        f"{HOME}/nothing",
        f"{HOME}/posts/1",
        f"{SETTINGS}/nothing",
        f"{MEMBERS}/x/remove",
        f"{MEMBERS}/-1/remove",
        f"{API_TOKENS}/1/nothing",
        f"/client/0{ACCOUNT}",
        f"/Client/{ACCOUNT}",
        f"/client/{ACCOUNT}/posts",
        "//",
        f"{HOME}//posts",
        f"{HOME}/../posts",
        f"{HOME}/%2e%2e/posts",
        f"{HOME}/posts;x",
    ):
        answer = await see(admin, path + query)
        assert (answer.status, answer.header("content-type")) == (404, "text/html; charset=utf-8"), path
        assert Page(answer.text).words("h1") == "There is nothing here"
        assert answer.header("cache-control") == "no-store"
        answer = await admin.request("GET", path + query, headers=[JSON])
        assert (answer.status, answer.error) == (404, "not_found")


@on_sqlite
async def test_another_spelling_of_a_section_is_another_section(
    client: Client, database: Database, api_token: str
) -> None:
    editor = await signed_in(client, database, api_token, Role.EDITOR)
    admin = await signed_in(client, database, api_token, Role.ADMIN, JOHN)
    for spelling in ("Posts", "POSTS", "p%6Fsts", "%70osts", "posts%20", "post", "settings%00"):
        assert (await see(editor, f"{HOME}/{spelling}")).status in {403, 404}
        assert (await see(admin, f"{HOME}/{spelling}")).status == 404
    for spelling in ("Settings/team", "s%65ttings/team", "settings/%74eam", "settings/Team"):
        assert (await see(editor, f"{HOME}/{spelling}")).status == 403
        assert (await see(admin, f"{HOME}/{spelling}")).status == 404


async def test_short_addresses_redirect_to_the_posts_of_a_team(
    client: Client, database: Database, api_token: str
) -> None:
    browser = await signed_in(client, database, api_token, Role.EDITOR)
    with changing(database) as connection:
        administration.add_team(connection, ACCOUNT, "Later team", team_id=TEAM + 1)
    later = f"/client/{ACCOUNT}/t/{TEAM + 1}"
    for path, leads_to in (
        ("/", HOME),
        (f"/client/{ACCOUNT}", HOME),
        (f"/client/{ACCOUNT}/", HOME),
        (HOME, HOME),
        (f"{HOME}/", HOME),
        (later, later),
    ):
        answer = await see(browser, path)
        assert (answer.status, answer.header("location")) == (303, f"{leads_to}/posts"), path
        answer = await see(browser, f"{path}?chromeless=1")
        assert (answer.status, answer.header("location")) == (303, f"{leads_to}/posts?chromeless=1")


async def test_an_account_without_teams_has_no_start_page(client: Client, database: Database, api_token: str) -> None:
    browser = await signed_in(client, database, api_token, Role.ADMIN)
    with changing(database) as connection:
        connection.execute(delete(teams).where(teams.c.account_id == ACCOUNT))
    await page_of(browser, "/", 404)
    await page_of(browser, f"/client/{ACCOUNT}", 404)
    await page_of(browser, HOME, 403)


@on_sqlite
async def test_a_trailing_slash_and_head_make_no_difference(client: Client, database: Database, api_token: str) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    for path in await pages_of_an_admin(database, admin):
        plain, slashed = await see(admin, path), await see(admin, f"{path}/")
        assert plain.status == slashed.status == 200
        assert plain.body == slashed.body
        head = await admin.request("HEAD", path, headers=[HTML])
        assert (head.status, head.headers) == (plain.status, plain.headers)
    for path, status in (("/", 303), (SETTINGS, 303), (f"{HOME}/nothing", 404)):
        assert (await admin.request("HEAD", path, headers=[HTML])).status == status
    assert (await client.request("HEAD", f"{HOME}/posts", headers=[HTML])).status == 401


@on_sqlite
@pytest.mark.parametrize("query", ["", "?chromeless=1"])
async def test_a_wrong_method_gets_405_with_the_allowed_methods(
    client: Client, database: Database, api_token: str, query: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    reading, both = "GET, HEAD", "GET, HEAD, POST"
    for path, methods, allow in (
        ("/", ("POST", "PUT", "DELETE"), reading),
        (f"{HOME}/posts", ("POST", "PUT", "PATCH"), reading),
        (MEMBERS, ("POST", "DELETE"), reading),
        (API_TOKENS, ("PUT", "DELETE"), both),
        (f"{API_TOKENS}/1/revoke", ("PUT",), both),
        (f"{MEMBERS}/1/remove", ("DELETE",), both),
        (f"{MEMBERS}/1/role", ("GET", "HEAD", "PUT"), "POST"),
        (f"{MEMBERS}/1/sign-out", ("GET", "HEAD", "PUT"), "POST"),
    ):
        for method in methods:
            answer = await admin.request(method, path + query, headers=[JSON, SAME_ORIGIN])
            assert (answer.status, answer.header("allow")) == (405, allow), (method, path)
            assert answer.error == "method_not_allowed"


@on_sqlite
async def test_with_studio_pages_switched_off_only_the_login_works(
    client: Client, service: Node, database: Database, api_token: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    with with_settings(service, studio_pages=False) as bare:
        bare.cookies = dict(admin.cookies)
        for path in ("/", HOME, f"{HOME}/posts", SETTINGS, API_TOKENS, MEMBERS):
            answer = await see(bare, path)
            assert (answer.status, answer.error) == (404, "not_found")
            answer = await submit(bare, path, [("name", "x"), ("scope", "write:sso")])
            assert (answer.status, answer.error) == (404, "not_found")
        other = bare.another()
        answer = await see(other, f"{HOME}/posts?a=1&sso={await bare.issue(api_token, JOHN)}")
        assert (answer.status, answer.header("location")) == (303, f"{HOME}/posts?a=1")
        assert (await other.get("/session")).json()["user"]["email"] == JOHN["email"]
    with changing(database) as connection:
        assert len(administration.list_api_tokens_of(connection, ACCOUNT, now=0, limit=9)) == 1


@on_sqlite
async def test_a_login_link_to_a_page_signs_in_and_redirects_to_it(
    client: Client, database: Database, api_token: str
) -> None:
    for query in ("", "chromeless=1"):
        browser = client.another()
        token = await client.issue(api_token)
        answer = await see(browser, f"{HOME}/ideas?{query}{'&' if query else ''}sso={token}")
        clean = f"{HOME}/ideas{'?' if query else ''}{query}"
        assert (answer.status, answer.header("location")) == (303, clean)
        page = await page_of(browser, clean)
        assert page.words("h1") == "Ideas"
        assert token not in str(page.attributes)
    # Also in a browser in which the same user is already signed in.
    assert (await see(browser, f"{HOME}/ideas?sso={await client.issue(api_token)}")).status == 303


# --- embedded in another page ----------------------------------------------------------------------------------------


def is_chromeless(address: str) -> bool:
    return parse_qs(urlsplit(address).query).get("chromeless") == ["1"]


@on_sqlite
async def test_chromeless_pages_have_no_navigation_and_link_only_such_pages(
    client: Client, database: Database, api_token: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    with changing(database) as connection:
        add_members(connection, 120)
    waiting = [f"{HOME}/posts?chromeless=1", f"{API_TOKENS}?chromeless=1", f"{MEMBERS}?search=m&page=2&chromeless=1"]
    seen = set()
    for address in waiting:  # the loop appends to this list
        kind = re.sub(r"/[0-9]+/(remove|revoke)", r"/N/\1", address)  # one page of each kind is enough
        if kind in seen:
            continue
        seen.add(kind)
        page = await page_of(admin, address)
        assert not {"header", "details"} & page.elements
        assert page.sections == []
        for text, link in page.links:
            assert is_chromeless(link) or link == "#content", (address, text)
            waiting += [link] if link.startswith("/") else []
        for form in page.forms:
            hidden = form.method == "get" and form.sent("chromeless") == ["1"]
            # A form without an action is submitted to the address of its page.
            assert hidden or is_chromeless(address if form.action is None else form.action), (address, form)
    assert seen == {
        f"{HOME}/posts?chromeless=1",
        f"{API_TOKENS}?chromeless=1",
        f"{API_TOKENS}?show=revoked&chromeless=1",
        f"{API_TOKENS}/N/revoke?chromeless=1",
        f"{MEMBERS}/N/remove?chromeless=1",
        f"{MEMBERS}?chromeless=1",
        f"{MEMBERS}?page=2&chromeless=1",
        f"{MEMBERS}?page=3&chromeless=1",
        f"{MEMBERS}?page=1&chromeless=1",
        *(f"{MEMBERS}?search=m&page={number}&chromeless=1" for number in (1, 2, 3)),
    }


async def test_a_change_on_a_chromeless_page_returns_to_a_chromeless_page(
    client: Client, database: Database, api_token: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    await client.issue(api_token, JOHN)
    with changing(database) as connection:
        john = administration.find_user(connection, JOHN["email"]).id
        token_id, _ = administration.create_api_token(
            connection, account_id=ACCOUNT, name="x", scopes=frozenset({Scope.WRITE_SSO}), now=1
        )
    for path in (
        f"{MEMBERS}/{john}/role",
        f"{MEMBERS}/{john}/sign-out",
        f"{MEMBERS}/{john}/remove",
        f"{API_TOKENS}/{token_id}/revoke",
    ):
        answer = await submit(admin, f"{path}?chromeless=1", [("role", "admin"), ("page", "1"), ("search", "j&=?")])
        location = answer.header("location") or ""
        assert (answer.status, is_chromeless(location)) == (303, True), path
        page = await page_of(admin, location)
        assert "header" not in page.elements
        assert page.words("notice")
    wrong = await submit(admin, f"{API_TOKENS}?chromeless=1", [("name", "")])
    assert wrong.status == 422
    assert "header" not in Page(wrong.text).elements


@on_sqlite
async def test_a_page_is_chromeless_only_with_the_query_parameter(
    client: Client, database: Database, api_token: str
) -> None:
    browser = await signed_in(client, database, api_token, Role.EDITOR)
    for query, chromeless in (
        ("", False),
        ("?chromeless=0", False),
        ("?chromeless=false", False),
        ("?chromeless=NO", False),
        ("?chromeles=1", False),
        ("?chromeless=1&chromeless=0", False),
        ("?chromeless=1", True),
        ("?chromeless", True),
        ("?a=1&chromeless=true", True),
        ("?chromeless=%FF", True),
    ):
        page = await page_of(browser, f"{HOME}/posts{query}")
        assert ("header" not in page.elements) == chromeless, query
        if not chromeless:
            assert page.form("/logout").method == "post"
            assert page.form("/sso/sign-out-everywhere").method == "post"
            assert not any(is_chromeless(link) for _, link in page.links)


# --- security --------------------------------------------------------------------------------------------------------


async def test_hostile_names_are_shown_as_plain_text(client: Client, database: Database, api_token: str) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    name = HOSTILE[:100]
    with changing(database) as connection:
        connection.execute(update(users).values(first_name=name, last_name=name))
        connection.execute(update(accounts).values(name=name))
        connection.execute(update(teams).values(name=name))
        token_id, _ = administration.create_api_token(
            connection, account_id=ACCOUNT, name=name, scopes=frozenset({Scope.WRITE_SSO}), now=1
        )
    known = await pages_of_an_admin(database, admin)
    addresses = [*known, f"{API_TOKENS}/{token_id}/revoke"]
    for lang in ("en", "de"):
        for address in addresses:
            answer = await admin.request("GET", address, headers=[HTML, ("accept-language", lang)])
            assert answer.status == 200
            page = _harmless(answer.text)
            assert page.lang == lang
            for where in ("place", "summary"):
                assert " ".join(name.split()) in page.words(where), (address, where)
        tokens = Page((await admin.request("GET", API_TOKENS, headers=[HTML])).text)
        assert " ".join(name.split()) in [row[0] for row in tokens.rows]
    assert (await page_of(admin, addresses[-1])).words("h2") == f"Revoke {name}?"


@on_sqlite
async def test_hostile_input_in_forms_is_shown_as_plain_text(
    client: Client, database: Database, api_token: str
) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    quoted = HOSTILE.replace("&", "%26").replace("%(", "%25(").replace(" ", "+")
    page = _harmless((await see(admin, f"{MEMBERS}?search={quoted}&page={quoted}&notice={quoted}")).text)
    assert page.form(MEMBERS).sent("search") == [HOSTILE]
    assert page.words("notice") == ""
    fields = [("name", HOSTILE), ("scope", HOSTILE), ("max_role", HOSTILE), ("expires_in", HOSTILE)]
    answer = await submit(admin, API_TOKENS, fields)
    assert answer.status == 422
    assert _harmless(answer.text).form(API_TOKENS).sent("name") == [HOSTILE]
    assert _harmless(answer.text).form(API_TOKENS).sent("expires_in") == [HOSTILE]


def _harmless(html: str) -> Page:
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "base"} & page.elements
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"style", "src", "srcset", "formaction"}
        assert name != "href" or value.startswith(("/client/", "#content", "data:image/svg+xml,"))
        assert name != "action" or value.startswith(("/client/", "/logout", "/sso/"))
    assert "49 }}" not in html
    return page


async def all_answers(client: Client, database: Database, api_token: str) -> list[tuple[str, bytes, list[str]]]:
    """Return `X-Frame-Options`, body and policy of pages of each kind, error pages included."""
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    editor = await signed_in(client, database, api_token, Role.EDITOR, JOHN)
    requests = [(admin, path) for path in await pages_of_an_admin(database, admin)]
    requests += [(client, "/"), (editor, SETTINGS), (editor, "/client/1"), (admin, f"{HOME}/nothing")]
    answers = [await see(browser, path) for browser, path in requests]
    answers.append(await submit(admin, API_TOKENS, [("name", "n"), ("scope", "write:sso")]))
    answers.append(await submit(admin, API_TOKENS, []))
    answers.append(await submit(admin, API_TOKENS, [], origin=()))
    assert [answer.status for answer in answers] == [200] * 5 + [401, 403, 403, 404, 200, 422, 403]
    found = []
    for answer in answers:
        assert answer.header("cache-control") == "no-store"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("cross-origin-opener-policy") == "same-origin"
        assert answer.header("cross-origin-resource-policy") == "same-origin"
        assert answer.header("referrer-policy") in {"no-referrer", "strict-origin"}
        assert answer.header("content-language") == "en"
        assert {"accept", "accept-language", "cookie"} <= set((answer.header("vary") or "").lower().split(", "))
        policy = (answer.header("content-security-policy") or "").split("; ")
        found.append((answer.header("x-frame-options") or "", answer.body, policy))
    return found


@on_sqlite
async def test_no_page_is_cached_or_framed_or_loads_or_runs_anything(
    client: Client, database: Database, api_token: str
) -> None:
    for frame_options, body, policy in await all_answers(client, database, api_token):
        (style,) = re.findall(rb"<style>(.*?)</style>", body, re.DOTALL)
        digest = b64encode(sha256(style).digest()).decode()
        assert sorted(policy) == [
            "base-uri 'none'",
            "default-src 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
            "img-src data:",
            f"style-src 'sha256-{digest}'",
        ]
        assert frame_options == "DENY"


@on_sqlite
async def test_only_the_configured_origins_may_frame_pages(
    client: Client, service: Node, database: Database, api_token: str
) -> None:
    origins = "https://intranet.example https://portal.example:8443"
    with with_settings(service, embed_origins=origins) as embedded:
        for frame_options, _, policy in await all_answers(embedded, database, api_token):
            assert f"frame-ancestors {origins}" in policy
            assert len(policy) == 6
            assert frame_options == ""


@on_sqlite
async def test_every_page_is_in_the_language_of_the_browser(client: Client, database: Database, api_token: str) -> None:
    admin = await signed_in(client, database, api_token, Role.ADMIN)
    with changing(database) as connection:
        connection.execute(insert(teams).values(id=TEAM + 1, account_id=ACCOUNT, name="Second"))
    for path in await pages_of_an_admin(database, admin):
        buttons = {}
        for lang in ("en", "de"):
            answer = await admin.request("GET", path, headers=[HTML, ("accept-language", lang)])
            page = Page(answer.text)
            assert (page.lang, answer.header("content-language")) == (lang, lang)
            buttons[lang] = page.words("button")
        assert "Sign out everywhere" in buttons["en"]
        assert "Überall abmelden" in buttons["de"]
