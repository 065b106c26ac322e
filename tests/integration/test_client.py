"""The client: what it asks, what it makes of every answer and of none, and what it repeats."""

import asyncio
import logging
import pickle
import ssl
import time
import traceback
from typing import Any

import httpx
import pytest
import trustme

from scripts.tools.ports import free_port
from sso_service import tokens
from sso_service.client import (
    AsyncSSOClient,
    Created,
    InsufficientScope,
    InvalidAPIToken,
    InvalidParameter,
    NoAccess,
    OutcomeUnknown,
    RoleNotAllowed,
    SSOClient,
    SSOError,
    TokenConsumed,
    TokenExpired,
    TokenInvalid,
    TokenRefused,
    Unavailable,
    UnexpectedAnswer,
    UserDisabled,
)
from sso_service.database import administration
from sso_service.database.engine import Database
from sso_service.permissions import Role, permissions
from sso_service.service import Service
from sso_service.web.app import create_app
from tests.support.api import BOTH, make_api_token
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.python_client import API_TOKEN, SERVICE_URL, Kind, call, error_of
from tests.support.wire import Reply, Talk, Wire, listening, says_nothing, told

pytestmark = pytest.mark.anyio


TOKEN = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"
STUDIO = f"https://studio.example{PAGE}"

LOGIN = (
    b'{"active":true,"ref":"a9dcb9261b47","user":{"id":3,"email":"jane.doe@example.com","first_name":"Jane",'
    b'"last_name":"Doe"},"account_id":123,"role":"editor","permissions":["posts:edit"],"expires_at":1900000000}'
)
CREATED = b'{"token":"%s","user_created":false}' % TOKEN.encode()

# Every method with something to call it with, and the answer that it gets when all is well.
CREATE = ("create_token", JANE, (201, CREATED))
LOGIN_URL = ("login_url", {"studio_url": STUDIO, **JANE}, (201, CREATED))
VERIFY = ("verify", {"token": TOKEN}, (200, LOGIN))
CONSUME = ("consume", {"token": TOKEN}, (200, LOGIN))
REVOKE = ("revoke", {"token": TOKEN}, (200, b'{"revoked":true}'))
ONCE = [CONSUME, REVOKE]
NEVER_REPEATED = [VERIFY, *ONCE]
Method = tuple[str, dict[str, Any], tuple[int, bytes]]


@pytest.fixture(params=[SSOClient, AsyncSSOClient])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Either client: what is promised of one is promised of both."""
    client: Kind = request.param
    return client


# --- with the real service -------------------------------------------------------------------------------------------


@pytest.fixture
def transport(service: Service) -> httpx.ASGITransport:
    return httpx.ASGITransport(create_app(service))


@pytest.fixture
def client(transport: httpx.ASGITransport, database: Database) -> AsyncSSOClient:
    """A client of the real application, with an API token of `ACCOUNT` for everything."""
    return AsyncSSOClient(SERVICE_URL, make_api_token(database, scopes=BOTH)[1], transport=transport)


async def test_a_token_is_created_verified_and_consumed_once(client: AsyncSSOClient, clock: Clock) -> None:
    created = await client.create_token(**JANE)
    again = await client.create_token(**JANE)
    assert (created.user_created, again.user_created) == (True, False)
    assert created.token != again.token

    verification = await client.verify(created.token)
    assert (verification.active, verification.reason) == (True, None)
    login = await client.consume(created.token)
    assert (login.user.email, login.user.first_name, login.user.last_name) == tuple(JANE.values())
    assert (login.account_id, login.role, login.permissions) == (ACCOUNT, "editor", tuple(permissions(Role.EDITOR)))
    assert (login.expires_at, login.ref) == (int(clock()) + 300, tokens.ref(created.token))
    same = (verification.user, verification.account_id, verification.role, verification.permissions)
    assert same == (login.user, login.account_id, login.role, login.permissions)
    assert (verification.expires_at, verification.ref) == (login.expires_at, login.ref)

    error = await error_of(client.consume(created.token))
    assert (type(error), error.code, error.status) == (TokenConsumed, "token_consumed", 410)
    verification = await client.verify(created.token)
    assert (verification.active, verification.reason, verification.user) == (False, "consumed", None)


@on_sqlite
async def test_revoking_says_whether_somebody_was_faster(client: AsyncSSOClient) -> None:
    unused, used = (await client.create_token(**JANE)).token, (await client.create_token(**JANE)).token
    await client.consume(used)
    assert await client.revoke(unused) is True
    assert await client.revoke(used) is False
    assert type(await error_of(client.consume(unused))) is TokenConsumed


@on_sqlite
async def test_every_reason_against_a_login_token_is_an_error_of_its_own(
    client: AsyncSSOClient, database: Database, clock: Clock
) -> None:
    late, jane, john = [(await client.create_token(**person)).token for person in (JANE, JANE, JOHN)]
    with changing(database) as connection:
        administration.disable_user(connection, JOHN["email"], now=int(clock()))
    assert type(await error_of(client.consume(john))) is NoAccess
    assert type(await error_of(client.consume(jane[:-2] + "AA"))) is TokenInvalid
    assert type(await error_of(client.consume("\ud800"))) is TokenInvalid
    clock.advance(300)
    assert type(await error_of(client.consume(late))) is TokenExpired
    assert type(await error_of(client.revoke(late))) is TokenExpired
    assert {(await client.verify(each)).reason for each in (late, "x", jane[:-2] + "AA")} == {
        "expired",
        "malformed",
        "bad_signature",
    }
    assert all(issubclass(each, TokenRefused) for each in (TokenConsumed, TokenExpired, TokenInvalid, NoAccess))


@on_sqlite
async def test_every_reason_against_a_person_is_an_error_of_its_own(
    client: AsyncSSOClient, transport: httpx.ASGITransport, database: Database, clock: Clock
) -> None:
    error = await error_of(client.create_token(**{**JANE, "email": "no address"}))
    assert isinstance(error, InvalidParameter)
    assert (error.code, error.field, error.rule, error.status) == ("parameter_invalid", "email", "email", 422)
    error = await error_of(client.create_token(**{**JANE, "last_name": " "}))
    assert isinstance(error, InvalidParameter)
    assert (error.code, error.field, error.rule) == ("parameter_missing", "last_name", "required")
    error = await error_of(client.create_token(**{**JANE, "first_name": "\ud800"}))
    assert isinstance(error, InvalidParameter)
    assert (error.field, error.rule) == ("first_name", "characters")

    await client.create_token(**JANE)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    capped = make_api_token(database, max_role=Role.PUBLISHER)[1]
    assert type(
        await error_of(call(AsyncSSOClient, **JANE, method="create_token", api_token=capped, transport=transport))
    ) is (RoleNotAllowed)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    assert type(await error_of(client.create_token(**JANE))) is UserDisabled


@on_sqlite
async def test_every_reason_against_an_api_token_is_an_error_of_its_own(
    client: AsyncSSOClient, transport: httpx.ASGITransport, database: Database
) -> None:
    error = await error_of(call(AsyncSSOClient, "verify", token=TOKEN, transport=transport))
    assert (type(error), error.status) == (InvalidAPIToken, 401)
    for_writing = make_api_token(database)[1]
    error = await error_of(call(AsyncSSOClient, "verify", api_token=for_writing, token=TOKEN, transport=transport))
    assert isinstance(error, InsufficientScope)
    assert (error.required_scope, error.status) == ("verify:sso", 403)
    others = make_api_token(database, account_id=OTHER_ACCOUNT, scopes=BOTH)[1]
    token = (await client.create_token(**JANE)).token
    error = await error_of(call(AsyncSSOClient, "consume", api_token=others, token=token, transport=transport))
    assert type(error) is TokenInvalid


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CREATE, VERIFY, CONSUME, REVOKE])
async def test_each_method_posts_json_with_the_api_token(kind: Kind, method: Method) -> None:
    name, given, answer = method
    wire = Wire(answer)
    await call(kind, name, "https://sso.example/base/", transport=wire, **given)
    (request,) = wire.requests
    path = {"create_token": ""}.get(name, f"/{name}")
    assert (request.method, str(request.url)) == ("POST", f"https://sso.example/base/v1/sso_tokens{path}")
    assert request.headers["authorization"] == f"Bearer {API_TOKEN}"
    assert request.headers["content-type"] == "application/json"
    assert httpx.Response(200, content=request.content).json() == given


@pytest.mark.parametrize(
    ("studio_url", "expected"),
    [
        ("https://studio.example", "https://studio.example?sso=T"),
        ("https://studio.example/", "https://studio.example/?sso=T"),
        (STUDIO, f"{STUDIO}?sso=T"),
        (f"{STUDIO}?", f"{STUDIO}?sso=T"),
        (f"{STUDIO}?a=1", f"{STUDIO}?a=1&sso=T"),
        (f"{STUDIO}?a=1&", f"{STUDIO}?a=1&&sso=T"),
        (f"{STUDIO}#top", f"{STUDIO}?sso=T#top"),
        (f"{STUDIO}?a=1#top?sso=2", f"{STUDIO}?a=1&sso=T#top?sso=2"),
        (f"{STUDIO}?b=%2F+%zz&a&a=;sso=1#", f"{STUDIO}?b=%2F+%zz&a&a=;sso=1&sso=T#"),
        (f"{STUDIO}?xsso=1&SSO=2&q=sso%3D3", f"{STUDIO}?xsso=1&SSO=2&q=sso%3D3&sso=T"),
        ("HTTP://Studio.Example:8080/büro?ä=ö", "HTTP://Studio.Example:8080/büro?ä=ö&sso=T"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x?sso=T"),
    ],
)
async def test_a_login_url_is_the_studio_url_with_a_parameter_more(kind: Kind, studio_url: str, expected: str) -> None:
    wire = Wire((201, b'{"token":"T","user_created":false}'))
    assert await call(kind, "login_url", studio_url=studio_url, transport=wire, **JANE) == expected


@pytest.mark.parametrize(
    "studio_url",
    [
        "",
        PAGE,
        f"//studio.example{PAGE}",
        "studio.example/x",
        "ftp://studio.example/x",
        "javascript://studio.example/%0aalert(1)",
        "https:/x",
        "https:///evil.example/x",
        "https://",
        "https://:443/x",
        "https://studio.example:port/x",
        "https://[::1/x",
        # What is before the @ is what people see, and what is behind it gets the token.
        "https://studio.example@evil.example/x",
        "https://evil.example\\@studio.example/x",
        "https://evil.example\\.studio.example/x",
        " https://studio.example/x",
        "https://studio.example/x y",
        "https://studio.example/x\r\nSet-Cookie: a=b",
        "https://stu\tdio.example/x",
        f"{STUDIO}?sso=1",
        f"{STUDIO}?a=1&sso",
        f"{STUDIO}?%73so=1#top",
        f"{STUDIO}?s%73%6F=",
    ],
)
async def test_what_is_no_studio_url_is_refused_before_a_token_is_made(kind: Kind, studio_url: str) -> None:
    wire = Wire((201, CREATED))
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        await call(kind, "login_url", studio_url=studio_url, transport=wire, **JANE)
    assert wire.requests == []


@pytest.mark.parametrize(
    "settings",
    [
        {"service_url": "sso.example"},
        {"service_url": "/v1"},
        {"service_url": "ftp://sso.example"},
        {"service_url": "https://"},
        {"service_url": "https://user:pass@sso.example"},
        {"service_url": "https://sso.example?a=1"},
        {"service_url": "https://sso.example?"},
        {"service_url": "https://sso.example/#a"},
        {"service_url": "https://sso.example:port"},
        {"service_url": "https://sso.example\n"},
        {"api_token": ""},
        {"api_token": f"{API_TOKEN}\n"},
        {"api_token": f"{API_TOKEN}\r\nX: y"},
        {"api_token": f"{API_TOKEN}ü"},
        {"timeout": 0},
        {"retry_for": -1},
    ],
)
def test_a_client_that_cannot_work_is_refused_at_once(kind: Kind, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        kind(**{"service_url": SERVICE_URL, "api_token": API_TOKEN, **settings})
    assert API_TOKEN not in str(caught.value)
    assert "pass" not in str(caught.value)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_json", SSOError),
        (404, "not_found", SSOError),
        (405, "method_not_allowed", SSOError),
        (413, "payload_too_large", SSOError),
        (418, "of a later version", SSOError),
        # Not known to have been done, and not known not to.
        (500, "internal_error", OutcomeUnknown),
        (503, "of a later version", OutcomeUnknown),
        (503, "outcome_unknown", OutcomeUnknown),
        (503, "unavailable", Unavailable),
        (503, "overloaded", Unavailable),
    ],
)
async def test_an_error_says_what_the_service_said(
    kind: Kind, status: int, code: str, expected: type[SSOError]
) -> None:
    wire = Wire((status, told(code, field="email"), {"Retry-After": "7"}))
    error = await error_of(call(kind, "consume", token=TOKEN, transport=wire))
    assert type(error) is expected
    assert (error.code, error.status, error.message) == (code, status, "So it is.")
    assert (error.details, error.retry_after) == ({"field": "email"}, 7.0)
    assert str(error) == f"So it is. ({code})"
    assert len(wire.requests) == 1


@pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "1e3", "0x7", "Fri, 31 Dec 1999 23:59:59 GMT"])
async def test_a_retry_after_that_is_no_number_of_seconds_is_ignored(kind: Kind, value: str) -> None:
    wire = Wire((503, told("unavailable"), {"Retry-After": value}))
    error = await error_of(call(kind, "verify", token=TOKEN, transport=wire))
    assert (type(error), error.retry_after) == (Unavailable, None)


NOT_OURS = [
    (200, b"<html>Welcome to the proxy</html>"),
    (200, b""),
    (200, b"null"),
    (200, b"[]"),
    (200, b"{}"),
    (200, b'{"user":1}'),
    (200, b"\xff\xfe"),
    (200, b"[" * 100_000),
    (201, b'{"token":'),
    (204, b""),
    (301, b"", {"Location": "https://evil.example/"}),
    (302, b"<html>Log in first</html>", {"Location": "https://login.example/"}),
    (307, b"", {"Location": "https://evil.example/"}),
    (308, b"", {"Location": "/v1/sso_tokens"}),
    (304, b""),
    (401, b"<html>Who are you?</html>"),
    (403, b'{"error":"forbidden"}'),
    (404, b'{"error":{"code":404,"message":"no"}}'),
    (407, b'{"error":{"code":"proxy"}}'),
    (500, b'{"error":{"code":"a","message":"b","details":[]}}'),
    (500, b'{"error":{"code":"\xff","message":"b"}}'),
    (500, b'{"error":{"code":"\\ud800","message":"b"}}'),
    (500, b'{"error":' * 100_000),
    (502, b"<html>Bad gateway</html>"),
    (504, b"<html>Gateway time-out</html>", {"Retry-After": "3"}),
]


@pytest.mark.parametrize("reply", NOT_OURS)
@pytest.mark.parametrize("method", [CREATE, *NEVER_REPEATED])
async def test_an_answer_that_is_not_the_services_is_told_as_such(kind: Kind, method: Method, reply: Reply) -> None:
    name, given, _ = method
    wire = Wire(reply)
    error = await error_of(call(kind, name, transport=wire, retry_for=0, **given))
    assert isinstance(reply, tuple)
    assert (type(error), error.code, error.status) == (UnexpectedAnswer, "unexpected_answer", reply[0])
    assert isinstance(error, OutcomeUnknown)  # what passed it on, and how far, nobody knows
    # Redirects are not followed: nobody else gets the API token.
    assert [request.url.host for request in wire.requests] == ["sso.example"]


# --- what is repeated ------------------------------------------------------------------------------------------------

AWAY = [
    (503, told("unavailable"), {"Retry-After": "0"}),
    (503, told("overloaded"), {"Retry-After": "0"}),
    (503, told("outcome_unknown"), {"Retry-After": "0"}),
    (502, b"<html>Bad gateway</html>"),
    (503, b"<html>Down</html>"),
    (504, b"<html>Gateway time-out</html>"),
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("slow"),
    httpx.PoolTimeout("slow"),
    httpx.ReadTimeout("slow"),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("gone"),
]


@pytest.mark.parametrize(
    ("method", "reply"), [*((CREATE, reply) for reply in AWAY), (LOGIN_URL, AWAY[0]), (LOGIN_URL, AWAY[-1])], ids=repr
)
async def test_creating_is_repeated_while_the_service_is_away(kind: Kind, method: Method, reply: Reply) -> None:
    name, given, answer = method
    wire = Wire(reply, answer)
    result = await call(kind, name, transport=wire, **given)
    assert TOKEN in (result.token if isinstance(result, Created) else result)
    assert len(wire.requests) == 2
    assert wire.requests[0].content == wire.requests[1].content


@pytest.mark.parametrize("reply", AWAY, ids=repr)
@pytest.mark.parametrize("method", NEVER_REPEATED)
async def test_nothing_else_is_ever_repeated(kind: Kind, method: Method, reply: Reply) -> None:
    name, given, answer = method
    wire = Wire(reply, answer)
    assert isinstance(await error_of(call(kind, name, transport=wire, **given)), Unavailable | OutcomeUnknown)
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    "reply", [(401, told("missing_token")), (422, told("parameter_invalid")), (500, told("internal_error"))]
)
async def test_creating_is_not_repeated_when_that_would_not_help(kind: Kind, reply: Reply) -> None:
    wire = Wire(reply, CREATE[2])
    await error_of(call(kind, "create_token", transport=wire, **JANE))
    assert len(wire.requests) == 1


@pytest.mark.slow
async def test_creating_waits_as_long_as_the_service_asks(kind: Kind) -> None:
    wire = Wire((503, told("unavailable"), {"Retry-After": "1"}), CREATE[2])
    await call(kind, "create_token", transport=wire, **JANE)
    first, second = wire.times
    assert 1 <= second - first < 2.5


@pytest.mark.parametrize("seconds", ["10", "3600", "999999999"])
async def test_who_is_asked_to_wait_for_too_long_is_told_so_at_once(kind: Kind, seconds: str) -> None:
    wire = Wire((503, told("unavailable"), {"Retry-After": seconds}), CREATE[2])
    started = time.monotonic()
    error = await error_of(call(kind, "create_token", transport=wire, **JANE))
    assert (type(error), error.retry_after) == (Unavailable, float(seconds))
    assert time.monotonic() - started < 1
    assert len(wire.requests) == 1


@pytest.mark.slow
async def test_creating_gives_up_in_time_and_does_not_hammer(kind: Kind) -> None:
    wire = Wire((503, told("unavailable"), {"Retry-After": "0"}))
    started = time.monotonic()
    error = await error_of(call(kind, "create_token", transport=wire, retry_for=1, **JANE))
    assert type(error) is Unavailable
    assert time.monotonic() - started < 1.5
    assert 3 < len(wire.requests) <= 11


@pytest.mark.slow
async def test_waits_differ_so_that_clients_do_not_come_back_together() -> None:
    waits = set[float]()
    for _ in range(8):
        wire = Wire((503, told("unavailable"), {"Retry-After": "0"}), CREATE[2])
        await call(AsyncSSOClient, "create_token", transport=wire, **JANE)
        waits.add(round(wire.times[1] - wire.times[0], 3))
    assert max(waits) - min(waits) > 0.005


# --- when there is no answer -----------------------------------------------------------------------------------------

NOT_SENT = [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError]
PERHAPS_SENT = [
    httpx.ReadTimeout,
    httpx.WriteTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
    httpx.LocalProtocolError,
    httpx.DecodingError,
]


@pytest.mark.parametrize("failure", [*NOT_SENT, *PERHAPS_SENT])
@pytest.mark.parametrize("method", [CREATE, *NEVER_REPEATED])
async def test_what_may_have_been_done_once_is_said_to_be_unknown(
    kind: Kind, method: Method, failure: type[httpx.HTTPError]
) -> None:
    name, given, _ = method
    error = await error_of(call(kind, name, transport=Wire(failure("so it is")), retry_for=0, **given))
    expected = OutcomeUnknown if method in ONCE and failure in PERHAPS_SENT else Unavailable
    assert (type(error), error.status) == (expected, None)


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def stops_in_the_middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")


async def talks_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@pytest.mark.parametrize("talk", [says_nothing, hangs_up, stops_in_the_middle, talks_nonsense])
@pytest.mark.parametrize("method", [CREATE, *NEVER_REPEATED], ids=lambda method: method[0])
async def test_a_server_that_does_not_answer_leaves_the_outcome_unknown(kind: Kind, method: Method, talk: Talk) -> None:
    name, given, _ = method
    async with listening(talk) as (url, got):
        error = await error_of(call(kind, name, url, timeout=0.2, retry_for=0, **given))
    assert type(error) is (OutcomeUnknown if method in ONCE else Unavailable)
    assert len(got) == 1


async def test_without_a_connection_nothing_was_done(kind: Kind) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for name, given, _ in ONCE:
        assert type(await error_of(call(kind, name, url, **given))) is Unavailable
    started = time.monotonic()
    assert type(await error_of(call(kind, "create_token", url, retry_for=0.5, **JANE))) is Unavailable
    assert time.monotonic() - started < 1


@pytest.mark.slow
async def test_time_outs_count_into_the_time_for_repeating(kind: Kind) -> None:
    async with listening(says_nothing) as (url, got):
        started = time.monotonic()
        error = await error_of(call(kind, "create_token", url, timeout=0.8, retry_for=1, **JANE))
        assert time.monotonic() - started < 1.4
    assert type(error) is Unavailable
    assert len(got) == 2


async def test_a_service_with_a_certificate_of_a_private_authority_needs_to_be_trusted(kind: Kind) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\nConnection: close\r\n\r\n" + b'{"revoked":true}')
        await writer.drain()

    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    async with listening(answers, tls=server) as (url, got):
        assert type(await error_of(call(kind, "revoke", url, token=TOKEN))) is Unavailable
        assert got == []
        assert await call(kind, "revoke", url, token=TOKEN, ssl_context=client) is True


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        (401, told("missing_token")),
        (410, told("token_consumed")),
        (503, told("unavailable")),
        (200, b"You sent: " + TOKEN.encode() + API_TOKEN.encode()),
        (302, b"", {"Location": f"https://login.example/?next={TOKEN}"}),
        (500, f'{{"error":"{TOKEN}{API_TOKEN}"}}'.encode()),
        httpx.ReadTimeout("slow"),
        httpx.ConnectError("refused"),
    ],
)
async def test_neither_token_is_in_what_is_printed_or_logged_of_an_error(
    kind: Kind, reply: Reply, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for method in (CONSUME, CREATE):
        error = await error_of(call(kind, method[0], transport=Wire(reply), retry_for=0, **method[1]))
        whole = "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))
        for text in (whole, str(error), repr(error), repr(vars(error)), caplog.text):
            assert TOKEN not in text
            assert API_TOKEN not in text


def test_what_is_printed_of_a_client_or_a_result_has_no_secret_in_it(kind: Kind) -> None:
    client = kind(SERVICE_URL, API_TOKEN)
    assert repr(client) == f"{kind.__name__}('{SERVICE_URL}')"
    assert API_TOKEN not in repr(vars(client))
    assert TOKEN not in repr(Created(TOKEN, True))
    assert TOKEN not in f"{[Created(TOKEN, True)]}"
