"""Readers of requests: the number of their steps does not grow with the number of parts of a request.

Steps are counted instead of measured: a function that is called once for each parameter, segment or cookie would be
called thousands of times for a request of 30 KB.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from urllib.parse import parse_qs, unquote_plus, unquote_to_bytes

import email_validator
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.tools.bench.places import BODY, CHUNKED, HEAD, places
from sso_service.client.links import split_studio_url
from sso_service.errors import FieldError, NotCanonical, ServiceError
from sso_service.http import (
    MAX_PARAMETERS,
    cookie,
    form_fields,
    has_broken_encoding,
    has_too_many_parameters,
    language,
    percent_decoded,
    split_parameter,
)
from sso_service.paths import MAX_SEGMENTS, StudioPath, judge, judge_target
from sso_service.people import normalise_email


def steps(read: Callable[[], object]) -> int:
    """Return the number of functions called, in Python or C, while `read` runs."""
    count = 0

    def event(frame: FrameType, kind: str, argument: object) -> None:
        nonlocal count
        count += kind in {"call", "c_call"}

    previous = sys.getprofile()
    sys.setprofile(event)
    try:
        with suppress(ServiceError, ValueError):
            read()
    finally:
        sys.setprofile(previous)
    return count


def headers(name: bytes, value: bytes) -> dict[str, object]:
    return {"headers": [(name, value)], "scheme": "http"}


READERS: dict[str, Callable[[int], object]] = {
    "encoded names": lambda size: split_parameter(b"%73s&" * size + b"sso=a"),
    "other encoded names": lambda size: split_parameter(b"%C3%A4=1&" * size),
    "repeated login tokens": lambda size: split_parameter(b"sso=a&" * size),
    "segments": lambda size: judge(b"/a" * size),
    "encoded segments": lambda size: judge(b"/%41" * size),
    "percent-encoding": lambda size: judge(b"/" + b"%C3%A4" * size),
    "broken percent-encoding": lambda size: judge(b"/" + b"%" * size),
    "parameters of a target": lambda size: judge_target(b"/a?" + b"a&" * size),
    "fields": lambda size: form_fields(b"a=%41&" * size),
    "broken encoding of a field": lambda size: form_fields(b"a=" + b"%" * size),
    "encoding of a field": lambda size: form_fields(b"a=" + b"%41" * size),
    "cookies": lambda size: cookie(headers(b"cookie", b"a=b; " * size), "studio_session"),
    "cookies without a name": lambda size: cookie(headers(b"cookie", b";" * size), "studio_session"),
    "languages": lambda size: language(headers(b"accept-language", b"de;q=0.5," * size)),
    "parameters of a Studio URL": lambda size: split_studio_url("https://studio.example/?" + "%73s&" * size),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_the_steps_of_reading_do_not_grow_with_the_number_of_parts(read: Callable[[int], object]) -> None:
    steps(lambda: read(1))  # compiles patterns
    read_few = steps(lambda: read(MAX_PARAMETERS + 1))
    assert steps(lambda: read(6000)) == read_few < 700


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [b"/a", b"/%41", b"/%C3%A4", b"/\xc3\xa4"])
def test_a_path_has_at_most_64_segments(segment: bytes) -> None:
    assert MAX_SEGMENTS == 64
    for end in (b"", b"/"):
        assert judge(segment * 64 + end) == StudioPath()
        with pytest.raises(NotCanonical):
            judge(segment * 65 + end)
    assert judge(b"/client/123/t/42/posts" + segment * 59) == StudioPath(123, 42, "posts")
    with pytest.raises(NotCanonical):
        judge(b"/client/123/t/42/posts" + segment * 60)


@pytest.mark.parametrize("parameter", [b"", b"a", b"a=b", b"%61=%62", b"="])
def test_a_query_has_at_most_200_parameters(parameter: bytes) -> None:
    query = b"&".join([parameter] * 200)
    assert not has_too_many_parameters(query)
    assert has_too_many_parameters(query + b"&")
    assert judge_target(b"/client/123?" + query) == StudioPath(123)
    with pytest.raises(NotCanonical):
        judge_target(b"/client/123?" + query + b"&a")


@pytest.mark.parametrize(
    "domain",
    ["\u0660" * 60, "ä" * 60, "a" * 64, "\ufdfa" * 250, "ä." * 45 + "de", "b." * 126 + "cc"],
)
def test_an_overlong_domain_is_refused_before_the_library_reads_it(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(email_validator, "validate_email", never)
    for address in (f"a@{domain}", f"{'a' * 65}@b.example", "ä@b.example"):
        with pytest.raises(FieldError) as refused:
            normalise_email(address)
        assert refused.value.rule == "email"


# --- the same results as the obvious way ------------------------------------------------------------------------------

pieces = st.sampled_from(
    [*b"s o S %73 %6f %6F % & = + sso &sso= %5f %5F _ switch a \xc3 %C3 %A4 %2573 %0a \xff %ss0".split(), b"\n", b" "]
)
queries = st.lists(pieces, max_size=12).map(b"".join)


@given(queries, st.sampled_from(["sso", "sso_switch"]))
def test_the_parameter_is_found_exactly_where_a_name_decodes_to_it(query: bytes, parameter: str) -> None:
    parts = [piece.partition(b"=") for piece in query.split(b"&")] if query else []
    named = [unquote_plus(name.decode("latin-1")) == parameter for name, _, _ in parts]
    values = [value for (_, _, value), found in zip(parts, named, strict=True) if found]
    rest = b"&".join(b"".join(part) for part, found in zip(parts, named, strict=True) if not found)
    assert split_parameter(query, parameter) == (values, rest)


@given(
    st.lists(st.sampled_from([*b"% %3 %41 %c3%A4 = == =3D / a _ \t \r\n =\n \x00 \xff".split(), b"\n"])).map(b"".join)
)
def test_percent_encoding_is_decoded_as_by_the_standard_library(raw: bytes) -> None:
    if not has_broken_encoding(raw):
        assert percent_decoded(raw) == unquote_to_bytes(raw)


@given(queries)
def test_fields_are_read_as_by_the_standard_library(query: bytes) -> None:
    if query.isascii() and not has_broken_encoding(query):
        assert form_fields(query) == parse_qs(query.decode(), keep_blank_values=True)
    elif has_broken_encoding(query):
        assert form_fields(query) == {}


def first_cookie(line: str, name: str) -> str | None:
    """Return the value of the first cookie in a header, by splitting it."""
    for pair in line.split(";"):
        key, _, value = pair.strip().partition("=")
        if key == name:
            return value
    return None


@given(st.lists(st.sampled_from([b"n", b"n=", b";", b" ", b"=", b"x", b"\xa0", b"\t", b"n=v", b"nn"])).map(b"".join))
def test_the_first_cookie_of_a_name_is_found_as_by_splitting(line: bytes) -> None:
    assert cookie(headers(b"cookie", line), "n") == first_cookie(line.decode("latin-1"), "n")


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_every_place_of_the_benchmark_fits_what_the_service_reads() -> None:
    found = list(places("cookie", "secret"))
    assert len({place.name for place in found}) == len(found)
    for place in found:
        for piece in place.pieces:
            head, blank, body = place.request(place.repeated(piece)).partition(b"\r\n\r\n")
            assert blank, place.name
            assert len(head) < HEAD + 300, place.name
            assert len(body) < (CHUNKED if b"chunked" in head else BODY) + 300, place.name
