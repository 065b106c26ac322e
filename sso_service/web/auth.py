"""`GET /auth`: forward authentication, for a reverse proxy that asks before it hands a request to a Studio."""

import re

from starlette.types import Receive, Scope, Send

from sso_service.errors import NoAccess, NotCanonical, NotSignedIn, PathError
from sso_service.paths import StudioPath, judge_target
from sso_service.services.node import Node
from sso_service.web.session import current_session

# nginx sends the first, Caddy and Traefik the second. A client can send either, and a proxy may forward the one that it
# does not set. So every occurrence of both has to be permitted.
_ORIGINAL_HEADERS = (b"x-original-uri", b"x-forwarded-uri")
# An intermediary may have joined two headers (RFC 9110 section 5.3), and the second would look like the end of the
# first. So a value that could be several URIs is judged both as one and as several. A value with a space is not a URI.
_JOINED = re.compile(rb",(?=/)")
_MAX_URIS = 16
"""Original URIs of one request, at most. A proxy sends one or two, and each may cost a query of the database."""


class ForwardAuth:
    """204 with the user's identity if they may view the original path. Otherwise 401 or 403."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = await current_session(self._node, scope)
        if session is None:
            raise NotSignedIn
        signed_in = await self._node.sessions.authorize(session, _original_paths(scope))
        headers = [
            (b"x-studio-user", b"%d" % signed_in.user.id),
            (b"x-studio-email", signed_in.user.email.encode()),
            (b"x-studio-account", b"%d" % session.account_id),
            (b"x-studio-role", signed_in.role.encode()),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _original_paths(scope: Scope) -> list[StudioPath]:
    """Return the paths that the proxy was asked for. Raises `NoAccess` if there are too many or one is invalid."""
    values = [value for name, value in scope["headers"] if name in _ORIGINAL_HEADERS]
    try:
        if len(values) > _MAX_URIS:
            raise NotCanonical
        uris = [uri for value in values for uri in _readings(value)]
        if len(uris) > _MAX_URIS:
            raise NotCanonical
        return [judge_target(uri) for uri in uris]
    except PathError as error:
        raise NoAccess from error


def _readings(value: bytes) -> list[bytes]:
    if b" " in value:
        raise NotCanonical
    return [value, *_JOINED.split(value, _MAX_URIS)] if b",/" in value else [value]
