"""The places in a request, and the spellings, in which a login token may occur and must not be logged."""

import re
from collections.abc import Callable
from urllib.parse import quote, unquote

PAGE = "/client/123/t/42/posts"


def encoded(text: str) -> str:
    """Percent-encode every character."""
    return "".join(f"%{ord(character):02X}" for character in text)


def partly(token: str) -> str:
    """Percent-encode one character in the middle, so that no part is as long as a token."""
    return token[:20] + encoded(token[20]) + token[21:]


def escaped(token: str) -> str:
    """Write every character as JSON and JavaScript may."""
    return "".join(f"\\u{ord(character):04x}" for character in token)


SPELLINGS: list[Callable[[str], str]] = [
    str,
    encoded,
    partly,
    lambda token: quote(partly(token), safe=""),
    lambda token: quote(quote(quote(encoded(token), safe=""), safe=""), safe=""),
    lambda token: quote(escaped(token)),
    escaped,  # no browser sends a backslash in a path, but other programs do
    lambda token: f"wf_live_{token}",
    lambda token: f"-{token}_",
]
"""Ways to write a token in a URL."""


def contains(text: str, token: str) -> bool:
    """Return whether `text` contains `token`, as it is or in an encoding."""
    text = text.replace(r"\x5C", "\\")  # as nginx writes a backslash
    for _ in range(6):
        if token in text:
            return True
        text = unquote(re.sub(r"\\+u00([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text))
    return False


def targets_with(token: str) -> list[str]:
    """Return request targets that contain `token` anywhere but as the one value of the parameter `sso`."""
    targets = []
    for spelling in SPELLINGS:
        spelled = spelling(token)
        link = f"https://studio.example/y?a=1&sso={spelled}"
        targets += [
            f"/{spelled}",
            f"{PAGE}/{spelled}/edit?a=1",
            f"/x?next=/y?xsso={spelled}",
            f"/x?next={quote(link, safe='')}",
            f"/x?next={quote(quote(link, safe=''), safe='')}",
            f"/x?{spelled}",
            f"/x?{spelled}=1&a=2",
            f"/x?a+{spelled}+b",
            f"/x?q={quote(chr(123) + chr(34) + 'sso' + chr(34) + ':' + chr(34))}{spelled}%22%7D",
            f"/x?sso[]={spelled}",
            f"/x?SSO={spelled}",
            f"/x?a=1;sso={spelled}",
        ]
    return targets


def headers_with(token: str) -> list[tuple[str, str]]:
    """Return headers that contain `token`."""
    values = [spelling(token) for spelling in SPELLINGS]
    values += [f"https://studio.example/y?sso={value}" for value in values]
    names = [
        *("Referer", "X-Original-URI", "X-Original-URL", "X-Forwarded-Uri", "X-Forwarded-For", "X-Forwarded-Host"),
        *("X-Request-ID", "User-Agent", "Origin", "Forwarded", "X-Real-IP", "Accept-Language", "Traceparent"),
    ]
    return [(name, value) for name in names for value in values] + [
        ("X-Request-ID", f"1-{token}"),
        ("Tracestate", f"a={token}"),
        ("Cookie", f"a={token}; studio_session={token}.{token}"),
        ("Authorization", f"Bearer {token}"),
        ("Authorization", f"Basic {token}"),
    ]
