"""Studio in a frame of the intranet (`SSO_EMBED_ORIGINS`), and API calls by its scripts (`SSO_CORS_ORIGINS`)."""

import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlencode

import pytest

from sso_service.database.transactions import Database
from sso_service.errors import SettingsError
from sso_service.settings import read_settings
from tests.support.api import LIMIT, VERIFY, bearer, encoded, make_api_token, node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import on_sqlite
from tests.support.outages import a_database_that
from tests.support.pages import MessagePage

pytestmark = pytest.mark.anyio

PORTAL = "https://portal.example"
INTRANET = "https://intranet.example:8443"
LOCAL = "http://localhost:3000"
ORIGINS = f"{PORTAL}, {INTRANET} {LOCAL}"

SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])


@pytest.fixture
def embedded(database_url: str, keys_dir: Path, clock: Clock) -> Iterator[Client]:
    """A browser and a service that `ORIGINS` may show in a frame."""
    with node(database_url, keys_dir, clock, SSO_EMBED_ORIGINS=ORIGINS) as client:
        yield client


@pytest.fixture
def confirming(database_url: str, keys_dir: Path, clock: Clock) -> Iterator[Client]:
    """The same with a service that asks for confirmation before each login."""
    with node(database_url, keys_dir, clock, SSO_EMBED_ORIGINS=ORIGINS, SSO_CONFIRM_LOGIN="1") as client:
        yield client


@pytest.fixture
def cors(database_url: str, keys_dir: Path, clock: Clock) -> Iterator[Client]:
    """A client of a service that scripts of `ORIGINS` may call."""
    with node(database_url, keys_dir, clock, SSO_CORS_ORIGINS=ORIGINS) as client:
        yield client


def cookie(answer: Answer, name: str) -> tuple[str, set[str]]:
    """Return the value and attributes of the only cookie in a response, which must have this name."""
    pair, *attributes = (answer.header("set-cookie") or "").split("; ")
    key, _, value = pair.partition("=")
    assert key == name
    assert len(attributes) == len(set(attributes))
    return value, set(attributes)


def policy(answer: Answer) -> dict[str, str]:
    """Return the directives of the page's Content-Security-Policy."""
    directives = [line.strip().split(" ", 1) for line in (answer.header("content-security-policy") or "").split(";")]
    found = dict(directives)
    assert len(found) == len(directives), "browsers use only the first of repeated directives"
    return found


async def pages(client: Client, api_token: str) -> list[Answer]:
    """Return one page of each kind: refused logins, a refused path, and the confirmation page."""
    used = await client.issue(api_token)
    await client.another().get(f"/?sso={used}")
    browser = client.another()
    await browser.get(f"/?sso={await client.issue(api_token, JOHN)}")
    unused = await client.issue(api_token)
    answers = [
        await client.another().get("/?sso=x"),
        await client.another().get(f"/?sso={used}"),
        await client.another().get(f"/client/999?sso={unused}"),
        await client.another().get(f"/a//b?sso={unused}"),
        await client.another().get(f"/?sso={unused}", sec_fetch_dest="image"),
        await client.request("POST", "/sso/confirm", headers=[("origin", "https://evil.example")]),
        await browser.get(f"{PAGE}?sso={unused}"),
    ]
    assert [answer.status for answer in answers] == [401, 401, 403, 400, 403, 403, 200]
    for answer in answers:
        MessagePage(answer.text)
    return answers


# --- settings --------------------------------------------------------------------------------------------------------

VARIABLES = pytest.mark.parametrize("variable", ["SSO_EMBED_ORIGINS", "SSO_CORS_ORIGINS"])

GOOD = [
    PORTAL,
    INTRANET,
    "https://a.b-c.example",
    "https://xn--bcher-kva.example",
    "https://192.0.2.1",
    "http://localhost",
    LOCAL,
    "http://127.0.0.1",
    "http://127.0.0.1:8000",
    "https://localhost:8443",
    f"{PORTAL} {INTRANET}",
    f"{PORTAL},{INTRANET}",
    f"{PORTAL}, {INTRANET}",
    f" {PORTAL} ,  {INTRANET},{LOCAL} ",
    ",".join(f"https://n{n}.example" for n in range(50)),
]

WRONG = [
    "*",
    "null",
    "portal.example",
    "//portal.example",
    "https:portal.example",
    "https:/portal.example",
    "https:",
    "https://",
    "https://:443",
    f"{PORTAL}/",
    f"{PORTAL}/start",
    f"{PORTAL}?",
    f"{PORTAL}?a=b",
    f"{PORTAL}#",
    f"{PORTAL}#a",
    "https://user@portal.example",
    "https://user:hunter2@portal.example",
    "https://*.example",
    "https://*",
    "https://portal.example:",
    "https://portal.example:*",
    "https://portal.example:x",
    "https://portal.example:0x1bb",
    "https://portal.example:99999",
    "https://portal.example:-1",
    "https://portal .example",
    "https://b\u00fccher.example",
    "https://port%61l.example",
    "https://portal_.example/..",
    "https://portal.example\\@evil.example",
    "https://portal.example;script-src *",
    f"{PORTAL};",
    f"'self' {PORTAL}",
    "'none'",
    "'unsafe-inline'",
    "http://portal.example",
    "http://192.0.2.1",
    "http://localhost.example",
    "http://127.0.0.1.example",
    "http://notlocalhost",
    "http://localhost/",
    "http://localhost@evil.example",
    "ftp://portal.example",
    "wss://portal.example",
    "javascript:alert(1)",
    "data:text/html,x",
    f"{PORTAL};{INTRANET}",
    f"{PORTAL}|{INTRANET}",
    f'"{PORTAL}"',
    f"{PORTAL}\0",
    f"{PORTAL}\r\nX-Evil: 1",
    f"{PORTAL}\x7f",
    f"{PORTAL} http://portal.example",
    f"{PORTAL},portal.example",
    f"*,{PORTAL}",
]


def error_of(variable: str, value: str) -> SettingsError | None:
    """Return the error for a setting, or None if it is valid."""
    try:
        read_settings({variable: value})
    except SettingsError as error:
        return error
    return None


@VARIABLES
def test_origins_are_separated_by_spaces_or_commas(variable: str) -> None:
    assert read_settings({variable: ""}) == read_settings({})
    for value in GOOD:
        assert read_settings({variable: value}) != read_settings({}), value


@VARIABLES
def test_an_invalid_origin_is_an_error_that_names_the_variable(variable: str) -> None:
    errors = {value: error_of(variable, value) for value in WRONG}
    assert [value for value, error in errors.items() if error is None] == []
    for error in errors.values():
        assert variable in str(error)
        assert "hunter2" not in "".join(traceback.format_exception(error))


# --- frames ----------------------------------------------------------------------------------------------------------

CROSS_SITE = {"HttpOnly", "Path=/", "SameSite=None", "Secure", "Partitioned"}


@on_sqlite
@SCHEMES
async def test_an_embedded_session_cookie_is_cross_site_and_partitioned(
    embedded: Client, api_token: str, scheme: str
) -> None:
    """Browsers reject SameSite=None without Secure, so Secure is set even where a proxy hides that TLS is used."""
    embedded.scheme = scheme
    answer = await embedded.get(f"{PAGE}?sso={await embedded.issue(api_token)}")
    value, attributes = cookie(answer, "studio_session")
    assert value
    assert attributes == {*CROSS_SITE, "Max-Age=43200"}
    assert (await embedded.get("/session")).status == 200

    signed_out = await embedded.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")])
    value, attributes = cookie(signed_out, "studio_session")
    assert (signed_out.status, value) == (204, "")
    assert attributes == {*CROSS_SITE, "Max-Age=0"}


@on_sqlite
@SCHEMES
async def test_an_embedded_form_cookie_is_cross_site_and_partitioned(
    confirming: Client, api_token: str, scheme: str
) -> None:
    confirming.scheme = scheme
    answer = await confirming.get(f"{PAGE}?sso={await confirming.issue(api_token)}")
    value, attributes = cookie(answer, "studio_form")
    assert len(value) > 20
    assert attributes == {*CROSS_SITE, "Max-Age=300"}


@on_sqlite
@SCHEMES
async def test_cookies_are_same_site_by_default(client: Client, api_token: str, scheme: str) -> None:
    client.scheme = scheme
    expected = {"HttpOnly", "Path=/", "SameSite=Lax"} | ({"Secure"} if scheme == "https" else set())
    answer = await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    assert cookie(answer, "studio_session")[1] == {*expected, "Max-Age=43200"}
    question = await client.get(f"/?sso={await client.issue(api_token, JOHN)}")
    assert cookie(question, "studio_form")[1] == {*expected, "Max-Age=300"}
    signed_out = await client.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")])
    assert cookie(signed_out, "studio_session") == ("", {*expected, "Max-Age=0"})


@on_sqlite
async def test_only_allowed_origins_can_frame_pages(embedded: Client, client: Client, api_token: str) -> None:
    framed, unframed = await pages(embedded, api_token), await pages(client, api_token)
    for with_setting, without in zip(framed, unframed, strict=True):
        assert (
            with_setting.header("x-frame-options") is None
        )  # it cannot list origins, and would block the allowed ones
        assert set(policy(with_setting)["frame-ancestors"].split()) == {PORTAL, INTRANET, LOCAL}
        assert without.header("x-frame-options") == "DENY"
        assert policy(without)["frame-ancestors"] == "'none'"
        assert {**policy(with_setting), "frame-ancestors": "'none'"} == policy(without)


FRAMELESS = ["frame", "embed", "object", "fencedframe", "image", "empty", "script", "nonsense", "", "iframe, document"]


@on_sqlite
async def test_only_a_navigation_in_an_allowed_frame_consumes(embedded: Client, api_token: str) -> None:
    token = await embedded.issue(api_token)
    iframe = ("sec-fetch-dest", "iframe")
    for method, headers, status in (
        *(("GET", [("sec-fetch-dest", destination)], 403) for destination in FRAMELESS),
        ("GET", [iframe, ("sec-fetch-dest", "image")], 403),
        ("GET", [iframe, ("sec-purpose", "prefetch")], 503),
        ("HEAD", [iframe], 200),
        ("OPTIONS", [iframe], 204),
    ):
        answer = await embedded.request(method, f"{PAGE}?sso={token}", headers=headers)
        assert answer.status == status, headers
        assert answer.header("set-cookie") is None
        assert answer.header("location") is None
    in_frame = {"sec_fetch_dest": "iframe", "sec_fetch_mode": "navigate", "sec_fetch_site": "cross-site"}
    answer = await embedded.get(f"{PAGE}?sso={token}", **in_frame)
    assert (answer.status, answer.header("location")) == (303, PAGE)
    assert cookie(answer, "studio_session")[0]

    other = await embedded.issue(api_token)
    answer = await embedded.another().get(f"{PAGE}?sso={other}", sec_fetch_dest="document")
    assert answer.status == 303


@on_sqlite
async def test_a_frame_consumes_nothing_by_default(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for destination in ("iframe", *FRAMELESS):
        answer = await client.get(f"{PAGE}?sso={token}", sec_fetch_dest=destination, accept="application/json")
        assert (answer.status, answer.error) == (403, "not_a_navigation"), destination
        assert answer.header("set-cookie") is None
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303


@on_sqlite
async def test_a_login_can_be_confirmed_in_a_frame(confirming: Client, api_token: str) -> None:
    token = await confirming.issue(api_token)
    question = await confirming.get(f"{PAGE}?chromeless=1&sso={token}", sec_fetch_dest="iframe")
    fields = MessagePage(question.text).fields
    body = urlencode(fields).encode()
    form = [("content-type", "application/x-www-form-urlencoded"), ("sec-fetch-dest", "iframe")]
    for origin in (PORTAL, INTRANET, "null", "https://evil.example"):
        # An origin that may frame the page still may not submit its form.
        answer = await confirming.request("POST", "/sso/confirm", headers=[*form, ("origin", origin)], body=body)
        assert answer.status == 403, origin
        assert answer.header("set-cookie") is None
    site = ("sec-fetch-site", "same-origin")
    answer = await confirming.request("POST", "/sso/confirm", headers=[*form, site], body=body)
    assert (answer.status, answer.header("location")) == (303, f"{PAGE}?chromeless=1")
    assert cookie(answer, "studio_session")[1] >= CROSS_SITE


@on_sqlite
async def test_an_embedding_origin_cannot_sign_out(embedded: Client, api_token: str) -> None:
    await embedded.get(f"{PAGE}?sso={await embedded.issue(api_token)}")
    for headers in (
        [("origin", PORTAL)],
        [("origin", LOCAL)],
        [("origin", "null")],
        [("sec-fetch-site", "cross-site")],
        [("origin", PORTAL), ("sec-fetch-site", "cross-site")],
        [],
    ):
        assert (await embedded.request("POST", "/logout", headers=headers)).status == 403, headers
    assert (await embedded.get("/session")).status == 200


CHROMELESS = [
    ("chromeless=1&sso=T", "?chromeless=1"),
    ("sso=T&chromeless=1", "?chromeless=1"),
    ("chromeless=true&hide=nav,footer&sso=T&lang=de", "?chromeless=true&hide=nav,footer&lang=de"),
    ("chromeless&sso=T", "?chromeless"),
    ("a=%20b&chromeless=1&sso=T&chromeless=%31", "?a=%20b&chromeless=1&chromeless=%31"),
]


@on_sqlite
async def test_chromeless_parameters_survive_the_redirect(embedded: Client, api_token: str) -> None:
    for query, kept in CHROMELESS:
        token = await embedded.issue(api_token)
        target = f"{PAGE}?{query.replace('T', token, 1)}"
        answer = await embedded.another().get(target, sec_fetch_dest="iframe")
        assert (answer.status, answer.header("location")) == (303, PAGE + kept)


# --- cross-origin scripts --------------------------------------------------------------------------------------------

API = ["/v1/sso_tokens", "/v1/sso_tokens/verify", "/v1/sso_tokens/consume", "/v1/sso_tokens/revoke"]
PREFLIGHT = [
    ("access-control-request-method", "POST"),
    ("access-control-request-headers", "authorization,content-type"),
]
OTHERS = [
    "https://evil.example",
    "https://portal.example.evil.example",
    "https://evil-portal.example",
    "https://sub.portal.example",
    "http://portal.example",
    "https://portal.example:8443",
    "https://intranet.example",
    "http://localhost",
    "http://localhost:3001",
    "https://localhost:3000",
    "null",
    "*",
    "",
    f"{PORTAL}/",
    f"{PORTAL} {INTRANET}",
    f"{PORTAL}, https://evil.example",
    "portal.example",
]


def cors_headers(answer: Answer) -> dict[str, str]:
    """Return the CORS headers of a response."""
    found = {name: value for name, value in answer.headers if name.startswith("access-control-")}
    for name in found:
        answer.header(name)  # fails if it occurs twice
    return found


def listed(value: str | None) -> set[str]:
    return {item.strip().lower() for item in (value or "").split(",")}


def is_readable_by(answer: Answer, origin: str) -> bool:
    """Return whether scripts of `origin`, and of no other, may read the response, without credentials."""
    found = cors_headers(answer)
    assert "access-control-allow-credentials" not in found
    if "access-control-allow-origin" not in found:  # browsers hide such a response from scripts
        return False
    assert found["access-control-allow-origin"] == origin
    assert "origin" in listed(answer.header("vary"))
    return True


async def api_answers(client: Client, api_token: str, verifier: str, origin: str) -> list[Answer]:
    """Return one API response of each status, requested by a script of `origin`."""

    async def send(method: str, target: str, body: bytes = b"{}", secret: str | None = api_token) -> Answer:
        headers: Sequence[tuple[str, str]] = [("origin", origin), *(bearer(secret) if secret else [])]
        return await client.request(method, target, headers=headers, body=body)

    token = await client.issue(api_token)
    body = json.dumps({"token": token}).encode()
    return [
        await send("POST", API[0], encoded(JANE)),
        await send("POST", API[1], body, verifier),
        await send("POST", API[2], body, verifier),
        await send("POST", API[2], body, verifier),  # gone
        await send("POST", API[3], body),
        await send("POST", API[0], b"x"),
        await send("POST", API[0], encoded(JANE), "x"),
        await send("POST", API[1], body, None),
        await send("POST", API[0], encoded(JANE), verifier),
        await send("POST", API[3], body, verifier),
        await send("POST", "/v1/unknown"),
        await send("GET", "/v1/sso_tokens/unknown"),
        await send("GET", API[0]),
        await send("DELETE", API[2]),
        await send("POST", API[0], b"x" * (LIMIT + 1)),
        await send("POST", API[0]),
        await send("POST", API[3], b'{"token": 5}'),
    ]


STATUSES = [201, 200, 200, 410, 200, 400, 401, 401, 403, 403, 404, 404, 405, 405, 413, 422, 422]


@pytest.fixture
def api_tokens(api_token: str, database: Database) -> tuple[str, str]:
    """The secrets of an API token that issues and of one that verifies."""
    return api_token, make_api_token(database, scopes=VERIFY)[1]


@on_sqlite
async def test_allowed_origins_can_read_every_api_response_and_error(cors: Client, api_tokens: tuple[str, str]) -> None:
    for origin in (PORTAL, INTRANET, LOCAL):
        answers = await api_answers(cors, *api_tokens, origin)
        assert [answer.status for answer in answers] == STATUSES
        for answer in answers:
            assert is_readable_by(answer, origin), answer
            assert answer.header("content-type") == "application/json"


@on_sqlite
async def test_other_origins_can_read_no_api_response(cors: Client, api_tokens: tuple[str, str]) -> None:
    for origin in OTHERS:
        for answer in await api_answers(cors, *api_tokens, origin):
            assert not is_readable_by(answer, origin), (origin, answer)
        for target in API:
            answer = await cors.request("OPTIONS", target, headers=[("origin", origin), *PREFLIGHT])
            assert not is_readable_by(answer, origin)
    for method in ("POST", "OPTIONS"):
        assert cors_headers(await cors.request(method, API[0], headers=PREFLIGHT)) == {}


@on_sqlite
async def test_a_preflight_allows_only_the_methods_and_headers_of_an_api_call(cors: Client) -> None:
    for origin in (PORTAL, INTRANET, LOCAL):
        for target in API:
            answer = await cors.request("OPTIONS", target, headers=[("origin", origin), *PREFLIGHT])
            assert answer.status in {200, 204}
            assert is_readable_by(answer, origin)
            found = cors_headers(answer)
            assert "post" in listed(found["access-control-allow-methods"])
            assert not {"*", "delete", "put", "patch"} & listed(found["access-control-allow-methods"])
            allowed = listed(found["access-control-allow-headers"])
            assert allowed >= {"authorization", "content-type"}
            assert not {"*", "cookie", "x-original-uri"} & allowed


@on_sqlite
async def test_a_script_can_read_a_503_response(
    tmp_path: Path, keys_dir: Path, clock: Clock, database_url: str
) -> None:
    with (
        a_database_that("is a directory", tmp_path) as url,
        node(url, keys_dir, clock, SSO_CORS_ORIGINS=PORTAL) as client,
    ):
        headers = [("origin", PORTAL), *bearer("wf_live_" + "A" * 43)]
        answer = await client.request("POST", API[0], headers=headers, body=encoded(JANE))
    assert (answer.status, answer.error) == (503, "unavailable")
    assert is_readable_by(answer, PORTAL)


@on_sqlite
async def test_only_the_api_is_shared_across_origins(cors: Client, api_token: str) -> None:
    await cors.get(f"{PAGE}?sso={await cors.issue(api_token)}")
    token = await cors.issue(api_token)
    targets = [
        "/session",
        "/auth",
        "/logout",
        "/sso/confirm",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/metrics",
        "/",
        PAGE,
        "/v1x/sso_tokens",
        "/V1/sso_tokens",
        "/v2/sso_tokens",
        "/a/v1/sso_tokens",
        f"/client/{ACCOUNT}/v1/sso_tokens",
        "/?sso=x",
        f"/a//b?sso={token}",
        "/v1x/sso_tokens?sso=x",
    ]
    for target in targets:
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            for more in ([], PREFLIGHT, [("x-original-uri", PAGE)]):
                answer = await cors.request(method, target, headers=[("origin", PORTAL), *more])
                assert cors_headers(answer) == {}, (method, target)
    answer = await cors.request("GET", f"{PAGE}?sso={token}", headers=[("origin", PORTAL)])
    assert answer.status == 303
    assert cors_headers(answer) == {}


@on_sqlite
async def test_nothing_is_shared_across_origins_by_default(
    client: Client, embedded: Client, api_tokens: tuple[str, str]
) -> None:
    for each in (client, embedded):  # SSO_EMBED_ORIGINS does not imply SSO_CORS_ORIGINS
        for origin in (PORTAL, LOCAL, "null"):
            answers = await api_answers(each, *api_tokens, origin)
            assert [answer.status for answer in answers] == STATUSES
            for target in (*API, "/session", "/auth", "/", PAGE):
                answers.append(await each.request("OPTIONS", target, headers=[("origin", origin), *PREFLIGHT]))
            for answer in answers:
                assert cors_headers(answer) == {}


@on_sqlite
async def test_cors_origins_may_not_frame_pages(cors: Client, api_token: str) -> None:
    for answer in await pages(cors, api_token):
        assert answer.header("x-frame-options") == "DENY"
        assert policy(answer)["frame-ancestors"] == "'none'"
    token = await cors.issue(api_token)
    assert (await cors.get(f"{PAGE}?sso={token}", sec_fetch_dest="iframe")).status == 403
    answer = await cors.get(f"{PAGE}?sso={token}")
    assert "SameSite=Lax" in cookie(answer, "studio_session")[1]


@on_sqlite
@pytest.mark.parametrize("spelling", ["https://Portal.Example", "HTTPS://portal.example", "https://portal.example:443"])
async def test_an_origin_in_another_spelling_is_refused_or_normalised(
    spelling: str, database_url: str, keys_dir: Path, clock: Clock
) -> None:
    """It must not be accepted and then never match."""
    if error_of("SSO_CORS_ORIGINS", spelling) is not None:
        return
    with node(database_url, keys_dir, clock, SSO_CORS_ORIGINS=spelling) as client:
        answer = await client.request("POST", API[0], headers=[("origin", PORTAL)])
    assert is_readable_by(answer, PORTAL)
