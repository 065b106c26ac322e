"""Lines of the log: no value from outside adds a line or a field, controls a terminal or contains a secret."""

import html
import json
import logging
import re
import secrets
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sso_service.observability import redaction
from sso_service.observability.audit import Event, EventName
from sso_service.observability.logs import (
    JsonFormatter,
    LineWriter,
    RequestContext,
    SystemLogFormatter,
    TextFormatter,
    current_request,
)
from sso_service.observability.redaction import redact
from sso_service.web.observed import AccessLogLine, _address, _path_without_token
from tests.support.spelling import SPELLINGS, contains, headers_with, targets_with

TOKEN = secrets.token_urlsafe(32)
FORGERY = "\n2026-01-01T00:00:00.000Z INFO    login user_id=1 forged=yes"
HOSTILE = (
    "\r\n\x00\x1b\x7f\x85\x9b\u200b\u200d\u202e\u2028\u2029\u2066\ufeff\u3164\u2800\u00a0\u00ad\ud800\U000e0041"
    "= \"'\\{}[],:%AaZz09_-\u00fc\u674e\U0001f600"
)
texts = st.text() | st.text(HOSTILE) | st.sampled_from([FORGERY, "a forged=yes", '" forged=yes "', "\\", '\\" a=b', ""])


@contextmanager
def request(request_id: str, client: str) -> Iterator[None]:
    reset = current_request.set(RequestContext(request_id, client))
    try:
        yield
    finally:
        current_request.reset(reset)


def record(message: object, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    information = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("a.library", logging.WARNING, "", 0, message, arguments, information)


def lines_of(text: str) -> list[str]:
    """Return the lines as any program might split them. Fails if a character is not visible."""
    for line in text.split("\n"):
        hidden = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
        assert not [c for c in line if c != " " and unicodedata.category(c) in hidden], ascii(line)
        assert not set(line) & set("\u3164\u2800\u034f\ufe0f\u115f"), ascii(line)
    assert text.split("\n") == text.splitlines()
    return text.splitlines()


FIELD = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "=]+)')


def fields_of(line: str) -> dict[str, str]:
    """Return the fields at the end of a line in text. Every value from outside must be among them."""
    found = list(FIELD.finditer(line))
    assert " ".join(each[0] for each in found) == line[found[0].start() :]
    return {name: json.loads(value) if value.startswith('"') else value for name, value in (e.groups() for e in found)}


def as_logged(text: str) -> str:
    """Return `text` as the log contains it, with lone surrogates as JSON represents them."""
    loaded: str = json.loads(json.dumps(redact(text)))
    return loaded


@given(texts, texts, texts, texts)
@example(FORGERY, "a b=c", TOKEN, "\u202e")
def test_a_value_is_one_field_of_one_line_in_text_and_json(
    reason: str, ref: str, request_id: str, address: str
) -> None:
    event = Event(event=EventName.LOGIN_REFUSED, user_id=7, reason=reason, ref=ref)
    logged = record(event)
    with request(request_id, address):
        [text] = lines_of(TextFormatter().format(logged))
        [encoded] = lines_of(JsonFormatter().format(logged))
        [system] = lines_of(SystemLogFormatter().format(logged))
    expected = {"user_id": 7, "reason": reason, "ref": ref, "request_id": request_id, "client": address}
    expected = {name: as_logged(value) if isinstance(value, str) else value for name, value in expected.items()}
    assert text.split(" login_refused ")[0].endswith(" WARNING") is True
    assert fields_of(text) == {name: str(value) for name, value in expected.items()}
    loaded: dict[str, Any] = json.loads(encoded)
    assert {name: loaded[name] for name in expected} == expected
    assert list(loaded) == ["time", "level", "event", *[n for n in loaded if n in expected]]
    assert system == f"sso-service: {encoded}"


@given(texts)
@example("user_id=1 forged=yes")
@example("Invalid HTTP request received.")
def test_a_message_with_text_from_outside_has_no_field(outside: str) -> None:
    with request("id", "192.0.2.1"):
        [text] = lines_of(TextFormatter().format(record("it failed: %s", outside)))
        [encoded] = lines_of(JsonFormatter().format(record("it failed: %s", outside)))
    without_quotes = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert set(FIELD.findall(without_quotes)) == {("request_id", "id"), ("client", "192.0.2.1")}
    assert json.loads(encoded)["message"] == as_logged(f"it failed: {outside}")


@given(texts)
@example(FORGERY)
@example(f"no such column: {TOKEN}{FORGERY}")
def test_a_traceback_adds_no_line_that_looks_like_an_entry(outside: str) -> None:
    try:
        raise ValueError(outside)
    except ValueError as error:
        caught = error
    text = TextFormatter().format(record("it failed\n", error=caught))
    first, *others = lines_of(text)
    assert first.endswith(" WARNING it failed")
    assert len(others) >= 4
    assert all(line.startswith("    ") for line in others)
    assert TOKEN not in text
    [encoded] = lines_of(JsonFormatter().format(record("it failed", error=caught)))
    assert "ValueError" in json.loads(encoded)["exception"]
    assert TOKEN not in encoded


def test_ordinary_lines_are_written_without_quotes() -> None:
    event = Event(event=EventName.LOGIN, user_id=3, account_id=123, ref="a9dcb9261b47", way="browser")
    access = AccessLogLine("request", "GET", "/client/123/t/42/posts", 200, 1.2)
    with request("5f0e5d9c1c2a-1f", "2001:db8::1"):
        lines = [TextFormatter().format(record(each)).partition("WARNING ")[2] for each in (event, access)]
        assert lines == [
            "login user_id=3 account_id=123 ref=a9dcb9261b47 way=browser request_id=5f0e5d9c1c2a-1f client=2001:db8::1",
            "request method=GET path=/client/123/t/42/posts status=200 milliseconds=1.2 "
            "request_id=5f0e5d9c1c2a-1f client=2001:db8::1",
        ]
    for message in (
        "Started server process [7]",
        "Listening on http://127.0.0.1:8000",
        "Verbindung zu «db» schlug fehl",
    ):
        assert TextFormatter().format(record(message)).endswith(f" WARNING {message}")


def test_a_record_that_cannot_be_formatted_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    writer = LineWriter()
    writer.setFormatter(TextFormatter())
    writer.setStream(sys.stderr)
    writer.handle(record("%d", TOKEN))
    assert capsys.readouterr().err.endswith(" WARNING a record of a.library was not written\n")


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", range(len(SPELLINGS)))
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "sso={}",
        "/y?sso={}&a=b",
        '{{"next": "/y?sso={}"}}',
        "a {} b",
        "'/y?sso={}'",
        "sso%3D{}%26a",
        "%{}",
        "\\{}",
    ],
)
def test_a_token_is_removed_in_every_spelling(spelling: int, text: str) -> None:
    hostile = text.format(SPELLINGS[spelling](TOKEN))
    assert contains(hostile, TOKEN) or text in {"%{}", "\\{}"}
    assert not contains(redact(hostile), TOKEN)
    line = AccessLogLine("request", "GET", hostile, 200, 1.0)
    for shown in (TextFormatter().format(record(line)), JsonFormatter().format(record(line))):
        assert not contains(shown, TOKEN)
        assert "redacted" in shown


def test_a_token_whose_first_characters_look_like_an_encoding_is_removed() -> None:
    token = "f6" + "q" * 41
    for encode in SPELLINGS:
        assert "q" * 41 not in redact("%" + encode(token))


def test_a_part_of_a_token_is_not_left_beside_what_was_removed() -> None:
    for cut in range(1, 43):
        hostile = f"{'a' * 60}{TOKEN[:cut]}%{ord(TOKEN[cut]):02x}{TOKEN[cut + 1 :]}"
        assert redact(hostile) == redaction.REDACTED


def test_api_tokens_cookies_and_nested_encodings_are_removed() -> None:
    assert redact(f"Bearer wf_live_{TOKEN}") == "Bearer [redacted]"
    assert redact(f"studio_session=WzEsMTIzXQ.aaaaaa.{TOKEN};") == "studio_session=WzEsMTIzXQ.aaaaaa.[redacted];"
    assert redact("%" + "25" * 40 + "41") == redaction.REDACTED
    assert redact(f"&#{ord(TOKEN[0])};{TOKEN[1:]} &#x{ord(TOKEN[0]):x};{TOKEN[1:]}") == "[redacted] [redacted]"


@pytest.mark.parametrize("escape", [r"\u{:04x}", r"\x{:02x}", "&#{};", "&#x{:x};", "&#X{:05X};"])
def test_escapes_within_escaped_text_are_removed(escape: str) -> None:
    """A template or an encoder of JSON escapes what another one has escaped."""
    spelled = ["".join(map(escape.format, map(ord, TOKEN))), TOKEN[:20] + escape.format(ord(TOKEN[20])) + TOKEN[21:]]
    for nesting in range(4):
        for text in spelled:
            assert redact(text) == redact(quote(text)) == redaction.REDACTED, nesting
        spelled = [html.escape(json.dumps(text)[1:-1]) for text in spelled]


@pytest.mark.parametrize(
    "text",
    [
        *("", "/client/123/t/42/posts?a=%2Fb%20c", "100 % of \\d+", "%zz%", "6b2f4a0e-9d1c-4a1e-8f6e-1c2d3e4f5a6b"),
        *("a" * 42, " ".join(["a" * 42] * 5), "/".join(["b" * 42] * 5), "%41" * 42, "\ud800", "ü" * 100),
    ],
)
def test_other_text_is_not_changed(text: str) -> None:
    assert redact(text) == text


@given(st.text(HOSTILE + "%\\&#;x41u0", max_size=300) | st.text())
def test_redacted_text_contains_no_run_of_token_characters(text: str) -> None:
    assert not re.search(r"[A-Za-z0-9_-]{43}", redact(text))


# --- values of a request ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*targets_with(TOKEN), f"/{'a/' * 2000}{TOKEN}"])
def test_the_path_in_the_access_log_contains_no_token(target: str) -> None:
    path, _, query = target.partition("?")
    shown = _path_without_token({"raw_path": path.encode(), "query_string": query.encode()})
    assert not contains(TextFormatter().format(record(AccessLogLine("request", "GET", shown, 200, 1.0))), TOKEN)


@pytest.mark.parametrize("start", range(2048 - 130, 2049))
def test_a_long_path_is_not_cut_within_a_token(start: int) -> None:
    for spelling in SPELLINGS:
        target = f"/{'b/' * start}"[:start] + "/" + spelling(TOKEN)
        shown = _path_without_token({"raw_path": target.encode() + b"/" + b"c/" * 90, "query_string": b""})
        assert len(shown) <= 2051
        assert not [at for at in range(34) if contains(redact(shown), TOKEN[at : at + 10])]


def test_an_address_is_logged_in_its_usual_spelling_or_as_invalid() -> None:
    for given_address, logged in {
        "192.0.2.1": "192.0.2.1",
        "2001:DB8:0::1": "2001:db8::1",
        "fe80::1%eth0": "fe80::1%eth0",
        "unix": "unix",
    }.items():
        assert _address(given_address) == logged
    for hostile in (
        *(
            "admin",
            "unknown",
            "",
            "192.0.2.1 a=b",
            "192.0.2.1\x85",
            "192.0.2.256",
            "192.0.2.1:80",
            "fe80::1%a b",
            "::1%",
        ),
        *("\u06f1.2.3.4", "1.2.3.4\u200b", TOKEN, f"fe80::1%{TOKEN}", "fe80::1%" + "a" * 16, "1" * 100_000),
    ):
        assert _address(hostile) == "invalid", ascii(hostile[:80])


def test_no_header_brings_a_token_into_the_request_of_a_line() -> None:
    for name, value in headers_with(TOKEN):
        if name == "X-Request-ID":
            with request(value, value):
                for formatter in (TextFormatter(), JsonFormatter()):
                    assert not contains(formatter.format(record("x")), TOKEN)
