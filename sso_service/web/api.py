"""`POST /v1/sso_tokens` and what is below it: the endpoints for those who have an API token."""

import json
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec
from itsdangerous import BadData
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sso_service.errors import BodyTooLarge, BodyTooSlow, FieldError, InvalidJSON, LoginRefused, NotAuthenticated
from sso_service.http import bearer
from sso_service.people import Person, read_person
from sso_service.permissions import Scope as ApiScope
from sso_service.service import Login, Service, reason_of
from sso_service.tokens import ref
from sso_service.web.errors import JSON_HEADERS
from sso_service.web.requests import body
from sso_service.web.session import describe

_HEADERS = [(name.lower().encode(), value.encode()) for name, value in JSON_HEADERS.items()]

Content = TypeVar("Content")


class ApiEndpoint(Generic[Content]):
    """A POST of a JSON object, which `read` checks, by the holder of an API token with `api_scope`.

    `answer` gets the API token's secret, which it checks, and what was read.
    """

    def __init__(
        self,
        service: Service,
        api_scope: ApiScope,
        read: Callable[[bytes], Content],
        answer: Callable[[str, Content], Awaitable[object]],
        *,
        status: int = 200,
    ) -> None:
        self._service = service
        self._api_scope = api_scope
        self._read = read
        self._answer = answer
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        secret = bearer(scope)
        if secret is None:
            raise NotAuthenticated
        try:
            given = self._read(await body(scope, receive))
        except (BodyTooLarge, BodyTooSlow, InvalidJSON, FieldError):
            # Who may not ask is told nothing about what they sent.
            await self._service.authorize(secret, self._api_scope)
            raise
        except ClientDisconnect:
            return
        content = msgspec.json.encode(await self._answer(secret, given))
        length = (b"content-length", b"%d" % len(content))
        await send({"type": "http.response.start", "status": self._status, "headers": [*_HEADERS, length]})
        await send({"type": "http.response.body", "body": content})


def create_token(service: Service) -> ApiEndpoint[Person]:
    """Issues a login token for the person in the body."""
    return ApiEndpoint(service, ApiScope.WRITE_SSO, decode_person, service.issue, status=201)


def verify_token(service: Service) -> ApiEndpoint[str]:
    """Says what a login token is good for, or why it is good for nothing. Consumes nothing."""

    async def answer(secret: str, token: str) -> dict[str, object]:
        try:
            return _describe(token, await service.verify(secret, token))
        except (BadData, LoginRefused) as error:
            return {"active": False, "ref": ref(token), "reason": reason_of(error)}

    return ApiEndpoint(service, ApiScope.VERIFY_SSO, decode_token, answer)


def consume_token(service: Service) -> ApiEndpoint[str]:
    """Redeems a login token for a frontend that keeps sessions of its own."""

    async def answer(secret: str, token: str) -> dict[str, object]:
        return _describe(token, await service.consume(secret, token))

    return ApiEndpoint(service, ApiScope.VERIFY_SSO, decode_token, answer)


def revoke_token(service: Service) -> ApiEndpoint[str]:
    """Takes back a login token that nobody has used."""

    async def answer(secret: str, token: str) -> dict[str, object]:
        return {"revoked": await service.revoke(secret, token)}

    return ApiEndpoint(service, ApiScope.WRITE_SSO, decode_token, answer)


def _describe(token: str, login: Login) -> dict[str, object]:
    claims = login.claims
    return {
        "active": True,
        "ref": ref(token),
        **describe(claims.account_id, login.user, login.role),
        "expires_at": claims.expires_at,
    }


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


def decode_token(content: bytes) -> str:
    """The field `token` of a JSON body, whatever text it is. Raises `InvalidJSON` or `FieldError`."""
    token = json_object(content).get("token")
    if token is None or (isinstance(token, str) and not token.strip()):
        raise FieldError("token", "required")
    if not isinstance(token, str):
        raise FieldError("token", "type")
    return token


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
