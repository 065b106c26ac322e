"""What a login link must never do: lead off this host, be used up by a machine, or show its token."""

import logging
from urllib.parse import urljoin, urlsplit

import pytest

from sso_service import tokens
from sso_service.service import Service
from tests.support._old import ACCOUNT, PAGE, TEAM, Answer, Client, Clock

pytestmark = pytest.mark.anyio

# For what is decided before any database is asked, or does not depend on which one answers.
any_database = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


async def works(client: Client, token: str) -> bool:
    """True if `token` signs in in a browser that nobody is signed in at. Consumes it."""
    answer = await client.another().get(f"{PAGE}?sso={token}")
    assert answer.status in {303, 401}
    return answer.status == 303


def stays_on_this_host(answer: Answer) -> bool:
    """True if no header of the answer can lead a browser anywhere but to a path of the host that it asked."""
    for name, value in answer.headers:
        assert all(" " <= character != "\x7f" for character in value), (name, value)
    locations = [value for name, value in answer.headers if name in {"location", "refresh", "content-location", "link"}]
    for location in locations:
        assert location.startswith("/"), location
        assert location[1:2] not in {"/", "\\"}, location
        assert urlsplit(urljoin("https://studio.example/a/b?c", location)).netloc == "studio.example", location
    return len(locations) <= 1


def refused(answer: Answer) -> bool:
    """True if the answer neither signs in nor leads anywhere."""
    return answer.header("location") is None and answer.header("set-cookie") is None


# --- the redirect never leaves the host ------------------------------------------------------------------------------

NOT_CANONICAL = [
    # Empty segments: `//host` is a URL on another host.
    b"//evil.example",
    b"//evil.example/",
    b"///evil.example",
    b"////evil.example",
    b"//user@evil.example/",
    b"//evil.example@studio.example/",
    b"//studio.example",
    b"/a//evil.example",
    b"/a//",
    b"//",
    b"///",
    b"/http://evil.example",
    b"/client/123//t/42/posts",
    b"/client/123/t/42/posts//",
    # Backslashes, which browsers take for slashes.
    b"/\\evil.example",
    b"/\\/evil.example",
    b"/\\\\evil.example",
    b"\\\\evil.example",
    b"/a\\..\\b",
    b"/%5cevil.example",
    b"/%5C%5Cevil.example",
    b"/%5c/evil.example",
    # Slashes, dots and percent signs in disguise, once and more often.
    b"/%2fevil.example",
    b"/%2F%2Fevil.example",
    b"/%2f/evil.example",
    b"/a%2fb",
    b"/https:%2f%2fevil.example",
    b"/%252fevil.example",
    b"/%252f%252fevil.example",
    b"/%255cevil.example",
    b"/%25252f",
    b"/%2e%2e/%2e%2e",
    b"/a%2eb",
    b"/%25",
    # Dot segments.
    b"/.",
    b"/..",
    b"/./",
    b"/.//evil.example",
    b"/..//evil.example",
    b"/a/../b",
    b"/a/./b",
    b"/a/..",
    b"/client/123/../999",
    b"/%2e",
    b"/%2E./evil.example",
    # Path parameters.
    b"/a;b",
    b"/;/evil.example",
    b"/a/..;/b",
    b"/a%3bb",
    b"/client/123;x/t/42/posts",
    # Control characters, which browsers drop from within a URL.
    b"/\t/evil.example",
    b"/\n/evil.example",
    b"/\r\n/evil.example",
    b"/\r\nLocation: https://evil.example",
    b"\t//evil.example",
    b"/a\x00b",
    b"/a\x7f",
    b"/%09/evil.example",
    b"/%0a/evil.example",
    b"/%0d%0aLocation:%20https://evil.example",
    b"/%0d%0aSet-Cookie:%20a=b",
    b"/%00",
    b"/%1f",
    b"/%7f",
    b"/%c2%85",
    b"/%C2%9F",
    # Not UTF-8.
    b"/%ff",
    b"/%fe%ff",
    b"/\xff\xfe",
    b"/\xe4",
    b"/%c0%af%c0%afevil.example",
    b"/%e0%80%af",
    b"/%c3",
    b"/%ed%a0%80",
    b"/%f5%80%80%80",
    # Not percent-encoding, and not a path.
    b"/%",
    b"/a%2",
    b"/%zz",
    b"/%u002f%u002fevil.example",
    b"",
    b"*",
    b"evil.example",
    b"evil.example/",
    b"http://evil.example/",
    b"https:evil.example",
    b"javascript:alert(1)",
    b"javascript:alert(1)//",
]


@any_database
async def test_a_path_that_is_not_canonical_is_refused_and_consumes_nothing(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for path in NOT_CANONICAL:
        target = path + b"?sso=" + token.encode()
        answer = await client.request("GET", target, headers=[("accept", "application/json")])
        assert (answer.status, answer.error) == (400, "bad_path"), path
        assert refused(answer), path
    assert await works(client, token)


ODD = [
    b"/@evil.example",
    b"/user:password@evil.example/",
    b"/:80",
    b"/evil.example:443",
    b"/https:evil.example",
    b"/javascript:alert(1)",
    b"/...",
    b"/....//",
    b"/..%20/a",
    b"/%20//evil.example",
    b"/ /evil.example",
    b"/%20/evil.example",
    b"/%20",
    b"/%C2%A0/evil.example",
    b"/%E2%80%A8/evil.example",
    b"/%E2%80%8B/evil.example",
    b"/%E2%80%AE/evil.example",
    b"/%EF%BB%BF/evil.example",
    b"/%EF%BC%8F%EF%BC%8Fevil.example",
    b"/%EF%BC%BC%EF%BC%BCevil.example",
    b"/%E2%81%84%E2%81%84evil.example",
    b"/%E3%80%82%E3%80%82/a",
    b"/\xef\xbc\x8f\xef\xbc\x8fevil.example",
    b"/%23//evil.example",
    b"/%3F//evil.example",
    b"/#//evil.example",
    b"/%22%3E%3Cscript%3E",
    b'/"><script>alert(1)</script>',
    b"/" + b"a" * 100_000,
    b"/" + b"a/" * 30_000,
    b"/" * 30_000,
    b"/" + b"../" * 20_000,
    b"/" + b"%2e%2e%2f" * 10_000,
    b"/" + b"%E2%82%AC" * 10_000,
]
HOSTILE_QUERIES = [
    b"sso=T&next=https://evil.example",
    b"next=//evil.example&sso=T",
    b"//evil.example&sso=T",
    b"sso=T&//evil.example",
    b"\\\\evil.example&sso=T",
    b"@evil.example&sso=T",
    b"sso=T&%0d%0aLocation:%20https://evil.example",
    b"sso=T&a=%0aSet-Cookie:%20b=c&%00=%7f",
    b"sso=T&/../../..",
    b"sso=T&#@evil.example",
    b"sso=T&;url=https://evil.example",
    b"sso=T&a=" + b"/" * 50_000,
]


async def test_no_link_leads_to_another_host(client: Client, api_token: str) -> None:
    token = (await client.issue(api_token)).encode()
    targets = [path + b"?sso=T" for path in NOT_CANONICAL + ODD]
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
    assert await works(client, token.decode())


HOSTS = ["evil.example", "evil.example:8443", "studio.example@evil.example", "//evil.example", "", "a/b\\c", "[::1]:80"]


@any_database
async def test_a_redirect_names_no_host_whatever_the_request_says(client: Client, api_token: str) -> None:
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


# --- only a person's navigation consumes -----------------------------------------------------------------------------


@any_database
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
    assert await works(client, token)


@any_database
async def test_any_other_method_is_not_allowed_and_consumes_nothing(client: Client, api_token: str) -> None:
    token = await client.issue(api_token)
    for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "get"):
        for path in (PAGE, "/"):
            answer = await client.request(method, f"{path}?sso={token}", body=b"a=1")
            assert answer.status == 405, method
            assert answer.error == "method_not_allowed"
            assert set((answer.header("allow") or "").split(", ")) == {"GET", "HEAD", "OPTIONS"}
            assert refused(answer)
            assert token not in answer.text
    assert await works(client, token)


PREFETCHES = [
    [("Sec-Purpose", "prefetch")],
    [("Sec-Purpose", "prefetch;prerender")],
    [("Sec-Purpose", "prefetch; anonymous-client-ip")],
    [("Sec-Purpose", "Prefetch")],
    [("Purpose", "prefetch")],
    [("X-Moz", "prefetch")],
    [("Sec-Purpose", "something"), ("Sec-Purpose", "prefetch")],
    [("Purpose", "prefetch"), ("Sec-Fetch-Dest", "document"), ("Sec-Fetch-Mode", "navigate")],
    [("X-Moz", "prefetch"), ("Sec-Fetch-Dest", "empty")],
]


@any_database
async def test_a_browser_that_loads_ahead_consumes_nothing_and_is_told_to_come_again(
    client: Client, api_token: str
) -> None:
    token = await client.issue(api_token)
    for headers in PREFETCHES:
        answer = await client.request("GET", f"{PAGE}?sso={token}", headers=headers)
        assert answer.status == 503, headers
        assert answer.header("cache-control") == "no-store"
        assert refused(answer)
        assert token not in answer.text
    assert await works(client, token)


DESTINATIONS = [
    ["iframe"],
    ["frame"],
    ["image"],
    ["empty"],
    ["script"],
    ["style"],
    ["object"],
    ["embed"],
    ["serviceworker"],
    ["nonsense"],
    [""],
    ["document", "iframe"],
    ["iframe", "document"],
    ["empty", "document"],
    ["document, iframe"],
    ["xdocument"],
    ["document;a=b"],
]


@any_database
async def test_only_a_navigation_of_a_whole_window_consumes_where_the_browser_says_what_it_is(
    client: Client, api_token: str
) -> None:
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


# --- the token is nowhere to be read ---------------------------------------------------------------------------------


async def test_no_log_line_has_a_token_an_address_or_a_cookie(
    client: Client, service: Service, api_token: str, clock: Clock, caplog: pytest.LogCaptureFixture
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
