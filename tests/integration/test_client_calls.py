"""The Python client against prepared responses: requests, results, errors, retries and secrets."""

import asyncio
import logging
import pickle
import ssl
import traceback
from typing import Any

import httpx
import pytest
import trustme

from scripts.tools.ports import free_port
from sso_service.client import (
    AsyncSSOClient,
    Created,
    OutcomeUnknown,
    SSOClient,
    SSOError,
    Unavailable,
    UnexpectedAnswer,
)
from tests.support.data import JANE, PAGE
from tests.support.python_client import API_TOKEN, FORGED, SERVICE_URL, Kind, call, error_of
from tests.support.waiting import Stopwatch
from tests.support.wire import Reply, Responder, Wire, error_body, listening, never_responds

pytestmark = pytest.mark.anyio

STUDIO = f"https://studio.example{PAGE}"
LOGIN = (
    b'{"active":true,"ref":"a9dcb9261b47","user":{"id":3,"email":"jane.doe@example.com","first_name":"Jane",'
    b'"last_name":"Doe"},"account_id":123,"role":"editor","permissions":["posts:edit"],"expires_at":1900000000}'
)
CREATED = b'{"token":"%s","user_created":false}' % FORGED.encode()

# Each method: its name, its arguments, and the response in the good case.
CREATE = ("create_token", JANE, (201, CREATED))
LOGIN_URL = ("login_url", {"studio_url": STUDIO, **JANE}, (201, CREATED))
VERIFY = ("verify", {"token": FORGED}, (200, LOGIN))
CONSUME = ("consume", {"token": FORGED}, (200, LOGIN))
REVOKE = ("revoke", {"token": FORGED}, (200, b'{"revoked":true}'))
ONCE = [CONSUME, REVOKE]
NEVER_RETRIED = [VERIFY, *ONCE]
Method = tuple[str, dict[str, Any], tuple[int, bytes]]


@pytest.fixture(params=[SSOClient, AsyncSSOClient])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Both clients in turn: they make the same promises."""
    client: Kind = request.param
    return client


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CREATE, VERIFY, CONSUME, REVOKE])
async def test_each_method_posts_json_with_the_api_token(kind: Kind, method: Method) -> None:
    name, arguments, answer = method
    wire = Wire(answer)
    await call(kind, name, "https://sso.example/base/", transport=wire, **arguments)
    (request,) = wire.requests
    path = {"create_token": ""}.get(name, f"/{name}")
    assert (request.method, str(request.url)) == ("POST", f"https://sso.example/base/v1/sso_tokens{path}")
    assert request.headers["authorization"] == f"Bearer {API_TOKEN}"
    assert request.headers["content-type"] == "application/json"
    assert httpx.Response(200, content=request.content).json() == arguments


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
        ("HTTPS://Studio.Example:8080/büro?ä=ö", "HTTPS://Studio.Example:8080/büro?ä=ö&sso=T"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x?sso=T"),
    ],
)
async def test_a_login_url_is_the_studio_url_with_one_more_parameter(
    kind: Kind, studio_url: str, expected: str
) -> None:
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
        "http://studio.example/x",
        "http://localhost.studio.example/x",
        "http://10.0.0.1/x",
        "javascript://studio.example/%0aalert(1)",
        "https:/x",
        "https:///evil.example/x",
        "https://",
        "https://:443/x",
        "https://studio.example:port/x",
        "https://[::1/x",
        # People read the host before the @, but the host after it would get the token.
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
async def test_an_invalid_studio_url_is_refused_before_a_token_is_created(kind: Kind, studio_url: str) -> None:
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
        {"service_url": "http://sso.example"},
        {"service_url": "HTTP://SSO.example:8000/"},
        {"service_url": "http://10.0.0.1:8000"},
        {"service_url": "http://0.0.0.0:8000"},
        {"service_url": "http://[fe80::1]:8000"},
        {"service_url": "http://localhost.example"},
        {"service_url": "http://127.0.0.1.example"},
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
def test_invalid_settings_of_a_client_are_refused_at_once(kind: Kind, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        kind(**{"service_url": SERVICE_URL, "api_token": API_TOKEN, **settings})
    assert API_TOKEN not in str(caught.value)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "sso.localhost", "127.0.0.1", "127.8.9.1", "[::1]"])
async def test_http_is_accepted_for_loopback(kind: Kind, host: str) -> None:
    wire = Wire((201, b'{"token":"T","user_created":false}'))
    url = f"http://{host}:8000"
    assert await call(kind, "login_url", url=url, studio_url=f"{url}/x", transport=wire, **JANE)


async def test_http_is_accepted_elsewhere_only_if_it_is_allowed(kind: Kind) -> None:
    wire = Wire((201, b'{"token":"T","user_created":false}'))
    urls = {"url": "http://sso.example", "studio_url": "http://studio.example/x"}
    with pytest.raises(ValueError, match="allow_http=True"):
        await call(kind, "login_url", transport=wire, **urls, **JANE)
    assert wire.requests == []
    assert (
        await call(kind, "login_url", allow_http=True, transport=wire, **urls, **JANE) == f"{urls['studio_url']}?sso=T"
    )


# --- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_json", SSOError),
        (404, "not_found", SSOError),
        (405, "method_not_allowed", SSOError),
        (413, "payload_too_large", SSOError),
        (418, "of a later version", SSOError),
        # The operation may have been done or not.
        (500, "internal_error", OutcomeUnknown),
        (503, "of a later version", OutcomeUnknown),
        (503, "outcome_unknown", OutcomeUnknown),
        (503, "unavailable", Unavailable),
        (503, "overloaded", Unavailable),
    ],
)
async def test_an_error_has_the_fields_of_the_response(
    kind: Kind, status: int, code: str, expected: type[SSOError]
) -> None:
    wire = Wire((status, error_body(code, field="email"), {"Retry-After": "7"}))
    error = await error_of(call(kind, "consume", token=FORGED, transport=wire))
    assert type(error) is expected
    assert (error.code, error.status, error.message) == (code, status, "Some reason.")
    assert (error.details, error.retry_after) == ({"field": "email"}, 7.0)
    assert str(error) == f"Some reason. ({code})"
    assert len(wire.requests) == 1


@pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "1e3", "0x7", "Fri, 31 Dec 1999 23:59:59 GMT"])
async def test_a_retry_after_that_is_not_in_seconds_is_ignored(kind: Kind, value: str) -> None:
    wire = Wire((503, error_body("unavailable"), {"Retry-After": value}))
    error = await error_of(call(kind, "verify", token=FORGED, transport=wire))
    assert (type(error), error.retry_after) == (Unavailable, None)


NOT_FROM_THE_SERVICE = [
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


@pytest.mark.parametrize("reply", NOT_FROM_THE_SERVICE)
@pytest.mark.parametrize("method", [CREATE, *NEVER_RETRIED])
async def test_a_response_from_elsewhere_is_reported_as_unexpected(kind: Kind, method: Method, reply: Reply) -> None:
    name, arguments, _ = method
    wire = Wire(reply)
    error = await error_of(call(kind, name, transport=wire, retry_for=0, **arguments))
    assert isinstance(reply, tuple)
    assert (type(error), error.code, error.status) == (UnexpectedAnswer, "unexpected_answer", reply[0])
    assert isinstance(error, OutcomeUnknown)  # a proxy may have passed the request on to the service
    # Redirects are not followed, so no other host gets the API token.
    assert [request.url.host for request in wire.requests] == ["sso.example"]


# --- retries ---------------------------------------------------------------------------------------------------------

UNAVAILABLE = [
    (503, error_body("unavailable"), {"Retry-After": "0"}),
    (503, error_body("overloaded"), {"Retry-After": "0"}),
    (503, error_body("outcome_unknown"), {"Retry-After": "0"}),
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
    ("method", "reply"),
    [*((CREATE, reply) for reply in UNAVAILABLE), (LOGIN_URL, UNAVAILABLE[0]), (LOGIN_URL, UNAVAILABLE[-1])],
    ids=repr,
)
async def test_creating_is_retried_while_the_service_is_unavailable(kind: Kind, method: Method, reply: Reply) -> None:
    name, arguments, answer = method
    wire = Wire(reply, answer)
    result = await call(kind, name, transport=wire, **arguments)
    assert FORGED in (result.token if isinstance(result, Created) else result)
    assert len(wire.requests) == 2
    assert wire.requests[0].content == wire.requests[1].content


@pytest.mark.parametrize("reply", UNAVAILABLE, ids=repr)
@pytest.mark.parametrize("method", NEVER_RETRIED)
async def test_verifying_consuming_and_revoking_are_never_retried(kind: Kind, method: Method, reply: Reply) -> None:
    name, arguments, answer = method
    wire = Wire(reply, answer)
    assert isinstance(await error_of(call(kind, name, transport=wire, **arguments)), Unavailable | OutcomeUnknown)
    assert len(wire.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [(401, error_body("missing_token")), (422, error_body("parameter_invalid")), (500, error_body("internal_error"))],
)
async def test_creating_is_not_retried_after_a_permanent_error(kind: Kind, reply: Reply) -> None:
    wire = Wire(reply, CREATE[2])
    await error_of(call(kind, "create_token", transport=wire, **JANE))
    assert len(wire.requests) == 1


@pytest.mark.slow
async def test_creating_waits_for_the_seconds_in_retry_after(kind: Kind) -> None:
    wire = Wire((503, error_body("unavailable"), {"Retry-After": "1"}), CREATE[2])
    await call(kind, "create_token", transport=wire, **JANE)
    first, second = wire.times
    assert 1 <= second - first < 10


@pytest.mark.parametrize("seconds", ["10", "3600", "999999999"])
async def test_a_retry_after_beyond_the_limit_is_an_error_at_once(kind: Kind, seconds: str) -> None:
    wire = Wire((503, error_body("unavailable"), {"Retry-After": seconds}), CREATE[2])
    started = Stopwatch()
    error = await error_of(call(kind, "create_token", transport=wire, **JANE))
    assert (type(error), error.retry_after) == (Unavailable, float(seconds))
    assert started.own_seconds < 8
    assert len(wire.requests) == 1


@pytest.mark.slow
async def test_creating_stops_in_time_with_few_attempts(kind: Kind) -> None:
    wire = Wire((503, error_body("unavailable"), {"Retry-After": "0"}))
    started = Stopwatch()
    error = await error_of(call(kind, "create_token", transport=wire, retry_for=1, **JANE))
    assert type(error) is Unavailable
    assert started.own_seconds < 8
    assert 1 < len(wire.requests) <= 11


async def test_clients_that_failed_together_retry_at_different_times() -> None:
    waits = set[float]()
    for _ in range(8):
        wire = Wire((503, error_body("unavailable"), {"Retry-After": "0"}), CREATE[2])
        await call(AsyncSSOClient, "create_token", transport=wire, **JANE)
        waits.add(round(wire.times[1] - wire.times[0], 3))
    assert max(waits) - min(waits) > 0.005


# --- no response -----------------------------------------------------------------------------------------------------

NOT_SENT = [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError]
POSSIBLY_SENT = [
    httpx.ReadTimeout,
    httpx.WriteTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
    httpx.LocalProtocolError,
    httpx.DecodingError,
]


@pytest.mark.parametrize("failure", [*NOT_SENT, *POSSIBLY_SENT])
@pytest.mark.parametrize("method", [CREATE, *NEVER_RETRIED])
async def test_without_a_response_the_outcome_of_a_sent_request_is_unknown(
    kind: Kind, method: Method, failure: type[httpx.HTTPError]
) -> None:
    name, arguments, _ = method
    error = await error_of(call(kind, name, transport=Wire(failure("some reason")), retry_for=0, **arguments))
    expected = OutcomeUnknown if method in ONCE and failure in POSSIBLY_SENT else Unavailable
    assert (type(error), error.status) == (expected, None)


async def disconnects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def stops_in_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")


async def speaks_another_protocol(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@pytest.mark.parametrize(
    "respond",
    [pytest.param(never_responds, marks=pytest.mark.slow), disconnects, stops_in_the_body, speaks_another_protocol],
)
@pytest.mark.parametrize("method", [CREATE, *NEVER_RETRIED], ids=lambda method: method[0])
async def test_a_failed_response_leaves_the_outcome_unknown(kind: Kind, method: Method, respond: Responder) -> None:
    name, arguments, _ = method
    timeout = 1 if respond is never_responds else 30  # only the first makes the client wait
    async with listening(respond) as (url, received):
        error = await error_of(call(kind, name, url, timeout=timeout, retry_for=0, **arguments))
    assert type(error) is (OutcomeUnknown if method in ONCE else Unavailable)
    assert len(received) == 1


async def test_without_a_connection_the_service_is_unavailable(kind: Kind) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for name, arguments, _ in ONCE:
        assert type(await error_of(call(kind, name, url, **arguments))) is Unavailable
    started = Stopwatch()
    assert type(await error_of(call(kind, "create_token", url, retry_for=0.5, **JANE))) is Unavailable
    assert started.own_seconds < 8


@pytest.mark.slow
async def test_time_outs_count_towards_the_limit_for_retries(kind: Kind) -> None:
    async with listening(never_responds) as (url, received):
        started = Stopwatch()
        error = await error_of(call(kind, "create_token", url, timeout=2, retry_for=2.6, **JANE))
        assert started.own_seconds < 3.8  # a second attempt with the whole time-out would end after 4 seconds
    assert type(error) is Unavailable
    assert len(received) == 2


async def test_a_proxy_of_the_environment_does_not_get_requests_for_loopback(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(never_responds) as (proxy, received):
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        url = f"http://127.0.0.1:{free_port()}"
        assert type(await error_of(call(kind, "consume", url, token=FORGED))) is Unavailable
        # A proxy in a network in which http is allowed is the operator's choice.
        await error_of(call(kind, "consume", "http://sso.example", token=FORGED, timeout=1, allow_http=True))
    assert [head.split(b"\r\n")[0] for head in received] == [b"POST http://sso.example/v1/sso_tokens/consume HTTP/1.1"]


async def test_a_certificate_of_a_private_authority_must_be_trusted(kind: Kind) -> None:
    async def responds(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\nConnection: close\r\n\r\n" + b'{"revoked":true}')
        await writer.drain()

    authority = trustme.CA()
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    async with listening(responds, tls=server) as (url, received):
        assert type(await error_of(call(kind, "revoke", url, token=FORGED))) is Unavailable
        assert received == []
        assert await call(kind, "revoke", url, token=FORGED, ssl_context=client) is True


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        (401, error_body("missing_token")),
        (410, error_body("token_consumed")),
        (503, error_body("unavailable")),
        (200, b"You sent: " + FORGED.encode() + API_TOKEN.encode()),
        (302, b"", {"Location": f"https://login.example/?next={FORGED}"}),
        (500, f'{{"error":"{FORGED}{API_TOKEN}"}}'.encode()),
        httpx.ReadTimeout("slow"),
        httpx.ConnectError("refused"),
    ],
)
async def test_errors_and_logs_contain_no_token(kind: Kind, reply: Reply, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for method in (CONSUME, CREATE):
        error = await error_of(call(kind, method[0], transport=Wire(reply), retry_for=0, **method[1]))
        whole = "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))
        for text in (whole, str(error), repr(error), repr(vars(error)), caplog.text):
            assert FORGED not in text
            assert API_TOKEN not in text


def test_the_printed_form_of_a_client_or_a_result_has_no_token(kind: Kind) -> None:
    client = kind(SERVICE_URL, API_TOKEN)
    assert repr(client) == f"{kind.__name__}('{SERVICE_URL}')"
    assert API_TOKEN not in repr(vars(client))
    assert FORGED not in repr(Created(FORGED, True))
    assert FORGED not in f"{[Created(FORGED, True)]}"
