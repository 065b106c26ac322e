"""`GET /session` and `POST /logout`: the session is checked at each request, and only same-origin pages sign out."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from scripts.tools.ports import free_port
from sso_service import keyring
from sso_service.database import members, open_database
from sso_service.database.transactions import Database
from sso_service.errors import Overloaded
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.sessions import COOKIE_LENGTH
from sso_service.settings import read_settings
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE, TEAM
from tests.support.databases import changing, on_sqlite
from tests.support.sessions import COOKIE, SESSION_LIFETIME, sign_in, sign_out_everywhere

pytestmark = pytest.mark.anyio


EDITOR = ["ideas:edit", "ideas:view", "posts:edit", "posts:view"]


async def with_cookie(client: Client, value: str) -> Answer:
    """Request `/session` from a new browser with this cookie."""
    browser = client.another()
    browser.cookies[COOKIE] = value
    return await browser.get("/session")


async def is_signed_in(client: Client, value: str | None = None) -> bool:
    """Return whether `/session` reports a session for the client, or for a new browser with the cookie `value`."""
    answer = await (client.get("/session") if value is None else with_cookie(client, value))
    if answer.status == 200:
        return True
    assert answer.status == 401
    error = answer.json()["error"]
    assert error.keys() == {"code", "message"}
    assert answer.header("set-cookie") is None
    return False


def attributes(answer: Answer) -> tuple[str, dict[str, str]]:
    """Return the value and attributes of the session cookie in a response."""
    line = answer.header("set-cookie")
    assert line is not None
    pair, *rest = line.split(";")
    name, _, value = pair.partition("=")
    assert name == COOKIE
    parts = [part.strip().partition("=") for part in rest]
    found = {key.lower(): setting for key, _, setting in parts}
    assert len(found) == len(rest)
    return value, found


# --- the session -----------------------------------------------------------------------------------------------------


async def test_a_session_response_has_the_user_account_role_and_permissions(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    await client.get(f"{PAGE}?sso={token}")
    content: dict[str, Any] = (await client.get("/session")).json()
    user_id = content["user"]["id"]
    assert isinstance(user_id, int)
    assert content == {
        "user": {"id": user_id, **JANE},
        "account_id": ACCOUNT,
        "role": "editor",
        "permissions": EDITOR,
    }
    assert (await client.get("/session?sso=x&account_id=999")).json() == content


async def test_a_request_without_a_valid_cookie_is_answered_401(
    client: Client, api_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not await is_signed_in(client)
    of_john = (await sign_in(client.another(), api_token, JOHN)).split(".")[0]
    good = await sign_in(client, api_token)
    assert await is_signed_in(client, good)
    token = await client.issue(api_token)
    payload, signed_at, signature = good.split(".")
    bad = {
        "empty": "",
        "a word": "admin",
        "dots": "..",
        "a login token": token,
        "an API token": api_token,
        "truncated": good[:-1],
        "longer": good + "A",
        "twice": good * 2,
        "without signature": f"{payload}.{signed_at}",
        "without payload": f".{signed_at}.{signature}",
        "another payload": f"{of_john}.{signed_at}.{signature}",
        "another time": f"{payload}.AAAAAA.{signature}",
        "upper case": good.upper(),
        "non-ASCII": "\xfc\xff\x80",
        "quoted": '"\\"',
        "percent signs": "%00%ff",
        "JSON": '{"user_id":1}',
        "very long": "A" * 10_000,
    }
    answers = {name: await with_cookie(client, value) for name, value in bad.items()}
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(bad, 401)
    assert len({answer.body for answer in answers.values()}) == 1
    other_name = await client.request("GET", "/session", headers=[("cookie", f"studio_form={good}; session={good}")])
    assert other_name.status == 401
    as_bearer = await client.another().get("/session", authorization=f"Bearer {good}")
    assert as_bearer.status == 401
    for secret in (good, token, api_token):
        assert secret not in caplog.text


@on_sqlite
async def test_the_session_cookie_is_found_among_other_cookies(client: Client, api_token: str) -> None:
    good = await sign_in(client, api_token)
    for value in (f"a=b; {COOKIE}={good}; c=d", f"{COOKIE}={good};c=d", f'theme="dark; x"; {COOKIE}={good}'):
        assert (await client.request("GET", "/session", headers=[("cookie", value)])).status == 200, value


@on_sqlite
async def test_a_session_expires_after_twelve_hours(client: Client, api_token: str, clock: Clock) -> None:
    clock.now = int(clock.now)
    await sign_in(client, api_token)
    clock.advance(SESSION_LIFETIME - 0.5)
    assert await is_signed_in(client)
    clock.advance(0.5)
    assert not await is_signed_in(client)
    clock.advance(SESSION_LIFETIME)
    assert not await is_signed_in(client)


@on_sqlite
async def test_a_session_of_a_node_whose_clock_is_a_minute_ahead_is_valid(
    client: Client, api_token: str, clock: Clock
) -> None:
    clock.now = int(clock.now)
    await sign_in(client, api_token)
    clock.advance(-60)
    assert await is_signed_in(client)
    clock.advance(-1)
    assert not await is_signed_in(client)


async def test_a_role_change_takes_effect_at_the_next_request(
    client: Client, api_token: str, database: Database
) -> None:
    await sign_in(client, api_token)
    content = ("posts", "ideas", "areas", "topics", "templates")
    actions = ("view", "edit", "create", "delete", "publish")
    everything_but_settings = [f"{section}:{action}" for section in content for action in actions]
    settings = [f"settings:{action}" for action in actions]
    for role, permissions in (
        (Role.ADMIN, everything_but_settings + settings),
        (Role.PUBLISHER, everything_but_settings),
        (Role.EDITOR, EDITOR),
    ):
        with changing(database) as connection:
            administration.set_role(connection, JANE["email"], ACCOUNT, role)
        answer = (await client.get("/session")).json()
        assert (answer["role"], answer["permissions"]) == (role, sorted(permissions))


async def test_disabling_or_removing_a_user_ends_sessions_at_once(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    john = client.another()
    await sign_in(client, api_token)
    await sign_in(john, api_token, JOHN)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
        administration.remove_member(connection, JOHN["email"], ACCOUNT)
    assert not await is_signed_in(client)
    assert not await is_signed_in(john)


async def test_a_session_belongs_to_one_account(client: Client, api_token: str, database: Database) -> None:
    with changing(database) as connection:
        _, elsewhere = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="tests", scopes=frozenset({Scope.WRITE_SSO}), now=0
        )
    await sign_in(client, api_token)
    other = client.another()
    await sign_in(other, elsewhere, page=f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts")
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], OTHER_ACCOUNT, Role.ADMIN)
    here, there = (await client.get("/session")).json(), (await other.get("/session")).json()
    assert (here["account_id"], here["role"], here["permissions"]) == (ACCOUNT, "editor", EDITOR)
    assert (there["account_id"], there["role"]) == (OTHER_ACCOUNT, "admin")
    assert here["user"] == there["user"]
    with changing(database) as connection:
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    assert not await is_signed_in(client)
    assert await is_signed_in(other)


@on_sqlite
async def test_revoking_the_signing_key_ends_its_sessions(
    client: Client, service: Node, api_token: str, clock: Clock
) -> None:
    await sign_in(client, api_token)
    await sign_in(client.another(), api_token, JOHN)
    keyring.revoke_all(service.keys.path, now=int(clock()))
    service.keys.refresh()
    assert not await is_signed_in(client)
    await sign_in(client, api_token)
    assert await is_signed_in(client)


async def test_an_unavailable_database_is_answered_503_not_401(
    client: Client, api_token: str, database: Database, keys_dir: Path, clock: Clock, tmp_path: Path
) -> None:
    session = await sign_in(client, api_token)
    unreachable = f"sqlite:///{tmp_path}" if database.is_sqlite else f"postgresql://127.0.0.1:{free_port()}/sso"
    settings = read_settings({"SSO_DATABASE_URL": unreachable})
    service = Node(settings, open_database(settings), KeyDirectory(keys_dir), clock=clock)
    cut_off = Client(create_app(service))
    answer = await with_cookie(cut_off, session)
    assert (answer.status, answer.error) == (503, "unavailable")
    assert int(answer.header("retry-after") or 0) > 0
    assert answer.header("set-cookie") is None
    assert session not in answer.text
    assert not await is_signed_in(cut_off, "garbage")  # no query is needed to refuse it
    service.close()


# --- signing out everywhere ------------------------------------------------------------------------------------------


async def test_signing_out_everywhere_ends_all_earlier_sessions(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    clock.now = int(clock.now) + 0.25
    earlier = await sign_in(client.another(), api_token)
    john = await sign_in(client.another(), api_token, JOHN)
    clock.advance(10)
    this_second = await sign_in(client.another(), api_token)
    sign_out_everywhere(database, clock())
    assert not await is_signed_in(client, earlier)
    assert not await is_signed_in(client, this_second)
    assert await is_signed_in(client, john)
    clock.advance(SESSION_LIFETIME // 2)
    assert not await is_signed_in(client, this_second)
    later = await sign_in(client.another(), api_token)
    assert await is_signed_in(client, later)


async def test_a_session_that_began_after_the_sign_out_stays_valid(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await client.issue(api_token)
    sign_out_everywhere(database, clock())
    clock.advance(1)
    assert await is_signed_in(client, await sign_in(client, api_token))


async def test_a_login_in_the_same_second_as_the_sign_out_is_valid(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    before = await sign_in(client, api_token)
    sign_out_everywhere(database, clock())
    assert not await is_signed_in(client)
    after = await sign_in(client, api_token)  # in the same browser, which still has the old cookie
    assert await is_signed_in(client)
    assert await is_signed_in(client, after)
    assert not await is_signed_in(client, before)
    elsewhere = await sign_in(client.another(), api_token)
    assert await is_signed_in(client, elsewhere)
    clock.advance(SESSION_LIFETIME - 1)
    assert await is_signed_in(client)


async def test_repeated_sign_outs_in_one_second_end_each_new_session(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await sign_in(client, api_token)
    for _ in range(3):
        sign_out_everywhere(database, clock())
        assert not await is_signed_in(client)
        await sign_in(client, api_token)
        assert await is_signed_in(client)


async def test_a_clock_set_back_does_not_undo_a_sign_out(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    session = await sign_in(client, api_token)
    sign_out_everywhere(database, clock())
    with pytest.raises(Overloaded):
        sign_out_everywhere(database, clock() - 100)
    assert not await is_signed_in(client, session)


# --- the cookie ------------------------------------------------------------------------------------------------------


@on_sqlite
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_cookie_is_same_site_and_hidden_from_scripts(service: Node, api_token: str, scheme: str) -> None:
    client = Client(create_app(service), scheme=scheme)
    token = await client.issue(api_token)
    answer = await client.get(f"/client/{ACCOUNT}/t/{TEAM}/posts?sso={token}")
    value, found = attributes(answer)
    assert value
    expected = {"path": "/", "max-age": str(SESSION_LIFETIME), "httponly": "", "samesite": "Lax"}
    assert found == (expected | {"secure": ""} if scheme == "https" else expected)
    assert await is_signed_in(client)

    signed_out = await client.request("POST", "/logout", headers=[("origin", f"{scheme}://studio.example")])
    value, found = attributes(signed_out)
    assert value == ""
    expected["max-age"] = "0"
    assert found == (expected | {"secure": ""} if scheme == "https" else expected)


# --- signing out -----------------------------------------------------------------------------------------------------


@on_sqlite
async def test_signing_out_deletes_the_cookie(client: Client, api_token: str) -> None:
    await sign_in(client, api_token)
    answer = await client.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")])
    assert answer.status == 204
    assert answer.body == b""
    assert COOKIE not in client.cookies
    assert not await is_signed_in(client)
    again = await client.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")])
    assert again.status == 204


@on_sqlite
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_only_same_origin_pages_can_sign_out(service: Node, api_token: str, scheme: str) -> None:
    client = Client(create_app(service), scheme=scheme)
    session = await sign_in(client, api_token)
    own = f"{scheme}://studio.example"
    allowed: list[list[tuple[str, str]]] = [
        [("origin", own)],
        [("sec-fetch-site", "same-origin")],
        [("origin", own), ("sec-fetch-site", "same-origin")],
    ]
    refused: list[list[tuple[str, str]]] = [
        [],
        [("referer", f"{own}/session")],
        [("origin", "")],
        [("origin", "null")],
        [("origin", "studio.example")],
        [("origin", "https://evil.example")],
        [("origin", f"{scheme}://evil.example")],
        [("origin", f"{scheme}://studio.example.evil.example")],
        [("origin", f"{scheme}://evil.studio.example")],
        [("origin", f"{scheme}://studio.example@evil.example")],
        [("origin", f"{scheme}://evil.example/studio.example")],
        [("origin", f"{scheme}://studio.example:8443")],
        [("origin", own), ("origin", "https://evil.example")],
        [("origin", f"{own}, https://evil.example")],
        [("sec-fetch-site", "")],
        [("sec-fetch-site", "cross-site")],
        [("sec-fetch-site", "same-site")],
        [("sec-fetch-site", "none")],
        [("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
        [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")],
    ]
    answers: dict[str, int] = {}
    for headers in (*allowed, *refused):
        browser = client.another()
        browser.cookies[COOKIE] = session
        answer = await browser.request("POST", "/logout", headers=headers)
        answers[str(headers)] = answer.status
        assert (answer.status == 204) == (COOKIE not in browser.cookies)
        assert answer.status == 204 or answer.json()["error"].keys() == {"code", "message"}
        assert session not in answer.text
    assert answers == {str(headers): 204 if headers in allowed else 403 for headers in (*allowed, *refused)}


@on_sqlite
async def test_a_plain_http_page_cannot_sign_out_of_an_https_site(service: Node) -> None:
    client = Client(create_app(service), scheme="https")
    answer = await client.request("POST", "/logout", headers=[("origin", "http://studio.example")])
    assert answer.status == 403


@on_sqlite
async def test_the_port_is_part_of_the_origin(service: Node) -> None:
    client = Client(create_app(service), host="localhost:8000")
    for origin, status in (
        ("http://localhost:8000", 204),
        ("http://localhost", 403),
        ("http://localhost:8001", 403),
        ("http://127.0.0.1:8000", 403),
    ):
        assert (await client.request("POST", "/logout", headers=[("origin", origin)])).status == status, origin


async def test_a_cookie_that_is_too_long_is_refused(client: Client, api_token: str) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    value = client.cookies["studio_session"]
    assert len(value) <= COOKIE_LENGTH
    # The decoder skips characters outside base64, so one cookie has many spellings. Its length at least is limited.
    for padding in ("!" * 200, "." * 200, "A" * 1_000_000):
        client.cookies["studio_session"] = value + padding
        assert (await client.get("/session")).status == 401
    client.cookies["studio_session"] = value
    assert (await client.get("/session")).status == 200


async def test_an_account_can_end_only_its_own_sessions(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    with changing(database) as connection:
        _, others = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="others", scopes=frozenset({Scope.WRITE_SSO}), now=1
        )
    here, there = client.another(), client.another()
    await here.get(f"{PAGE}?sso={await client.issue(api_token)}")
    await there.get(f"/client/{OTHER_ACCOUNT}?sso={await client.issue(others)}")
    user = (await there.get("/session")).json()["user"]
    with changing(database) as connection:
        administration.sign_out_member(connection, OTHER_ACCOUNT, user["id"], database=database)
    assert [(await each.get("/session")).status for each in (here, there)] == [200, 401]
    with changing(database) as connection:
        members.sign_out_user(connection, user["id"], database=database)
    assert [(await each.get("/session")).status for each in (here, there)] == [401, 401]
    clock.advance(2)
    await there.get(f"/client/{OTHER_ACCOUNT}?sso={await client.issue(others)}")
    assert (await there.get("/session")).status == 200


async def test_an_account_can_end_a_session_that_is_dated_ahead(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    # An admin's page uses the database's clock. The session here begins in the same second.
    with database.connect() as connection, database.reading(connection):
        clock.now = connection.execute(select(database.now())).scalar_one()
    await sign_in(client, api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    now = int(clock.now)
    steps: list[bool] = []

    def everywhere(connection: Connection) -> None:
        administration.sign_out_user(connection, JANE["email"], now=now)

    def in_the_account(connection: Connection) -> None:
        administration.sign_out_member(connection, ACCOUNT, user_id, database=database)

    for sign_out in (everywhere, in_the_account, in_the_account, everywhere, in_the_account):
        cookie = await sign_in(client, api_token)
        steps.append(await is_signed_in(client, cookie))
        with changing(database) as connection:
            sign_out(connection)
        steps.append(await is_signed_in(client, cookie))
    assert steps == [True, False] * 5


def sign_out_until_refused(database: Database, sign_out: Callable[[Connection], object]) -> None:
    """Sign out repeatedly, within a second, until the service refuses."""
    with changing(database) as connection, suppress(Overloaded):
        for _ in range(100):
            sign_out(connection)
        pytest.fail("no sign-out was refused")


async def test_sign_outs_in_one_account_do_not_block_signing_out_everywhere(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    await sign_in(client, api_token)
    user_id = (await client.get("/session")).json()["user"]["id"]
    sign_out_until_refused(
        database, partial(administration.sign_out_member, account_id=ACCOUNT, user_id=user_id, database=database)
    )
    cookie = await sign_in(client, api_token)
    assert await is_signed_in(client, cookie)
    with changing(database) as connection:
        members.sign_out_user(connection, user_id, database=database)
    assert not await is_signed_in(client, cookie)
    cookie = await sign_in(client, api_token)
    assert await is_signed_in(client, cookie)
    # Refused sign-outs do not prevent disabling the user, or signing in again.
    sign_out_until_refused(database, partial(members.sign_out_user, user_id=user_id, database=database))
    assert await is_signed_in(client, await sign_in(client, api_token))
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert not await is_signed_in(client)


async def test_enabling_a_user_does_not_restore_ended_sessions(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    cookie = await sign_in(client, api_token)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    with changing(database) as connection:
        administration.enable_user(connection, JANE["email"])
    assert not await is_signed_in(client, cookie)
    assert await is_signed_in(client, await sign_in(client, api_token))


async def test_adding_a_member_again_does_not_restore_ended_sessions(
    client: Client, api_token: str, database: Database, clock: Clock
) -> None:
    clock.advance(-10)
    cookie = await sign_in(client, api_token)
    clock.advance(10)
    with changing(database) as connection:
        administration.remove_member(connection, JANE["email"], ACCOUNT)
    again = await sign_in(client, api_token)  # the next login token adds the member again
    assert await is_signed_in(client, again)
    assert not await is_signed_in(client, cookie)
