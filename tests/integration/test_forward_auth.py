"""`GET /auth`: what a reverse proxy asks before it lets a browser through, and what no path gets around."""

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
from tests.support.sessions import COOKIE, HALF_A_DAY, sign_in, sign_out_everywhere

pytestmark = pytest.mark.anyio

EMAIL = JANE["email"]
TEAM_PATH = f"/client/{ACCOUNT}/t/{TEAM}"
SETTINGS = f"{TEAM_PATH}/settings"

# The two headers in which proxies name the URI that was asked for: nginx by configuration; Caddy and Traefik always.
NAMES = ("X-Original-URI", "X-Forwarded-Uri")


async def ask(client: Client, *uris: tuple[str, str], target: str = "/auth") -> Answer:
    """The answer about these (header, URI), once it is found to be in form."""
    answer = await client.request("GET", target, headers=uris)
    assert answer.status in {204, 401, 403, 503}
    assert answer.header("set-cookie") is None
    assert answer.header("location") is None
    assert answer.header("cache-control") == "no-store"
    told = sorted(name for name, _ in answer.headers if name.startswith("x-studio-"))
    if answer.status == 204:
        assert answer.body == b""
        assert told == ["x-studio-account", "x-studio-email", "x-studio-role", "x-studio-user"]
    else:
        assert answer.json().keys() == {"error"}
        assert {"code", "message"} <= answer.json()["error"].keys() <= {"code", "message", "details"}
        assert told == []
        assert (answer.header("retry-after") is not None) == (answer.status == 503)
    return answer


async def status(client: Client, uri: str, name: str = NAMES[0]) -> int:
    return (await ask(client, (name, uri))).status


def set_role(database: Database, role: Role, email: str = EMAIL) -> None:
    with changing(database) as connection:
        administration.set_role(connection, email, ACCOUNT, role)


# --- who is signed in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_whoever_may_see_a_page_is_let_through_and_named(
    client: Client, api_token: str, name: str, database: Database
) -> None:
    await sign_in(client, api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    for role in Role:
        set_role(database, role)
        answer = await ask(client, (name, PAGE))
        assert answer.status == 204
        assert answer.header("x-studio-user") == str(user_id)
        assert answer.header("x-studio-email") == EMAIL
        assert answer.header("x-studio-account") == str(ACCOUNT)
        assert answer.header("x-studio-role") == role


async def test_each_account_of_a_person_is_a_session_of_its_own(
    client: Client, api_token: str, database: Database
) -> None:
    elsewhere = make_api_token(database, account_id=OTHER_ACCOUNT)[1]
    page = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/settings"
    other = client.another()
    await sign_in(client, api_token)
    await sign_in(other, elsewhere, page=f"/client/{OTHER_ACCOUNT}")
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, OTHER_ACCOUNT, Role.ADMIN)
    answer = await ask(other, (NAMES[0], page))
    assert (answer.header("x-studio-account"), answer.header("x-studio-role")) == (str(OTHER_ACCOUNT), "admin")
    assert await status(client, page) == 403
    assert await status(other, PAGE) == 403


async def test_whoever_is_not_signed_in_is_told_so(client: Client, service: Node, api_token: str, clock: Clock) -> None:
    session = await sign_in(client, api_token)
    token = await client.issue(api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    now = int(clock())
    key = service.keys.ring.signing_key(now)
    assert await status(client, PAGE) == 204
    bad = {
        "forged": dump_session(Session(user_id, ACCOUNT, now), bytes(32)),
        "of another purpose": dump_session(Session(user_id, ACCOUNT, now), key.token_key),
        "too old": service.sessions.sign(Session(user_id, ACCOUNT, now - HALF_A_DAY)),
        "from the future": service.sessions.sign(Session(user_id, ACCOUNT, now + 61)),
        "of an account that they are not in": service.sessions.sign(Session(user_id, OTHER_ACCOUNT, now)),
        "of nobody": service.sessions.sign(Session(4711, ACCOUNT, now)),
        "cut": session[:-1],
        "empty": "",
        "a word": "admin",
        "a login token": token,
        "an API token": api_token,
    }
    browsers = {name: client.another() for name in ("none", *bad)}
    for name, value in bad.items():
        browsers[name].cookies[COOKIE] = value
    answers = {name: await ask(browser, (NAMES[0], PAGE)) for name, browser in browsers.items()}
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(browsers, 401)
    assert len({answer.body for answer in answers.values()}) == 1
    assert answers["none"].error == (await client.another().get("/session")).error
    bearer = ("authorization", f"Bearer {api_token}")
    assert (await ask(client.another(), bearer, (NAMES[0], PAGE))).status == 401


@on_sqlite
async def test_a_session_is_good_to_the_second_of_its_end(client: Client, api_token: str, clock: Clock) -> None:
    clock.now = float(int(clock.now))
    await sign_in(client, api_token)
    clock.advance(HALF_A_DAY - 1)
    assert await status(client, PAGE) == 204
    clock.advance(1)
    assert await status(client, PAGE) == 401


async def test_what_changes_for_a_person_counts_at_the_next_request(
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
    token = await client.issue(api_token)  # makes them a member again, but an editor, and of no session from before
    assert await status(client, PAGE) == 401
    await client.get(f"{PAGE}?sso={token}")
    assert (await status(client, PAGE), await status(client, SETTINGS)) == (204, 403)
    sign_out_everywhere(database, clock())
    assert await status(client, PAGE) == 401
    assert await status(john, PAGE) == 204


@on_sqlite
async def test_signing_out_and_a_revoked_key_end_it(
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


# --- which role sees which page --------------------------------------------------------------------------------------

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
    # Another spelling is another section, whatever the application behind makes of it.
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
    "\u017fettings": {Role.ADMIN},  # a long s, which is an s when its case is folded
    "post%C5%BF": {Role.ADMIN},
}


async def test_a_role_sees_its_sections_and_only_an_admin_those_that_are_unknown(
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
async def test_a_page_without_a_section_is_for_every_member_and_other_pages_for_everybody_signed_in(
    client: Client, api_token: str
) -> None:
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
        for name in NAMES:
            assert await status(client, path, name) == 204, path
        assert await status(client.another(), path) == 401, path


async def test_nobody_sees_another_account_s_pages_whatever_their_role(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    await client.issue(make_api_token(database, account_id=OTHER_ACCOUNT)[1])  # Jane belongs to it, but came by ours
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
        # What only looks like a page of Studio:
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


# --- URIs that could be read in two ways -----------------------------------------------------------------------------


@on_sqlite
async def test_a_path_that_is_not_canonical_is_refused_to_everybody(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    set_role(database, Role.ADMIN)
    for path, name in product(NOT_CANONICAL, NAMES):
        uri = path.decode("latin-1")
        for each in (uri, f"{uri}?a=1"):
            assert await status(client, each, name) == 403, each
        assert (await ask(client.another(), (name, uri))).status in {401, 403}


@on_sqlite
async def test_a_value_that_is_no_path_and_query_is_refused(client: Client, api_token: str, database: Database) -> None:
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
        f"{PAGE}#",  # a fragment is for the browser and never sent
        f"{PAGE}#/../settings",
        f"{PAGE}\t",
        f'"{PAGE}"',
        f"<{PAGE}>",
        "*",
        "-",
        "null",
        # Two in one value, as a proxy folds them that joins headers of one name (RFC 9110 section 5.3).
        f"/x, {SETTINGS}",
        f"{SETTINGS}, /x",
        f"{PAGE}, {PAGE}",
        f"/x?a, {SETTINGS}",
        f"{PAGE}?a b",
    ):
        for name in NAMES:
            assert await status(client, value, name) == 403, value


@on_sqlite
async def test_two_uris_folded_without_a_space_do_not_pass_for_the_first(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for value in (f"/x,{SETTINGS}", f"{PAGE},{SETTINGS}", f"{SETTINGS},{PAGE}", f"{TEAM_PATH},{SETTINGS}"):
        for name in NAMES:
            assert await status(client, value, name) == 403, value


@on_sqlite
async def test_a_comma_is_a_part_of_the_path_that_it_stands_in(
    client: Client, api_token: str, database: Database
) -> None:
    """An application that reads `42,` as the number 42, as `parseInt` does, would show the settings."""
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
            for name in NAMES:
                assert await status(client, path, name) == 403, (role, path)


@on_sqlite
async def test_a_query_opens_and_closes_nothing(client: Client, api_token: str) -> None:
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
        for name in NAMES:
            assert await status(client, PAGE + query, name) == 204, query
            assert await status(client, SETTINGS + query, name) == 403, query
            assert await status(client, f"/a/../b{query}", name) == 403, query


# --- a client can send either header itself --------------------------------------------------------------------------

GOOD = (PAGE, TEAM_PATH, "/welcome?x=/../y")
BAD = (SETTINGS, f"/client/{OTHER_ACCOUNT}", "/a/../b", "", f"https://studio.example{PAGE}", "/CLIENT", "/a b")


@on_sqlite
async def test_every_uri_must_be_allowed_whoever_names_it_and_in_whatever_order(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for good, other in product(GOOD, GOOD):
        for names in product(NAMES, NAMES):
            assert (await ask(client, *zip(names, (good, other), strict=True))).status == 204
    for good, bad in product(GOOD, BAD):
        for uris, names in product(permutations((good, bad)), product(NAMES, NAMES)):
            sent = list(zip(names, uris, strict=True))
            assert (await ask(client, *sent)).status == 403, sent
    many = [(NAMES[n % 2], PAGE) for n in range(5)]
    assert (await ask(client, *many)).status == 204
    for at in range(5):
        one_bad = [*many[:at], (NAMES[at % 2], SETTINGS), *many[at + 1 :]]
        assert (await ask(client, *one_bad)).status == 403, at


@on_sqlite
async def test_a_request_that_names_no_uri_is_refused_whatever_else_it_names(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    set_role(database, Role.ADMIN)
    assert (await ask(client)).status == 403
    for name in (
        *("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Url", "X-Forwarded-Path", "X-Forwarded-Prefix"),
        *("X-Original-Uri-", "X_Original_URI", "X_Forwarded_Uri", "Original-URI", "Referer", "X-Forwarded-For"),
    ):
        assert (await ask(client, (name, PAGE))).status == 403, name
    for target in (f"/auth?{PAGE}", f"/auth?uri={PAGE}", f"/auth?X-Original-URI={PAGE}"):
        assert (await ask(client, target=target)).status == 403, target
    assert (await ask(client.another())).status in {401, 403}


@on_sqlite
async def test_names_of_headers_are_read_in_any_case(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for name in NAMES:
        for spelled in (name.lower(), name.upper(), name):
            assert await status(client, PAGE, spelled) == 204
            assert (await ask(client, (spelled, SETTINGS), (name, PAGE))).status == 403


@on_sqlite
async def test_who_a_client_says_that_it_is_changes_nothing(client: Client, api_token: str) -> None:
    claimed = [
        *(("X-Studio-Role", "admin"), ("X-Studio-User", "1"), ("X-Studio-Account", str(OTHER_ACCOUNT))),
        *(("X-Studio-Email", "admin@example.com"), ("X-Studio-Foo", "bar"), ("X-Forwarded-User", "admin")),
    ]
    assert (await ask(client, *claimed, (NAMES[0], PAGE))).status == 401
    await sign_in(client, api_token)
    assert (await ask(client, *claimed, (NAMES[0], SETTINGS))).status == 403
    answer = await ask(client, *claimed, (NAMES[0], PAGE))
    assert (answer.status, answer.header("x-studio-email"), answer.header("x-studio-role")) == (204, EMAIL, "editor")
    assert answer.header("x-studio-account") == str(ACCOUNT)


# --- what else it does not do ----------------------------------------------------------------------------------------


async def test_it_signs_nobody_in(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for target in ("/auth", f"/auth?sso={token}"):
        for uri in (f"{PAGE}?sso={token}", PAGE):
            assert (await ask(client, (NAMES[0], uri), target=target)).status == 401
            assert (await ask(client, (NAMES[1], uri), target=target)).status == 401
    assert client.cookies == {}
    signed_in = client.another()
    await sign_in(signed_in, api_token)
    assert (await ask(signed_in, (NAMES[0], f"{PAGE}?sso={token}"), target=f"/auth?sso={token}")).status == 204
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303  # the token is as good as ever


@on_sqlite
async def test_it_is_a_get(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = await client.request(method, "/auth", headers=[(NAMES[0], PAGE)])
        assert (answer.status, answer.error) == (405, "method_not_allowed"), method
        assert "GET" in (answer.header("allow") or "")
        assert not [name for name, _ in answer.headers if name.startswith("x-studio-")]


async def test_while_the_database_is_away_nobody_is_let_through(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    await sign_in(client, api_token)
    stranger = client.another()
    stranger.cookies[COOKIE] = "garbage"
    with unreachable(database):
        for uri in (PAGE, TEAM_PATH, "/welcome"):
            answer = await ask(client, (NAMES[0], uri))
            assert (answer.status, answer.error) == (503, "unavailable"), uri
            assert int(answer.header("retry-after") or 0) > 0
            assert await status(stranger, uri) == 401  # for which nobody need be asked
        assert await status(client, SETTINGS) == 503
        assert await status(client, "/a/../b") in {403, 503}
    assert await status(client, PAGE) == 204


async def test_while_a_part_of_the_database_is_missing_nobody_is_let_through(
    client: Client, api_token: str, database: Database
) -> None:
    await settled(client.issue(api_token))
    await sign_in(client, api_token)
    for table in ("teams", "memberships", "users"):
        with without(database, table):
            assert await status(client, PAGE) == 503, table
    assert await status(client, PAGE) == 204
