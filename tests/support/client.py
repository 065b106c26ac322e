"""An HTTP client that calls an ASGI application in this process."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message

from tests.support.data import JANE


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: status, headers with lower-case names, body. The request id is separate, since it always differs."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    request_id: str = field(default="", compare=False)

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None. The header must not be repeated."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) < 2, f"{name} occurs {len(values)} times"
        return values[0] if values else None

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        """Return the parsed body. The content type must be JSON."""
        assert self.header("content-type") == "application/json"
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The error code of a JSON error."""
        code: str = self.json()["error"]["code"]
        return code


class Client:
    """Calls an application with raw bytes, which HTTP libraries would normalise, and keeps cookies."""

    def __init__(
        self, app: ASGIApp, *, scheme: str = "http", host: str = "studio.example", address: str = "127.0.0.1"
    ) -> None:
        self.app = app
        self.address = address
        self.scheme = scheme
        self.host = host
        self.cookies: dict[str, str] = {}

    def another(self) -> "Client":
        """Return a client of the same application without cookies, like another browser."""
        return Client(self.app, scheme=self.scheme, host=self.host, address=self.address)

    async def request(
        self,
        method: str,
        target: str | bytes,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        pieces: Sequence[bytes] | None = None,
        ends: asyncio.Event | None = None,
        leaves: asyncio.Event | None = None,
    ) -> Answer:
        """Send a request for `target` (path and query, raw). `pieces` sends the body in several messages.

        If `ends` is given, the end of the body arrives only once it is set. The client stays until it has the answer,
        or until `leaves` is set, and raises `LookupError` if it left without one.
        """
        raw = target.encode() if isinstance(target, str) else target
        path, _, query = raw.partition(b"?")
        sent = [("host", self.host), *((name.lower(), value) for name, value in headers)]
        if self.cookies and not any(name == "cookie" for name, _ in sent):
            sent.append(("cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items())))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": self.scheme,
            "path": _decode(path),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent],
            "client": (self.address, 50000),
            "server": (self.host, 80),
        }
        parts = list(pieces) if pieces is not None else [body]
        incoming: list[Message] = [
            {"type": "http.request", "body": part, "more_body": ends is not None or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]
        outgoing: list[Message] = []

        async def receive() -> Message:
            nonlocal ends
            if ends is not None and not incoming:
                await ends.wait()
                ends = None
                return {"type": "http.request", "body": b"", "more_body": False}
            if incoming:
                return incoming.pop(0)
            if parts:
                await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            outgoing.append(message)

        await self.app(scope, receive, send)
        start = outgoing[0]
        received = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]]
        answer = Answer(
            start["status"],
            [(name, value) for name, value in received if name != "x-request-id"],
            b"".join(message.get("body", b"") for message in outgoing[1:]),
            "".join(value for name, value in received if name == "x-request-id"),
        )
        self._keep_cookies(answer)
        return answer

    async def get(self, target: str | bytes, **headers: str) -> Answer:
        """Send a GET request. `accept_language="de"` sends the header `Accept-Language: de`."""
        return await self.request("GET", target, headers=_dashed(headers))

    async def post_json(self, target: str, content: object, *, token: str | None = None) -> Answer:
        """Send JSON in a POST request, with an API token if given."""
        headers = [("content-type", "application/json")]
        if token is not None:
            headers.append(("authorization", f"Bearer {token}"))
        return await self.request("POST", target, headers=headers, body=json.dumps(content).encode())

    async def issue(self, token: str, person: Mapping[str, str] = JANE) -> str:
        """Issue a login token for `person`, with the API token `token`."""
        answer = await self.post_json("/v1/sso_tokens", person, token=token)
        assert answer.status == 201, answer
        issued: str = answer.json()["token"]
        return issued

    def _keep_cookies(self, answer: Answer) -> None:
        for name, value in answer.headers:
            if name == "set-cookie":
                key, _, content = value.partition(";")[0].partition("=")
                if "Max-Age=0" in value:
                    self.cookies.pop(key, None)
                else:
                    self.cookies[key] = content


def _dashed(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name.replace("_", "-"), value) for name, value in headers.items()]


def _decode(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")
