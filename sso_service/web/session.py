"""`GET /session` and `POST /logout`, and the session cookie."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sso_service.permissions import permissions
from sso_service.service import Service, SignedIn
from sso_service.sessions import Session
from sso_service.web.errors import CrossOrigin, Problem, json_error, json_response
from sso_service.web.requests import SESSION_COOKIE, cookie, is_same_origin


class SessionEndpoint:
    """Who is signed in, and what they may do: 200, or 401."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await current_session(self._service, scope)
        signed_in = await self._service.signed_in(session) if session else None
        if signed_in is None:
            response = json_error(Problem(401, "not_signed_in", "Nobody is signed in."))
        else:
            response = json_response(describe(signed_in))
        await response(scope, receive, send)


async def logout(request: Request) -> Response:
    """Ends the session of this browser: 204, and the cookie is gone."""
    if not is_same_origin(request.scope):
        raise CrossOrigin
    gone = set_cookie(request.scope, SESSION_COOKIE, "", max_age=0)
    return Response(status_code=204, headers={"Set-Cookie": gone, "Cache-Control": "no-store"})


def describe(signed_in: SignedIn) -> dict[str, object]:
    """What is told about somebody who is signed in."""
    user, role = signed_in.standing.user, signed_in.standing.role
    assert user is not None  # noqa: S101 - nobody without either is signed in
    assert role is not None  # noqa: S101 - likewise
    return {
        "user": {"id": user.id, "email": user.email, "first_name": user.first_name, "last_name": user.last_name},
        "account_id": signed_in.session.account_id,
        "role": role,
        "permissions": permissions(role),
    }


async def current_session(service: Service, scope: Scope) -> Session | None:
    """The session in the request's cookie, whose signature and age were checked, or None."""
    value = cookie(scope, SESSION_COOKIE)
    return await service.read_session(value) if value else None


def set_cookie(scope: Scope, name: str, value: str, *, max_age: int) -> str:
    """A `Set-Cookie` line (RFC 6265bis): not for scripts, not from other sites' forms, on HTTPS not without it."""
    secure = "; Secure" if scope["scheme"] == "https" else ""
    return f"{name}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Lax{secure}"
