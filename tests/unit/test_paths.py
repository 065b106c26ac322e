"""Paths: Studio paths, other canonical paths, and paths that are refused because they are not canonical."""

from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sso_service.errors import NotAStudioPath, NotCanonical
from sso_service.paths import StudioPath, judge

POSTS = StudioPath(account_id=123, team_id=42, section="posts")
ELSEWHERE = StudioPath()


def refused(path: bytes) -> None:
    with pytest.raises(NotCanonical):
        judge(path)


# --- Canonical paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "addressed"),
    [
        (b"/client/123", StudioPath(123)),
        (b"/client/123/", StudioPath(123)),
        (b"/client/123/t/42", StudioPath(123, 42)),
        (b"/client/123/t/42/", StudioPath(123, 42)),
        (b"/client/123/t/42/posts", POSTS),
        (b"/client/123/t/42/posts/", POSTS),
        (b"/client/123/t/42/posts/7/edit", POSTS),
        (b"/client/123/t/42/posts/7/settings/", POSTS),
        (b"/client/1/t/2/settings", StudioPath(1, 2, "settings")),
        (b"/client/4294967295/t/4294967295/ideas", StudioPath(4294967295, 4294967295, "ideas")),
        (b"/client/123/t/42/posts/a%20b%C3%A4%3F%23", POSTS),
    ],
)
def test_a_studio_path_addresses_account_team_and_section(path: bytes, addressed: StudioPath) -> None:
    assert judge(path) == addressed


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/welcome",
        b"/welcome/",
        b"/a/b/c",
        b"/clients/0123",
        b"/clien/1",
        b"/t/42",
        b"/en/client/0123/x",
        b"/...",
        b"/.well-known/security.txt",
        b"/a..b/..c/d..",
        b"/a%20b",
        b"/caf%C3%A9/%F0%9F%91%8D",
        b"/a:b@c=d+e,f&g~h!i$j'k(l)m*n",
    ],
)
def test_any_other_canonical_path_needs_only_a_session(path: bytes) -> None:
    assert judge(path) == ELSEWHERE


SPELLINGS = rb"client Client CLIENT cLIENt %63lient clien%74 %63%6C%69%65%6e%74 %43LIENT C%4Cient".split()


@pytest.mark.parametrize("first", SPELLINGS)
@pytest.mark.parametrize("rest", [b"", b"/", b"/0123", b"/123/t", b"/123/posts", b"/123/t/042/posts"])
def test_a_malformed_client_path_is_refused_in_every_spelling(first: bytes, rest: bytes) -> None:
    with pytest.raises(NotAStudioPath):
        judge(b"/" + first + rest)


@pytest.mark.parametrize("first", SPELLINGS[1:])
@pytest.mark.parametrize("rest", [b"/123", b"/123/", b"/123/t/42", b"/123/t/42/posts"])
def test_another_spelling_of_client_is_not_a_studio_path(first: bytes, rest: bytes) -> None:
    with pytest.raises(NotAStudioPath):
        judge(b"/" + first + rest)


@pytest.mark.parametrize("separator", [b"T", b"%74", b"teams", b"x", b"42"])
@pytest.mark.parametrize("rest", [b"", b"/", b"/42", b"/42/", b"/42/posts"])
def test_account_and_team_are_separated_by_a_literal_t(separator: bytes, rest: bytes) -> None:
    with pytest.raises(NotAStudioPath):
        judge(b"/client/123/" + separator + rest)


NO_ID = [
    b"00",
    b"0123",
    b"00123",
    b"4294967296",
    b"9999999999",
    b"10000000000",
    b"1" + b"0" * 5000,
    b"-1",
    b"+1",
    b"1.0",
    b"1e3",
    b"1_0",
    b"0x7b",
    b"12a",
    b"%31",
    b"12%33",
    b"12%20",
    b"%D9%A3",  # an Arabic digit three
    "\uff11".encode(),  # a fullwidth digit one, raw
]


@pytest.mark.parametrize("number", NO_ID)
@pytest.mark.parametrize(
    "path", [b"/client/%b", b"/client/%b/t/42/posts", b"/client/123/t/%b", b"/client/123/t/%b/posts"]
)
def test_ids_are_canonical_decimals_of_32_bits(path: bytes, number: bytes) -> None:
    with pytest.raises(NotAStudioPath):
        judge(path.replace(b"%b", number))


@pytest.mark.parametrize("section", [b"Posts", b"POSTS", b"%70osts", b"post%73", b"posts%20", b"post", b"p%C3%B6sts"])
def test_a_section_in_another_spelling_is_another_section(section: bytes) -> None:
    addressed = judge(b"/client/123/t/42/" + section)
    assert (addressed.account_id, addressed.team_id) == (123, 42)
    assert addressed.section not in {None, "posts", "ideas", "areas", "topics", "templates", "settings"}


# --- Paths that are not canonical ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [b"", b"client/123", b"welcome", b"*", b"https://studio.example/client/123", b"?", b" /"]
)
def test_a_path_must_begin_with_a_slash(path: bytes) -> None:
    refused(path)


@pytest.mark.parametrize("segment", [b".", b"..", b"%2e", b"%2E", b"%2e%2e", b"%2E.", b".%2e", b"%252e", b"%252e%252e"])
@pytest.mark.parametrize(
    "path", [b"/%b", b"/%b/", b"/a/%b", b"/%b/a", b"/client/123/t/42/posts/%b/settings", b"/%b/client/1"]
)
def test_dot_segments_are_refused_in_every_spelling(path: bytes, segment: bytes) -> None:
    refused(path.replace(b"%b", segment))


@pytest.mark.parametrize(
    "path",
    [
        b"//",
        b"///",
        b"//evil.example",
        b"//evil.example/",
        b"///evil.example",
        b"/a//b",
        b"/a//",
        b"/client//123",
        b"//client/123",
        b"/client/123//t/42/posts",
        b"/client/123/t/42/posts//",
    ],
)
def test_empty_segments_are_refused_except_for_one_trailing_slash(path: bytes) -> None:
    refused(path)


AMBIGUOUS = {
    "blank": b" ",
    "semicolon": b";",
    "path parameter": b";jsessionid=1",
    "backslash": b"\\",
    "encoded slash": b"%2f",
    "encoded slash, upper case": b"%2F",
    "encoded backslash": b"%5c",
    "encoded backslash, upper case": b"%5C",
    "encoded dot": b"%2e",
    "encoded dot, upper case": b"%2E",
    "encoded percent sign": b"%25",
    "doubly encoded slash": b"%252f",
    "doubly encoded letter": b"%2563",
}
NOT_UTF_8 = {
    "lone start byte": b"\xc3",
    "lone continuation byte": b"\x80",
    "Latin-1": b"\xe9",
    "encoded Latin-1": b"%E9",
    "encoded lone start byte": b"%C3",
    "encoded lone continuation byte": b"%80",
    "truncated sequence": b"%E2%82",
    "overlong dot": b"%C0%AE",
    "overlong slash": b"%C0%AF",
    "raw overlong slash": b"\xc0\xaf",
    "overlong slash of three bytes": b"%E0%80%AF",
    "surrogate": b"%ED%A0%80",
    "beyond Unicode": b"%F4%90%80%80",
    "FF": b"%FF",
}
INVALID_ESCAPES = {
    "bare percent sign": b"%",
    "one digit": b"%4",
    "no digits": b"%zz",
    "second digit missing": b"%4g",
    "signed": b"%+1",
    "white space": b"% 41",
    "IIS style": b"%u002e",
    "percent sign in front of an escape": b"%%41",
    "percent sign within an escape": b"%4%31",
    "fullwidth digits": b"%\xef\xbc\x94\xef\xbc\x91",
}
CONTROLS = {
    f"{spelling} U+{code:04X}": text
    for code in (*range(0x20), *range(0x7F, 0xA0))
    for spelling, text in (
        ("raw", chr(code).encode()),
        ("encoded", "".join(f"%{byte:02X}" for byte in chr(code).encode()).encode()),
        ("encoded in lower case", "".join(f"%{byte:02x}" for byte in chr(code).encode()).encode()),
    )
}
REFUSED = AMBIGUOUS | NOT_UTF_8 | INVALID_ESCAPES | CONTROLS


@pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)
def test_an_ambiguous_sequence_is_refused_anywhere_in_a_path(bad: bytes) -> None:
    for before in (b"/", b"/a", b"/a/", b"/client", b"/client/", b"/client/123/t/42/", b"/client/123/t/42/posts/x"):
        for after in (b"", b"/", b"x", b"/client/123/t/42/settings"):
            refused(before + bad + after)


def test_a_character_that_is_partly_encoded_is_refused() -> None:
    """The raw bytes alone are not valid UTF-8."""
    refused(b"/caf\xc3%A9")
    refused(b"/caf%C3\xa9")


def test_a_utf_8_sequence_does_not_extend_across_a_slash() -> None:
    refused(b"/caf%C3/%A9")


# --- Arbitrary bytes -------------------------------------------------------------------------------------------------

fragments = st.sampled_from(
    [
        *rb"/ // . .. %2e %2F % %25 \ ; %3b %c2%85 client CLIENT %63lient 123 0123 4294967296 t 42 posts".split(),
        b"\0",
        b"\x7f",
        b"\x85",
        b"\xff",
    ]
)
paths = st.binary() | st.lists(fragments | st.binary(max_size=3), max_size=12).map(lambda parts: b"/" + b"".join(parts))


@given(paths)
def test_an_accepted_path_has_exactly_one_reading(path: bytes) -> None:
    try:
        addressed = judge(path)
    except (NotCanonical, NotAStudioPath):
        return
    assert path.startswith(b"/")
    assert not path.startswith((b"//", b"/\\"))
    decoded = unquote_to_bytes(path)
    text = decoded.decode("utf-8")
    assert b";" not in path
    assert not set(text) & {"\\", *map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))}
    assert decoded.count(b"/") == path.count(b"/")
    assert decoded.count(b".") == path.count(b".")
    assert unquote_to_bytes(decoded) == decoded
    segments = text[1:].removesuffix("/").split("/")
    assert not {".", ".."} & set(segments)
    assert path == b"/" or "" not in segments
    if segments[0].casefold() == "client":
        expected = f"/client/{addressed.account_id}"
        expected += f"/t/{addressed.team_id}" if addressed.team_id is not None else ""
        assert path == expected.encode() or path.startswith(expected.encode() + b"/")
    else:
        assert addressed == ELSEWHERE


@given(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1), st.from_regex(r"[a-z]{1,12}", fullmatch=True))
def test_every_well_formed_studio_path_is_parsed(account: int, team: int, section: str) -> None:
    path = f"/client/{account}/t/{team}/{section}".encode()
    assert judge(path) == judge(path + b"/") == judge(path + b"/7/edit") == StudioPath(account, team, section)
