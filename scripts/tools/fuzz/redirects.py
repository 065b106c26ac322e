"""Target: the redirect after a login, compared with how a browser reads it (WHATWG URL standard)."""

from urllib.parse import parse_qsl, unquote_to_bytes

from ada_url import URL

from sso_service.errors import NotAStudioPath, NotCanonical
from sso_service.http import split_parameter
from sso_service.paths import judge
from sso_service.permissions import Role, may_view

HOST = "https://studio.example"
PAGE = f"{HOST}/client/123/t/42/posts"


def check(data: bytes) -> None:
    """Check `data` as the target of a request line: path and query."""
    path, _, query = data.partition(b"?")
    values, rest = split_parameter(query)
    _check_query(query, values, rest)
    try:
        addressed = judge(path)
    except (NotCanonical, NotAStudioPath):
        return
    location = path + (b"?" + rest if rest else b"")
    # A browser decodes the header as Latin-1 (Fetch standard, section 2.2.2: isomorphic decode), or as UTF-8 if it is
    # valid UTF-8. Both readings stay on this host.
    assert URL(location.decode("latin-1"), PAGE).href.startswith(f"{HOST}/")
    url = URL(location.decode("utf-8", "replace"), PAGE)
    assert url.href.startswith(f"{HOST}/")
    # The browser requests the same path. It addresses the same account and team and requires the same role.
    asked = url.pathname.encode()
    assert unquote_to_bytes(asked) == unquote_to_bytes(path)
    seen = judge(asked)
    assert (seen.account_id, seen.team_id) == (addressed.account_id, addressed.team_id)
    assert all(may_view(role, seen.section or "") == may_view(role, addressed.section or "") for role in Role)
    # The browser's request contains no token. White space and fragments, which a browser would remove, cannot be in a
    # query.
    if min(query, default=0x21) > 0x20 and b"#" not in query:
        assert split_parameter(url.search.removeprefix("?").encode())[0] == []


def _check_query(query: bytes, values: list[bytes], rest: bytes) -> None:
    """Check that every spelling of `sso`, and nothing else, is removed from a query."""
    pieces = query.split(b"&")
    kept = rest.split(b"&") if rest or not values else []
    removed = [piece for piece in pieces if _pairs(piece)[:1] and _pairs(piece)[0][0] == "sso"]
    assert [piece.partition(b"=")[2] for piece in removed] == values
    assert [piece for piece in pieces if piece not in removed] in (kept, [*kept, b""], [b""])
    assert split_parameter(rest) == ([], rest)
    assert _pairs(rest) == [(name, value) for name, value in _pairs(query) if name != "sso"]


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True, encoding="latin-1")


_TOKEN = b"sso=cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"
SEEDS = [
    PAGE.removeprefix(HOST).encode() + b"?" + _TOKEN,
    b"/client/123?chromeless=1&" + _TOKEN + b"&a=%20+;&&b",
    b"/a?%73s%6f=1&ss%4f=2&sso&SSO=3&%2573so=4",
    b"/?sso=a&sso=b",
    b"/?&&sso=a&",
    b"//evil.example?" + _TOKEN,
    b"/\\evil.example",
    b"/\t/evil.example",
    b"https://evil.example/",
    b"javascript:alert(1)",
    *(b"/a/" + odd + b"/b" for odd in b". .. %2e %2E%2e %2f %5C \\ ; %3b %25 %c2%85 %c2 %".split()),
    b"/caf\xc3\xa9/caf%C3%A9/\xe2\x80\xae?\xff=%ff#x",
    b"/Client/123/%63lient/t/042",
    b"/client/4294967295/t/1/settings/x/",
    b"*",
    b"",
]
