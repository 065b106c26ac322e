"""`POST /v1/sso_tokens`, for integrations."""

import json

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sso_service.people import FieldError, Person, read_person
from sso_service.permissions import Scope as ApiScope
from sso_service.service import NotAuthenticated, Service
from sso_service.web.errors import JSON_HEADERS, InvalidJSON
from sso_service.web.requests import BodyTooLarge, bearer, body

_HEADERS = [(name.lower().encode(), value.encode()) for name, value in JSON_HEADERS.items()]


class CreateToken:
    """Issues a login token for the person in the body."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        secret = bearer(scope)
        if secret is None:
            raise NotAuthenticated
        try:
            person = decode_person(await body(scope, receive))
        except (BodyTooLarge, InvalidJSON, FieldError):
            # Who may not ask is told nothing about what they sent.
            await self._service.authorize(secret, ApiScope.WRITE_SSO)
            raise
        except ClientDisconnect:
            return
        issued = await self._service.issue(secret, person)
        content = msgspec.json.encode(issued)
        length = (b"content-length", b"%d" % len(content))
        await send({"type": "http.response.start", "status": 201, "headers": [*_HEADERS, length]})
        await send({"type": "http.response.body", "body": content})


class _Fields(msgspec.Struct):
    email: str
    first_name: str
    last_name: str


_decode = msgspec.json.Decoder(_Fields).decode


def decode_person(content: bytes) -> Person:
    """The person that a JSON body describes; other fields are ignored. Raises `InvalidJSON` or `FieldError`."""
    try:
        return read_person(msgspec.structs.asdict(_decode(content.decode())))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Something is wrong with it; what, the slower way finds out.
        return read_person(json_object(content))


def json_object(content: bytes) -> dict[str, object]:
    """The object that `content` is in JSON (RFC 8259, so UTF-8 only, and no NaN). Raises `InvalidJSON`."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise InvalidJSON from None
    if not isinstance(value, dict):
        raise InvalidJSON
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)
