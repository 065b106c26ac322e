"""`SSOLogin`: ASGI middleware that accepts login links for a frontend with sessions of its own.

    app.add_middleware(SSOLogin, service_url="https://sso.example", api_token="wf_live_...")

For Starlette, FastAPI and other ASGI applications. Requires the extra `client`. The API token needs the scope
`verify:sso`: the service consumes the login token and returns the user. Login links follow the same rules as at the
service's own login.
"""

import hmac
import logging
import ssl
import time
from collections.abc import Callable
from urllib.parse import quote

import httpx

from sso_service.client import (
    AsyncSSOClient,
    Login,
    NoAccess,
    OutcomeUnknown,
    SSOError,
    TokenConsumed,
    TokenExpired,
    TokenInvalid,
    Unavailable,
)
from sso_service.client.asgi import ASGIApp, Receive, Response, Scope, Send
from sso_service.client.pages import refusal, switch_page
from sso_service.client.session import AnonymousUser, Credentials, SessionCookie, SSOUser
from sso_service.errors import InvalidForm, MalformedToken, PathError
from sso_service.http import is_for_a_window, is_prefetch, split_parameter
from sso_service.paths import StudioPath, judge_target
from sso_service.problems import RETRY_AFTER
from sso_service.sessions import check_form_token, dump_form_token
from sso_service.tokens import Claims, unsafe_read_claims

__all__ = ["MAX_AGE", "SSOLogin", "SSOUser"]

MAX_AGE = 900
"""Upper limit of a session's lifetime in seconds."""

# The characters of a URL that a link contains unchanged: all visible ASCII except `#`, which would begin a fragment.
_UNQUOTED = "".join(map(chr, range(0x21, 0x7F))).replace("#", "")

log = logging.getLogger(__name__)


class SSOLogin:
    """ASGI middleware: signs in on `GET <any path>?sso=TOKEN`, and adds the user to the scope of every request.

    `scope["user"]` is an `SSOUser`, or a user with `is_authenticated` False. `scope["auth"].scopes` contains
    `authenticated` and the user's permissions, for Starlette's `@requires("posts:edit")`.

    The session is the cookie named by `cookie`, signed with a key derived from `api_token`. All workers with the same
    API token accept it, and a new API token ends all sessions. It lasts `max_age` seconds. Until it ends, role and
    permissions are those of the login, even if the user is disabled or gets another role. For this reason more than 900
    raises `ValueError`.

    `timeout`, `ssl_context`, `transport` and `allow_http` are those of `AsyncSSOClient`. `clock` returns Unix seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        service_url: str,
        api_token: str,
        cookie: str = "sso_session",
        max_age: int = MAX_AGE,
        timeout: float = 5.0,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        allow_http: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < max_age <= MAX_AGE:
            raise ValueError(f"max_age must be 1 to {MAX_AGE} seconds, because a session keeps the role of its login")
        # Created once: it takes some milliseconds, and a client may be created for a single login.
        tls = ssl_context or httpx.create_ssl_context()

        def connect() -> AsyncSSOClient:
            return AsyncSSOClient(
                service_url, api_token, timeout=timeout, ssl_context=tls, transport=transport, allow_http=allow_http
            )

        connect()  # raises ValueError for invalid settings now, instead of at the first login
        self._app = app
        self._connect = connect
        self._clock = clock
        self._state_key = f"sso_login_{id(self)}"
        self._session = SessionCookie(cookie, api_token, max_age, clock)
        self._switch_key = hmac.digest(api_token.encode(), b"sso-login-middleware-switch/v1", "sha256")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._run_lifespan(scope, receive, send)
            return
        if scope["type"] in {"http", "websocket"}:
            current = self._session.read(scope)
            scope["user"] = current or AnonymousUser()
            scope["auth"] = Credentials(["authenticated", *current.permissions] if current else [])
            if scope["type"] == "http" and scope["method"] in {"GET", "HEAD"}:
                values, query = split_parameter(scope["query_string"])
                if values:
                    response = _response_without_consuming(scope) or await self._sign_in(scope, values, query, current)
                    # Servers write their access log from the scope when the response starts, without the login token.
                    scope["query_string"] = query
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _run_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keep one client for the lifetime of the server.

        It is stored in the server's lifespan state, so only requests of this server find it. A client belongs to one
        event loop, and several servers may run one application, one after the other or in parallel.
        """
        async with self._connect() as client:
            if "state" in scope:
                scope["state"][self._state_key] = client
            await self._app(scope, receive, send)

    async def _consume(self, scope: Scope, token: str) -> Login:
        client: AsyncSSOClient | None = scope.get("state", {}).get(self._state_key)
        if client is not None:
            return await client.consume(token)
        # Without the lifespan protocol, nothing would ever close the connections of a client that is kept.
        async with self._connect() as client:
            return await client.consume(token)

    async def _sign_in(self, scope: Scope, values: list[bytes], query: bytes, current: SSOUser | None) -> Response:
        """Return the response to a login link with these values of `sso` and the rest of its query."""
        raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
        proofs, query = split_parameter(query, "sso_switch")
        # If repeated, the request has no valid token: otherwise an attacker who adds one chooses which of them is read.
        token = values[0].decode("latin-1") if len(values) == 1 else ""
        try:
            path = judge_target(raw_path + b"?" + scope["query_string"])
            # The signature is not checked yet. These claims can lead to a refusal or a question, and to nothing else.
            claims = unsafe_read_claims(token)
        except (PathError, MalformedToken) as error:
            return refusal(scope, error.code)
        if path.account_id not in {None, claims.account_id}:
            return refusal(scope, "no_access")
        target = raw_path + (b"?" + query if query else b"")
        if current is not None and current.id != claims.user_id and not self._is_confirmed(scope, token, proofs):
            return self._ask(scope, token, target, current)
        return await self._redeem(scope, token, path, target, claims, current)

    async def _redeem(
        self, scope: Scope, token: str, path: StudioPath, target: bytes, claims: Claims, current: SSOUser | None
    ) -> Response:
        """Consume the token at the service, set the session cookie and redirect to `target`."""
        try:
            login = await self._consume(scope, token)
        except (TokenConsumed, TokenExpired) as error:
            # The service answers this for genuine tokens only, so the claims can be trusted now. A user who is signed
            # in already (back button, double click) is not refused.
            if current is not None and (current.id, current.account_id) == (claims.user_id, claims.account_id):
                return _redirect(target)
            return refusal(scope, error.code)
        except (TokenInvalid, NoAccess) as error:
            return refusal(scope, error.code)
        except SSOError as error:
            log.warning("login: %s: %s", type(error).__name__, error)
            return _failure(scope, error)
        if path.account_id not in {None, login.account_id}:
            return refusal(scope, "no_access")
        return _redirect(target, cookie=self._session.header(login, https=scope["scheme"] == "https"))

    def _ask(self, scope: Scope, token: str, target: bytes, current: SSOUser) -> Response:
        """Return a page that asks whether `current` is to be replaced, with a link that does so.

        It is a link instead of a form, so the middleware reads no body that the application might read as well. A GET
        that changes the signed-in user is safe because of the proof in it. Only this middleware can make a proof, and
        only this page contains it. It is valid for five minutes, for this login token and for the session cookie of
        this browser. An attacker who plants a link in another person's browser does not have that cookie, and so cannot
        have a proof for it.
        """
        now = int(self._clock())
        proof = dump_form_token(token, b"", self._session.value(scope), self._switch_key, now=now)
        href = quote(target, safe=_UNQUOTED) + ("&" if b"?" in target else "?") + f"sso={token}&sso_switch={proof}"
        return switch_page(scope, current.email, href)

    def _is_confirmed(self, scope: Scope, token: str, proofs: list[bytes]) -> bool:
        """Return whether the request carries exactly one proof, and it is valid for this token and this browser."""
        if len(proofs) != 1:
            return False
        keys, now = [self._switch_key], int(self._clock())
        try:
            check_form_token(proofs[0].decode("latin-1"), token, b"", self._session.value(scope), keys, now=now)
        except InvalidForm:
            return False
        return True


def _response_without_consuming(scope: Scope) -> Response | None:
    """Return the response to a GET or HEAD that is not a person's navigation, or None if it is one.

    Link previews, mail scanners and prefetching browsers would otherwise use up the link before its owner clicks it.
    """
    if scope["method"] == "HEAD":
        return Response(200, {"Cache-Control": "no-store"})
    if is_prefetch(scope):
        return Response(503, {"Cache-Control": "no-store"})
    return None if is_for_a_window(scope) else refusal(scope, "not_a_navigation")


def _redirect(target: bytes, cookie: str | None = None) -> Response:
    """Return a 303 to `target`, byte for byte. It is a canonical path and a query, so it stays on this host."""
    headers = {
        "Location": target.decode("latin-1"),
        "Cache-Control": "no-store",
        # Sites that the next page links to must not learn where this user came from.
        "Referrer-Policy": "no-referrer",
    }
    return Response(303, headers if cookie is None else {**headers, "Set-Cookie": cookie})


def _failure(scope: Scope, error: SSOError) -> Response:
    """Return a 503 for any failure of the service or of this frontend's API token: the user caused neither."""
    code = error.code if isinstance(error, Unavailable) else "unavailable"
    if isinstance(error, OutcomeUnknown):
        code = "outcome_unknown"
    seconds = RETRY_AFTER if error.retry_after is None else f"{error.retry_after:.0f}"
    return refusal(scope, code, {"Retry-After": seconds})
