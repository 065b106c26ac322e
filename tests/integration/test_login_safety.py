"""Safety of login links: redirects stay on this host, machines consume nothing, and tokens do not leak."""

import logging

import pytest

from sso_service import tokens
from sso_service.services.node import Node
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, PAGE, TEAM
from tests.support.databases import on_sqlite
from tests.support.hostile_links import (
    DESTINATIONS,
    HOSTILE_QUERIES,
    NOT_CANONICAL,
    PREFETCHES,
    UNUSUAL,
    refused,
    stays_on_this_host,
)

pytestmark = pytest.mark.anyio


async def is_usable(client: Client, token: str) -> bool:
    """True if `token` signs in a fresh browser. Consumes the token."""
    answer = await client.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401}
    return answer.status == 303


# --- Redirects stay on this host -------------------------------------------------------------------------------------


@on_sqlite
async def test_a_path_that_is_not_canonical_is_refused_and_consumes_nothing(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for path in NOT_CANONICAL:
        target = path + b"?sso=" + token.encode()
        answer = await client.request("GET", target, headers=[("accept", "application/json")])
        assert (answer.status, answer.error) == (400, "bad_path"), path
        assert refused(answer), path
    assert await is_usable(client, token)


async def test_no_login_link_redirects_to_another_host(client: Client, api_token: str) -> None:
    token = (await client.issue(api_token)).encode()
    targets = [path + b"?sso=T" for path in NOT_CANONICAL + UNUSUAL]
    for target in targets + [path + b"?" + query for path in (b"/", PAGE.encode()) for query in HOSTILE_QUERIES]:
        answer = await client.another().get(target.replace(b"sso=T", b"sso=" + token))
        assert answer.status in {303, 400, 403}, target[:80]
        assert stays_on_this_host(answer), target[:80]
        if answer.status == 303:
            assert (answer.header("location") or "").encode("latin-1") == target.replace(b"sso=T&", b"").replace(
                b"&sso=T", b""
            ).removesuffix(b"?sso=T")
            token = (await client.issue(api_token)).encode()
        else:
            assert refused(answer)
    assert await is_usable(client, token.decode())


HOSTS = ["evil.example", "evil.example:8443", "studio.example@evil.example", "//evil.example", "", "a/b\\c", "[::1]:80"]


@on_sqlite
async def test_a_redirect_ignores_all_host_headers(client: Client, api_token: str) -> None:
    for host in HOSTS:
        client.host = host
        browser = client.another()
        headers = [
            *((name, host) for name in ("x-forwarded-host", "x-original-host", "x-forwarded-server", "x-host")),
            ("forwarded", f"host={host};proto=https"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-prefix", "//evil.example"),
            ("x-forwarded-uri", "//evil.example/"),
            ("x-original-url", "//evil.example/"),
            ("x-rewrite-url", "//evil.example/"),
        ]
        for sent in (headers, []):
            token = await client.issue(api_token)
            answer = await browser.request("GET", f"{PAGE}?sso={token}", headers=sent)
            assert (answer.status, answer.header("location")) == (303, PAGE)
            assert stays_on_this_host(answer)
            assert "evil" not in str([header for header in answer.headers if header[0] != "set-cookie"])
            assert "domain" not in (answer.header("set-cookie") or "").lower()


# --- Only the navigation of a person consumes ------------------------------------------------------------------------


@on_sqlite
async def test_head_and_options_consume_nothing(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for target in (f"{PAGE}?sso={token}", f"/?a=1&sso={token}"):
        for method, status in (("HEAD", 200), ("OPTIONS", 204)):
            for headers in ([], [("sec-fetch-dest", "document")], [("sec-fetch-site", "cross-site")]):
                answer = await client.request(method, target, headers=headers)
                assert answer.status == status
                assert refused(answer)
                assert answer.body == b""
                assert answer.header("cache-control") == "no-store"
    assert await is_usable(client, token)


@on_sqlite
async def test_other_methods_are_not_allowed_and_consume_nothing(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get"):
        for path in (PAGE, "/"):
            answer = await client.request(method, f"{path}?sso={token}", body=b"a=1")
            assert answer.status == 405, method
            assert answer.error == "method_not_allowed"
            assert set((answer.header("allow") or "").split(", ")) == {"GET", "HEAD", "OPTIONS"}
            assert refused(answer)
            assert token not in answer.text
    assert await is_usable(client, token)


@on_sqlite
async def test_a_prefetch_consumes_nothing_and_gets_503(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for headers in PREFETCHES:
        answer = await client.request("GET", f"{PAGE}?sso={token}", headers=headers)
        assert answer.status == 503, headers
        assert answer.header("cache-control") == "no-store"
        assert refused(answer)
        assert token not in answer.text
    assert await is_usable(client, token)


@on_sqlite
async def test_only_a_top_level_navigation_consumes(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for destinations in DESTINATIONS:
        for accept in ("text/html", "application/json"):
            headers = [*(("sec-fetch-dest", value) for value in destinations), ("accept", accept)]
            answer = await client.request("GET", f"{PAGE}?sso={token}", headers=headers)
            assert 400 <= answer.status < 500, destinations
            assert answer.header("cache-control") == "no-store"
            assert refused(answer)
            assert token not in answer.text
    navigation = {"sec_fetch_dest": "document", "sec_fetch_mode": "navigate", "sec_fetch_site": "cross-site"}
    assert (await client.get(f"{PAGE}?sso={token}", **navigation)).status == 303


# --- Tokens do not leak ----------------------------------------------------------------------------------------------


async def test_logs_contain_no_token_address_or_cookie(
    client: Client, service: Node, api_token: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token, unused = await client.issue(api_token), await client.issue(api_token)
    claims = tokens.unsafe_read_claims(token)
    forged = tokens.sign(claims, bytes(32))
    for target in (
        f"{PAGE}?sso={forged}",
        f"{PAGE}?sso={token}&sso={unused}",
        f"/a//b?sso={unused}",
        f"/client/999?sso={unused}",
        f"/client/{ACCOUNT}/t/{TEAM + 1}?sso={unused}",
        f"{PAGE}?sso={token}",
        f"{PAGE}?sso={token}",
    ):
        await client.get(target)
        await client.another().get(target)
    await client.request("POST", f"{PAGE}?sso={unused}")
    await client.request("HEAD", f"{PAGE}?sso={unused}")
    await client.request("POST", "/sso/confirm", body=f"token={unused}&target=/&form=x".encode())
    clock.advance(300)
    await client.another().get(f"{PAGE}?sso={unused}")
    for secret in (token, unused, forged, api_token, client.cookies["studio_session"], "jane.doe"):
        assert secret not in caplog.text
