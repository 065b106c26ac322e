"""`POST /v1/sso_tokens` and the addresses below it, for the holders of API tokens."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sso_service import permissions
from sso_service.errors import FieldError, InvalidJSON, LoginTokenError, NotAuthenticated, RequestError
from sso_service.http import JSON_HEADERS, bearer
from sso_service.people import Person, read_person
from sso_service.services.node import Node
from sso_service.services.redeeming import VerifiedToken
from sso_service.tokens import ref
from sso_service.web.requests import body
from sso_service.web.schemas import ActiveToken, InactiveToken, NewToken, PersonBody, RevokedToken
from sso_service.web.session import user_body

_HEADERS = [(name.lower().encode(), value.encode()) for name, value in JSON_HEADERS.items()]

Content = TypeVar("Content")


@dataclass(frozen=True, slots=True)
class ApiEndpoint(Generic[Content]):
    """A POST of a JSON object by the holder of an API token with `scope`.

    `read` decodes the body. `answer` gets the secret of the API token, which it must check, and the decoded body. It
    returns the value that is sent as JSON. With `counts_invalid`, invalid bodies count against the rate limit.
    """

    node: Node
    scope: permissions.Scope
    read: Callable[[bytes], Content]
    answer: Callable[[str, Content], Awaitable[object]]
    status: int = 200
    counts_invalid: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        secret = bearer(scope)
        if secret is None:
            raise NotAuthenticated
        try:
            given = self.read(await body(scope, receive))
        except RequestError:
            # An unauthorized client must not learn anything about its body, so its API token is checked first.
            api_token = await self.node.issuing.authorize(secret, self.scope)
            if self.counts_invalid:
                self.node.issuing.count(secret, api_token)
            raise
        except ClientDisconnect:
            return
        content = msgspec.json.encode(await self.answer(secret, given))
        length = (b"content-length", b"%d" % len(content))
        await send({"type": "http.response.start", "status": self.status, "headers": [*_HEADERS, length]})
        await send({"type": "http.response.body", "body": content})


def create_token(node: Node) -> ApiEndpoint[Person]:
    """Issue a login token for the person in the body."""

    async def answer(secret: str, person: Person) -> NewToken:
        issued = await node.issuing.issue(secret, person)
        return NewToken(issued.token, issued.user_created)

    return ApiEndpoint(node, permissions.Scope.WRITE_SSO, decode_person, answer, status=201, counts_invalid=True)


def verify_token(node: Node) -> ApiEndpoint[str]:
    """Report whether a login token signs in, or why not, without consuming it."""

    async def answer(secret: str, token: str) -> ActiveToken | InactiveToken:
        try:
            return _active(token, await node.redeeming.verify(secret, token))
        except LoginTokenError as error:
            return InactiveToken(ref=ref(token), reason=error.reason)

    return ApiEndpoint(node, permissions.Scope.VERIFY_SSO, decode_token, answer)


def consume_token(node: Node) -> ApiEndpoint[str]:
    """Redeem a login token for a frontend that has its own sessions."""

    async def answer(secret: str, token: str) -> ActiveToken:
        return _active(token, await node.redeeming.consume(secret, token))

    return ApiEndpoint(node, permissions.Scope.VERIFY_SSO, decode_token, answer)


def revoke_token(node: Node) -> ApiEndpoint[str]:
    """Revoke an unused login token."""

    async def answer(secret: str, token: str) -> RevokedToken:
        return RevokedToken(await node.redeeming.revoke(secret, token))

    return ApiEndpoint(node, permissions.Scope.WRITE_SSO, decode_token, answer)


def _active(token: str, verified: VerifiedToken) -> ActiveToken:
    claims = verified.claims
    return ActiveToken(
        ref=ref(token),
        user=user_body(verified.user),
        account_id=claims.account_id,
        role=verified.role,
        permissions=permissions.permissions(verified.role),
        expires_at=claims.expires_at,
    )


_decode = msgspec.json.Decoder(PersonBody).decode


def decode_person(content: bytes) -> Person:
    """Return the person in a JSON body, ignoring other fields. Raises `InvalidJSON` or `FieldError`."""
    try:
        return read_person(msgspec.structs.asdict(_decode(content.decode())))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The slower decoder finds the field and the rule that it breaks.
        return read_person(json_object(content))


def decode_token(content: bytes) -> str:
    """Return the field `token` of a JSON body, any text. Raises `InvalidJSON` or `FieldError`."""
    token = json_object(content).get("token")
    if token is None or (isinstance(token, str) and not token.strip()):
        raise FieldError("token", "required")
    if not isinstance(token, str):
        raise FieldError("token", "type")
    return token


def json_object(content: bytes) -> dict[str, object]:
    """Return the object in a JSON body (RFC 8259: UTF-8 only, without NaN). Raises `InvalidJSON`."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise InvalidJSON from None
    if not isinstance(value, dict):
        raise InvalidJSON
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)
