"""The question before a login: when it is asked, and what its answer is good for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlencode

import pytest

from sso_service import keyring, tokens
from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.keyring import KeyDirectory
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
def asking_service(database_url: str, keys_dir: Path, tmp_path: Path, clock: Clock) -> Iterator[Node]:
    """A service that asks before every login, with links that outlive the question."""
    environ = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}
    settings = read_settings({**environ, "SSO_CONFIRM_LOGIN": "1", "SSO_TOKEN_TTL": "3600"})
    service = Node(settings, open_database(settings), KeyDirectory(keys_dir), clock=clock)
    yield service
    service.close()


@pytest.fixture
def asking(asking_service: Node) -> Client:
    """A browser in front of it."""
    return Client(create_app(asking_service))


def leads_to(answer: Answer, target: str) -> bool:
    """True if this answer leads on to `target`, and nobody keeps it or is told of it."""
    return (
        answer.status == 303
        and answer.header("location") == target
        and answer.header("cache-control") == "no-store"
        and answer.header("referrer-policy") == "no-referrer"
    )


def opens_a_session(answer: Answer) -> bool:
    return any(name == "set-cookie" and value.startswith("studio_session=") for name, value in answer.headers)


def question(answer: Answer) -> dict[str, str]:
    """The fields of the form in a page that asks, which neither signs in nor leads anywhere."""
    assert answer.status == 200
    assert answer.header("location") is None
    assert not opens_a_session(answer)
    page = MessagePage(answer.text)
    assert page.form == ("post", "/sso/confirm")
    return page.fields


async def respond(client: Client, fields: dict[str, str], headers: Sequence[tuple[str, str]] = SAME_ORIGIN) -> Answer:
    """The answer to the form, sent as a browser sends it."""
    content_type = ("content-type", "application/x-www-form-urlencoded")
    body = urlencode(fields).encode("ascii")
    return await client.request("POST", "/sso/confirm", headers=[content_type, *headers], body=body)


async def refusal(
    client: Client, fields: dict[str, str], headers: Sequence[tuple[str, str]] = SAME_ORIGIN
) -> tuple[int, str]:
    """Status and error code of an answer that is refused, which neither signs in nor redirects."""
    answer = await respond(client, fields, [*headers, JSON])
    assert answer.header("location") is None
    assert not opens_a_session(answer)
    return answer.status, answer.error


async def works(client: Client, token: str) -> bool:
    """True if `token` is unused. Consumes it."""
    browser = client.another()
    answer = await browser.get(f"/?sso={token}")
    if answer.status == 200:
        answer = await respond(browser, question(answer))
    assert answer.status in {303, 401}
    return answer.status == 303


async def email(client: Client) -> str | None:
    """Who is signed in."""
    answer = await client.get("/session")
    found: str | None = answer.json()["user"]["email"] if answer.status == 200 else None
    return found


# --- someone else is signed in ---------------------------------------------------------------------------------------


async def test_a_link_of_someone_else_asks_first_and_signs_in_when_the_answer_is_yes(
    client: Client, api_token: str
) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    asked = await client.get(f"{PAGE}?a=%20b+c&&sso={token}&a=%c3%A4&d")
    assert JANE["email"] in asked.text
    assert JOHN["email"] not in asked.text
    fields = question(asked)
    assert await email(client) == JANE["email"]

    answer = await respond(client, fields)
    assert leads_to(answer, f"{PAGE}?a=%20b+c&&a=%c3%A4&d")
    assert opens_a_session(answer)
    assert await email(client) == JOHN["email"]
    assert not await works(client, token)


async def test_a_question_that_is_not_answered_consumes_nothing_and_changes_nobody(
    client: Client, api_token: str
) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    for _ in range(3):
        fields = question(await client.get(f"{PAGE}?sso={token}"))
    assert await email(client) == JANE["email"]
    assert await works(client, token)
    assert await refusal(client, fields) == (401, "token_consumed")
    assert await email(client) == JANE["email"]


async def test_whoever_is_not_signed_in_any_more_is_nobody_to_ask_about(
    client: Client, service: Node, api_token: str, database: Database, clock: Clock
) -> None:
    user_id = tokens.unsafe_read_claims(await client.issue(api_token, JANE)).user_id
    now = int(clock())
    key = service.keys.ring.signing_key(now)
    good = service.sessions.sign(Session(user_id, ACCOUNT, now - 10))

    async def asks(cookie: str) -> bool:
        browser = client.another()
        browser.cookies["studio_session"] = cookie
        answer = await browser.get(f"/?sso={await client.issue(api_token, JOHN)}")
        assert answer.status in {200, 303}
        return answer.status == 200

    assert await asks(good)
    assert not await asks(service.sessions.sign(Session(user_id, ACCOUNT, now - 43200))), "too old"
    assert not await asks(dump_session(Session(user_id, ACCOUNT, now), bytes(32))), "forged"
    assert not await asks(dump_session(Session(user_id, ACCOUNT, now), key.token_key)), "of another purpose"
    assert not await asks(service.sessions.sign(Session(user_id, OTHER_ACCOUNT, now))), "not a member there"
    assert not await asks(service.sessions.sign(Session(4711, ACCOUNT, now))), "unknown"
    assert not await asks("nonsense")
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=now)
    assert not await asks(good), "disabled"
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
    assert not await asks(good), "from before they were disabled"
    good = service.sessions.sign(Session(user_id, ACCOUNT, now + 1))
    assert await asks(good)
    with changing(database) as connection:
        administration.sign_out_user(connection, JANE["email"], now=now)
    assert not await asks(good), "signed out everywhere"
    with changing(database) as connection:
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    assert not await asks(service.sessions.sign(Session(user_id, ACCOUNT, now + 1))), "removed"


async def test_nothing_is_asked_about_a_link_that_does_not_work(
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
    assert question(await client.get(f"/?sso={token}"))


async def test_a_yes_is_no_way_around_the_checks_of_a_login(
    asking: Client, api_token: str, database: Database, clock: Clock
) -> None:
    token = await asking.issue(api_token)
    fields = question(await asking.get(f"{PAGE}?sso={token}"))
    for team in (OTHER_TEAM, 43):
        unknown_team = question(await asking.get(f"/client/{ACCOUNT}/t/{team}/posts?sso={token}"))
        assert await refusal(asking, unknown_team) == (403, "no_access")
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert await refusal(asking, fields) == (403, "no_access")
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    assert await refusal(asking, fields) == (403, "no_access")
    await asking.issue(api_token)
    assert leads_to(await respond(asking, fields), PAGE)


# --- SSO_CONFIRM_LOGIN -----------------------------------------------------------------------------------------------


async def test_where_it_is_set_every_login_asks_first(asking: Client, api_token: str) -> None:
    token = await asking.issue(api_token)
    for _ in range(2):
        fields = question(await asking.get(f"{PAGE}?a=1&sso={token}&a=2"))
    assert await email(asking) is None
    answer = await respond(asking, fields)
    assert leads_to(answer, f"{PAGE}?a=1&a=2")
    assert opens_a_session(answer)
    assert await email(asking) == JANE["email"]
    assert not await works(asking, token)


async def test_where_it_is_set_whoever_is_signed_in_goes_on_with_a_used_or_expired_link(
    asking: Client, api_token: str, clock: Clock
) -> None:
    token = await asking.issue(api_token)
    await respond(asking, question(await asking.get(f"{PAGE}?sso={token}")))
    clock.advance(3600)
    assert leads_to(await asking.get(f"{PAGE}?sso={token}"), PAGE)
    clock.advance(-3600)
    assert leads_to(await asking.get(f"{PAGE}?sso={token}"), PAGE)  # the back button


async def test_where_it_is_set_machines_still_get_no_question_that_they_could_answer(
    asking: Client, api_token: str
) -> None:
    token = await asking.issue(api_token)
    target = f"{PAGE}?sso={token}"
    for method, headers in (
        ("HEAD", []),
        ("OPTIONS", []),
        ("GET", [("sec-purpose", "prefetch")]),
        ("GET", [("sec-fetch-dest", "iframe")]),
        ("GET", [("sec-fetch-dest", "empty")]),
    ):
        answer = await asking.request(method, target, headers=headers)
        assert "<form" not in answer.text
        assert token not in answer.text
        assert answer.header("set-cookie") is None
    assert await works(asking, token)


# --- what an answer is good for --------------------------------------------------------------------------------------


async def test_an_answer_is_good_for_its_token_its_target_and_its_browser_only(asking: Client, api_token: str) -> None:
    token, other = await asking.issue(api_token), await asking.issue(api_token)
    target = f"{PAGE}?a=1"
    fields = question(await asking.get(f"{target}&sso={token}"))
    other_fields = question(await asking.get(f"{PAGE}?sso={other}"))
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
        assert await refusal(asking, {**fields, **changed}) == (403, "form_invalid"), changed
    for missing in fields:
        rest = {name: value for name, value in fields.items() if name != missing}
        assert await refusal(asking, rest) == (403, "form_invalid"), missing

    stranger = asking.another()
    assert await refusal(stranger, fields) == (403, "form_invalid")  # without a cookie of its own
    question(await stranger.get(f"{target}&sso={token}"))
    assert await refusal(stranger, fields) == (403, "form_invalid")  # and with one
    for cookie in ("", "x", asking.cookies["studio_form"] + "A"):
        stranger.cookies["studio_form"] = cookie
        assert await refusal(stranger, fields) == (403, "form_invalid")

    assert leads_to(await respond(asking, fields), target)
    assert leads_to(await respond(asking, other_fields), PAGE)


async def test_an_answer_replaces_nobody_that_the_question_did_not_name(asking: Client, api_token: str) -> None:
    first, second = await asking.issue(api_token, JANE), await asking.issue(api_token, JOHN)
    first_fields = question(await asking.get(f"/first?sso={first}"))
    second_fields = question(await asking.get(f"/second?sso={second}"))
    assert leads_to(await respond(asking, second_fields), "/second")
    assert await email(asking) == JOHN["email"]
    asked_again = question(await respond(asking, first_fields))
    assert await email(asking) == JOHN["email"]
    assert leads_to(await respond(asking, asked_again), "/first")
    assert await email(asking) == JANE["email"]


async def test_an_answer_is_good_for_five_minutes(asking: Client, api_token: str, clock: Clock) -> None:
    clock.now = float(int(clock.now))
    token, other = await asking.issue(api_token), await asking.issue(api_token)
    fields = question(await asking.get(f"/?sso={token}"))
    other_fields = question(await asking.get(f"/?sso={other}"))
    clock.advance(299)
    assert leads_to(await respond(asking, fields), "/")
    clock.advance(1)
    assert await refusal(asking, other_fields) == (403, "form_invalid")
    assert await works(asking, other)


async def test_a_link_that_expires_while_its_question_waits_has_expired(
    client: Client, api_token: str, clock: Clock
) -> None:
    clock.now = float(int(clock.now))
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    token = await client.issue(api_token, JOHN)
    clock.advance(200)
    fields = question(await client.get(f"/?sso={token}"))
    clock.advance(100)
    assert await refusal(client, fields) == (401, "token_expired")
    assert await email(client) == JANE["email"]


async def test_an_answer_that_is_sent_again_signs_nobody_in_again(asking: Client, api_token: str) -> None:
    token = await asking.issue(api_token)
    fields = question(await asking.get(f"{PAGE}?sso={token}"))
    assert opens_a_session(await respond(asking, fields))

    again = await respond(asking, fields)  # "reload", while signed in: just the page
    assert leads_to(again, PAGE)
    assert not opens_a_session(again)
    assert (await asking.request("POST", "/logout", headers=SAME_ORIGIN)).status == 204
    assert await refusal(asking, fields) == (401, "token_consumed")
    assert await email(asking) is None


async def test_an_answer_to_a_question_that_a_revoked_key_signed_is_refused(
    asking: Client, asking_service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    fields = question(await asking.get(f"/?sso={await asking.issue(api_token)}"))
    keyring.revoke_all(keys_dir, now=int(clock()))
    asking_service.keys.refresh()
    assert await refusal(asking, fields) in {(403, "form_invalid"), (401, "token_invalid")}


async def test_an_answer_is_good_after_the_keys_were_rotated(
    client: Client, service: Node, api_token: str, keys_dir: Path, clock: Clock
) -> None:
    await client.get(f"/?sso={await client.issue(api_token, JANE)}")
    fields = question(await client.get(f"/?sso={await client.issue(api_token, JOHN)}"))
    keyring.rotate(keys_dir, now=int(clock()))
    service.keys.refresh()
    clock.advance(100)
    assert leads_to(await respond(client, fields), "/")


# --- where an answer may come from -----------------------------------------------------------------------------------

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


async def test_an_answer_from_any_other_page_is_refused_and_consumes_nothing(asking: Client, api_token: str) -> None:
    fields = question(await asking.get(f"{PAGE}?sso={await asking.issue(api_token)}"))
    for headers in FOREIGN:
        assert await refusal(asking, fields, headers) == (403, "cross_origin"), headers
    assert leads_to(await respond(asking, fields), PAGE)


@pytest.mark.parametrize(
    "headers", [[("origin", "http://studio.example")], [("sec-fetch-site", "same-origin")]], ids=["origin", "site"]
)
async def test_either_header_alone_is_proof_that_an_answer_comes_from_our_page(
    asking: Client, api_token: str, headers: list[tuple[str, str]]
) -> None:
    fields = question(await asking.get(f"{PAGE}?sso={await asking.issue(api_token)}"))
    assert leads_to(await respond(asking, fields, headers), PAGE)


async def test_an_answer_from_the_unencrypted_page_of_the_same_name_is_refused(asking: Client, api_token: str) -> None:
    """Whoever controls the network can write pages of http://studio.example, but not of https://studio.example."""
    asking.scheme = "https"
    fields = question(await asking.get(f"{PAGE}?sso={await asking.issue(api_token)}"))
    assert await refusal(asking, fields, [("origin", "http://studio.example")]) == (403, "cross_origin")
    assert leads_to(await respond(asking, fields, [("origin", "https://studio.example")]), PAGE)


async def test_an_answer_counts_only_as_the_navigation_of_a_whole_window(asking: Client, api_token: str) -> None:
    token = await asking.issue(api_token)
    fields = question(await asking.get(f"{PAGE}?sso={token}"))
    for destination in ("iframe", "empty", "image"):
        headers = [("origin", "http://studio.example"), ("sec-fetch-dest", destination)]
        answer = await respond(asking, fields, headers)
        assert not opens_a_session(answer), destination
        assert answer.status != 303
    assert await works(asking, token)


async def test_an_answer_is_a_post(asking: Client, api_token: str) -> None:
    token = await asking.issue(api_token)
    fields = question(await asking.get(f"{PAGE}?sso={token}"))
    target = f"/sso/confirm?{urlencode(fields)}"
    for method in ("GET", "PUT", "DELETE"):
        answer = await asking.request(method, target, headers=SAME_ORIGIN, body=urlencode(fields).encode())
        assert (answer.status, answer.header("allow")) == (405, "POST")
        assert token not in answer.text
    assert (await asking.request("HEAD", target, headers=SAME_ORIGIN)).status == 405
    assert await works(asking, token)


async def test_a_body_that_is_no_form_is_refused(asking: Client, api_token: str) -> None:
    token = await asking.issue(api_token)
    fields = question(await asking.get(f"{PAGE}?sso={token}"))
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
        answer = await asking.request("POST", "/sso/confirm", headers=[*SAME_ORIGIN, JSON], body=body)
        assert (answer.status, answer.error) == (403, "form_invalid"), body[:40]
        assert not opens_a_session(answer)
    answer = await asking.request("POST", "/sso/confirm", headers=SAME_ORIGIN, body=good + b"&a=" + b"x" * 17_000)
    assert (answer.status, answer.error) == (413, "payload_too_large")
    assert await works(asking, token)


# --- the browser's own cookie ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "secure"), [("http", set[str]()), ("https", {"Secure"})])
async def test_the_question_s_cookie_is_for_this_host_only_and_not_for_scripts(
    asking: Client, api_token: str, scheme: str, secure: set[str]
) -> None:
    asking.scheme = scheme
    token = await asking.issue(api_token)
    cookies = set()
    for _ in range(3):
        cookie = (await asking.another().get(f"/?sso={token}")).header("set-cookie") or ""
        pair, *attributes = cookie.split("; ")
        assert set(attributes) == {"Path=/", "Max-Age=300", "HttpOnly", "SameSite=Lax"} | secure
        assert pair.startswith("studio_form=")
        assert len(pair) > len("studio_form=") + 20, "long enough to be nobody's guess"
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


async def test_a_cookie_that_was_planted_cannot_write_headers(asking: Client, api_token: str) -> None:
    """A quoted cookie can hold characters that end a header, or an attribute of a cookie, where it is sent back."""
    token = await asking.issue(api_token)
    for planted in PLANTED:
        answer = await asking.request("GET", f"/?sso={token}", headers=[("cookie", f"studio_form={planted}")])
        assert answer.status in {200, 400, 403}
        for name, value in answer.headers:
            assert all(" " <= character != "\x7f" for character in value), (name, value)
        attributes = (answer.header("set-cookie") or "").split("; ")[1:]
        assert set(attributes) <= {"Path=/", "Max-Age=300", "HttpOnly", "SameSite=Lax"}, planted
