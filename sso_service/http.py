"""Reading and writing parts of HTTP messages: query, cookies, language, fetch metadata, errors in JSON.

Pure, and on the raw bytes of an ASGI scope. Server, web and client modules share it, so it depends on none of them.
"""

import re
from binascii import a2b_qp
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec

Scope = Mapping[str, Any]
"""The `scope` of an ASGI request."""

Headers = list[tuple[bytes, bytes]]
"""Header lines as ASGI sends them: names in lower case."""

# --- headers ---------------------------------------------------------------------------------------------------------


def headers(scope: Scope, name: bytes) -> list[str]:
    """Return every occurrence of a header. `name` is in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def header(scope: Scope, name: bytes) -> str:
    """Return the first occurrence of a header, or an empty string."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def bearer(scope: Scope) -> str | None:
    """Return the secret in `Authorization: Bearer <secret>` (RFC 6750 section 2.1).

    None if the header is missing, has another scheme, or occurs more than once: a proxy and this service might read
    different ones.
    """
    match headers(scope, b"authorization"):
        case [value]:
            scheme, _, secret = value.partition(" ")
            return secret.strip() or None if scheme.lower() == "bearer" else None
    return None


def cookie(scope: Scope, name: str) -> str | None:
    """Return the value of the first cookie with this name (RFC 6265 section 5.4), or None.

    Cookies of this service are never quoted. The standard library's parser removes quotes from every cookie, in
    quadratic time: with it, one long header would keep a worker busy for seconds.
    """
    for line in headers(scope, b"cookie"):
        # A header of 30 KB can hold 15,000 cookies, so the pattern looks for one instead of splitting them all.
        if found := _cookie_pattern(name).search(f";{line}"):
            return (found[1] or "").rstrip()
    return None


@lru_cache(maxsize=64)
def _cookie_pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf";\s*{re.escape(name)}(?:=([^;]*)|\s*(?:;|\Z))")


def set_cookie(name: str, value: str, *, max_age: int, https: bool, embedded: bool = False) -> str:
    """Return a `Set-Cookie` line (RFC 6265bis): no access for scripts, `Secure` on HTTPS. `max_age` is in seconds.

    With `embedded`, the browser sends the cookie from within another site's page as well. It is then partitioned by
    that site (CHIPS), so it cannot be used for tracking, and browsers that block third-party cookies accept it. Forms
    of other sites send it too. This is harmless because every change checks its origin: see `is_same_origin`.
    """
    line = f"{name}={value}; Path=/; Max-Age={max_age}; HttpOnly"
    if embedded:
        return f"{line}; SameSite=None; Secure; Partitioned"
    return f"{line}; SameSite=Lax" + ("; Secure" if https else "")


# --- percent-encoding -----------------------------------------------------------------------------------------------

_BROKEN_ENCODING = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def has_broken_encoding(raw: bytes) -> bool:
    """Return whether a percent sign in `raw` is not followed by two hex digits (RFC 3986 section 2.1).

    The decoders of the standard library need 300 ns for each such sign, so 30 KB of them would take 9 ms.
    """
    return _BROKEN_ENCODING.search(raw) is not None


def percent_decoded(raw: bytes) -> bytes:
    """Return `raw` decoded (RFC 3986 section 2.1). Its percent-encoding must not be broken.

    With `=` for `%`, the encoding is quoted-printable (RFC 2045 section 6.7) without line breaks. That decoder is
    written in C and takes a hundredth of the time of `unquote_to_bytes`, with the same result.
    """
    return a2b_qp(raw.replace(b"=", b"=3D").replace(b"%", b"=")) if b"%" in raw else raw


# --- query -----------------------------------------------------------------------------------------------------------


MAX_PARAMETERS = 200
"""Parameters of a query, at most. Browsers and Studios use a few dozen; a query of 32 KiB could hold 16,000 of them,
which are costly for everything that reads them later."""


def has_too_many_parameters(query: bytes) -> bool:
    """Return whether a raw query has more than `MAX_PARAMETERS` parameters, those with an empty name included.

    Such a query is not canonical: where queries are judged it is refused, like a path that is not canonical.
    """
    return query.count(b"&") >= MAX_PARAMETERS


def split_parameter(query: bytes, parameter: str = "sso") -> tuple[list[bytes], bytes]:
    """Split a raw query into the undecoded values of `parameter` and the rest, which is kept byte for byte.

    `parameter` consists of ASCII letters, digits, `_` and `-`. Its name is found in every percent-encoded spelling, so
    none can smuggle a login token past this function. The time is linear: nothing is decoded, and no list is made of
    the other parameters.
    """
    if b"&" not in query and query.startswith(b"sso=") and parameter == "sso":  # the usual login link
        return [query[4:]], b""
    if not query:
        return [], b""
    pattern = _parameter_pattern(parameter)
    values = pattern.findall(query := b"&" + query)
    return values, (pattern.sub(b"", query) if values else query)[1:]


@lru_cache(maxsize=64)
def _parameter_pattern(parameter: str) -> re.Pattern[bytes]:
    """Return the pattern of `&NAME=VALUE`, or `&NAME` alone, for every NAME that decodes to `parameter`.

    A character has three spellings at most: itself, and its percent-encoding with either case of each hex digit. (A
    plus sign decodes to a space, which no name has. Bytes that are not ASCII decode to nothing that is.)
    """
    name = "".join(f"(?:{re.escape(char)}|%(?i:{ord(char):02x}))" for char in parameter)
    return re.compile(rf"&{name}(?:=([^&]*)|(?=&)|\Z)".encode())


def form_fields(content: bytes, encoding: str = "utf-8") -> dict[str, list[str]]:
    """Return the fields of a form or of a query (`application/x-www-form-urlencoded`; URL standard, section 5.1).

    A text that no browser sends has no fields: one with too many, or with a broken percent-encoding. So the time stays
    linear with a small factor; `parse_qs` takes 300 ns for each broken sign.
    """
    fields: dict[str, list[str]] = {}
    if has_too_many_parameters(content) or has_broken_encoding(content):
        return fields
    for piece in content.replace(b"+", b" ").split(b"&"):
        if piece:
            name, _, value = (percent_decoded(part).decode(encoding, "replace") for part in piece.partition(b"="))
            fields.setdefault(name, []).append(value)
    return fields


# --- origin and purpose of a request ---------------------------------------------------------------------------------


def is_same_origin(scope: Scope) -> bool:
    """Return whether the browser states that the request comes from a page of this origin.

    This is the defence against cross-site request forgery for everything that relies on a cookie: no page can set
    either of these headers (Fetch standard, sections 3.2 and 4.8). Without both headers the answer is False.
    """
    site = headers(scope, b"sec-fetch-site")
    if site:
        return site == ["same-origin"]
    match headers(scope, b"origin"):
        case [origin]:
            scheme, _, host = origin.partition("://")
            # An https origin is always accepted: behind a proxy that does not forward the scheme, the service sees
            # http. An http origin is refused on https: an attacker in the network can serve such a page.
            return host == header(scope, b"host") != "" and (scheme == "https" or scheme == scope["scheme"])
    return False


def is_prefetch(scope: Scope) -> bool:
    """Return whether the request is a prefetch or a preview (`Sec-Purpose` of Fetch, and its older names)."""
    purposes = ",".join(headers(scope, b"sec-purpose") + headers(scope, b"purpose") + headers(scope, b"x-moz")).lower()
    return "prefetch" in purposes or "preview" in purposes


def is_for_a_window(scope: Scope, *, frames: bool = False) -> bool:
    """Return False if the browser states that the response is not for a window (`Sec-Fetch-Dest` of Fetch metadata).

    With `frames`, an `iframe` counts as a window.
    """
    destination = headers(scope, b"sec-fetch-dest")
    return destination in ([], ["document"]) or (frames and destination == ["iframe"])


# --- content negotiation ---------------------------------------------------------------------------------------------


def prefers_json(scope: Scope) -> bool:
    """Return whether `Accept` names JSON and not HTML."""
    accept = header(scope, b"accept").lower()
    return "json" in accept and "html" not in accept


def accepts_html(scope: Scope) -> bool:
    """Return whether `Accept` names HTML, as browsers do when they navigate."""
    return "text/html" in header(scope, b"accept").lower()


_MAX_LANGUAGES = 32


def language(scope: Scope) -> str:
    """Return `de` or `en`, whichever `Accept-Language` (RFC 9110 section 12.5.4) ranks first. The default is `en`."""
    if not (accepted := ",".join(headers(scope, b"accept-language"))):
        return "en"
    ranked: list[tuple[float, int, str]] = []
    # Browsers send about ten languages. The rest of a longer list is ignored, because each costs half a microsecond.
    for position, item in enumerate(accepted.lower().split(",", _MAX_LANGUAGES)[:_MAX_LANGUAGES]):
        tag, _, weight = item.partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            quality = 0.0
        primary = tag.strip().split("-")[0]
        if primary in {"de", "en"} and 0 < quality <= 1:
            ranked.append((-quality, position, primary))
    return min(ranked)[2] if ranked else "en"


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it: HTTP status, `code` for programs, `message` for people, details, extra headers."""

    status: int
    code: str
    message: str
    details: dict[str, str] | None = None
    headers: dict[str, str] = field(default_factory=dict)


ISOLATED = {"Cross-Origin-Resource-Policy": "same-origin"}
"""Pages of other sites cannot load the response as an image or script (Fetch standard, section 3.7). Requests by CORS
and navigations, also of frames, are not affected."""
ISOLATED_PAGE = {**ISOLATED, "Cross-Origin-Opener-Policy": "same-origin"}
"""A window of another site that opened the page, or was opened by it, has no reference to it (HTML standard, section
7.1.3). In a frame the header has no effect."""

JSON_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    **ISOLATED,
}
"""Headers of every JSON response: caches must not keep it, and browsers must not guess another type."""


# The OpenAPI document is derived from these two classes and contains their docstrings.
class ErrorFields(msgspec.Struct, frozen=True):
    """An error."""

    code: str
    message: str
    details: dict[str, str] | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error."""

    error: ErrorFields


def error_body(problem: Problem) -> bytes:
    """Return the JSON body of an error: `{"error": {"code", "message", "details"}}`, `details` only where given."""
    return msgspec.json.encode(ErrorBody(ErrorFields(problem.code, problem.message, problem.details or msgspec.UNSET)))


def error_headers(problem: Problem, body: bytes) -> Headers:
    """Return the header lines for `body`, the JSON body of `problem`, with its length."""
    lines = {**JSON_HEADERS, **problem.headers, "Content-Length": str(len(body))}
    return [(name.lower().encode(), value.encode()) for name, value in lines.items()]
