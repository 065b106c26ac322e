"""`GET /auth`, for a reverse proxy that asks before it hands a request to a Studio: forward authentication."""

import re

from starlette.types import Receive, Scope, Send

from sso_service.errors import NoAccess, NotAStudioPath, NotCanonical, NotSignedIn
from sso_service.paths import StudioPath, judge
from sso_service.service import Service
from sso_service.web.session import current_session

# nginx calls it the one, Caddy and Traefik the other. A client can send either itself, and a proxy that knows only of
# one passes the other on; so every occurrence of both has to be allowed.
_ORIGINAL = (b"x-original-uri", b"x-forwarded-uri")
# Something on the way may have joined two headers to one (RFC 9110 section 5.3), and the second would pass for the end
# of the first. So what could be several is judged both as one and as several. Joined with a blank, it is no URI at all.
_JOINED = re.compile(rb",(?=/)")


class ForwardAuth:
    """204 with who is signed in, if they may see the path that the proxy was asked for; else 401 or 403."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await current_session(self._service, scope)
        if session is None:
            raise NotSignedIn
        signed_in = await self._service.admit(session, _original_paths(scope))
        headers = [
            (b"x-studio-user", b"%d" % signed_in.user.id),
            (b"x-studio-email", signed_in.user.email.encode()),
            (b"x-studio-account", b"%d" % session.account_id),
            (b"x-studio-role", signed_in.role.encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _readings(value: bytes) -> list[bytes]:
    if b" " in value:
        raise NotCanonical
    return [value, *_JOINED.split(value)] if b",/" in value else [value]


def _original_paths(scope: Scope) -> list[StudioPath]:
    """What the proxy was asked for, without queries. Raises `NoAccess` for what nobody may see."""
    values = [value for name, value in scope["headers"] if name in _ORIGINAL]
    try:
        return [judge(uri.partition(b"?")[0]) for value in values for uri in _readings(value)]
    except (NotCanonical, NotAStudioPath) as error:
        raise NoAccess from error
