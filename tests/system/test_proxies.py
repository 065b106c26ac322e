"""The service and a Studio behind real reverse proxies, configured by the files of `scripts/deploy`."""

import random
import re
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.deployments import NAVIGATION, Deployment, running_deployment
from tests.support.programs import program
from tests.support.proxies import HOST, PROXIES, proxying
from tests.support.studio_server import application
from tests.support.waiting import PATIENCE

IDENTITY = ["x-studio-user", "x-studio-email", "x-studio-account", "x-studio-role"]


@pytest.fixture(scope="module", params=PROXIES)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    program(kind)
    return kind


@pytest.fixture(scope="module")
def module_deployment(
    kind: str, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    with running_deployment(kind, sqlite_template, tmp_path_factory.mktemp(kind)) as (deployment, _):
        yield deployment


@pytest.fixture
def deployment(module_deployment: Deployment) -> Deployment:
    module_deployment.studio.take()
    return module_deployment


# --- signing in ------------------------------------------------------------------------------------------------------


def test_requests_without_a_session_do_not_reach_the_studio(deployment: Deployment) -> None:
    send = deployment.proxy.request
    for target in ("/", PAGE, f"{PAGE}?a=1", "/static/app.js", "/client/999/t/77/posts"):
        for cookie in ("", "studio_session=WzEsMTIzXQ.aaaaaa.aaaa"):
            assert send(target, cookie=cookie).status == 401
            assert send(target, cookie=cookie, method="POST", body=b"a=1").status == 401
            for headers in (NAVIGATION, [("Accept", "text/html")]):
                answer = send(target, *headers, cookie=cookie)
                assert (answer.status, answer.header("location")) == (303, "https://portal.example/")
                assert answer.header("cache-control") == "no-store"
            fetch = [("Sec-Fetch-Mode", "cors"), ("Accept", "text/html")]
            assert send(target, *fetch, cookie=cookie).status == 401
    assert not deployment.studio.received


def test_the_studio_receives_the_identity_after_a_login(deployment: Deployment) -> None:
    target = f"{PAGE}/7?chromeless=1"
    answer = deployment.proxy.request(f"{target}&sso={deployment.issue()}", *NAVIGATION)
    assert (answer.status, answer.header("location")) == (303, target)
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("strict-transport-security")
    # With `no-referrer`, a browser would send no origin with the confirmation form.
    assert deployment.proxy.request(f"{PAGE}?sso={'A' * 43}", *NAVIGATION).header("referrer-policy") == "strict-origin"
    cookie, _, attributes = (answer.header("set-cookie") or "").partition(";")
    assert "Secure" in attributes, "the proxy did not forward the scheme"
    session = deployment.proxy.request("/session", cookie=cookie).json()
    answer = deployment.proxy.request(target, *NAVIGATION, cookie=cookie)
    assert (answer.status, answer.text) == (200, "Studio")
    [seen] = deployment.studio.received
    assert (seen.method, seen.target) == ("GET", target.encode())
    assert [seen.values(name) for name in IDENTITY] == [
        [str(session["user"]["id"])],
        [JANE["email"]],
        [str(ACCOUNT)],
        ["editor"],
    ]
    assert seen.values("host") == [f"{HOST}:{deployment.proxy.port}"]
    assert seen.values("x-forwarded-proto") == ["https"]
    assert seen.values("x-forwarded-for") == ["127.0.0.1"]


def test_a_role_change_takes_effect_at_the_next_request(deployment: Deployment) -> None:
    def statuses() -> list[int]:
        paths = (PAGE, f"{PAGE}/7/edit", SETTINGS, f"/client/{ACCOUNT}/t/42/topics", FOREIGN)
        return [deployment.proxy.request(path, *NAVIGATION, cookie=cookie).status for path in paths]

    cookie = deployment.sign_in(JOHN)
    assert statuses() == [200, 200, 403, 403, 403]
    deployment.run("user", "set-role", JOHN["email"], "--account", str(ACCOUNT), "admin")
    assert statuses() == [200, 200, 200, 200, 403]
    assert deployment.studio.take()[-1].values("x-studio-role") == ["admin"]
    deployment.run("user", "set-role", JOHN["email"], "--account", str(ACCOUNT), "publisher")
    assert statuses() == [200, 200, 403, 200, 403]
    deployment.studio.take()
    deployment.run("user", "disable", JOHN["email"])
    assert [deployment.proxy.request(path, cookie=cookie).status for path in (PAGE, "/")] == [401, 401]
    assert not deployment.studio.received


def test_signing_out_ends_access_to_the_studio(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    assert deployment.proxy.request(PAGE, cookie=cookie).status == 200
    foreign = deployment.proxy.request("/logout", ("Origin", "https://evil.example"), method="POST", cookie=cookie)
    assert foreign.status == 403
    answer = deployment.proxy.request(
        "/logout", ("Origin", f"https://{HOST}:{deployment.proxy.port}"), method="POST", cookie=cookie
    )
    assert answer.status == 204
    kept = (answer.header("set-cookie") or "").partition(";")[0]
    assert deployment.proxy.request(PAGE, cookie=kept).status == 401


SPELLINGS = ["sso", "%73so", "s%73o", "ss%6f", "ss%6F", "%73%73%6F"]
BROKEN = [
    "sso",
    "sso=",
    "a&sso",
    "sso&a",
    "sso=T&sso=T",
    "sso=T&%73so=T",
    "sso=T;x",
    "sso=%zz",
    "sso=T%00",
    "%73so=T;&a=b",
]
NO_SSO = [
    "SSO=T",
    "ssox=T",
    "xsso=T",
    "s%2573o=T",
    "a=sso",
    "a=sso=T",
    "a=%26sso=T",
    "a=;sso=T",
    "sso%3DT",
    "ss%c0%af=T",
]


def test_a_query_with_sso_in_any_spelling_never_reaches_the_studio(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    for spelling, query in product(SPELLINGS, ["{}", "{}&a=1", "a=%20&{}", "&{}&"]):
        token = deployment.issue()
        answer = deployment.proxy.request(f"{PAGE}?{query.format(f'{spelling}={token}')}")
        assert answer.status == 303, (spelling, query)
        assert answer.header("location") in {PAGE, f"{PAGE}?a=1", f"{PAGE}?a=%20", f"{PAGE}?&"}
    for query in BROKEN:
        token = deployment.issue()
        assert deployment.proxy.request(f"{PAGE}?{query.replace('T', token)}", cookie=cookie).status == 401, query
        assert deployment.accepts(token), query
    assert deployment.proxy.request(f"{PAGE}?a#&sso=T", cookie=cookie).status in {400, 404}
    assert not deployment.studio.received
    for query in NO_SSO:
        assert deployment.proxy.request(f"{PAGE}?{query}", cookie=cookie).status == 200, query
    assert [seen.target for seen in deployment.studio.received] == [f"{PAGE}?{query}".encode() for query in NO_SSO]


def test_only_a_navigation_consumes_a_login_link(deployment: Deployment) -> None:
    token = deployment.issue()
    for method, headers in [("HEAD", []), ("OPTIONS", []), ("POST", []), ("GET", [("Sec-Purpose", "prefetch")])]:
        answer = deployment.proxy.request(f"{PAGE}?sso={token}", *headers, method=method)
        assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
    assert deployment.accepts(token)
    assert not deployment.studio.received


# --- the service's own paths -----------------------------------------------------------------------------------------

INTERNAL = b"""
    /readyz /%72eadyz?sso=T
    /metrics /auth /%6detrics /%61%75%74%68 /metrics?sso=T /auth?sso=T /%6detrics?%73so=T /metrics#?sso=T
    /metrics?a#&sso=T /metrics%0a?sso=T /x/../metrics?sso=T /x/%2e%2e/metrics?sso=T /./metrics?sso=T //metrics?sso=T
    /v1/../metrics /v1/..//auth /V1/../metrics /sso/../metrics /sso/%2e%2e/auth
    https://studio.example/metrics?sso=T x:/metrics?sso=T x:metrics?sso=T x:http://studio.example/metrics?sso=T
    x:http://studio.example/auth?sso=T x:http://studio.example/metrics *?sso=T
""".split()


def test_internal_paths_of_the_service_are_not_reachable(deployment: Deployment) -> None:
    for path in ("/healthz", "/docs"):
        assert deployment.proxy.request(path).status == 200
    for path in ("/healthz?sso=T", "/session?sso=T"):
        assert deployment.proxy.request(path).status in {200, 401}
    assert deployment.proxy.request("/v1/sso_tokens", method="POST", body=b"{}").error == "missing_token"
    for path in ("/v1/nothing", "/sso/nothing"):
        assert deployment.proxy.request(path, ("Accept", "application/json")).error == "not_found"
    cookie = deployment.sign_in()
    for target in INTERNAL:
        headers = [("X-Original-URI", "/"), ("X-Forwarded-Uri", "/")]
        answer = deployment.proxy.request(target, *headers, cookie=cookie)
        assert answer.status in {400, 401, 403, 404}, target
        assert answer.header("set-cookie") is None, target
        assert not {name for name, _ in answer.headers} & set(IDENTITY), target
    assert not deployment.studio.received


def test_another_host_name_is_not_served(deployment: Deployment) -> None:
    cookie, token = deployment.sign_in(), deployment.issue()
    for path in ("/session", PAGE, f"{PAGE}?sso={token}"):
        for target, host in [
            (path, "evil.example"),
            (path, "127.0.0.1"),
            (path, f"{HOST}.evil.example"),
            (f"https://evil.example{path}", ""),
        ]:
            answer = deployment.proxy.request(target, *NAVIGATION, cookie=cookie, host=host)
            assert (answer.status, answer.body) == (200, b"") or answer.status == 421, (target, host)
            assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
    assert not deployment.studio.received
    assert deployment.accepts(token)


def test_plain_http_only_redirects_to_https(deployment: Deployment) -> None:
    token = deployment.issue()
    for method, target in [("GET", f"{PAGE}?sso={token}"), ("GET", "/"), ("POST", "/v1/sso_tokens")]:
        with closing(HTTPConnection("127.0.0.1", deployment.proxy.http_port, timeout=PATIENCE)) as connection:
            connection.request(method, target, headers={"Host": HOST})
            answer = connection.getresponse()
            assert answer.status in {301, 308}
            assert (answer.headers["Location"], answer.read()[:9]) in [
                (f"https://{HOST}{target}", b"<html>\r\n<"),
                (f"https://{HOST}:{deployment.proxy.port}{target}", b""),
                (f"https://{HOST}{target}", b""),
            ]
    assert not deployment.studio.received
    assert deployment.accepts(token)


# --- hostile paths ---------------------------------------------------------------------------------------------------

SETTINGS = f"/client/{ACCOUNT}/t/42/settings"
FOREIGN = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"

# Valid targets of login links that an editor of account 123 may not see.
ABOVE_AN_EDITOR = b"""
    /client/123/t/42/settings /client/123/t/42/settings/ /client/123/t/42/settings/posts /client/123/t/42/topics
    /client/123/t/42/Settings /client/123/t/42/%73ettings /client/123/t/42/posts, /client/123/t/42/posts,/settings
    /client/123/t/42/posts%20
""".split()

# Paths that are forbidden to all members of account 123, or that are ambiguous.
HOSTILE_PATHS = [
    # Another account, or a team that belongs to another account or does not exist.
    *b"/client/999 /client/999/ /client/999/t/77/posts /client/999/t/42/posts".split(),
    *b"/client/123/t/77/posts /client/123/t/43/posts".split(),
    # Paths without the form of a Studio path.
    *b"/client /client/ /client/123/settings /client/123/t /client/123/T/42/settings".split(),
    *b"/client/123,/t/42/settings /client/123/t/42,/settings".split(),
    # Dot segments, raw and encoded.
    *b"""
    /client/123/t/42/posts/../settings /client/123/t/42/posts/./../settings /client/123/../999/t/77/posts
    /client/123/t/42/posts/../../../../999/t/77/posts /x/../client/999/t/77/posts /./client/999/t/77/posts
    /client/./999/t/77/posts /client/123/t/42/posts/%2e%2e/settings /client/123/t/42/posts/.%2e/settings
    /client/123/t/42/posts/%2E./settings /x/%2e%2e/client/999/t/77/posts /client/123/t/42/posts/%252e%252e/settings
    /client/123/t/42/posts/%25252e%25252e/settings /client/123/t/42/posts/.. /client/123/t/42/posts/../
    /v1/../client/999/t/77/posts /session/../client/999/t/77/posts /sso/../client/123/t/42/settings
    """.split(),
    # Repeated or encoded slashes.
    *b"""
    //client/999/t/77/posts ///client/999/t/77/posts //studio.example/client/999/t/77/posts
    /client//999/t/77/posts /client/123//t/42/settings /client/123/t/42//settings
    /client/123/t/42/posts//../settings /client%2f999/t/77/posts /client%2F999%2Ft%2F77%2Fposts
    /%2fclient/999/t/77/posts /client/123/t/42%2fsettings /client/123/t/42/posts/..%2fsettings
    /client/123/t/42/posts%2f..%2fsettings /client/123/t/42/posts/%2e%2e%2fsettings /client%252f999/t/77/posts
    /client/123/t/42/posts/..%252fsettings /client/123/t/42/posts%c0%af../settings
    """.split(),
    # Another spelling of `client`, or of a number.
    *b"""
    /CLIENT/999/t/77/posts /CLIENT/123/t/42/settings /Client/123/t/42/posts /%63lient/999/t/77/posts
    /%63lient/123/t/42/settings /%43LIENT/123/t/42/settings /c%6Cient/123/t/42/settings
    /%2563lient/123/t/42/settings /client/0123/t/42/settings /client/0999/t/77/posts /client/123/t/042/settings
    /client/+123/t/42/settings /client/%3123/t/42/settings /client/123%20/t/42/settings /client/123.0/t/42/settings
    """.split(),
    # Path parameters and backslashes.
    *rb"""
    /client;x/999/t/77/posts /client/123;x/t/42/settings /client/123/t/42/settings;x
    /client/123/t/42/posts;/../settings /client/123/t/42/posts/..;/settings /client/123/t/42/posts/..%3b/settings
    /;/client/999/t/77/posts \client/999/t/77/posts /\client/999/t/77/posts /client\999\t\77\posts
    /client/123/t/42/posts/..\settings /client/123/t/42/posts/..%5csettings /client%5c999/t/77/posts
    /client/123/t/42/posts/..%255csettings
    """.split(),
    # Control characters, and bytes that are not UTF-8.
    *b"""
    /client/123/t/42/posts%00/../settings /client/123/t/42/settings%00 /client/123/t/42/settings%0a
    /client/123/t/42/posts%0d%0a /%09/client/999/t/77/posts /client/123/t/42/settings%09
    /client/123/t/42/posts/%ff/../settings /client/123/t/42/posts/% /client/123/t/42/posts/%u002e%u002e/settings
    """.split(),
    b"/client/123/t/42/posts/\xff",
    b"/client/123/t/42/posts/\x01",
    b"/client/123/t/42/posts/\t../settings",
    # More than a path, or no path.
    *b"""
    /client/999/t/77/posts#/../../client/123/t/42/posts /client/123/t/42/posts#/../settings
    https://studio.example/client/999/t/77/posts https://studio.example//client/999/t/77/posts
    x:/client/999/t/77/posts x:client/999/t/77/posts x:http://studio.example/client/999/t/77/posts
    client/999/t/77/posts * @evil.example/
    """.split(),
]


def readings(target: bytes) -> Iterator[list[str]]:
    """Yield the segments of a path as various servers might read it."""
    path = re.split(rb"[?#]", target.partition(b"://")[2].partition(b"/")[2] if b"://" in target else target)[0]
    for times, parameters, backslashes in product(range(4), (True, False), (True, False)):
        text = path
        for _ in range(times):
            text = unquote_to_bytes(text)
        if backslashes:
            text = text.replace(b"\\", b"/")
        resolved: list[str] = []
        for segment in text.decode("latin-1").casefold().split("/"):
            name = re.sub("[;\0].*", "", segment) if parameters else segment
            if name == "..":
                del resolved[-1:]
            elif name not in {"", "."}:
                resolved.append(name.strip())
        yield resolved


def is_for_an_editor_of_the_account(target: bytes) -> bool:
    """Return whether an editor of account 123, team 42, may see the path in every reading of it."""
    for segments in readings(target):
        match segments:
            case ["client", *rest] if (
                rest[:1] != ["123"] or rest[1:2] not in ([], ["t"]) or rest[2:3] not in ([], ["42"])
            ):
                return False
            case ["client", _, _, _, section, *_] if section not in {"posts", "ideas"}:
                return False
    return True


def test_the_path_readings_of_these_tests_detect_hidden_paths() -> None:
    for allowed in (b"/", b"/static/app.js", b"/client/123", b"/client/123/t/42/posts/7?a=/../..", b"/clients/999"):
        assert is_for_an_editor_of_the_account(allowed), allowed
    for hidden in (
        b"/client/999",
        b"/client/123/t/43",
        b"/client/123/t/42/settings",
        b"/client/123/t/42/posts/..%252fsettings?a",
        b"/x/..%5cCLIENT;a/999",
        b"//%63lient/0123/t/42/posts",
        b"https://studio.example/client/999",
    ):
        assert not is_for_an_editor_of_the_account(hidden), hidden


def test_a_hostile_path_neither_signs_in_nor_consumes(deployment: Deployment) -> None:
    token = deployment.issue()
    for path in HOSTILE_PATHS:
        for target in (path + b"?sso=" + token.encode(), path + b"?a=1&%73so=" + token.encode() + b"&b"):
            answer = deployment.proxy.request(target, *NAVIGATION)
            assert answer.status in {400, 403, 404, 421}, target
            assert (answer.header("location"), answer.header("set-cookie")) == (None, None), target
    assert not deployment.studio.received
    assert deployment.accepts(token)


SPOOFED_HEADERS = [
    [],
    [("X-Forwarded-Uri", PAGE)],
    [("X-Original-URI", PAGE)],
    [("X-Forwarded-Uri", PAGE), ("X-Original-URI", PAGE), ("X-Original-URI", "/")],
    [("X_Forwarded_Uri", PAGE), ("X_Original_URI", PAGE), ("X-Studio-Role", "admin")],
]


def test_a_hostile_path_gives_an_editor_no_other_access(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    for path, spoofed in product(ABOVE_AN_EDITOR + HOSTILE_PATHS, SPOOFED_HEADERS):
        answer = deployment.proxy.request(path + b"?a=" + PAGE.encode(), *spoofed, cookie=cookie)
        assert answer.status in {400, 403, 404}, (path, spoofed)
        assert not deployment.studio.received, (path, spoofed)


SEGMENTS = (
    b"client CLIENT %63lient 123 0123 999 t 42 77 posts settings a .. . %2e%2e .%2e %252e %20 %C3%A4 \xc3\xa4".split()
)
SEPARATORS = [b"/"] * 12 + b"// %2f %252f \\ %5c ; ;/ %3b # , |".split()


def test_an_editor_reaches_only_paths_allowed_in_every_reading(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    generator = random.Random(42)
    prefixes = [b"", b"/client/123", b"/client/123/t/42", PAGE.encode()]
    for _ in range(600):
        path = generator.choice(prefixes)
        for _ in range(generator.randint(1, 4)):
            path += generator.choice(SEPARATORS) + generator.choice(SEGMENTS)
        deployment.proxy.request(path, cookie=cookie)
    targets = {request.target for request in deployment.studio.received}
    assert len(targets) > 30
    for target in targets:
        assert is_for_an_editor_of_the_account(target), target


def test_identity_headers_from_the_client_are_removed(deployment: Deployment, kind: str) -> None:
    cookie = deployment.sign_in()
    names = [*IDENTITY, *(name.upper() for name in IDENTITY), *(name.replace("-", "_") for name in IDENTITY)]
    names += ["X_Studio-Role", "X-Studio_Role", "x_studio_role", "X_STUDIO_FOO"]
    if kind == "caddy":
        names.append("X-Studio-Foo")  # nginx can remove only the names in its configuration
    spoofed = [(name, value) for name in names for value in ("1", "admin")]
    others = [
        ("X-Original-URL", SETTINGS),
        ("X-Rewrite-URL", SETTINGS),
        ("X-Original-URI", "/"),
        ("X-Forwarded-Uri", "/"),
    ]
    for headers in (
        spoofed,
        spoofed + others,
        [("Connection", "close, X-Studio-Role, X-Studio-User, Cookie, Host"), *spoofed],
    ):
        # Without a cookie, these headers do not sign in.
        assert deployment.proxy.request(PAGE, *headers).status == 401
        answer = deployment.proxy.request(PAGE, *headers, cookie=cookie)
        assert answer.status == 200
        [seen] = deployment.studio.take()
        assert {name for name, _ in seen.headers if re.match("x.studio", name)} == set(IDENTITY)
        assert [len(seen.values(name)) for name in IDENTITY] == [1, 1, 1, 1]
        assert seen.values("x-studio-role") == ["editor"]
        assert seen.values("x-studio-email") == [JANE["email"]]
        assert not {name for name, _ in seen.headers} & {name.lower() for name, _ in others}
        assert SETTINGS not in str(seen.headers)


# --- the checked request is the forwarded request --------------------------------------------------------------------

UNUSUAL_TARGETS = [
    *b"/ /? /?a=/../..//&b=%2e%2e%5c;x#y /client/123/t/42/posts/a%20b%C3%A4/".split(),
    b'/client/123/t/42/posts/\xc3\xa4|^[]"<>`{}',
    *b"/client/123/t/42/posts/%7C%5E%41 /a,b:c@d=e+f&g!h$i'(j)*k~ /a%2fb\"c".split(),
    b"/" + b"a" * 3000,
]


def test_the_service_checks_exactly_what_the_studio_receives(kind: str, tmp_path: Path) -> None:
    with (
        application() as service,
        application() as studio,
        proxying(kind, [f"127.0.0.1:{service.port}"], studio.port, tmp_path / "proxy") as proxy,
    ):
        # This replacement of the service allows every request, including those that the service refuses.
        service.status, service.headers = "204 No Content", [(name, "of the service") for name in IDENTITY]
        for target, method in product(UNUSUAL_TARGETS + ABOVE_AN_EDITOR + HOSTILE_PATHS, ("GET", "POST")):
            spoofed = [("X-Forwarded-Uri", "/"), ("X-Original-URI", "/"), ("Upgrade", "websocket")]
            proxy.request(target, *spoofed, method=method, cookie="a=b", body=b"body" if method == "POST" else b"")
            checked, forwarded = service.take(), studio.take()
            assert len(checked) == len(forwarded) <= 1, target
            if not forwarded:
                assert target not in UNUSUAL_TARGETS
                continue
            original = checked[0].values("x-original-uri") + checked[0].values("x-forwarded-uri")
            assert original == [forwarded[0].target.decode("latin-1")], target
            assert (checked[0].method, checked[0].target.rstrip(b"?"), checked[0].body) == ("GET", b"/auth", b"")
            assert checked[0].values("cookie") == ["a=b"]
            assert not checked[0].values("upgrade")
            assert forwarded[0].method == method
            assert forwarded[0].body == (b"body" if method == "POST" else b"")
            assert [forwarded[0].values(name) for name in IDENTITY] == [["of the service"]] * 4


# --- refusals and outages of the service -----------------------------------------------------------------------------


def test_only_a_204_from_the_service_lets_a_request_through(kind: str, tmp_path: Path) -> None:
    with (
        application() as service,
        application() as studio,
        proxying(kind, [f"127.0.0.1:{service.port}"], studio.port, tmp_path / "proxy") as proxy,
    ):
        for status in ("500 No", "503 No", "404 No", "302 No", "400 No", "401 No", "403 No", "429 No"):
            service.status, service.headers = status, [("Location", "/"), ("X-Studio-Role", "admin")]
            for headers in ([], NAVIGATION, [("Upgrade", "websocket"), ("Connection", "Upgrade")]):
                assert proxy.request(PAGE, *headers, ("X-Studio-Role", "admin"), cookie="a=b").status >= 300, status
        assert service.received
        assert not studio.received
        service.status, service.headers = "204 No Content", []
        assert proxy.request(PAGE, ("X-Studio-Role", "admin"), ("X-Studio-User", "1")).status == 200
        assert not {value for name in IDENTITY for value in studio.received[0].values(name)} & {"admin", "1"}


def test_without_the_service_requests_fail_and_no_token_is_logged(
    kind: str, sqlite_template: Path, tmp_path: Path
) -> None:
    with running_deployment(kind, sqlite_template, tmp_path) as (deployment, stop):
        cookie, token = deployment.sign_in(), deployment.issue()
        assert deployment.proxy.request(PAGE, cookie=cookie).status == 200
        deployment.studio.take()
        stop()
        for headers in ([], NAVIGATION, [("Upgrade", "websocket"), ("Connection", "Upgrade")]):
            assert deployment.proxy.request(PAGE, *headers, cookie=cookie).status in {500, 502, 503}
            for target in (f"{PAGE}?sso={token}", f"{PAGE}?a&%73so={token}"):
                answer = deployment.proxy.request(
                    target, *headers, ("Referer", f"https://{HOST}{target}"), cookie=cookie
                )
                assert answer.status in {500, 502, 503}
                assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
                # Otherwise, the browser's next requests would send this URL with the token as their Referer.
                assert answer.header("referrer-policy") == "no-referrer"
        assert not deployment.studio.received
        written = logged(deployment)
        assert PAGE in written
        assert token not in written


# --- logs, upgrades and bodies ---------------------------------------------------------------------------------------


def logged(deployment: Deployment) -> str:
    """Return the logs of the proxy and the service for all requests so far."""
    marker = f"/{random.randbytes(8).hex()}"
    deployment.proxy.request(marker)
    deadline = time.monotonic() + PATIENCE
    while marker not in (written := deployment.proxy.logged()):
        assert time.monotonic() < deadline, "the proxy has not logged the request"
        time.sleep(0.01)
    return written + Path(deployment.env["SSO_HOME"], "service.log").read_text()


def test_logs_contain_no_token(deployment: Deployment) -> None:
    used, unused = deployment.issue(), deployment.issue()
    cookie = deployment.sign_in()
    referer = ("Referer", f"https://{HOST}{PAGE}?sso={unused}")
    for query in (f"sso={used}", f"sso={used}", f"a&s%73o={used}", f"sso={used}&sso={unused}", f"sso={unused};x"):
        deployment.proxy.request(f"{PAGE}?{query}", referer)
    before = [f"{PAGE}?a#&", "/a//b?", "/metrics?", "/session?", f"https://{HOST}{PAGE}?sso&", "x:y?", "/%zz?"]
    for target in [*(f"{start}sso={unused}" for start in before), f"{PAGE}#?sso={deployment.issue()}"]:
        deployment.proxy.request(target, referer, cookie=cookie)
    for method in ("HEAD", "POST", "BREW"):
        deployment.proxy.request(f"{PAGE}?sso={unused}", referer, method=method)
    # The proxy refuses without first reading or storing the body.
    for length in ("100000", "9999999999"):
        answer = deployment.proxy.request(f"{PAGE}?sso={unused}", ("Content-Length", length), method="POST")
        assert answer.status in {405, 413}
    deployment.proxy.request(f"{PAGE}?sso={unused}", host="evil.example")
    deployment.proxy.request(PAGE, referer, cookie=cookie)
    written = logged(deployment)
    assert f"{PAGE}" in written
    for secret in (used, unused, unused[:20], cookie.partition("=")[2], deployment.api_token):
        assert secret not in written


def upgrade(deployment: Deployment, target: str, *headers: tuple[str, str]) -> tuple[int, bytes]:
    """Send an upgrade request. Returns the status, and after an upgrade the reply to a line of text."""
    lines = [f"GET {target} HTTP/1.1", f"Host: {HOST}", *(f"{name}: {value}" for name, value in headers), "", ""]
    with closing(deployment.proxy.connect()) as connection:
        connection.sendall("\r\n".join(lines).encode())
        received = b""
        while not received.endswith(b"\n\r\n") and (piece := connection.recv(1)):
            received += piece
        status = int(received.split(b" ")[1])
        if status == 101:
            connection.sendall(b"hello\n")
            received = b""
            while not received.endswith(b"\n") and (piece := connection.recv(100)):
                received += piece
        return status, received if status == 101 else b""


def test_a_websocket_requires_access_to_its_path(deployment: Deployment) -> None:
    websocket = [("Upgrade", "WebSocket"), ("Connection", "keep-alive, Upgrade"), ("Sec-WebSocket-Key", "YQ==")]
    assert upgrade(deployment, PAGE, *websocket) == (401, b"")
    cookie = ("Cookie", deployment.sign_in())
    assert upgrade(deployment, SETTINGS, *websocket, cookie) == (403, b"")
    assert upgrade(deployment, "/client/123/t/42/posts/../settings", *websocket, cookie) == (403, b"")
    assert not deployment.studio.received
    assert upgrade(deployment, PAGE, *websocket, ("X-Studio-Role", "admin"), cookie) == (101, b"echo hello\n")
    [seen] = deployment.studio.take()
    assert seen.values("x-studio-role") == ["editor"]
    assert seen.values("sec-websocket-key") == ["YQ=="]


def test_upgrades_other_than_websocket_are_not_forwarded(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    several = [["h2c", "websocket"], ["websocket", "h2c"], ["h2c, websocket"]]
    for upgrades in (["h2c"], ["websocketx"], ["TLS/1.0"], *several):
        for connection in ("Upgrade, HTTP2-Settings", "close, upgrade"):
            headers = [("Connection", connection), ("HTTP2-Settings", "AAMAAABkAAQAAP__")]
            answer = deployment.proxy.request(PAGE, *(("Upgrade", each) for each in upgrades), *headers, cookie=cookie)
            # Of repeated headers, nginx reads and forwards only the first.
            assert answer.status in {101, 200, 400}, upgrades
            for seen in deployment.studio.take():
                assert not [value for value in seen.values("upgrade") if value.lower() != "websocket"], upgrades


def test_a_body_reaches_the_studio_unchanged(deployment: Deployment) -> None:
    cookie = deployment.sign_in()
    body = random.randbytes(300_000)
    assert deployment.proxy.request(PAGE, method="PUT", body=body, cookie=cookie).status == 200
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:7], body[7:200_000], body[200_000:]))
    trailer = b"0\r\nX-Studio-Role: admin\r\nX-Studio-Foo: admin\r\n\r\n"
    headers = [("Transfer-Encoding", "chunked"), ("Trailer", "X-Studio-Role, X-Studio-Foo")]
    assert deployment.proxy.request(PAGE, *headers, method="POST", body=chunked + trailer, cookie=cookie).status == 200
    put, post = deployment.studio.take()
    assert (put.method, put.body) == ("PUT", body)
    assert (post.method, post.body) == ("POST", body)
    assert post.values("x-studio-role") == ["editor"]
    assert not post.values("x-studio-foo")
    # A request with a body is refused like any other. The body is short: Caddy does not read a long one to its end,
    # and may close the connection while it is sent.
    assert deployment.proxy.request(SETTINGS, method="POST", body=body[:10_000], cookie=cookie).status == 403
    assert not deployment.studio.received
