"""Parse Studio paths, for the login redirect and for forward authentication. Pure, on raw bytes.

A path is either canonical or refused; it is never repaired. Such checks are bypassed when two programs read a path
differently, such as a proxy that decodes `%2e%2e` or an application server that cuts at `;`. So a path that can be read
in two ways is not canonical. A canonical path begins with exactly one slash and contains neither `\\` nor a control
character, so a redirect to it stays on this host (WHATWG URL standard, section 4.4).
"""

import re
from functools import lru_cache

import msgspec

from sso_service.errors import NotAStudioPath, NotCanonical
from sso_service.http import has_broken_encoding, has_too_many_parameters, percent_decoded

MAX_SEGMENTS = 64
"""Segments of a path, at most. A Studio's paths have a dozen; a path of 32 KiB could hold 16,000 segments, and every
one has to be decoded and checked."""

_PLAIN = re.compile(rb"(?:/[A-Za-z0-9_-]+)+/?")
_ID = re.compile(rb"[1-9][0-9]{0,9}")


class StudioPath(msgspec.Struct, frozen=True):
    """The account, team and section that a path addresses.

    `account_id` is None for a path outside `/client`, which requires only a session.
    """

    account_id: int | None = None
    team_id: int | None = None
    section: str | None = None


def judge_target(target: bytes) -> StudioPath:
    """Return what the raw target of a request, a path and perhaps a query, addresses.

    Raises what `judge` raises, and `NotCanonical` for a query with too many parameters.
    """
    path, _, query = target.partition(b"?")
    if has_too_many_parameters(query):
        raise NotCanonical
    return judge(path)


def judge(raw: bytes) -> StudioPath:
    """Return what the raw, percent-encoded path of a request (without the query) addresses.

    Raises `NotCanonical`. Raises `NotAStudioPath` if the first segment is `client` in any spelling, but the path does
    not match `/client/{account}(/t/{team}(/{section}...)?)?` exactly, with decimal ids without leading zeros.
    """
    # The same few hundred paths are requested all day, so their results are cached. Longer paths are not among them,
    # and caching them would let a client fill the memory.
    return _judge_often(raw) if len(raw) <= 128 else _judge(raw)


def _judge(raw: bytes) -> StudioPath:
    segments = _segments(raw)
    if segments[0] != b"client" and percent_decoded(segments[0]).decode().casefold() != "client":
        return StudioPath()
    match segments:
        case [b"client", account]:
            return StudioPath(_id(account))
        case [b"client", account, b"t", team]:
            return StudioPath(_id(account), _id(team))
        case [b"client", account, b"t", team, section, *_]:
            # The section is compared without decoding: another spelling is an unknown section, which only an admin may
            # view.
            return StudioPath(_id(account), _id(team), section.decode("ascii", "replace"))
    raise NotAStudioPath


_judge_often = lru_cache(maxsize=1024)(_judge)


def _segments(raw: bytes) -> list[bytes]:
    """Return the undecoded segments, without the empty one after a trailing slash. Raises `NotCanonical`."""
    # First, so that the time for all that follows is linear in the length of the path, with a small factor.
    if raw.count(b"/") - raw.endswith(b"/") > MAX_SEGMENTS:
        raise NotCanonical
    if _PLAIN.fullmatch(raw):  # the common case: nothing in it needs decoding or checking
        return raw.strip(b"/").split(b"/")
    # A space, `?` or `#` cannot be in the path of a request line (RFC 9112 section 3).
    if not raw.startswith(b"/") or has_broken_encoding(raw) or b" " in raw or b"?" in raw or b"#" in raw:
        raise NotCanonical
    segments = raw[1:].split(b"/")
    if len(segments) > 1 and segments[-1] == b"":
        segments.pop()
    if b"" in segments and raw != b"/":
        raise NotCanonical
    for segment in segments:
        try:
            segment.decode("utf-8")  # fails if a character is half raw and half percent-encoded
            text = percent_decoded(segment).decode("utf-8")
        except UnicodeDecodeError:
            raise NotCanonical from None
        if text in {".", ".."} or _ENCODED_SEPARATOR.search(segment) or _AMBIGUOUS.search(text):
            raise NotCanonical
    return segments


# An encoded slash, backslash, dot or percent sign. Some proxies decode these before they route, others do not.
_ENCODED_SEPARATOR = re.compile(rb"%(?:2f|5c|2e|25)", re.IGNORECASE)
# Path parameters and backslashes, raw or encoded, and control characters (C0, DEL and C1).
_AMBIGUOUS = re.compile(r"[;\\\x00-\x1f\x7f-\x9f]")


def _id(segment: bytes) -> int:
    if not _ID.fullmatch(segment) or int(segment) > 2**32 - 1:
        raise NotAStudioPath
    return int(segment)
