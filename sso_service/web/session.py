"""`GET /session`, `POST /logout`, and the session cookie of a request."""

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sso_service.database.directory import User
from sso_service.errors import CrossOrigin, NotSignedIn, Unavailable
from sso_service.http import accepts_html, cookie, is_same_origin, set_cookie
from sso_service.permissions import permissions
from sso_service.services.accounts import Actor
from sso_service.services.node import Node
from sso_service.sessions import Session
from sso_service.settings import Settings
from sso_service.web.problems import json_response
from sso_service.web.requests import SESSION_COOKIE
from sso_service.web.schemas import SessionBody, UserBody
from sso_service.web.studio.pages import message_page


class SessionEndpoint:
    """Report the user of the session and what they may do: 200, or 401."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        current = await current_session(self._node, scope)
        signed_in = await self._node.sessions.check(current) if current else None
        if signed_in is None:
            raise NotSignedIn
        session = signed_in.session
        content = SessionBody(
            user_body(signed_in.user), session.account_id, signed_in.role, permissions(signed_in.role)
        )
        await json_response(content)(scope, receive, send)


class Logout:
    """End the session of this browser: 204 and an expired cookie. With `everywhere`, end all of its user's sessions.

    These are the sessions in the account of this session only: a session that one account's API token began must not
    affect another account. Browsers get a page instead of 204, with a link to the portal.
    """

    def __init__(self, node: Node, *, everywhere: bool = False) -> None:
        self._node = node
        self._everywhere = everywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_same_origin(scope):
            raise CrossOrigin
        framed_by = self._node.settings.origins_of("embed_origins")
        try:
            portal_url = await self._sign_out(scope)
        except Unavailable:
            if not accepts_html(scope):
                raise
            await message_page(scope, "page_unavailable", framed_by=framed_by)(scope, receive, send)
            return
        expired = cookie_line(scope, self._node.settings, SESSION_COOKIE, "", max_age=0)
        headers = {"Set-Cookie": expired, "Cache-Control": "no-store"}
        response = Response(status_code=204, headers=headers)
        if accepts_html(scope):
            response = message_page(scope, "signed_out", portal_url=portal_url, headers=headers, framed_by=framed_by)
        await response(scope, receive, send)

    async def _sign_out(self, scope: Scope) -> str | None:
        """End the sessions on the server side, and return the account's portal."""
        try:
            session = await current_session(self._node, scope)
            signed_in = await self._node.sessions.check(session) if session else None
        except Unavailable:
            if self._everywhere:
                raise
            # Without keys or database the session cannot be read. This browser gives up its cookie all the same.
            return None
        if signed_in is None:
            return None
        if self._everywhere:
            await self._node.accounts.sign_out_member(Actor(), signed_in.session.account_id, signed_in.user.id)
        return signed_in.access.portal_url


def user_body(user: User) -> UserBody:
    """Return the user's JSON fields."""
    return UserBody(user.id, user.email, user.first_name, user.last_name)


async def current_session(node: Node, scope: Scope) -> Session | None:
    """Return the session in the request's cookie, after checking signature and age, or None."""
    value = cookie(scope, SESSION_COOKIE)
    return await node.sessions.read(value) if value else None


def cookie_line(scope: Scope, settings: Settings, name: str, value: str, *, max_age: int) -> str:
    """Return the `Set-Cookie` line of one of the service's cookies. `max_age` is in seconds."""
    embedded = bool(settings.origins_of("embed_origins"))
    return set_cookie(name, value, max_age=max_age, https=scope["scheme"] == "https", embedded=embedded)
