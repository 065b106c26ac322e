"""Hostile paths and spoofed headers behind real reverse proxies, configured by the files of `scripts/deploy`."""

import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from urllib.parse import unquote_to_bytes

from tests.support.data import ACCOUNT, JANE, PAGE
from tests.support.deployments import IDENTITY, NAVIGATION, Deployment
from tests.support.proxies import proxying
from tests.support.studio_server import application

SETTINGS = f"/client/{ACCOUNT}/t/42/settings"

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
