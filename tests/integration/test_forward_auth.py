"""`GET /auth`, the forward authentication endpoint: sessions, roles, and URIs that try to bypass the access check."""

from itertools import permutations, product
from pathlib import Path

import pytest

from sso_service import keyring
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from sso_service.services.node import Node
from sso_service.sessions import Session, dump_session
from tests.support import administration
from tests.support.api import make_api_token, settled
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE, TEAM
from tests.support.databases import changing, on_sqlite
from tests.support.hostile_links import NOT_CANONICAL
from tests.support.outages import unreachable, without
from tests.support.sessions import COOKIE, SESSION_LIFETIME, sign_in, sign_out_everywhere

pytestmark = pytest.mark.anyio

EMAIL = JANE["email"]
TEAM_PATH = f"/client/{ACCOUNT}/t/{TEAM}"
SETTINGS = f"{TEAM_PATH}/settings"

# The headers in which proxies send the requested URI: nginx if configured to, Caddy and Traefik always.
HEADER_NAMES = ("X-Original-URI", "X-Forwarded-Uri")


async def authorize(client: Client, *uris: tuple[str, str], target: str = "/auth") -> Answer:
    """Send a forward authentication request with these (header, URI) pairs, and validate the form of the response."""
    answer = await client.request("GET", target, headers=uris)
    assert answer.status in {204, 401, 403, 503}
    assert answer.header("set-cookie") is None
    assert answer.header("location") is None
    assert answer.header("cache-control") == "no-store"
    identity = sorted(name for name, _ in answer.headers if name.startswith("x-studio-"))
    if answer.status == 204:
        assert answer.body == b""
        assert identity == ["x-studio-account", "x-studio-email", "x-studio-role", "x-studio-user"]
    else:
        assert answer.json().keys() == {"error"}
        assert {"code", "message"} <= answer.json()["error"].keys() <= {"code", "message", "details"}
        assert identity == []
        assert (answer.header("retry-after") is not None) == (answer.status == 503)
    return answer


async def status(client: Client, uri: str, name: str = HEADER_NAMES[0]) -> int:
    return (await authorize(client, (name, uri))).status


def set_role(database: Database, role: Role, email: str = EMAIL) -> None:
    with changing(database) as connection:
        administration.set_role(connection, email, ACCOUNT, role)


# --- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADER_NAMES)
async def test_a_member_with_access_is_allowed_and_identified(
    client: Client, api_token: str, name: str, database: Database
) -> None:
    await sign_in(client, api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    for role in Role:
        set_role(database, role)
        answer = await authorize(client, (name, PAGE))
        assert answer.status == 204
        assert answer.header("x-studio-user") == str(user_id)
        assert answer.header("x-studio-email") == EMAIL
        assert answer.header("x-studio-account") == str(ACCOUNT)
        assert answer.header("x-studio-role") == role


async def test_a_session_is_limited_to_one_account_of_a_user(
    client: Client, api_token: str, database: Database
) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    page = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/settings"
    other = client.another()
    await sign_in(client, api_token)
    await sign_in(other, elsewhere, page=f"/client/{OTHER_ACCOUNT}")
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, OTHER_ACCOUNT, Role.ADMIN)
    answer = await authorize(other, (HEADER_NAMES[0], page))
    assert (answer.header("x-studio-account"), answer.header("x-studio-role")) == (str(OTHER_ACCOUNT), "admin")
    assert await status(client, page) == 403
    assert await status(other, PAGE) == 403


async def test_a_request_without_a_valid_session_is_answered_401(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    session = await sign_in(client, api_token)
    token = await client.issue(api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    now = int(clock())
    key = service.keys.ring.signing_key(now)
    assert await status(client, PAGE) == 204
    bad = {
        "forged": dump_session(Session(user_id, ACCOUNT, now), bytes(32)),
        "signed with the token key": dump_session(Session(user_id, ACCOUNT, now), key.token_key),
        "too old": service.sessions.sign(Session(user_id, ACCOUNT, now - SESSION_LIFETIME)),
        "from the future": service.sessions.sign(Session(user_id, ACCOUNT, now + 61)),
        "of an account without membership": service.sessions.sign(Session(user_id, OTHER_ACCOUNT, now)),
        "of an unknown user": service.sessions.sign(Session(4711, ACCOUNT, now)),
        "truncated": session[:-1],
        "empty": "",
        "a word": "admin",
        "a login token": token,
        "an API token": api_token,
    }
    browsers = {name: client.another() for name in ("none", *bad)}
    for name, value in bad.items():
        browsers[name].cookies[COOKIE] = value
    answers = {name: await authorize(browser, (HEADER_NAMES[0], PAGE)) for name, browser in browsers.items()}
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(browsers, 401)
    assert len({answer.body for answer in answers.values()}) == 1
    assert answers["none"].error == (await client.another().get("/session")).error
    bearer = ("authorization", f"Bearer {api_token}")
    assert (await authorize(client.another(), bearer, (HEADER_NAMES[0], PAGE))).status == 401


@on_sqlite
async def test_a_session_is_valid_until_the_second_it_expires(client: Client, api_token: str, clock: Clock) -> None:
    clock.now = float(int(clock.now))
    await sign_in(client, api_token)
    clock.advance(SESSION_LIFETIME - 1)
    assert await status(client, PAGE) == 204
    clock.advance(1)
    assert await status(client, PAGE) == 401


async def test_user_changes_take_effect_at_the_next_request(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    clock.advance(-10)
    await sign_in(client, api_token)
    john = client.another()
    await sign_in(john, api_token, JOHN)
    for role, allowed in ((Role.EDITOR, 403), (Role.ADMIN, 204), (Role.PUBLISHER, 403), (Role.ADMIN, 204)):
        set_role(database, role)
        assert await status(client, SETTINGS) == allowed
        assert await status(john, SETTINGS) == 403
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert await status(client, PAGE) == 401
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert await status(client, PAGE) == 401
    await sign_in(client, api_token)
    assert await status(client, PAGE) == 204
    clock.advance(10)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert await status(client, PAGE) == 401
    token = await client.issue(api_token)  # adds the member again, as an editor; earlier sessions stay invalid
    assert await status(client, PAGE) == 401
    await client.get(f"{PAGE}?sso={token}")
    assert (await status(client, PAGE), await status(client, SETTINGS)) == (204, 403)
    sign_out_everywhere(database, clock())
    assert await status(client, PAGE) == 401
    assert await status(john, PAGE) == 204


@on_sqlite
async def test_signing_out_and_revoking_the_key_end_a_session(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    other = client.another()
    await sign_in(client, api_token)
    await sign_in(other, api_token)
    await client.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")])
    assert (await status(client, PAGE), await status(other, PAGE)) == (401, 204)
    keyring.revoke_all(keys_dir, now=int(clock()))
    service.keys.refresh()
    assert await status(other, PAGE) == 401


# --- roles and pages -------------------------------------------------------------------------------------------------

SECTIONS = {
    "posts": {Role.EDITOR, Role.PUBLISHER, Role.ADMIN},
    "ideas": {Role.EDITOR, Role.PUBLISHER, Role.ADMIN},
    "areas": {Role.PUBLISHER, Role.ADMIN},
    "topics": {Role.PUBLISHER, Role.ADMIN},
    "templates": {Role.PUBLISHER, Role.ADMIN},
    "settings": {Role.ADMIN},
    "billing": {Role.ADMIN},
    "x": {Role.ADMIN},
    "t": {Role.ADMIN},
    "42": {Role.ADMIN},
    "client": {Role.ADMIN},
    # Another spelling is another section, however the application behind the proxy reads it.
    "Posts": {Role.ADMIN},
    "POSTS": {Role.ADMIN},
    "%70osts": {Role.ADMIN},
    "post%73": {Role.ADMIN},
    "%69deas": {Role.ADMIN},
    "posts%20": {Role.ADMIN},
    "posts,": {Role.ADMIN},
    "posts:view": {Role.ADMIN},
    "posts&": {Role.ADMIN},
    "post": {Role.ADMIN},
    "postss": {Role.ADMIN},
    "%73ettings": {Role.ADMIN},
    "Settings": {Role.ADMIN},
    "\u017fettings": {Role.ADMIN},  # a long s, which case folding turns into s
    "post%C5%BF": {Role.ADMIN},
}


async def test_each_role_sees_its_sections_and_unknown_ones_need_an_admin(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    for role in Role:
        set_role(database, role)
        for section, roles in SECTIONS.items():
            for rest in ("", "/", "/7/edit", "?a=1"):
                uri = f"{TEAM_PATH}/{section}{rest}".encode().decode("latin-1")
                assert await status(client, uri) == (204 if role in roles else 403), (role, uri)


@on_sqlite
async def test_pages_without_a_section_are_open_to_every_member(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for path in (
        f"/client/{ACCOUNT}",
        f"/client/{ACCOUNT}/",
        TEAM_PATH,
        f"{TEAM_PATH}/",
        "/",
        "/welcome",
        "/welcome/",
        "/assets/app.js?v=1",
        "/clients/1",
        "/en/client/999/t/77/settings",
        "/settings",
        "/session",
        "/auth",
        "/caf%C3%A9/%F0%9F%91%8D",
        "/a:b@c=d+e&f~h!i$j'k(l)m*n",
    ):
        for name in HEADER_NAMES:
            assert await status(client, path, name) == 204, path
        assert await status(client.another(), path) == 401, path


async def test_pages_of_another_account_are_refused_for_every_role(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    await client.issue(
        make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    )  # Jane is a member, but her session is of ACCOUNT
    set_role(database, Role.ADMIN)
    assert await status(client, SETTINGS) == 204
    for path in (
        f"/client/{OTHER_ACCOUNT}",
        f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{OTHER_ACCOUNT}/t/{TEAM}/posts",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{ACCOUNT}/t/43/posts",
        f"/client/{ACCOUNT}/t/4294967295",
        "/client/4294967295",
        # Paths that only resemble a Studio path:
        "/client",
        "/client/",
        "/CLIENT",
        "/%63lient",
        f"/Client/{ACCOUNT}/t/{TEAM}/posts",
        f"/CLIENT/{ACCOUNT}",
        f"/%63lient/{ACCOUNT}/t/{TEAM}/posts",
        f"/%43LIEN%54/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/0{ACCOUNT}/t/{TEAM}/posts",
        f"/client/{ACCOUNT}/t/0{TEAM}/posts",
        f"/client/%31%32%33/t/{TEAM}/posts",
        f"/client/{ACCOUNT}/t",
        f"/client/{ACCOUNT}/T/{TEAM}/posts",
        f"/client/{ACCOUNT}/%74/{TEAM}/posts",
        f"/client/{ACCOUNT}/posts",
        f"/client/{ACCOUNT}/settings",
        "/client/0",
        "/client/4294967296",
        "/client/" + "1" * 5000,
    ):
        assert await status(client, path) == 403, path


# --- ambiguous URIs --------------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_path_that_is_not_canonical_is_refused(client: Client, api_token: str, database: Database) -> None:
    await sign_in(client, api_token)
    set_role(database, Role.ADMIN)
    for path, name in product(NOT_CANONICAL, HEADER_NAMES):
        uri = path.decode("latin-1")
        for each in (uri, f"{uri}?a=1"):
            assert await status(client, each, name) == 403, each
        assert (await authorize(client.another(), (name, uri))).status in {401, 403}


@on_sqlite
async def test_a_value_that_is_not_a_path_and_query_is_refused(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    set_role(database, Role.ADMIN)
    assert await status(client, PAGE) == 204
    for value in (
        "",
        " ",
        "?",
        "?a=/",
        PAGE[1:],
        f"http://studio.example{PAGE}",
        f"https://studio.example{PAGE}",
        f"//studio.example{PAGE}",
        f"studio.example{PAGE}",
        f" {PAGE}",
        f"{PAGE} ",
        f"{PAGE} HTTP/1.1",
        f"GET {PAGE}",
        f"{TEAM_PATH}/po sts",
        "/ /",
        f"{PAGE}#",  # browsers never send the fragment
        f"{PAGE}#/../settings",
        f"{PAGE}\t",
        f'"{PAGE}"',
        f"<{PAGE}>",
        "*",
        "-",
        "null",
        # Two URIs in one value, as from a proxy that combines fields of one name (RFC 9110, section 5.3).
        f"/x, {SETTINGS}",
        f"{SETTINGS}, /x",
        f"{PAGE}, {PAGE}",
        f"/x?a, {SETTINGS}",
        f"{PAGE}?a b",
    ):
        for name in HEADER_NAMES:
            assert await status(client, value, name) == 403, value


@on_sqlite
async def test_two_uris_combined_without_a_space_are_refused(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for value in (f"/x,{SETTINGS}", f"{PAGE},{SETTINGS}", f"{SETTINGS},{PAGE}", f"{TEAM_PATH},{SETTINGS}"):
        for name in HEADER_NAMES:
            assert await status(client, value, name) == 403, value


@on_sqlite
async def test_a_comma_in_a_path_is_part_of_its_segment(client: Client, api_token: str, database: Database) -> None:
    """An application that reads `42,` as 42, as `parseInt` does, would show the settings."""
    await sign_in(client, api_token)
    for role in (Role.EDITOR, Role.ADMIN):
        set_role(database, role)
        for path in (
            f"/client/{ACCOUNT},/",
            f"/client/{ACCOUNT},/t/{TEAM}/settings",
            f"/client/{ACCOUNT}/t/{TEAM},/settings",
            f"/client/{ACCOUNT}/,/t/{TEAM}/settings",
            f"/client/{ACCOUNT}/t/,/{TEAM}/settings",
        ):
            for name in HEADER_NAMES:
                assert await status(client, path, name) == 403, (role, path)


@on_sqlite
async def test_the_query_does_not_affect_access(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for query in (
        "?",
        "?a",
        "?x=/../y",
        "?x=//evil.example&y=%2e%2e%2f%00%ff",
        f"?next={SETTINGS}",
        f"?{PAGE}",
        "??/client/999",
        "?a;b\\c",
        "?sso=x",
        "?a=b,c",
        "?%zz=%",
    ):
        for name in HEADER_NAMES:
            assert await status(client, PAGE + query, name) == 204, query
            assert await status(client, SETTINGS + query, name) == 403, query
            assert await status(client, f"/a/../b{query}", name) == 403, query


# --- headers sent by the client --------------------------------------------------------------------------------------

GOOD = (PAGE, TEAM_PATH, "/welcome?x=/../y")
BAD = (SETTINGS, f"/client/{OTHER_ACCOUNT}", "/a/../b", "", f"https://studio.example{PAGE}", "/CLIENT", "/a b")


@on_sqlite
async def test_every_uri_in_a_request_must_be_allowed(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for good, other in product(GOOD, GOOD):
        for names in product(HEADER_NAMES, HEADER_NAMES):
            assert (await authorize(client, *zip(names, (good, other), strict=True))).status == 204
    for good, bad in product(GOOD, BAD):
        for uris, names in product(permutations((good, bad)), product(HEADER_NAMES, HEADER_NAMES)):
            sent = list(zip(names, uris, strict=True))
            assert (await authorize(client, *sent)).status == 403, sent
    many = [(HEADER_NAMES[n % 2], PAGE) for n in range(5)]
    assert (await authorize(client, *many)).status == 204
    for at in range(5):
        one_bad = [*many[:at], (HEADER_NAMES[at % 2], SETTINGS), *many[at + 1 :]]
        assert (await authorize(client, *one_bad)).status == 403, at


@on_sqlite
async def test_a_request_without_a_uri_header_is_refused(client: Client, api_token: str, database: Database) -> None:
    await sign_in(client, api_token)
    set_role(database, Role.ADMIN)
    assert (await authorize(client)).status == 403
    for name in (
        *("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Url", "X-Forwarded-Path", "X-Forwarded-Prefix"),
        *("X-Original-Uri-", "X_Original_URI", "X_Forwarded_Uri", "Original-URI", "Referer", "X-Forwarded-For"),
    ):
        assert (await authorize(client, (name, PAGE))).status == 403, name
    for target in (f"/auth?{PAGE}", f"/auth?uri={PAGE}", f"/auth?X-Original-URI={PAGE}"):
        assert (await authorize(client, target=target)).status == 403, target
    assert (await authorize(client.another())).status in {401, 403}


@on_sqlite
async def test_header_names_are_case_insensitive(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for name in HEADER_NAMES:
        for spelled in (name.lower(), name.upper(), name):
            assert await status(client, PAGE, spelled) == 204
            assert (await authorize(client, (spelled, SETTINGS), (name, PAGE))).status == 403


@on_sqlite
async def test_identity_headers_from_the_client_are_ignored(client: Client, api_token: str) -> None:
    claimed = [
        *(("X-Studio-Role", "admin"), ("X-Studio-User", "1"), ("X-Studio-Account", str(OTHER_ACCOUNT))),
        *(("X-Studio-Email", "admin@example.com"), ("X-Studio-Foo", "bar"), ("X-Forwarded-User", "admin")),
    ]
    assert (await authorize(client, *claimed, (HEADER_NAMES[0], PAGE))).status == 401
    await sign_in(client, api_token)
    assert (await authorize(client, *claimed, (HEADER_NAMES[0], SETTINGS))).status == 403
    answer = await authorize(client, *claimed, (HEADER_NAMES[0], PAGE))
    assert (answer.status, answer.header("x-studio-email"), answer.header("x-studio-role")) == (204, EMAIL, "editor")
    assert answer.header("x-studio-account") == str(ACCOUNT)


# --- limits of the endpoint, and outages -----------------------------------------------------------------------------


async def test_forward_authentication_never_consumes_a_login_token(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for target in ("/auth", f"/auth?sso={token}"):
        for uri in (f"{PAGE}?sso={token}", PAGE):
            assert (await authorize(client, (HEADER_NAMES[0], uri), target=target)).status == 401
            assert (await authorize(client, (HEADER_NAMES[1], uri), target=target)).status == 401
    assert client.cookies == {}
    signed_in = client.another()
    await sign_in(signed_in, api_token)
    assert (
        await authorize(signed_in, (HEADER_NAMES[0], f"{PAGE}?sso={token}"), target=f"/auth?sso={token}")
    ).status == 204
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303  # the token was not consumed


@on_sqlite
async def test_methods_other_than_get_are_refused(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, "/auth", headers=[(HEADER_NAMES[0], PAGE)])
        assert (answer.status, answer.error) == (405, "method_not_allowed"), method
        assert "GET" in (answer.header("allow") or "")
        assert not [name for name, _ in answer.headers if name.startswith("x-studio-")]


async def test_requests_are_refused_while_the_database_is_unavailable(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    await sign_in(client, api_token)
    forger = client.another()
    forger.cookies[COOKIE] = "garbage"
    with unreachable(database):
        for uri in (PAGE, TEAM_PATH, "/welcome"):
            answer = await authorize(client, (HEADER_NAMES[0], uri))
            assert (answer.status, answer.error) == (503, "unavailable"), uri
            assert int(answer.header("retry-after") or 0) > 0
            assert await status(forger, uri) == 401  # no query is needed to refuse it
        assert await status(client, SETTINGS) == 503
        assert await status(client, "/a/../b") in {403, 503}
    assert await status(client, PAGE) == 204


async def test_requests_are_refused_while_a_table_is_missing(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    await sign_in(client, api_token)
    for table in ("teams", "memberships", "users"):
        with without(database, table):
            assert await status(client, PAGE) == 503, table
    assert await status(client, PAGE) == 204
