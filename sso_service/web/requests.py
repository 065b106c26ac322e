"""What is read of a request: headers, cookies, body, query. From the raw ASGI scope, byte for byte."""

import asyncio
import re
from urllib.parse import parse_qs, unquote_plus

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

SESSION_COOKIE = "studio_session"
FORM_COOKIE = "studio_form"

_BODY_LIMIT = 16 * 1024
"""Bytes of a request body that are read at most."""
_BODY_TIMEOUT = 10.0
"""Seconds that a request body may take."""
_LENGTH = re.compile(r"[0-9]+")


class BodyTooLarge(Exception):
    """The body is over 16 KiB. The rest of it was not read."""


def headers(scope: Scope, name: bytes) -> list[str]:
    """Every occurrence of a header; `name` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def header(scope: Scope, name: bytes) -> str:
    """The first occurrence of a header, or an empty text."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def bearer(scope: Scope) -> str | None:
    """The secret in `Authorization: Bearer <secret>` (RFC 6750 section 2.1), or None if there is none, or two."""
    match headers(scope, b"authorization"):
        case [value]:
            scheme, _, secret = value.partition(" ")
            return secret.strip() or None if scheme.lower() == "bearer" else None
    return None


def cookie(scope: Scope, name: str) -> str | None:
    """The value of the first cookie of this name (RFC 6265 section 5.4), or None.

    Our own values are never quoted. The standard library's parser undoes quotes, of every cookie and in quadratic time:
    with it, one long header would keep a worker busy for seconds.
    """
    for line in headers(scope, b"cookie"):
        for pair in line.split(";"):
            key, _, value = pair.strip().partition("=")
            if key == name:
                return value
    return None


class BodyTooSlow(Exception):
    """The body did not arrive in time. It would keep its connection busy for as long as its sender likes."""


async def body(scope: Scope, receive: Receive) -> bytes:
    """The whole body.

    Raises `BodyTooLarge` as soon as that is known, `BodyTooSlow`, or `ClientDisconnect` if the client went away.
    """
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            return await _whole_body(scope, receive)
    except TimeoutError:
        raise BodyTooSlow from None


async def _whole_body(scope: Scope, receive: Receive) -> bytes:
    declared = header(scope, b"content-length")
    if _LENGTH.fullmatch(declared) and int(declared[:20]) > _BODY_LIMIT:
        raise BodyTooLarge
    received = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        received += message.get("body", b"")
        if len(received) > _BODY_LIMIT:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(received)


async def form(scope: Scope, receive: Receive, encoding: str = "utf-8") -> dict[str, list[str]]:
    """The fields of a form in the body; none if it cannot be read. Raises what `body` raises."""
    try:
        return parse_qs(
            (await body(scope, receive)).decode("latin-1"),
            keep_blank_values=True,
            encoding=encoding,
            errors="replace",
            max_num_fields=20,
        )
    except ValueError:
        return {}


def is_same_origin(scope: Scope) -> bool:
    """True if a browser says that the request comes from a page of this very origin.

    The defence against cross-site request forgery of all that rests on a cookie: a browser lets no page write either of
    these headers (Fetch standard, sections 3.2 and 4.8). Where neither is sent, nothing is believed.
    """
    site = headers(scope, b"sec-fetch-site")
    if site:
        return site == ["same-origin"]
    match headers(scope, b"origin"):
        case [origin]:
            scheme, _, host = origin.partition("://")
            # Behind a proxy that does not tell us of its TLS we are on http and cannot judge an origin on https; on
            # https, a page on http may come from anybody between the browser and its server.
            return host == header(scope, b"host") != "" and (scheme == "https" or scheme == scope["scheme"])
    return False


def is_prefetch(scope: Scope) -> bool:
    """True if the client says that it only loads ahead, or for a preview (`Sec-Purpose` of Fetch, and older names)."""
    purposes = ",".join(headers(scope, b"sec-purpose") + headers(scope, b"purpose") + headers(scope, b"x-moz")).lower()
    return "prefetch" in purposes or "preview" in purposes


def is_for_a_window(scope: Scope, *, frames: bool = False) -> bool:
    """False if the browser says that the answer is not for a window (Fetch metadata, `Sec-Fetch-Dest`).

    With `frames`, an `iframe` is one too.
    """
    destination = headers(scope, b"sec-fetch-dest")
    return destination in ([], ["document"]) or (frames and destination == ["iframe"])


def split_sso(query: bytes, parameter: str = "sso") -> tuple[list[bytes], bytes]:
    """The values of the parameter `sso`, undecoded, and the query without it, otherwise byte for byte.

    Names are compared after decoding, so that no spelling of the name slips through with a token in it.
    """
    if b"&" not in query and query.startswith(b"sso=") and parameter == "sso":  # most are nothing else
        return [query[4:]], b""
    values: list[bytes] = []
    kept: list[bytes] = []
    for piece in query.split(b"&") if query else ():
        name, _, value = piece.partition(b"=")
        if unquote_plus(name.decode("latin-1")) == parameter:
            values.append(value)
        else:
            kept.append(piece)
    return values, b"&".join(kept)


def prefers_json(scope: Scope) -> bool:
    """True if the client names JSON, and not HTML, as what it accepts."""
    accept = header(scope, b"accept").lower()
    return "json" in accept and "html" not in accept


def accepts_html(scope: Scope) -> bool:
    """True if the client names HTML as what it accepts, as browsers do when a person goes somewhere."""
    return "text/html" in header(scope, b"accept").lower()


def language(scope: Scope) -> str:
    """`de` or `en`, whichever `Accept-Language` (RFC 9110 section 12.5.4) puts first; `en` if neither is there."""
    if not (accepted := ",".join(headers(scope, b"accept-language"))):
        return "en"
    ranked: list[tuple[float, int, str]] = []
    for position, item in enumerate(accepted.lower().split(",")):
        tag, _, weight = item.partition(";")
        try:
            quality = float(weight.strip().removeprefix("q=") or 1)
        except ValueError:
            quality = 0.0
        primary = tag.strip().split("-")[0]
        if primary in {"de", "en"} and 0 < quality <= 1:
            ranked.append((-quality, position, primary))
    return min(ranked)[2] if ranked else "en"
