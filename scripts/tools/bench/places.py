"""The places of a request that a sender can fill, and the awkward pieces to fill them with.

`scripts/bench --only hostile` fills each place with each piece. `scripts/fuzz cost` searches for worse mixtures of
them; the worst that it has found are among the pieces here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.tools.bench.stores import ACCOUNT, TEAM

PAGE = f"/client/{ACCOUNT}/t/{TEAM}/posts"
TEAM_PAGE = f"/client/{ACCOUNT}/t/{TEAM}/settings/team"

HEAD = 32_000
"""Bytes of a head: a little less than the service accepts."""
BODY = 16_000
"""Bytes of a body: a little less than the application accepts."""
CHUNKED = 250_000
"""Bytes of a body with its framing: what the service may get from one read."""


@dataclass(frozen=True)
class Place:
    """A place in a request: everything before and after it, and the pieces that its reader may find costly.

    `room` is the size of a filled place in bytes. `characters` limits it to so many characters instead.
    """

    name: str
    before: bytes
    after: bytes
    room: int
    pieces: tuple[bytes, ...]
    characters: int | None = None

    def cut(self, fill: bytes) -> bytes:
        """Return as much of `fill` as the place holds."""
        if self.characters is None:
            return fill[: self.room]
        return fill.decode("utf-8", "ignore")[: self.characters].encode()

    def repeated(self, piece: bytes) -> bytes:
        """Return the place's content if `piece` fills it."""
        times = self.room // len(piece)
        return self.cut(piece * times) if self.characters else piece * times

    def request(self, fill: bytes) -> bytes:
        """Return the request with `fill` in this place."""
        head, blank, body = (self.before + fill + self.after).partition(b"\r\n\r\n")
        if body and b"\r\nTransfer-Encoding:" not in head:
            head += b"\r\nContent-Length: %d" % len(body)
        return head + blank + body


def _place(
    name: str, template: str, pieces: Sequence[bytes], room: int = HEAD, *, characters: int | None = None
) -> Place:
    before, _, after = template.partition("<>")
    host = "\r\nHost: studio.example"
    line, end, rest = before.partition("\r\n") if "\r\n" in before else ("", "", before)
    if not end:  # the place is in the request line
        line, end, rest = after.partition("\r\n")
        after = line + host + end + rest
    else:
        before = line + host + end + rest
    if room == HEAD:
        room -= len(before) + len(after)
    return Place(name, before.encode(), after.encode(), room, tuple(pieces), characters)


_QUERY = (
    b"&",
    b"a&",
    b"sso&",
    b"&sso=",
    b"&s",
    b"%73s%6",
    b"&%73%73%6",
    b"%41%41%41&",
    b"%C3%A4=1&",
    b"%",
    b"+",
    b"%25",
    b"=",
)
_PATH = (
    b"/",
    b"/a",
    b"/%41",
    b"/%C3%A4",
    b"%41",
    b"%C3%A4",
    b"%C3%9F",
    b"%",
    b"%a",
    b"%zz",
    b"a%41",
    b"~",
    b"%3d",
    b"=",
    b"/~",
)
_COOKIES = (b";", b"studio_session=a;", b"; studio_session", b";\xa0", b";studio_session ", b"=", b"a=b; ", b"; ")
_LANGUAGES = (b",", b"de,", b"de;q=0.1,", b"-", b"de;q=1e-9,", b"de-", b";", b"\xa0,", b"de;q=" + b"1" * 4000)
_URIS = (b",/", b",/a", b",/client/123/t/42/posts", b"/a", b"/%41", b"%41", b"%", b"&", b"a", b"?", b",")
_ADDRESSES = (
    b"".join(b"10.%d.%d.1," % divmod(number, 250) for number in range(2600)),  # each of a trusted proxy
    b"".join(b"10.%d.%d.1," % divmod(number, 250) for number in range(80)),
    b"127.0.0.1,",
    b"::1,",
    b",",
    b":",
    b"1.2.3.4,",
    b"[",
    b"127.0.0.1:1,",
    b"a,",
    b"\xa0",
    b"9",
)
_LINES = (
    tuple(
        name + value
        for name in (
            b"a Accept Accept-Language Authorization Content-Type Cookie Origin Purpose Referer Sec-Fetch-Dest "
            b"Sec-Fetch-Site Sec-Purpose X-Forwarded-For X-Forwarded-Proto X-Forwarded-Uri X-Moz X-Original-URI "
            b"X-Request-ID"
        ).split()
        for value in (b":\r\n", b": a\r\n")
    )
    + tuple(b"X-Original-URI: /client/123/t/%d/posts\r\n" % team for team in (42, 43))
    + (b"X-Forwarded-For: 127.0.0.1\r\n",)
)
_JSON = (
    b"[],",
    b"{},",
    b'{"":0},',
    b'"a",',
    b"1,",
    b"-1,",
    b"1e9,",
    b"[",
    b'{"":',
    b'"',
    b"\\",
    b'"\\u00e4",',
    b"9",
    b"0.1,",
    b"2.2250738585072011e-308,",
    b"9" * 4300 + b",",
    b"0." + b"5" * 700 + b"e-300,",
    b"null,",
    b"\n",
    "😀".encode(),
    b"\\ud800",
)
_KEYS = (b'"":0,', b'"a":[],', b'"email":"",', b'"token":"a",', b'"\\u0061":{},', b'"a":"\\n",')
_TEXT = (
    b"a",
    b" ",
    b"\\n",
    b"\\u00e4",
    b"\\ud83d\\ude00",
    b"\\ud800",
    "ä".encode(),
    "\u0390".encode(),
    "\u3000".encode(),
    b"\\u0000",
)
_DOMAIN = (
    b"b.",
    b"a",
    b"xn--4ca.",
    b"xn--a.",
    b"-",
    b".",
    b"xn--",
    "ä.".encode(),
    "ä".encode(),
    "\ufdfa".encode(),
    "\uac01".encode(),
    "\u0627\u200d".encode(),
    "\u3002a".encode(),
    "a\u0323\u0301".encode(),
    "\u0627.".encode(),
    "\u4e00.".encode(),
    "\u4e00".encode(),
    "ß.".encode(),
    "\u30fb".encode(),
    "\u00b7l".encode(),
    "\u0660".encode(),
    "\U0001f600.".encode(),
    "a\u00ad".encode(),
    b"@",
    b"[",
    "\u05d0.".encode(),
    "\u05d0".encode(),
    b"1.",
    "\u2460.".encode(),
    "\u33ff.".encode(),
)
_LOCAL = (
    b"a.",
    b"a",
    b".",
    b'\\"',
    b"\\\\",
    "ä".encode(),
    b"<",
    b"(",
    b"+",
    "\u0301".encode(),
    "\ufdfa".encode(),
    b" ",
    b"@",
    b"a@",
)
_FORM = (
    b"%41",
    b"%",
    b"+",
    b"&",
    b"a&",
    b"a=&",
    b"%C3%A4",
    b"%ff",
    b"=",
    b"\xff",
    b"\xe4%e4",
    b"&token=",
    b"%00",
    b"%F0%9F%98%80",
    b"a",
)
_CHUNKS = (b"1\r\na\r\n", b"1;a\r\na\r\n", b"01\r\n\r\r\n", b"1;" + b"a" * 1000 + b"\r\na\r\n")


def places(cookie: str, secret: str) -> Iterator[Place]:
    """Yield all places. `cookie` is that of an admin's session, `secret` that of an API token."""
    session = f"Cookie: studio_session={cookie}\r\n"
    post = f"HTTP/1.1\r\nAuthorization: Bearer {secret}\r\nContent-Type: application/json\r\n"
    yield _place("an ordinary login link", f"GET {PAGE}?sso={'A' * 43}<> HTTP/1.1\r\nAccept: text/html\r\n\r\n", (), 1)
    for name, target, headers in (
        ("login link", "/x?<>&sso=A", ""),
        ("login link with a page", "/x?sso=A&<>", "Accept: text/html\r\n"),
        ("no login link", "/x?<>", ""),
        ("page", TEAM_PAGE + "?search=<>", session),
        ("page, many", TEAM_PAGE + "?" + "a=%41&" * 190 + "search=<>", session),
        ("/session", "/session?<>", session),
    ):
        yield _place(f"query, {name}", f"GET {target} HTTP/1.1\r\n{headers}\r\n", _QUERY)
    for name, target, headers in (
        ("login link", "/<>?sso=A", ""),
        ("page", "/<>", session),
        ("account", "/client/<>", session),
        ("section", PAGE + "/<>", session),
    ):
        yield _place(f"path, {name}", f"GET {target} HTTP/1.1\r\n{headers}\r\n", _PATH)
    for target in ("/auth", "/session", f"{PAGE}?sso=A", TEAM_PAGE):
        yield _place(f"header lines, {target}", f"GET {target} HTTP/1.1\r\n{session}<>X: y\r\n\r\n", _LINES)
    for header, target, pieces in (
        ("Cookie", "/auth", _COOKIES),
        ("Cookie", f"{PAGE}?sso=A", _COOKIES),
        ("Accept-Language", f"{PAGE}?sso=A\r\nAccept: text/html", _LANGUAGES),
        ("Accept", f"{PAGE}?sso=A", (b"html,json,", b"text/html", b"application/json,", b",")),
        ("Authorization", "/metrics", (b"Bearer ", b" ", b"a", b"\xe4")),
        ("X-Forwarded-For", "/session", _ADDRESSES),
        ("X-Forwarded-For: 1.2.3.4", "/session", _ADDRESSES),
        ("X-Forwarded-Proto", "/session", (b"https,", b" ", b"\xa0")),
        ("X-Request-ID", "/session", (b"a", b"-", b"\xe4", b"/")),
        ("Sec-Purpose", f"{PAGE}?sso=A", (b"prefetc,", b"previe", b",")),
        ("Sec-Fetch-Dest", f"{PAGE}?sso=A", (b"document,", b"a")),
        ("Origin", "/logout", (b"https://", b"a", b":")),
        ("Content-Length", "/x", (b"0", b"9")),
        ("Content-Type", "/session", (b"a;", b'="')),
        ("User-Agent", f"{PAGE}?sso=A", (b"bot ", b"(")),
        ("Referer", f"{PAGE}?sso=A", (b"/", b"?sso=")),
    ):
        path, _, more = target.partition("\r\n")
        method = "POST" if path == "/logout" else "GET"
        yield _place(
            f"{header}, {path}",
            f"{method} {path} HTTP/1.1\r\n{more}{chr(13) + chr(10) if more else ''}{header}: <>\r\n\r\n",
            pieces,
        )
    for header in ("X-Original-URI", "X-Forwarded-Uri"):
        for start in ("/a", "/a?", "/a?" + "&a" * 150):
            yield _place(f"{header}: {start[:6]}", f"GET /auth HTTP/1.1\r\n{session}{header}: {start}<>\r\n\r\n", _URIS)
    preflight = (
        "Origin: https://portal.example\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: "
    )
    yield _place(
        "Access-Control-Request-Headers",
        f"OPTIONS /v1/sso_tokens HTTP/1.1\r\n{preflight}<>\r\n\r\n",
        (b",", b"authorization,", b"a,", b"\xa0,"),
    )
    names = '"first_name":"Jane","last_name":"Doe"'
    for path in ("", "/verify", "/consume"):
        sent = f"POST /v1/sso_tokens{path} {post}\r\n"
        yield _place(
            f"JSON value, {path or 'issue'}", f'{sent}{{"x":[<>0],"token":"a","email":"a",{names}}}', _JSON, BODY
        )
        yield _place(f"JSON value unfinished, {path or 'issue'}", f'{sent}{{"x":[<>', _JSON, BODY)
        yield _place(f"JSON keys, {path or 'issue'}", f'{sent}{{<>"token":"a","email":"a",{names}}}', _KEYS, BODY)
    sent = f"POST /v1/sso_tokens {post}\r\n"
    yield _place("JSON, token", f'POST /v1/sso_tokens/verify {post}\r\n{{"token":"<>"}}', _TEXT, BODY)
    yield _place("JSON, e-mail", f'{sent}{{"email":"<>",{names}}}', _TEXT, BODY)
    yield _place("JSON, first name", f'{sent}{{"email":"a@b","first_name":"<>","last_name":"Doe"}}', _TEXT, BODY)
    yield _place(
        "JSON, name of 100", f'{sent}{{"email":"a@b","first_name":"<>","last_name":"Doe"}}', _TEXT, 400, characters=100
    )
    for name, address, most in (
        ("domain", "a@<>", 252),
        ("domain of a new user", "a@<>.example", 240),
        ("local part", "<>@b.example", 240),
    ):
        awkward = _LOCAL if name == "local part" else _DOMAIN
        yield _place(f"e-mail, {name}", f'{sent}{{"email":"{address}",{names}}}', awkward, 1000, characters=most)
    form = "HTTP/1.1\r\nSec-Fetch-Site: same-origin\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    yield _place("form, /sso/confirm", f"POST /sso/confirm {form}\r\n<>", _FORM, BODY)
    yield _place("form, /sso/confirm token", f"POST /sso/confirm {form}\r\nform=a.b.c&token=<>&target=/a", _FORM, BODY)
    yield _place(
        "form, /sso/confirm form", f"POST /sso/confirm {form}\r\ntarget=/a&form=<>", (*_FORM, b".", b"IjEi."), BODY
    )
    tokens_page = TEAM_PAGE.replace("team", "api-tokens")
    yield _place("form, API token", f"POST {tokens_page} {form}{session}\r\nname=<>", _FORM, BODY)
    yield _place("form, role", f"POST {TEAM_PAGE}/1/role {form}{session}\r\nrole=a&search=<>", _FORM, BODY)
    chunked = f"POST /v1/sso_tokens {post}Transfer-Encoding: chunked\r\n\r\n"
    yield _place("chunks", f"{chunked}<>0\r\n\r\n", _CHUNKS, CHUNKED)
    yield _place("trailers", f"{chunked}1\r\na\r\n0\r\n<>\r\n", (b"a:\r\n", b"a: b\r\n"), CHUNKED)
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"):
        yield _place(path, f"GET {path}<> HTTP/1.1\r\n\r\n", (), 0)
