"""Login with `?sso=TOKEN` in a browser: redirect, session and refusals."""

import string

import pytest
from sqlalchemy import update

from sso_service import tokens
from sso_service.database.schema import memberships
from sso_service.database.transactions import Database
from sso_service.services.node import Node
from sso_service.tokens import Claims
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing
from tests.support.login import EMAIL, SESSION_LIFETIME, code, is_usable, signs_in
from tests.support.redeeming import LIFETIME, token_key

pytestmark = pytest.mark.anyio
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


# --- The redirect ----------------------------------------------------------------------------------------------------


async def test_a_token_signs_in_once_and_redirects_to_the_clean_url(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)

    answer = await client.get(f"{PAGE}?a=%20b&sso={token}&c=1")
    assert answer.status == 303
    assert answer.header("location") == f"{PAGE}?a=%20b&c=1"

    session = await client.get("/session")
    assert session.json()["user"]["email"] == "jane.doe@example.com"
    assert session.json()["account_id"] == ACCOUNT
    assert session.json()["role"] == "editor"

    again = await client.another().get(f"{PAGE}?sso={token}")
    assert again.status == 401
    assert token not in again.text


async def test_the_redirect_is_not_cached_and_sends_no_referrer(client: Client, api_token: str) -> None:
    answer = await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    assert answer.status == 303
    assert answer.header("cache-control") == "no-store"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.body == b""


QUERIES = [
    ("sso=T", ""),
    ("sso=T&a=1", "?a=1"),
    ("a=1&sso=T", "?a=1"),
    ("a=1&sso=T&b=2", "?a=1&b=2"),
    ("b=2&a=1&b=1&sso=T&b=2&a=", "?b=2&a=1&b=1&b=2&a="),
    ("a&sso=T&b&=&=c", "?a&b&=&=c"),
    ("a=b+c&sso=T&+d+=%2B", "?a=b+c&+d+=%2B"),
    ("a=%c3%A4%C3%a4&sso=T&b=%2f%2F%3d%26", "?a=%c3%A4%C3%a4&b=%2f%2F%3d%26"),
    ("a=%&b=%zz&sso=T&c=%f", "?a=%&b=%zz&c=%f"),
    ("a=%ff%00%0d%0a&sso=T", "?a=%ff%00%0d%0a"),
    ("a&&sso=T&&b", "?a&&&b"),
    ("a=1&sso=T&", "?a=1&"),
    ("&a=1&sso=T", "?&a=1"),
    ("ssox=1&xsso=2&sso=T&SSO=3&Sso=4&s%53o=5", "?ssox=1&xsso=2&SSO=3&Sso=4&s%53o=5"),
    ("sso%00=1&sso=T&+sso=2&sso+=3&%20sso=4&sso[]=5&sso%3D=6", "?sso%00=1&+sso=2&sso+=3&%20sso=4&sso[]=5&sso%3D=6"),
    ("%2573so=1&sso=T", "?%2573so=1"),
    ("a=sso=x&sso=T&b=?sso=y", "?a=sso=x&b=?sso=y"),
    ("a;sso=x&sso=T;", None),
    ("a;sso=x&sso=T", "?a;sso=x"),
    ("a=1?sso=2&sso=T", "?a=1?sso=2"),
    ("next=https://evil.example/%3Fx&sso=T", "?next=https://evil.example/%3Fx"),
    ("a=\\'\"<>|^`{}&sso=T", "?a=\\'\"<>|^`{}"),
    ("%73so=T&a=1", "?a=1"),
    ("a=1&%73%73%6F=T", "?a=1"),
    ("a=" + "x" * 20_000 + "&sso=T", "?a=" + "x" * 20_000),
]


async def test_other_query_parameters_keep_their_order_and_bytes(client: Client, api_token: str) -> None:
    for query, kept in QUERIES:
        token = await client.issue(api_token)
        answer = await client.another().get(f"{PAGE}?{query.replace('T', token)}")
        if kept is None:
            assert answer.status == 401, query
        else:
            assert signs_in(answer, PAGE + kept), (query, answer)


PATHS = [
    "/",
    "/welcome",
    "/welcome/",
    "/a/b/c.html",
    "/caf%C3%A9/%F0%9F%91%8D",
    "/a%20b%3F%23%26",
    "/a%c3%a4%C3%A4",
    "/.well-known/x",
    "/a:b@c=d+e,f&g~h!i$j'k(l)m*n",
    "/clients/0123",
    "/en/client/999",
    "/session/",
    "/sessions",
    f"/client/{ACCOUNT}",
    f"/client/{ACCOUNT}/",
    f"/client/{ACCOUNT}/t/42",
    f"/client/{ACCOUNT}/t/42/",
    f"{PAGE}/",
    f"{PAGE}/7/edit",
    f"/client/{ACCOUNT}/t/42/settings",
]


async def test_a_token_redirects_to_every_canonical_path_unchanged(client: Client, api_token: str) -> None:
    for path in PATHS:
        answer = await client.another().get(f"{path}?sso={await client.issue(api_token)}")
        assert signs_in(answer, path), (path, answer)


# --- The session cookie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "secure"), [("http", set[str]()), ("https", {"Secure"})])
async def test_the_session_cookie_is_bound_to_the_host_and_hidden_from_scripts(
    client: Client, api_token: str, scheme: str, secure: set[str]
) -> None:
    client.scheme = scheme
    cookie = (await client.get(f"/?sso={await client.issue(api_token)}")).header("set-cookie")
    assert cookie is not None
    pair, *attributes = cookie.split("; ")
    assert pair.startswith("studio_session=")
    assert set(attributes) == {"Path=/", f"Max-Age={SESSION_LIFETIME}", "HttpOnly", "SameSite=Lax"} | secure


async def test_a_session_ends_after_twelve_hours(client: Client, api_token: str, clock: Clock) -> None:
    await client.get(f"/?sso={await client.issue(api_token)}")
    clock.advance(SESSION_LIFETIME - 1)
    assert (await client.get("/session")).status == 200
    clock.advance(1)
    assert (await client.get("/session")).status == 401


# --- Refused tokens --------------------------------------------------------------------------------------------------


async def test_a_used_token_is_refused_in_another_browser_and_after_logout(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    assert signs_in(await client.get(f"/?sso={token}"), "/")
    assert await code(client.another(), f"/?sso={token}") == (401, "token_consumed")
    assert (await client.request("POST", "/logout", headers=[("origin", "http://studio.example")])).status == 204
    assert await code(client, f"/?sso={token}") == (401, "token_consumed")


async def test_a_token_is_valid_until_the_second_of_its_expiry(client: Client, api_token: str, clock: Clock) -> None:
    clock.now = float(int(clock.now))
    first, second = await client.issue(api_token), await client.issue(api_token)
    clock.advance(LIFETIME - 1)
    assert await is_usable(client, first)
    clock.advance(1)
    assert await code(client.another(), f"/?sso={second}") == (401, "token_expired")
    assert await code(client.another(), f"/?sso={first}") == (401, "token_expired")


async def test_only_the_exact_text_of_a_token_is_accepted(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    final = ALPHABET.index(token[-1])
    for wrong in (
        "",
        token[:-1],
        token[1:],
        token + "A",
        token + "=",
        token + "%3D",
        token + "%20",
        token + "+",
        token + "%00",
        "%20" + token,
        token + "." + token,
        token * 2,
        f"%{ord(token[0]):02x}{token[1:]}",  # the token is never percent-decoded
        "".join(f"%{ord(character):02X}" for character in token),
        *(token[:-1] + ALPHABET[final + spare] for spare in (1, 2, 3)),  # decode to the same bytes
        *(token[:at] + ALPHABET[ALPHABET.index(token[at]) ^ 32] + token[at + 1 :] for at in (0, 6, 11, 16, 21, 22, 41)),
        token.swapcase(),
        token[::-1],
        token.replace(token[20], "/", 1),
        "A" * 43,
        "_" * 42 + "8",
        "null",
        "x" * 100_000,
        "%ff%fe",
    ):
        assert await code(client, f"{PAGE}?sso={wrong}") == (401, "token_invalid"), wrong
    for raw in (b"\xff", b"\xc3\xa4" * 21, "\uff21".encode() * 43):
        assert await code(client, b"/?sso=" + raw) == (401, "token_invalid")
    assert await code(client, "/?sso") == (401, "token_invalid")
    assert await is_usable(client, token)


async def test_a_repeated_sso_parameter_is_refused_and_consumes_nothing(client: Client, api_token: str) -> None:
    token, other = await client.issue(api_token), await client.issue(api_token)
    for query in (
        f"sso={token}&sso={other}",
        f"sso={token}&sso={token}",
        f"sso={token}&sso=",
        f"sso={token}&sso",
        f"sso&sso={token}",
        f"sso=x&a=1&sso={token}",
        f"%73so={token}&sso={other}",
        f"sso={token}&s%73o={other}",
        f"ss%6f={token}&ss%6F={other}",
        f"%73%73%6f&sso={token}",
    ):
        assert await code(client, f"{PAGE}?{query}") == (401, "token_invalid"), query
    assert await is_usable(client, token)
    assert await is_usable(client, other)


async def test_a_signature_by_a_key_for_another_purpose_is_refused(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    claims = tokens.unsafe_read_claims(await client.issue(api_token))
    key = service.keys.ring.signing_key(int(clock()))
    for wrong_key in (bytes(32), key.secret, key.session_key, key.form_key, b""):
        assert await code(client, f"/?sso={tokens.sign(claims, wrong_key)}") == (401, "token_invalid")


async def test_a_token_that_exceeds_the_maximum_lifetime_is_refused(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    issued = tokens.unsafe_read_claims(await client.issue(api_token))
    latest = int(clock()) + LIFETIME + 60
    key = token_key(service, clock)
    overlong = tokens.sign(Claims(latest + 1, issued.user_id, ACCOUNT, 7), key)
    assert await code(client, f"/?sso={overlong}") == (401, "token_invalid")
    assert await is_usable(client, tokens.sign(Claims(latest, issued.user_id, ACCOUNT, 7), key))
    clock.advance(1)
    assert await is_usable(client, overlong)


async def test_a_request_without_the_sso_parameter_is_not_a_login(client: Client) -> None:
    for target in ("/nowhere", "/nowhere?SSO=x", "/nowhere?ssox=1&xsso=2&a=sso=3", "/nowhere?", "/nowhere?a;sso=1"):
        for method in ("GET", "POST"):
            answer = await client.request(method, target)
            assert (answer.status, answer.error) == (404, "not_found")
    for target in ("/", PAGE, f"{PAGE}?SSO=x", f"{PAGE}?ssox=1&xsso=2&a=sso=3", f"{PAGE}?a;sso=1"):
        for method in ("GET", "POST"):
            answer = await client.request(method, target)
            assert (answer.status, answer.error) == (401, "not_signed_in")


# --- Refusals consume nothing ----------------------------------------------------------------------------------------


async def test_a_token_opens_only_paths_of_its_account_and_teams(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for path in (
        f"/client/{OTHER_ACCOUNT}",
        f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{OTHER_ACCOUNT}/t/42/posts",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}/posts",
        f"/client/{ACCOUNT}/t/{OTHER_TEAM}",
        f"/client/{ACCOUNT}/t/43/posts",
        f"/client/{ACCOUNT}/t/4294967295/posts",
        "/client/4294967295",
        "/client/1",
        # Similar to Studio paths, but not canonical:
        "/client",
        "/client/",
        "/CLIENT",
        "/%63lient",
        f"/Client/{ACCOUNT}/t/42/posts",
        f"/CLIENT/{ACCOUNT}/t/42/posts",
        f"/%63lient/{ACCOUNT}/t/42/posts",
        f"/%43LIEN%54/{ACCOUNT}/t/42/posts",
        f"/client/0{ACCOUNT}/t/42/posts",
        f"/client/{ACCOUNT}/t/042/posts",
        f"/client/{ACCOUNT}/t/42.0/posts",
        "/client/%31%32%33/t/42/posts",
        f"/client/+{ACCOUNT}/t/42/posts",
        f"/client/{ACCOUNT}/t",
        f"/client/{ACCOUNT}/t/",
        f"/client/{ACCOUNT}/posts",
        f"/client/{ACCOUNT}/T/42/posts",
        f"/client/{ACCOUNT}/%74/42/posts",
        "/client/0",
        "/client/-1",
        "/client/4294967296",
        "/client/" + "1" * 5000,
    ):
        assert await code(client, f"{path}?sso={token}") == (403, "no_access"), path
    assert await is_usable(client, token)


async def test_a_disabled_user_or_removed_member_consumes_nothing(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    token = await client.issue(api_token)
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert await code(client, f"{PAGE}?sso={token}") == (403, "no_access")
    with changing(database) as connection:
        administration.enable_user(connection, EMAIL)
    assert await code(client, f"{PAGE}?sso={token}") == (401, "token_expired")
    assert await is_usable(client, await client.issue(api_token))

    later = await client.issue(api_token)
    with changing(database) as connection:
        administration.remove_member(connection, EMAIL, ACCOUNT)
    assert await code(client, f"{PAGE}?sso={later}") == (403, "no_access")
    assert await code(client, f"/?sso={later}") == (403, "no_access")
    again = await client.issue(api_token)  # renews the membership
    assert await code(client, f"/?sso={later}") == (401, "token_expired")
    assert await is_usable(client, again)


async def test_a_signed_token_of_an_unknown_user_or_account_is_refused(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    issued = tokens.unsafe_read_claims(await client.issue(api_token))
    for user_id, account_id in ((issued.user_id, 4711), (4711, ACCOUNT), (0, 0), (issued.user_id, OTHER_ACCOUNT)):
        token = tokens.sign(Claims(issued.expires_at, user_id, account_id, 7), token_key(service, clock))
        assert await code(client, f"/?sso={token}") == (403, "no_access")


async def test_a_session_has_the_current_role_and_ends_when_the_user_is_disabled(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await client.get(f"/?sso={await client.issue(api_token)}")
    with changing(database) as connection:
        connection.execute(update(memberships).values(role="admin"))
    assert (await client.get("/session")).json()["role"] == "admin"
    with changing(database) as connection:
        administration.disable_user(connection, EMAIL, now=int(clock()))
    assert (await client.get("/session")).status == 401


# --- Paths of the service --------------------------------------------------------------------------------------------


async def test_the_paths_of_the_service_ignore_the_sso_parameter(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for method, path, status in (
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/session", 401),
        ("GET", "/auth", 401),
        ("POST", "/sso/sign-out-everywhere", 403),
        ("GET", "/openapi.json", 200),
        ("GET", "/docs", 200),
        ("GET", "/v1/sso_tokens/consume", 405),
        ("POST", "/v1/sso_tokens/verify", 401),
        ("GET", "/logout", 405),
        ("GET", "/sso/confirm", 405),
        ("GET", "/v1/sso_tokens", 405),
        ("POST", "/logout", 403),
        ("POST", "/sso/confirm", 403),
        ("POST", "/v1/sso_tokens", 401),
    ):
        answer = await client.request(method, f"{path}?sso={token}")
        assert answer.status == status, (method, path, answer)
        assert answer.header("location") is None
        assert answer.header("set-cookie") is None
        assert token not in answer.text
    issued = await client.post_json(f"/v1/sso_tokens?sso={token}", JANE, token=api_token)
    assert issued.status == 201
    assert await is_usable(client, token)
