"""The service and a Studio behind real reverse proxies, configured by the very files of `scripts/deploy`."""

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
from tests.support.deployments import NAVIGATION, House, house_with
from tests.support.programs import program
from tests.support.proxies import HOST, PROXIES, proxying
from tests.support.studio_server import application
from tests.support.waiting import PATIENCE

IDENTITY = ["x-studio-user", "x-studio-email", "x-studio-account", "x-studio-role"]


# --- the proxies -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PROXIES)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    program(kind)
    return kind


# --- all of it together ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_house(kind: str, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house_with(kind, sqlite_template, tmp_path_factory.mktemp(kind)) as (house, _):
        yield house


@pytest.fixture
def house(shared_house: House) -> House:
    shared_house.studio.take()
    return shared_house


# --- signing in ------------------------------------------------------------------------------------------------------


def test_nobody_reaches_the_studio_without_having_signed_in(house: House) -> None:
    ask = house.proxy.ask
    for target in ("/", PAGE, f"{PAGE}?a=1", "/static/app.js", "/client/999/t/77/posts"):
        for cookie in ("", "studio_session=WzEsMTIzXQ.aaaaaa.aaaa"):
            assert ask(target, cookie=cookie).status == 401
            assert ask(target, cookie=cookie, method="POST", body=b"a=1").status == 401
            for headers in (NAVIGATION, [("Accept", "text/html")]):
                answer = ask(target, *headers, cookie=cookie)
                assert (answer.status, answer.header("location")) == (303, "https://portal.example/")
                assert answer.header("cache-control") == "no-store"
            fetch = [("Sec-Fetch-Mode", "cors"), ("Accept", "text/html")]
            assert ask(target, *fetch, cookie=cookie).status == 401
    assert not house.studio.seen


def test_a_login_link_opens_the_studio_which_is_told_who_it_is(house: House) -> None:
    target = f"{PAGE}/7?chromeless=1"
    answer = house.proxy.ask(f"{target}&sso={house.issue()}", *NAVIGATION)
    assert (answer.status, answer.header("location")) == (303, target)
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("strict-transport-security")
    # With `no-referrer` a browser would not say where the answer to a question comes from.
    assert house.proxy.ask(f"{PAGE}?sso={'A' * 43}", *NAVIGATION).header("referrer-policy") == "strict-origin"
    cookie, _, attributes = (answer.header("set-cookie") or "").partition(";")
    assert "Secure" in attributes, "the service was not told of TLS"
    session = house.proxy.ask("/session", cookie=cookie).json()
    answer = house.proxy.ask(target, *NAVIGATION, cookie=cookie)
    assert (answer.status, answer.text) == (200, "Studio")
    [seen] = house.studio.seen
    assert (seen.method, seen.target) == ("GET", target.encode())
    assert [seen.values(name) for name in IDENTITY] == [
        [str(session["user"]["id"])],
        [JANE["email"]],
        [str(ACCOUNT)],
        ["editor"],
    ]
    assert seen.values("host") == [f"{HOST}:{house.proxy.port}"]
    assert seen.values("x-forwarded-proto") == ["https"]
    assert seen.values("x-forwarded-for") == ["127.0.0.1"]


def test_a_role_is_what_it_is_at_the_next_request(house: House) -> None:
    def statuses() -> list[int]:
        paths = (PAGE, f"{PAGE}/7/edit", SETTINGS, f"/client/{ACCOUNT}/t/42/topics", FOREIGN)
        return [house.proxy.ask(path, *NAVIGATION, cookie=cookie).status for path in paths]

    cookie = house.sign_in(JOHN)
    assert statuses() == [200, 200, 403, 403, 403]
    house.run("user", "set-role", JOHN["email"], "--account", str(ACCOUNT), "admin")
    assert statuses() == [200, 200, 200, 200, 403]
    assert house.studio.take()[-1].values("x-studio-role") == ["admin"]
    house.run("user", "set-role", JOHN["email"], "--account", str(ACCOUNT), "publisher")
    assert statuses() == [200, 200, 403, 200, 403]
    house.studio.take()
    house.run("user", "disable", JOHN["email"])
    assert [house.proxy.ask(path, cookie=cookie).status for path in (PAGE, "/")] == [401, 401]
    assert not house.studio.seen


def test_signing_out_ends_it(house: House) -> None:
    cookie = house.sign_in()
    assert house.proxy.ask(PAGE, cookie=cookie).status == 200
    foreign = house.proxy.ask("/logout", ("Origin", "https://evil.example"), method="POST", cookie=cookie)
    assert foreign.status == 403
    answer = house.proxy.ask("/logout", ("Origin", f"https://{HOST}:{house.proxy.port}"), method="POST", cookie=cookie)
    assert answer.status == 204
    kept = (answer.header("set-cookie") or "").partition(";")[0]
    assert house.proxy.ask(PAGE, cookie=kept).status == 401


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


def test_a_query_with_sso_in_whatever_spelling_never_reaches_the_studio(house: House) -> None:
    cookie = house.sign_in()
    for spelling, query in product(SPELLINGS, ["{}", "{}&a=1", "a=%20&{}", "&{}&"]):
        token = house.issue()
        answer = house.proxy.ask(f"{PAGE}?{query.format(f'{spelling}={token}')}")
        assert answer.status == 303, (spelling, query)
        assert answer.header("location") in {PAGE, f"{PAGE}?a=1", f"{PAGE}?a=%20", f"{PAGE}?&"}
    for query in BROKEN:
        token = house.issue()
        assert house.proxy.ask(f"{PAGE}?{query.replace('T', token)}", cookie=cookie).status == 401, query
        assert house.works(token), query
    assert house.proxy.ask(f"{PAGE}?a#&sso=T", cookie=cookie).status in {400, 404}
    assert not house.studio.seen
    for query in NO_SSO:
        assert house.proxy.ask(f"{PAGE}?{query}", cookie=cookie).status == 200, query
    assert [seen.target for seen in house.studio.seen] == [f"{PAGE}?{query}".encode() for query in NO_SSO]


def test_what_only_asks_about_a_link_does_not_use_it_up(house: House) -> None:
    token = house.issue()
    for method, headers in [("HEAD", []), ("OPTIONS", []), ("POST", []), ("GET", [("Sec-Purpose", "prefetch")])]:
        answer = house.proxy.ask(f"{PAGE}?sso={token}", *headers, method=method)
        assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
    assert house.works(token)
    assert not house.studio.seen


# --- what is the service's -------------------------------------------------------------------------------------------

INTERNAL = b"""
    /readyz /%72eadyz?sso=T
    /metrics /auth /%6detrics /%61%75%74%68 /metrics?sso=T /auth?sso=T /%6detrics?%73so=T /metrics#?sso=T
    /metrics?a#&sso=T /metrics%0a?sso=T /x/../metrics?sso=T /x/%2e%2e/metrics?sso=T /./metrics?sso=T //metrics?sso=T
    /v1/../metrics /v1/..//auth /V1/../metrics /sso/../metrics /sso/%2e%2e/auth
    https://studio.example/metrics?sso=T x:/metrics?sso=T x:metrics?sso=T x:http://studio.example/metrics?sso=T
    x:http://studio.example/auth?sso=T x:http://studio.example/metrics *?sso=T
""".split()


def test_the_services_own_paths_are_reached_but_those_for_the_machines_behind_the_proxy(house: House) -> None:
    for path in ("/healthz", "/docs"):
        assert house.proxy.ask(path).status == 200
    for path in ("/healthz?sso=T", "/session?sso=T"):
        assert house.proxy.ask(path).status in {200, 401}
    assert house.proxy.ask("/v1/sso_tokens", method="POST", body=b"{}").error == "missing_token"
    for path in ("/v1/nothing", "/sso/nothing"):
        assert house.proxy.ask(path, ("Accept", "application/json")).error == "not_found"
    cookie = house.sign_in()
    for target in INTERNAL:
        headers = [("X-Original-URI", "/"), ("X-Forwarded-Uri", "/")]
        answer = house.proxy.ask(target, *headers, cookie=cookie)
        assert answer.status in {400, 401, 403, 404}, target
        assert answer.header("set-cookie") is None, target
        assert not {name for name, _ in answer.headers} & set(IDENTITY), target
    assert not house.studio.seen


def test_another_host_name_is_not_served(house: House) -> None:
    cookie, token = house.sign_in(), house.issue()
    for path in ("/session", PAGE, f"{PAGE}?sso={token}"):
        for target, host in [
            (path, "evil.example"),
            (path, "127.0.0.1"),
            (path, f"{HOST}.evil.example"),
            (f"https://evil.example{path}", ""),
        ]:
            answer = house.proxy.ask(target, *NAVIGATION, cookie=cookie, host=host)
            assert (answer.status, answer.body) == (200, b"") or answer.status == 421, (target, host)
            assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
    assert not house.studio.seen
    assert house.works(token)


def test_without_tls_there_is_nothing_but_the_way_to_it(house: House) -> None:
    token = house.issue()
    for method, target in [("GET", f"{PAGE}?sso={token}"), ("GET", "/"), ("POST", "/v1/sso_tokens")]:
        with closing(HTTPConnection("127.0.0.1", house.proxy.http_port, timeout=PATIENCE)) as connection:
            connection.request(method, target, headers={"Host": HOST})
            answer = connection.getresponse()
            assert answer.status in {301, 308}
            assert (answer.headers["Location"], answer.read()[:9]) in [
                (f"https://{HOST}{target}", b"<html>\r\n<"),
                (f"https://{HOST}:{house.proxy.port}{target}", b""),
                (f"https://{HOST}{target}", b""),
            ]
    assert not house.studio.seen
    assert house.works(token)


# --- tricks with paths -----------------------------------------------------------------------------------------------

SETTINGS = f"/client/{ACCOUNT}/t/42/settings"
FOREIGN = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts"

# What a link can lead to but an editor of account 123 may not see.
ABOVE_AN_EDITOR = b"""
    /client/123/t/42/settings /client/123/t/42/settings/ /client/123/t/42/settings/posts /client/123/t/42/topics
    /client/123/t/42/Settings /client/123/t/42/%73ettings /client/123/t/42/posts, /client/123/t/42/posts,/settings
    /client/123/t/42/posts%20
""".split()

# What nobody in account 123 may see, or what can be read in more than one way.
TRICKS = [
    # Another account, or a team of another account or of none.
    *b"/client/999 /client/999/ /client/999/t/77/posts /client/999/t/42/posts".split(),
    *b"/client/123/t/77/posts /client/123/t/43/posts".split(),
    # Not of the form of a Studio path.
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
    # Slashes: two of them, or one in disguise.
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
    # Control characters and what is not UTF-8.
    *b"""
    /client/123/t/42/posts%00/../settings /client/123/t/42/settings%00 /client/123/t/42/settings%0a
    /client/123/t/42/posts%0d%0a /%09/client/999/t/77/posts /client/123/t/42/settings%09
    /client/123/t/42/posts/%ff/../settings /client/123/t/42/posts/% /client/123/t/42/posts/%u002e%u002e/settings
    """.split(),
    b"/client/123/t/42/posts/\xff",
    b"/client/123/t/42/posts/\x01",
    b"/client/123/t/42/posts/\t../settings",
    # Not only a path, or none.
    *b"""
    /client/999/t/77/posts#/../../client/123/t/42/posts /client/123/t/42/posts#/../settings
    https://studio.example/client/999/t/77/posts https://studio.example//client/999/t/77/posts
    x:/client/999/t/77/posts x:client/999/t/77/posts x:http://studio.example/client/999/t/77/posts
    client/999/t/77/posts * @evil.example/
    """.split(),
]


def readings(target: bytes) -> Iterator[list[str]]:
    """The segments of a path in every way that we know some server to read it."""
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
    """True if there is no reading of the path that an editor of account 123, team 42, may not see."""
    for segments in readings(target):
        match segments:
            case ["client", *rest] if (
                rest[:1] != ["123"] or rest[1:2] not in ([], ["t"]) or rest[2:3] not in ([], ["42"])
            ):
                return False
            case ["client", _, _, _, section, *_] if section not in {"posts", "ideas"}:
                return False
    return True


def test_the_reader_of_paths_that_these_tests_rest_on_sees_through_the_tricks() -> None:
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


def test_no_trick_with_the_path_signs_in_or_uses_a_link_up(house: House) -> None:
    token = house.issue()
    for trick in TRICKS:
        for target in (trick + b"?sso=" + token.encode(), trick + b"?a=1&%73so=" + token.encode() + b"&b"):
            answer = house.proxy.ask(target, *NAVIGATION)
            assert answer.status in {400, 403, 404, 421}, target
            assert (answer.header("location"), answer.header("set-cookie")) == (None, None), target
    assert not house.studio.seen
    assert house.works(token)


LIES = [
    [],
    [("X-Forwarded-Uri", PAGE)],
    [("X-Original-URI", PAGE)],
    [("X-Forwarded-Uri", PAGE), ("X-Original-URI", PAGE), ("X-Original-URI", "/")],
    [("X_Forwarded_Uri", PAGE), ("X_Original_URI", PAGE), ("X-Studio-Role", "admin")],
]


def test_no_trick_with_the_path_shows_an_editor_what_is_not_theirs(house: House) -> None:
    cookie = house.sign_in()
    for trick, lie in product(ABOVE_AN_EDITOR + TRICKS, LIES):
        answer = house.proxy.ask(trick + b"?a=" + PAGE.encode(), *lie, cookie=cookie)
        assert answer.status in {400, 403, 404}, (trick, lie)
        assert not house.studio.seen, (trick, lie)


PIECES = (
    b"client CLIENT %63lient 123 0123 999 t 42 77 posts settings a .. . %2e%2e .%2e %252e %20 %C3%A4 \xc3\xa4".split()
)
JOINTS = [b"/"] * 12 + b"// %2f %252f \\ %5c ; ;/ %3b # , |".split()


def test_what_the_studio_is_asked_for_is_an_editors_in_every_reading(house: House) -> None:
    cookie = house.sign_in()
    chance = random.Random(42)
    beginnings = [b"", b"/client/123", b"/client/123/t/42", PAGE.encode()]
    for _ in range(600):
        path = chance.choice(beginnings)
        for _ in range(chance.randint(1, 4)):
            path += chance.choice(JOINTS) + chance.choice(PIECES)
        house.proxy.ask(path, cookie=cookie)
    targets = {request.target for request in house.studio.seen}
    assert len(targets) > 30
    for target in targets:
        assert is_for_an_editor_of_the_account(target), target


def test_a_client_cannot_say_who_it_is(house: House, kind: str) -> None:
    cookie = house.sign_in()
    names = [*IDENTITY, *(name.upper() for name in IDENTITY), *(name.replace("-", "_") for name in IDENTITY)]
    names += ["X_Studio-Role", "X-Studio_Role", "x_studio_role", "X_STUDIO_FOO"]
    if kind == "caddy":
        names.append("X-Studio-Foo")  # nginx cannot clear names that it is not told of
    lies = [(name, value) for name in names for value in ("1", "admin")]
    others = [
        ("X-Original-URL", SETTINGS),
        ("X-Rewrite-URL", SETTINGS),
        ("X-Original-URI", "/"),
        ("X-Forwarded-Uri", "/"),
    ]
    for headers in (lies, lies + others, [("Connection", "close, X-Studio-Role, X-Studio-User, Cookie, Host"), *lies]):
        # A client that sends nothing else is not signed in by it.
        assert house.proxy.ask(PAGE, *headers).status == 401
        answer = house.proxy.ask(PAGE, *headers, cookie=cookie)
        assert answer.status == 200
        [seen] = house.studio.take()
        assert {name for name, _ in seen.headers if re.match("x.studio", name)} == set(IDENTITY)
        assert [len(seen.values(name)) for name in IDENTITY] == [1, 1, 1, 1]
        assert seen.values("x-studio-role") == ["editor"]
        assert seen.values("x-studio-email") == [JANE["email"]]
        assert not {name for name, _ in seen.headers} & {name.lower() for name, _ in others}
        assert SETTINGS not in str(seen.headers)


# --- what is judged is what is forwarded ------------------------------------------------------------------------------

ODD = [
    *b"/ /? /?a=/../..//&b=%2e%2e%5c;x#y /client/123/t/42/posts/a%20b%C3%A4/".split(),
    b'/client/123/t/42/posts/\xc3\xa4|^[]"<>`{}',
    *b"/client/123/t/42/posts/%7C%5E%41 /a,b:c@d=e+f&g!h$i'(j)*k~ /a%2fb\"c".split(),
    b"/" + b"a" * 3000,
]


def test_the_service_is_asked_about_exactly_what_the_studio_gets(kind: str, tmp_path: Path) -> None:
    with (
        application() as service,
        application() as studio,
        proxying(kind, [f"127.0.0.1:{service.port}"], studio.port, tmp_path / "proxy") as proxy,
    ):
        # It allows whatever it is asked for, even what ours would refuse.
        service.status, service.headers = "204 No Content", [(name, "of the service") for name in IDENTITY]
        for target, method in product(ODD + ABOVE_AN_EDITOR + TRICKS, ("GET", "POST")):
            lies = [("X-Forwarded-Uri", "/"), ("X-Original-URI", "/"), ("Upgrade", "websocket")]
            proxy.ask(target, *lies, method=method, cookie="a=b", body=b"body" if method == "POST" else b"")
            asked, got = service.take(), studio.take()
            assert len(asked) == len(got) <= 1, target
            if not got:
                assert target not in ODD
                continue
            original = asked[0].values("x-original-uri") + asked[0].values("x-forwarded-uri")
            assert original == [got[0].target.decode("latin-1")], target
            assert (asked[0].method, asked[0].target.rstrip(b"?"), asked[0].body) == ("GET", b"/auth", b"")
            assert asked[0].values("cookie") == ["a=b"]
            assert not asked[0].values("upgrade")
            assert got[0].method == method
            assert got[0].body == (b"body" if method == "POST" else b"")
            assert [got[0].values(name) for name in IDENTITY] == [["of the service"]] * 4


# --- when the service cannot say yes ----------------------------------------------------------------------------------


def test_an_answer_that_is_not_yes_lets_nobody_through(kind: str, tmp_path: Path) -> None:
    with (
        application() as service,
        application() as studio,
        proxying(kind, [f"127.0.0.1:{service.port}"], studio.port, tmp_path / "proxy") as proxy,
    ):
        for status in ("500 No", "503 No", "404 No", "302 No", "400 No", "401 No", "403 No", "429 No"):
            service.status, service.headers = status, [("Location", "/"), ("X-Studio-Role", "admin")]
            for headers in ([], NAVIGATION, [("Upgrade", "websocket"), ("Connection", "Upgrade")]):
                assert proxy.ask(PAGE, *headers, ("X-Studio-Role", "admin"), cookie="a=b").status >= 300, status
        assert service.seen
        assert not studio.seen
        service.status, service.headers = "204 No Content", []
        assert proxy.ask(PAGE, ("X-Studio-Role", "admin"), ("X-Studio-User", "1")).status == 200
        assert not {value for name in IDENTITY for value in studio.seen[0].values(name)} & {"admin", "1"}


def test_without_the_service_nobody_gets_in_and_no_token_into_a_log(
    kind: str, sqlite_template: Path, tmp_path: Path
) -> None:
    with house_with(kind, sqlite_template, tmp_path) as (house, stop):
        cookie, token = house.sign_in(), house.issue()
        assert house.proxy.ask(PAGE, cookie=cookie).status == 200
        house.studio.take()
        stop()
        for headers in ([], NAVIGATION, [("Upgrade", "websocket"), ("Connection", "Upgrade")]):
            assert house.proxy.ask(PAGE, *headers, cookie=cookie).status in {500, 502, 503}
            for target in (f"{PAGE}?sso={token}", f"{PAGE}?a&%73so={token}"):
                answer = house.proxy.ask(target, *headers, ("Referer", f"https://{HOST}{target}"), cookie=cookie)
                assert answer.status in {500, 502, 503}
                assert (answer.header("location"), answer.header("set-cookie")) == (None, None)
                # Or the address of this error page, with the token, would be the Referer of what the browser asks next.
                assert answer.header("referrer-policy") == "no-referrer"
        assert not house.studio.seen
        written = everything_logged(house)
        assert PAGE in written
        assert token not in written


# --- what else passes -------------------------------------------------------------------------------------------------


def everything_logged(house: House) -> str:
    """What the proxy and the service have written down about all that was asked until now."""
    mark = f"/{random.randbytes(8).hex()}"
    house.proxy.ask(mark)
    deadline = time.monotonic() + PATIENCE
    while mark not in (written := house.proxy.logged()):
        assert time.monotonic() < deadline, "the proxy writes no log"
        time.sleep(0.01)
    return written + Path(house.env["SSO_HOME"], "service.log").read_text()


def test_no_log_has_a_token_in_it(house: House) -> None:
    used, unused = house.issue(), house.issue()
    cookie = house.sign_in()
    referer = ("Referer", f"https://{HOST}{PAGE}?sso={unused}")
    for query in (f"sso={used}", f"sso={used}", f"a&s%73o={used}", f"sso={used}&sso={unused}", f"sso={unused};x"):
        house.proxy.ask(f"{PAGE}?{query}", referer)
    before = [f"{PAGE}?a#&", "/a//b?", "/metrics?", "/session?", f"https://{HOST}{PAGE}?sso&", "x:y?", "/%zz?"]
    for target in [*(f"{start}sso={unused}" for start in before), f"{PAGE}#?sso={house.issue()}"]:
        house.proxy.ask(target, referer, cookie=cookie)
    for method in ("HEAD", "POST", "BREW"):
        house.proxy.ask(f"{PAGE}?sso={unused}", referer, method=method)
    # Nor is a body of any length waited for, and kept, before the service has said no.
    for length in ("100000", "9999999999"):
        answer = house.proxy.ask(f"{PAGE}?sso={unused}", ("Content-Length", length), method="POST")
        assert answer.status in {405, 413}
    house.proxy.ask(f"{PAGE}?sso={unused}", host="evil.example")
    house.proxy.ask(PAGE, referer, cookie=cookie)
    written = everything_logged(house)
    assert f"{PAGE}" in written
    for secret in (used, unused, unused[:20], cookie.partition("=")[2], house.api_token):
        assert secret not in written


def converse(house: House, target: str, *headers: tuple[str, str]) -> tuple[int, bytes]:
    """The status of the answer to a request that may upgrade, and what is said after it if it did."""
    lines = [f"GET {target} HTTP/1.1", f"Host: {HOST}", *(f"{name}: {value}" for name, value in headers), "", ""]
    with closing(house.proxy.connect()) as connection:
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


def test_a_websocket_is_opened_for_who_may_see_its_path(house: House) -> None:
    websocket = [("Upgrade", "WebSocket"), ("Connection", "keep-alive, Upgrade"), ("Sec-WebSocket-Key", "YQ==")]
    assert converse(house, PAGE, *websocket) == (401, b"")
    cookie = ("Cookie", house.sign_in())
    assert converse(house, SETTINGS, *websocket, cookie) == (403, b"")
    assert converse(house, "/client/123/t/42/posts/../settings", *websocket, cookie) == (403, b"")
    assert not house.studio.seen
    assert converse(house, PAGE, *websocket, ("X-Studio-Role", "admin"), cookie) == (101, b"echo hello\n")
    [seen] = house.studio.take()
    assert seen.values("x-studio-role") == ["editor"]
    assert seen.values("sec-websocket-key") == ["YQ=="]


def test_no_other_upgrade_passes(house: House) -> None:
    cookie = house.sign_in()
    several = [["h2c", "websocket"], ["websocket", "h2c"], ["h2c, websocket"]]
    for upgrades in (["h2c"], ["websocketx"], ["TLS/1.0"], *several):
        for connection in ("Upgrade, HTTP2-Settings", "close, upgrade"):
            headers = [("Connection", connection), ("HTTP2-Settings", "AAMAAABkAAQAAP__")]
            answer = house.proxy.ask(PAGE, *(("Upgrade", each) for each in upgrades), *headers, cookie=cookie)
            # Of two headers nginx reads the first, and sends on that alone.
            assert answer.status in {101, 200, 400}, upgrades
            for seen in house.studio.take():
                assert not [value for value in seen.values("upgrade") if value.lower() != "websocket"], upgrades


def test_a_body_reaches_the_studio_whole_and_nobody_else(house: House) -> None:
    cookie = house.sign_in()
    body = random.randbytes(300_000)
    assert house.proxy.ask(PAGE, method="PUT", body=body, cookie=cookie).status == 200
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:7], body[7:200_000], body[200_000:]))
    trailer = b"0\r\nX-Studio-Role: admin\r\nX-Studio-Foo: admin\r\n\r\n"
    headers = [("Transfer-Encoding", "chunked"), ("Trailer", "X-Studio-Role, X-Studio-Foo")]
    assert house.proxy.ask(PAGE, *headers, method="POST", body=chunked + trailer, cookie=cookie).status == 200
    put, post = house.studio.take()
    assert (put.method, put.body) == ("PUT", body)
    assert (post.method, post.body) == ("POST", body)
    assert post.values("x-studio-role") == ["editor"]
    assert not post.values("x-studio-foo")
    # Who may not pass, passes with no body either.
    # A short one: of a long one Caddy does not read the end, and may hang up while it is being sent.
    assert house.proxy.ask(SETTINGS, method="POST", body=body[:10_000], cookie=cookie).status == 403
    assert not house.studio.seen
