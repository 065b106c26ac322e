"""The session cookie of the middleware, and the user that the application gets from it."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import httpx
import pytest
from itsdangerous import URLSafeTimedSerializer
from starlette.authentication import AuthCredentials, BaseUser, UnauthenticatedUser
from starlette.responses import Response
from starlette.types import Message

from sso_service.client.middleware import SSOLogin, SSOUser
from sso_service.client.session import AnonymousUser, Credentials
from sso_service.database.transactions import Database
from sso_service.permissions import Role
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE
from tests.support.databases import changing
from tests.support.frontend import email_of, frontend, sign_in
from tests.support.python_client import SERVICE_URL

pytestmark = pytest.mark.anyio

IsUnused = Callable[[str], Awaitable[bool]]


async def test_a_session_ends_after_its_lifetime(
    client: Client, api_token: str, transport: httpx.ASGITransport, verifier: str, clock: Clock
) -> None:
    for max_age, options in ((900, {}), (60, {"max_age": 60, "cookie": "__Host-mine"})):
        clock.now = int(clock.now)
        browser = Client(frontend(api_token=verifier, transport=transport, clock=clock, **options))
        await sign_in(browser, client, api_token)
        assert list(browser.cookies) == [options.get("cookie", "sso_session")]
        clock.advance(max_age - 1)
        assert await email_of(browser) == JANE["email"]
        clock.advance(1)
        assert await email_of(browser) is None


async def test_workers_share_sessions_although_their_clocks_differ(
    client: Client, api_token: str, transport: httpx.ASGITransport, verifier: str, clock: Clock
) -> None:
    browser = Client(frontend(api_token=verifier, transport=transport, clock=clock))
    await sign_in(browser, client, api_token)
    for seconds, expected in ((-59, JANE["email"]), (-120, None)):
        other_clock = Clock(clock.now + seconds)
        browser.app = frontend(api_token=verifier, transport=transport, clock=other_clock)
        assert await email_of(browser) == expected


async def test_a_cookie_that_this_api_token_did_not_sign_is_ignored(
    browser: Client, client: Client, api_token: str, transport: httpx.ASGITransport, verifier: str, clock: Clock
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
    browser.app = frontend(api_token=verifier, transport=transport, clock=clock)
    assert await email_of(browser) is None  # another API token signed it


async def test_the_longest_session_fits_into_a_cookie(
    client: Client, api_token: str, transport: httpx.ASGITransport, verifier: str, database: Database, clock: Clock
) -> None:
    letters = "".join(chr(0x1F300 + 7 * number % 1000) for number in range(200))
    person = {"email": f"{'a' * 60}@{'b' * 60}.{'c' * 60}.{'d' * 60}.example", "first_name": letters[:100]}
    person["last_name"] = letters[100:]
    await client.issue(api_token, person)
    with changing(database) as connection:
        administration.set_role(connection, person["email"], ACCOUNT, Role.ADMIN)
    browser = Client(frontend(api_token=verifier, transport=transport, clock=clock))
    await sign_in(browser, client, api_token, person)
    assert (await browser.get("/who")).json()["name"] == f"{letters[:100]} {letters[100:]}"
    assert len(f"sso_session={browser.cookies['sso_session']}") < 4000  # browsers accept 4096 with all attributes


async def test_a_websocket_has_the_user_and_ignores_login_tokens(
    browser: Client, client: Client, api_token: str, is_unused: IsUnused
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
        {"service_url": "http://sso.example"},
        {"api_token": ""},
        {"timeout": 0},
    ],
)
def test_invalid_settings_are_refused_at_the_start(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        SSOLogin(Response(), **{"service_url": SERVICE_URL, "api_token": "t", **options})


def test_http_to_the_service_needs_the_option_allow_http() -> None:
    assert SSOLogin(Response(), service_url="http://sso.example", api_token="t", allow_http=True)


def test_users_have_the_attributes_of_starlettes_users() -> None:
    public = {name for name in dir(BaseUser) if not name.startswith("_")}
    assert public == {"is_authenticated", "display_name", "identity"}
    user = SSOUser(7, "jane.doe@example.com", "Jane", "Doe", ACCOUNT, "editor", ("posts:edit",))
    assert [getattr(user, name) for name in sorted(public)] == ["Jane Doe", "7", True]
    anonymous, expected = AnonymousUser(), UnauthenticatedUser()
    assert {name: getattr(anonymous, name) for name in public} == {name: getattr(expected, name) for name in public}
    assert vars(AuthCredentials(["a"])) == {"scopes": ["a"]} == asdict(Credentials(["a"]))
