"""Login links that must neither redirect to another host nor sign in."""

from urllib.parse import urljoin, urlsplit

from tests.support.client import Answer

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
    # Backslashes, which browsers treat as slashes.
    b"/\\evil.example",
    b"/\\/evil.example",
    b"/\\\\evil.example",
    b"\\\\evil.example",
    b"/a\\..\\b",
    b"/%5cevil.example",
    b"/%5C%5Cevil.example",
    b"/%5c/evil.example",
    # Slashes, dots and percent signs, encoded once or more often.
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
    # Control characters, which browsers remove from URLs.
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
    # Invalid percent-encoding, and values that are not paths.
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
UNUSUAL = [
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


def refused(answer: Answer) -> bool:
    """Return whether a response neither signs in nor redirects."""
    return answer.header("location") is None and answer.header("set-cookie") is None


def stays_on_this_host(answer: Answer) -> bool:
    """Return whether no header of a response can send a browser to another host."""
    for name, value in answer.headers:
        assert all(" " <= character != "\x7f" for character in value), (name, value)
    locations = [value for name, value in answer.headers if name in {"location", "refresh", "content-location", "link"}]
    for location in locations:
        assert location.startswith("/"), location
        assert location[1:2] not in {"/", "\\"}, location
        assert urlsplit(urljoin("https://studio.example/a/b?c", location)).netloc == "studio.example", location
    return len(locations) <= 1
