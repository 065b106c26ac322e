"""The service and a Studio behind real reverse proxies, configured by the files of `scripts/deploy`."""

import random
import re
import secrets
import time
from contextlib import closing
from http.client import HTTPConnection
from itertools import product
from pathlib import Path

from scripts.tools.ports import free_port
from tests.support.data import ACCOUNT, JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.deployments import IDENTITY, NAVIGATION, Deployment, running_deployment
from tests.support.proxies import HOST, proxying
from tests.support.spelling import contains, headers_with, targets_with
from tests.support.studio_server import application
from tests.support.waiting import PATIENCE

SETTINGS = f"/client/{ACCOUNT}/t/42/settings"
FOREIGN = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"


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
        if kind.startswith("nginx"):  # the log shows which server is down, although the error log is off
            assert re.search(r' auth="[^ "]+ 50[24]"', written)


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


def test_no_place_of_a_request_brings_a_token_into_a_log(deployment: Deployment) -> None:
    token, cookie = deployment.issue(), deployment.sign_in()
    for signed_in in ("", cookie):
        for target in targets_with(token):
            deployment.proxy.request(target, cookie=signed_in)
        for header in headers_with(token):
            deployment.proxy.request(PAGE, header, cookie=signed_in)
        deployment.proxy.request(PAGE, method=token, cookie=signed_in)
    assert not contains(logged(deployment), token)
    assert deployment.accepts(token)


def test_an_outage_of_the_studio_brings_no_token_into_a_log(kind: str, tmp_path: Path) -> None:
    token = secrets.token_urlsafe(32)
    with application() as service:
        service.status, service.headers = "204 No Content", []
        services, no_studio = [f"127.0.0.1:{service.port}"], free_port()
        with proxying(kind, services, no_studio, tmp_path / "proxy") as proxy:
            for target in targets_with(token):
                assert proxy.request(target).status >= 400, target
            for header in headers_with(token):
                assert proxy.request(PAGE, header).status == 502, header
            end = time.monotonic() + PATIENCE
            proxy.request("/the-last")
            while "/the-last" not in proxy.logged() and time.monotonic() < end:
                time.sleep(0.01)
            assert "502" in proxy.logged()
            assert not contains(proxy.logged(), token)


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
