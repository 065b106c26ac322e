"""`GET /session` and `POST /logout`, and the session cookie."""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sso_service.database.directory import User
from sso_service.errors import CrossOrigin, NotSignedIn, Unavailable
from sso_service.http import accepts_html, cookie, is_same_origin
from sso_service.permissions import Role, permissions
from sso_service.service import Service
from sso_service.sessions import Session
from sso_service.settings import Settings
from sso_service.web.errors import json_response
from sso_service.web.pages import message_page
from sso_service.web.requests import SESSION_COOKIE


class SessionEndpoint:
    """Who is signed in, and what they may do: 200, or 401."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await current_session(self._service, scope)
        signed_in = await self._service.signed_in(session) if session else None
        if signed_in is None:
            raise NotSignedIn
        content = describe(signed_in.session.account_id, signed_in.user, signed_in.role)
        await json_response(content)(scope, receive, send)


class Logout:
    """Ends the session of this browser, or with `everywhere` all sessions of its holder: 204, and the cookie is gone.

    Browsers get a page instead, with the way back to the portal.
    """

    def __init__(self, service: Service, *, everywhere: bool = False) -> None:
        self._service = service
        self._everywhere = everywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_same_origin(scope):
            raise CrossOrigin
        portal_url = await self._sign_out(scope)
        gone = set_cookie(scope, self._service.settings, SESSION_COOKIE, "", max_age=0)
        headers = {"Set-Cookie": gone, "Cache-Control": "no-store"}
        response = Response(status_code=204, headers=headers)
        if accepts_html(scope):
            framed_by = self._service.settings.origins_of("embed_origins")
            response = message_page(
                scope, "signed_out", 200, portal_url=portal_url, headers=headers, framed_by=framed_by
            )
        await response(scope, receive, send)

    async def _sign_out(self, scope: Scope) -> str | None:
        """Does what has to be done but for the cookie; returns the portal of the account."""
        session = await current_session(self._service, scope)
        try:
            signed_in = await self._service.signed_in(session) if session else None
        except Unavailable:
            if self._everywhere:
                raise
            return None  # the cookie goes anyway
        if signed_in is None:
            return None
        if self._everywhere:
            await self._service.sign_out_everywhere(signed_in)
        return signed_in.standing.portal_url


def describe(account_id: int, user: User, role: Role) -> dict[str, object]:
    """What is told about somebody who has access to an account."""
    return {
        "user": {"id": user.id, "email": user.email, "first_name": user.first_name, "last_name": user.last_name},
        "account_id": account_id,
        "role": role,
        "permissions": permissions(role),
    }


async def current_session(service: Service, scope: Scope) -> Session | None:
    """The session in the request's cookie, whose signature and age were checked, or None."""
    value = cookie(scope, SESSION_COOKIE)
    return await service.read_session(value) if value else None


def set_cookie(scope: Scope, settings: Settings, name: str, value: str, *, max_age: int) -> str:
    """A `Set-Cookie` line (RFC 6265bis): not for scripts, not from other sites' forms, on HTTPS not without it.

    With embedding it has to be sent from within another site's page. It is then kept apart for each such site (CHIPS),
    so that it is no use for following anybody from site to site, and browsers that refuse third-party cookies take it.
    That other sites' forms send it too is harmless: whatever changes something asks where it comes from.
    """
    line = f"{name}={value}; Path=/; Max-Age={max_age}; HttpOnly"
    if settings.origins_of("embed_origins"):
        return f"{line}; SameSite=None; Secure; Partitioned"
    return f"{line}; SameSite=Lax" + ("; Secure" if scope["scheme"] == "https" else "")
