"""The kinds of hostile connections: the behaviour of each from its first byte until it leaves or is cut off.

The requests are as expensive or as confusing as their kind allows, and each connection acts about once per pace. So the
soak shows the effect of what clients send and how they behave, and not that of a rate beyond the capacity.
"""

import json
import random
import secrets
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import msgspec

from scripts.tools.proof.hostile.peer import Peer

PAGE = "/client/123/t/42/posts"
"""The page of the attacked account that forged login links open."""
SETTINGS = "/client/124/t/50/settings"
"""The settings of the hostile account."""
_BIG = 30_000
"""Bytes of a long part of a head, whose limit is 32 KiB."""
_BODY = 15_000
"""Bytes of a long body, whose limit is 16 KiB."""


class Insider(msgspec.Struct, frozen=True):
    """The possessions of a hostile customer: an API token of the own account, and session cookies of its admins."""

    api_token: str
    cookies: list[str]


Behave = Callable[[Peer, Insider], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of connection. `weight` is its share of the connections; `reads` is false if it reads no response.

    `breach` decides for a status whether it shows that a request got what it must not get.
    """

    name: str
    behave: Behave
    weight: int = 1
    reads: bool = True
    breach: Callable[[int], bool] = lambda _: False


def _request(first: str, *lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{first} HTTP/1.1", "Host: studio.example", *lines, "", ""]).encode("latin-1") + body


def _post(path: str, api_token: str, content: bytes | dict[str, object]) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = (f"Authorization: Bearer {api_token}", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return _request(f"POST {path}", *headers, body=body)


def _navigation(target: str, *lines: str) -> bytes:
    return _request(f"GET {target}", "Accept: text/html", "Sec-Fetch-Dest: document", *lines)


def _forged() -> str:
    # The last of 43 characters has two spare bits, which must be zero in a well-formed token.
    return secrets.token_urlsafe(32)[:-1] + "A"


def _filled(*pieces: str) -> str:
    piece = random.choice(pieces)
    return piece * (_BIG // len(piece))


# --- one request after the other, each of which is answered ----------------------------------------------------------


def _asking(make: Callable[[Insider], bytes], *, body: bool = True) -> Behave:
    async def behave(peer: Peer, insider: Insider) -> None:
        while True:
            await peer.send(make(insider), requests=1)
            await peer.status(body=body)
            await peer.pause()

    return behave


def _malformed() -> str:
    return random.choice(["", "a", _forged()[:-1], _forged() + "A", "%00" * 20, "ä" * 43, "%ff" * 43, "A" * 5000])


def _nested() -> bytes:
    depth = _BODY // 2
    return random.choice([b"[" * _BODY, b"[" * depth + b"]" * depth, b'{"email":' * (_BODY // 9)])


def _address() -> str:
    local, domain = random.choice([("a." * 30, "ä." * 90 + "com"), ("a" * 60, "xn--" + "a" * 180), ("ä" * 60, "b.c")])
    return random.choice([f"{local}@{domain}", "@" * 250, '"' * 200 + "@b.c", "\u202e" * 100 + "@b.c"])


def _form(insider: Insider) -> bytes:
    body = (random.choice(["%41=&", "a&", "name=%C3%A4&"]) * _BODY)[:_BODY].encode()
    return _request(
        f"POST {SETTINGS}/api-tokens",
        f"Cookie: {random.choice(insider.cookies)}",
        "Sec-Fetch-Site: same-origin",
        "Content-Type: application/x-www-form-urlencoded",
        f"Content-Length: {len(body)}",
        body=body,
    )


def _forwarded() -> list[str]:
    names = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Request-ID", "X-Original-URI", "Forwarded", "Referer")
    values = ("1.2.3.4 event=login", "\x85event=login", "for=" * 1000, f"/?sso={_forged()}", "%0d%0a", "\xff" * 500)
    return [f"{random.choice(names)}: {random.choice(values)}" for _ in range(8)]


_ANSWERED: dict[str, Callable[[Insider], bytes]] = {
    "/metrics": lambda _: _request("GET /metrics"),
    "/readyz": lambda _: _request("GET /readyz"),
    "OPTIONS and TRACE": lambda _: _request(f"{random.choice(['OPTIONS', 'TRACE', 'BREW'])} {PAGE}?sso={_forged()}"),
    "CONNECT": lambda _: _request("CONNECT studio.example:443"),
    "WebSocket": lambda _: _request(
        f"GET {PAGE}",
        *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "HTTP/1.0": lambda _: f"GET {PAGE}?sso={_forged()} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode(),
    "query of 30 KB": lambda _: _navigation(f"/x?{_filled('%73s&', '%41%41%41&', '%C3%A4=1&', '&', '+=%2B&')}sso=a"),
    "path of 30 KB": lambda _: _navigation(f"{_filled('/%41', '/%C3%A4', '/a', '/', '%252e', '/.')}?sso={_forged()}"),
    "forward authentication of 30 KB": lambda insider: _request(
        "GET /auth", f"Cookie: {insider.cookies[0]}", f"X-Original-URI: {_filled('/%41', '/a?a&', '/client/', ';')}"
    ),
    "cookies of 30 KB": lambda _: _request(
        "GET /session", "Cookie: " + _filled("a=b; ", "studio_session=W10.aA.aaaa; ", ";", "studio_session=; ")
    ),
    "Accept-Language of 30 KB": lambda _: _navigation(
        f"{PAGE}?sso={_forged()}", "Accept-Language: " + _filled("de-aa;q=0.5,", "a,", ",", "x-y-z;q=0.0001, ")
    ),
    "headers of 30 KB": lambda _: _request("GET /session", *["a: b"] * (_BIG // 6)),
    "forwarding headers": lambda _: _navigation(f"{PAGE}?sso={_forged()}", *_forwarded()),
    "JSON, nested": lambda insider: _post("/v1/sso_tokens", insider.api_token, _nested()),
    "JSON, long": lambda insider: _post("/v1/sso_tokens", insider.api_token, b'{"a":"' + b"\\u00e4" * 2600 + b'"}'),
    "e-mail addresses": lambda insider: _post(
        "/v1/sso_tokens", insider.api_token, {"email": _address(), "first_name": "a", "last_name": "b"}
    ),
    "forms": _form,
    "body too large": lambda insider: _post("/v1/sso_tokens", insider.api_token, b" " * 100_000),
    "login tokens, malformed": lambda _: _navigation(f"{PAGE}?sso={_malformed()}"),
}

_REFUSED: dict[str, tuple[Callable[[Insider], bytes], Callable[[int], bool]]] = {
    "login tokens, forged": (lambda _: _navigation(f"{PAGE}?sso={_forged()}"), lambda status: status == 303),
    "login tokens, forged, by API": (
        lambda insider: _post(
            f"/v1/sso_tokens/{random.choice(['consume', 'revoke'])}", insider.api_token, {"token": _forged()}
        ),
        lambda status: status == 200,
    ),
    "API tokens, unknown": (
        lambda _: _post("/v1/sso_tokens", f"wf_live_{secrets.token_urlsafe(32)}", {"email": "a@b.example"}),
        lambda status: status in {201, 403, 422},
    ),
}


# --- other behaviour -------------------------------------------------------------------------------------------------


async def _pipelining(peer: Peer, _: Insider) -> None:
    """Send a hundred requests per pace, one behind the other, and read no response."""
    while True:
        await peer.send(_request("GET /a") * 100, requests=100)
        await peer.pause()


def _never_reading(path: str) -> Behave:
    async def behave(peer: Peer, _: Insider) -> None:
        while True:
            await peer.send(_request(f"GET {path}"), requests=1)
            await peer.pause()

    return behave


def _byte_by_byte(start: bytes, then: bytes) -> Behave:
    async def behave(peer: Peer, _: Insider) -> None:
        await peer.send(start, requests=1)
        for byte in then:
            await peer.pause()
            await peer.send(bytes([byte]))
        await peer.status()

    return behave


async def _chunks(peer: Peer, insider: Insider) -> None:
    """Send a body whose chunks have endless extensions or sizes, or a trailer without an end."""
    head = _request("POST /v1/sso_tokens", f"Authorization: Bearer {insider.api_token}", "Transfer-Encoding: chunked")
    await peer.send(head, requests=1)
    await peer.send(random.choice([b"1;a=", b"0" * 30, b"1\r\na\r\n0\r\na: ", b"1 ;", b"fffffffffffffffff\r\n"]))
    for _ in range(100):
        await peer.pause()
        await peer.send(b"0" * 20_000)


async def _expecting(peer: Peer, insider: Insider) -> None:
    """Ask for `100 Continue`, and send no body after it."""
    head = (f"Authorization: Bearer {insider.api_token}", "Content-Length: 100", "Expect: 100-continue")
    await peer.send(_request("POST /v1/sso_tokens", *head), requests=1)
    while True:  # first 100, later the end
        await peer.status()


async def _half_closed(peer: Peer, _: Insider) -> None:
    """End the sending side after a whole request or a part of one, and read the response much later."""
    request = _navigation(f"{random.choice(['/docs', PAGE])}?sso={_forged()}")
    await peer.send(request[: random.choice([len(request), len(request) // 2])], requests=1)
    peer.end()
    await peer.pause(5)
    await peer.status()


async def _resetting(peer: Peer, insider: Insider) -> None:
    """Reset the connection at a random moment during a request or its response."""
    request = random.choice(
        [
            _request("GET /openapi.json") * 3,
            _navigation(f"{PAGE}?sso={_forged()}"),
            _post("/v1/sso_tokens/verify", insider.api_token, {"token": _forged()}),
        ]
    )
    await peer.send(request[: random.choice([len(request), random.randrange(len(request))])], requests=1)
    await peer.pause(random.choice([0, 0.001, 0.01, 1]))
    peer.reset()


async def _garbage(peer: Peer, _: Insider) -> None:
    """Send bytes that are not HTTP."""
    await peer.send(random.choice([b"\0" * 100, b"\r\n" * 1000, b"SSH-2.0-x\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]))
    await peer.send(secrets.token_bytes(5000), requests=1)
    await peer.status()


async def _tls(peer: Peer, _: Insider) -> None:
    """Begin TLS, as on the wrong port."""
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="studio.example")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        await peer.send(hello.read(), requests=1)
    await peer.status()


async def _searching(peer: Peer, insider: Insider) -> None:
    """Search all members as an admin of the hostile account, and leave before the response."""
    search = f"{SETTINGS}/team?search={random.choice(['zz', '%C3%A4', '%25', 'm1', 'first'])}"
    await peer.send(_navigation(search, f"Cookie: {random.choice(insider.cookies)}"), requests=1)
    if random.random() < 0.1:
        await peer.status()
    else:
        await peer.pause(0.01)
        peer.reset()


def _kinds() -> Iterable[Kind]:
    yield Kind("pipelining without reading", _pipelining, reads=False)
    for path in ("/docs", "/openapi.json"):
        yield Kind(f"{path}, never read", _never_reading(path), reads=False)
    yield Kind("slow head", _byte_by_byte(b"GET /a HTTP/1.1\r\n", b"a: " + b"b" * 1000))
    yield Kind(
        "slow body",
        _byte_by_byte(
            _request("POST /v1/sso_tokens", "Authorization: Bearer a", "Content-Length: 1000"), b"{" + b" " * 1000
        ),
    )
    yield Kind("endless chunks", _chunks)
    yield Kind("Expect without a body", _expecting)
    yield Kind("half-closed", _half_closed)
    yield Kind("reset at random", _resetting)
    yield Kind("garbage", _garbage)
    yield Kind("TLS to the plain port", _tls)
    yield Kind("HEAD", _asking(lambda _: _request(f"HEAD {PAGE}?sso={_forged()}"), body=False))
    for name, make in _ANSWERED.items():
        yield Kind(name, _asking(make))
    for name, (make, breach) in _REFUSED.items():
        yield Kind(name, _asking(make), breach=breach)
    yield Kind("searches by an admin who leaves", _searching, weight=3)


KINDS = tuple(_kinds())
"""All kinds."""
