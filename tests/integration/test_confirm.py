"""The confirmation page before a login: when it appears, and which responses to it are accepted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlencode

import pytest

from sso_service import keyring, tokens
from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import Node
from sso_service.sessions import Session, dump_session
from sso_service.settings import read_settings
from sso_service.tokens import Claims
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing
from tests.support.pages import MessagePage

pytestmark = pytest.mark.anyio

SAME_ORIGIN = [("origin", "http://studio.example"), ("sec-fetch-site", "same-origin"), ("sec-fetch-dest", "document")]
JSON = ("accept", "application/json")


@pytest.fixture
def confirming_service(database_url: str, keys_dir: Path, tmp_path: Path, clock: Clock) -> Iterator[Node]:
    """A service that asks for confirmation before every login. Its links outlive the confirmation."""
    environ = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}
    settings = read_settings({**environ, "SSO_CONFIRM_LOGIN": "1", "SSO_TOKEN_TTL": "3600"})
    service = Node(settings, open_database(settings), KeyDirectory(keys_dir), clock=clock)
    yield service
    service.close()


@pytest.fixture
def confirming(confirming_service: Node) -> Client:
    """A browser of the service that asks for confirmation."""
    return Client(create_app(confirming_service))


def leads_to(answer: Answer, target: str) -> bool:
    """True if the response redirects to `target`, is not cached and sends no referrer."""
    return (
        answer.status == 303
        and answer.header("location") == target
        and answer.header("cache-control") == "no-store"
        and answer.header("referrer-policy") == "no-referrer"
    )


def opens_a_session(answer: Answer) -> bool:
    return any(name == "set-cookie" and value.startswith("studio_session=") for name, value in answer.headers)


def confirmation_form(answer: Answer) -> dict[str, str]:
    """The form fields of a confirmation page. Checks that it neither signs in nor redirects."""
    assert answer.status == 200
    assert answer.header("location") is None
    assert not opens_a_session(answer)
    page = MessagePage(answer.text)
    assert page.form == ("post", "/sso/confirm")
    return page.fields


async def submit(client: Client, fields: dict[str, str], headers: Sequence[tuple[str, str]] = SAME_ORIGIN) -> Answer:
    """Submit the form as a browser would."""
    content_type = ("content-type", "application/x-www-form-urlencoded")
    body = urlencode(fields).encode("ascii")
    return await client.request("POST", "/sso/confirm", headers=[content_type, *headers], body=body)


async def refusal(
    client: Client, fields: dict[str, str], headers: Sequence[tuple[str, str]] = SAME_ORIGIN
) -> tuple[int, str]:
    """Status and error code of a refused submission. Checks that it neither signs in nor redirects."""
    answer = await submit(client, fields, [*headers, JSON])
    assert answer.header("location") is None
    assert not opens_a_session(answer)
    return answer.status, answer.error


async def is_usable(client: Client, token: str) -> bool:
    """True if `token` is unused. Consumes the token."""
    browser = client.another()
    answer = await browser.get(f"/?sso={token}")
    if answer.status == 200:
        answer = await submit(browser, confirmation_form(answer))
    assert answer.status in {303, 401}
    return answer.status == 303


async def email(client: Client) -> str | None:
    """The address of the user who is signed in."""
    answer = await client.get("/session")
    found: str | None = answer.json()["user"]["email"] if answer.status == 200 else None
    return found


# --- Another user is signed in ---------------------------------------------------------------------------------------


async def test_a_link_of_another_user_signs_in_after_confirmation(client: Client, api_token: str) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    page = await client.get(f"{PAGE}?a=%20b+c&&sso={token}&a=%c3%A4&d")
    assert JANE["email"] in page.text
    assert JOHN["email"] not in page.text
    fields = confirmation_form(page)
    assert await email(client) == JANE["email"]

    answer = await submit(client, fields)
    assert leads_to(answer, f"{PAGE}?a=%20b+c&&a=%c3%A4&d")
    assert opens_a_session(answer)
    assert await email(client) == JOHN["email"]
    assert not await is_usable(client, token)


async def test_an_unanswered_confirmation_page_changes_nothing(client: Client, api_token: str) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    for _ in range(3):
        fields = confirmation_form(await client.get(f"{PAGE}?sso={token}"))
    assert await email(client) == JANE["email"]
    assert await is_usable(client, token)
    assert await refusal(client, fields) == (401, "token_consumed")
    assert await email(client) == JANE["email"]


async def test_confirmation_is_skipped_if_the_other_session_is_invalid(
    client: Client, service: Node, api_token: str, database: Database, clock: Clock
) -> None:
    clock.advance(-10)
    user_id = tokens.unsafe_read_claims(await client.issue(api_token, JANE)).user_id
    clock.advance(10)
    now = int(clock())
    key = service.keys.ring.signing_key(now)
    good = service.sessions.sign(Session(user_id, ACCOUNT, now - 10))

    async def asks_for_confirmation(cookie: str) -> bool:
        browser = client.another()
        browser.cookies["studio_session"] = cookie
        answer = await browser.get(f"/?sso={await client.issue(api_token, JOHN)}")
        assert answer.status in {200, 303}
        return answer.status == 200

    assert await asks_for_confirmation(good)
    assert not await asks_for_confirmation(service.sessions.sign(Session(user_id, ACCOUNT, now - 43200))), "too old"
    assert not await asks_for_confirmation(dump_session(Session(user_id, ACCOUNT, now), bytes(32))), "forged"
    assert not await asks_for_confirmation(dump_session(Session(user_id, ACCOUNT, now), key.token_key)), (
        "signed for another purpose"
    )
    assert not await asks_for_confirmation(service.sessions.sign(Session(user_id, OTHER_ACCOUNT, now))), (
        "not a member of that account"
    )
    assert not await asks_for_confirmation(service.sessions.sign(Session(4711, ACCOUNT, now))), "unknown"
    assert not await asks_for_confirmation("nonsense")
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=now)
    assert not await asks_for_confirmation(good), "disabled"
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
    assert not await asks_for_confirmation(good), "issued before the user was disabled"
    good = service.sessions.sign(Session(user_id, ACCOUNT, now + 1))
    assert await asks_for_confirmation(good)
    with changing(database) as connection:
        administration.sign_out_user(connection, JANE["email"], now=now)
    assert not await asks_for_confirmation(good), "signed out everywhere"
    with changing(database) as connection:
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    assert not await asks_for_confirmation(service.sessions.sign(Session(user_id, ACCOUNT, now + 1))), "removed"


async def test_an_invalid_link_is_refused_without_confirmation(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    claims = tokens.unsafe_read_claims(token)
    key = service.keys.ring.signing_key(int(clock())).token_key
    expired = tokens.sign(Claims(int(clock()), claims.user_id, ACCOUNT, 7), key)
    for target, status in (
        ("/?sso=x", 401),
        (f"/?sso={tokens.sign(claims, bytes(32))}", 401),
        (f"/?sso={expired}", 401),
        (f"/?sso={token}&sso={token}", 401),
        (f"/a//b?sso={token}", 400),
        (f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts?sso={token}", 403),
        (f"/CLIENT/{ACCOUNT}?sso={token}", 403),
    ):
        assert (await client.get(target)).status == status, target
    assert confirmation_form(await client.get(f"/?sso={token}"))


async def test_a_confirmed_login_passes_all_checks_of_a_login(
    confirming: Client, api_token: str, database: Database, clock: Clock
) -> None:
    token = await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={token}"))
    for team in (OTHER_TEAM, 43):
        unknown_team = confirmation_form(await confirming.get(f"/client/{ACCOUNT}/t/{team}/posts?sso={token}"))
        assert await refusal(confirming, unknown_team) == (403, "no_access")
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert await refusal(confirming, fields) == (403, "no_access")
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    assert await refusal(confirming, fields) == (403, "no_access")
    again = await confirming.issue(api_token)
    assert await refusal(confirming, fields) == (401, "token_expired")
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={again}"))
    assert leads_to(await submit(confirming, fields), PAGE)


# --- SSO_CONFIRM_LOGIN -----------------------------------------------------------------------------------------------


async def test_confirm_login_requires_confirmation_of_every_login(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    for _ in range(2):
        fields = confirmation_form(await confirming.get(f"{PAGE}?a=1&sso={token}&a=2"))
    assert await email(confirming) is None
    answer = await submit(confirming, fields)
    assert leads_to(answer, f"{PAGE}?a=1&a=2")
    assert opens_a_session(answer)
    assert await email(confirming) == JANE["email"]
    assert not await is_usable(confirming, token)


async def test_confirm_login_lets_a_signed_in_user_reopen_a_used_link(
    confirming: Client, api_token: str, clock: Clock
) -> None:
    token = await confirming.issue(api_token)
    await submit(confirming, confirmation_form(await confirming.get(f"{PAGE}?sso={token}")))
    clock.advance(3600)
    assert leads_to(await confirming.get(f"{PAGE}?sso={token}"), PAGE)
    clock.advance(-3600)
    assert leads_to(await confirming.get(f"{PAGE}?sso={token}"), PAGE)  # the back button


async def test_confirm_login_shows_no_form_to_machines(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    target = f"{PAGE}?sso={token}"
    for method, headers in (
        ("HEAD", []),
        ("OPTIONS", []),
        ("GET", [("sec-purpose", "prefetch")]),
        ("GET", [("sec-fetch-dest", "iframe")]),
        ("GET", [("sec-fetch-dest", "empty")]),
    ):
        answer = await confirming.request(method, target, headers=headers)
        assert "<form" not in answer.text
        assert token not in answer.text
        assert answer.header("set-cookie") is None
    assert await is_usable(confirming, token)


# --- Validity of a confirmation --------------------------------------------------------------------------------------


async def test_a_confirmation_is_bound_to_its_token_target_and_browser(confirming: Client, api_token: str) -> None:
    token, other = await confirming.issue(api_token), await confirming.issue(api_token)
    target = f"{PAGE}?a=1"
    fields = confirmation_form(await confirming.get(f"{target}&sso={token}"))
    other_fields = confirmation_form(await confirming.get(f"{PAGE}?sso={other}"))
    assert fields == {"token": token, "target": target, "replaces": "0", "form": fields["form"]}
    for changed in (
        {"token": other},
        {"token": ""},
        {"token": token[:-1]},
        {"token": token + "A"},
        {"target": PAGE},
        {"target": f"{PAGE}?a=2"},
        {"target": f"{PAGE}?a=1&"},
        {"target": f"{PAGE}?a=1#"},
        {"target": f"{PAGE}?a=%31"},
        {"target": "//evil.example"},
        {"target": "https://evil.example/"},
        {"target": "/\r\nLocation: //evil.example"},
        {"target": f"\0{target}"},
        {"target": ""},
        {"target": "\u20ac"},
        {"replaces": "1"},
        {"replaces": "x"},
        {"form": ""},
        {"form": "nonsense"},
        {"form": "\u20ac"},
        {"form": fields["form"][:-1]},
        {"form": fields["form"] + "A"},
        {"form": other_fields["form"]},
        {"form": token},
    ):
        assert await refusal(confirming, {**fields, **changed}) == (403, "form_invalid"), changed
    for missing in fields:
        rest = {name: value for name, value in fields.items() if name != missing}
        assert await refusal(confirming, rest) == (403, "form_invalid"), missing

    other_browser = confirming.another()
    assert await refusal(other_browser, fields) == (403, "form_invalid")  # without the cookie
    confirmation_form(await other_browser.get(f"{target}&sso={token}"))
    assert await refusal(other_browser, fields) == (403, "form_invalid")  # with a cookie of its own
    for cookie in ("", "x", confirming.cookies["studio_form"] + "A"):
        other_browser.cookies["studio_form"] = cookie
        assert await refusal(other_browser, fields) == (403, "form_invalid")

    assert leads_to(await submit(confirming, fields), target)
    assert leads_to(await submit(confirming, other_fields), PAGE)


async def test_a_confirmation_replaces_only_the_user_that_was_shown(confirming: Client, api_token: str) -> None:
    first, second = await confirming.issue(api_token, JANE), await confirming.issue(api_token, JOHN)
    first_fields = confirmation_form(await confirming.get(f"/first?sso={first}"))
    second_fields = confirmation_form(await confirming.get(f"/second?sso={second}"))
    assert leads_to(await submit(confirming, second_fields), "/second")
    assert await email(confirming) == JOHN["email"]
    second_form = confirmation_form(await submit(confirming, first_fields))
    assert await email(confirming) == JOHN["email"]
    assert leads_to(await submit(confirming, second_form), "/first")
    assert await email(confirming) == JANE["email"]


async def test_a_confirmation_is_valid_for_five_minutes(confirming: Client, api_token: str, clock: Clock) -> None:
    clock.now = float(int(clock.now))
    token, other = await confirming.issue(api_token), await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"/?sso={token}"))
    other_fields = confirmation_form(await confirming.get(f"/?sso={other}"))
    clock.advance(299)
    assert leads_to(await submit(confirming, fields), "/")
    clock.advance(1)
    assert await refusal(confirming, other_fields) == (403, "form_invalid")
    assert await is_usable(confirming, other)


async def test_a_link_that_expires_before_its_confirmation_is_refused(
    client: Client, api_token: str, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    clock.advance(200)
    fields = confirmation_form(await client.get(f"/?sso={token}"))
    clock.advance(100)
    assert await refusal(client, fields) == (401, "token_expired")
    assert await email(client) == JANE["email"]


async def test_a_repeated_confirmation_does_not_sign_in_again(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={token}"))
    assert opens_a_session(await submit(confirming, fields))

    again = await submit(confirming, fields)  # a reload while signed in only redirects
    assert leads_to(again, PAGE)
    assert not opens_a_session(again)
    assert (await confirming.request("POST", "/logout", headers=SAME_ORIGIN)).status == 204
    assert await refusal(confirming, fields) == (401, "token_consumed")
    assert await email(confirming) is None


async def test_a_confirmation_signed_by_a_revoked_key_is_refused(
    confirming: Client, confirming_service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    fields = confirmation_form(await confirming.get(f"/?sso={await confirming.issue(api_token)}"))
    keyring.revoke_all(keys_dir, now=int(clock()))
    confirming_service.keys.refresh()
    assert await refusal(confirming, fields) in {(403, "form_invalid"), (401, "token_invalid")}


async def test_a_confirmation_remains_valid_after_a_key_rotation(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    fields = confirmation_form(await client.get(f"/?sso={await client.issue(api_token, JOHN)}"))
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(100)
    assert leads_to(await submit(client, fields), "/")


# --- Origin of a confirmation ----------------------------------------------------------------------------------------

FOREIGN = [
    [],
    [("origin", "null")],
    [("origin", "")],
    [("origin", "http://evil.example")],
    [("origin", "http://studio.example.evil.example")],
    [("origin", "http://evil.example/studio.example")],
    [("origin", "http://studio.example@evil.example")],
    [("origin", "http://evil.example#studio.example")],
    [("origin", "http://notstudio.example")],
    [("origin", "http://sub.studio.example")],
    [("origin", "http://studio.example:8080")],
    [("origin", "studio.example")],
    [("origin", "http://studio.example"), ("origin", "http://evil.example")],
    [("origin", "http://studio.example http://evil.example")],
    [("sec-fetch-site", "cross-site")],
    [("sec-fetch-site", "same-site")],
    [("sec-fetch-site", "none")],
    [("sec-fetch-site", "")],
    [("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
    [("sec-fetch-site", "cross-site"), ("origin", "http://studio.example")],
    [("sec-fetch-site", "same-site"), ("origin", "http://studio.example")],
    [("referer", "http://studio.example/")],
]


async def test_a_cross_origin_confirmation_is_refused_and_consumes_nothing(confirming: Client, api_token: str) -> None:
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={await confirming.issue(api_token)}"))
    for headers in FOREIGN:
        assert await refusal(confirming, fields, headers) == (403, "cross_origin"), headers
    assert leads_to(await submit(confirming, fields), PAGE)


@pytest.mark.parametrize(
    "headers", [[("origin", "http://studio.example")], [("sec-fetch-site", "same-origin")]], ids=["origin", "site"]
)
async def test_either_origin_or_fetch_metadata_proves_the_same_origin(
    confirming: Client, api_token: str, headers: list[tuple[str, str]]
) -> None:
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={await confirming.issue(api_token)}"))
    assert leads_to(await submit(confirming, fields, headers), PAGE)


async def test_a_confirmation_from_the_http_origin_of_an_https_site_is_refused(
    confirming: Client, api_token: str
) -> None:
    """An attacker who controls the network can forge http://studio.example, but not https://studio.example."""
    confirming.scheme = "https"
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={await confirming.issue(api_token)}"))
    assert await refusal(confirming, fields, [("origin", "http://studio.example")]) == (403, "cross_origin")
    assert leads_to(await submit(confirming, fields, [("origin", "https://studio.example")]), PAGE)


async def test_a_confirmation_must_be_a_top_level_navigation(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={token}"))
    for destination in ("iframe", "empty", "image"):
        headers = [("origin", "http://studio.example"), ("sec-fetch-dest", destination)]
        answer = await submit(confirming, fields, headers)
        assert not opens_a_session(answer), destination
        assert answer.status != 303
    assert await is_usable(confirming, token)


async def test_a_confirmation_must_be_a_post_request(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={token}"))
    target = f"/sso/confirm?{urlencode(fields)}"
    for method in ("GET", "PUT", "DELETE"):
        answer = await confirming.request(method, target, headers=SAME_ORIGIN, body=urlencode(fields).encode())
        assert (answer.status, answer.header("allow")) == (405, "POST")
        assert token not in answer.text
    assert (await confirming.request("HEAD", target, headers=SAME_ORIGIN)).status == 405
    assert await is_usable(confirming, token)


async def test_a_body_that_is_not_the_form_is_refused(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    fields = confirmation_form(await confirming.get(f"{PAGE}?sso={token}"))
    good = urlencode(fields).encode()
    for body in (
        b"",
        b"\xff\xfe\x00",
        b"{}",
        b"&".join([b"a=1"] * 2000),
        good + b"&a=1" * 20,
        b"=".join([b"%"] * 2000),
        good.replace(b"form=", b"form=x&form="),
    ):
        answer = await confirming.request("POST", "/sso/confirm", headers=[*SAME_ORIGIN, JSON], body=body)
        assert (answer.status, answer.error) == (403, "form_invalid"), body[:40]
        assert not opens_a_session(answer)
    answer = await confirming.request("POST", "/sso/confirm", headers=SAME_ORIGIN, body=good + b"&a=" + b"x" * 17_000)
    assert (answer.status, answer.error) == (413, "payload_too_large")
    assert await is_usable(confirming, token)


# --- The form cookie -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "secure"), [("http", set[str]()), ("https", {"Secure"})])
async def test_the_form_cookie_is_bound_to_the_host_and_hidden_from_scripts(
    confirming: Client, api_token: str, scheme: str, secure: set[str]
) -> None:
    confirming.scheme = scheme
    token = await confirming.issue(api_token)
    cookies = set()
    for _ in range(3):
        cookie = (await confirming.another().get(f"/?sso={token}")).header("set-cookie") or ""
        pair, *attributes = cookie.split("; ")
        assert set(attributes) == {"Path=/", "Max-Age=300", "HttpOnly", "SameSite=Lax"} | secure
        assert pair.startswith("studio_form=")
        assert len(pair) > len("studio_form=") + 20, "too short to be unguessable"
        cookies.add(pair)
    assert len(cookies) == 3


PLANTED = [
    r'"x\073 Domain=example"',
    r'"x\073 Max-Age=9999999\073 SameSite=None"',
    r'"x\015\012Set-Cookie: studio_session=evil"',
    r'"x\000"',
    "x, studio_session=evil",
    "\xff",
]


async def test_a_planted_cookie_cannot_inject_headers(confirming: Client, api_token: str) -> None:
    """A quoted cookie value can contain characters that end a header or a cookie attribute when it is sent back."""
    token = await confirming.issue(api_token)
    for planted in PLANTED:
        answer = await confirming.request("GET", f"/?sso={token}", headers=[("cookie", f"studio_form={planted}")])
        assert answer.status in {200, 400, 403}
        for name, value in answer.headers:
            assert all(" " <= character != "\x7f" for character in value), (name, value)
        attributes = (answer.header("set-cookie") or "").split("; ")[1:]
        assert set(attributes) <= {"Path=/", "Max-Age=300", "HttpOnly", "SameSite=Lax"}, planted
