"""`SSOLogin`: login links for a frontend in Python (Starlette, FastAPI) that keeps sessions of its own.

    app.add_middleware(SSOLogin, service_url="https://sso.example", api_token="wf_live_...")

Needs the extra `sso-service[client]`. The API token needs the scope `verify:sso`; the service consumes the login token
and says who signs in. What must hold for a login link at the service's own login holds here too.
"""

import hashlib
import hmac
import logging
import re
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
from itsdangerous import BadData, TimestampSigner, URLSafeTimedSerializer
from starlette.authentication import AuthCredentials, BaseUser, UnauthenticatedUser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

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
from sso_service.errors import InvalidSession, MalformedToken, NotAStudioPath, NotCanonical
from sso_service.http import cookie, is_for_a_window, is_prefetch, prefers_json, split_parameter
from sso_service.paths import StudioPath, judge
from sso_service.sessions import check_form_token, dump_form_token
from sso_service.tokens import CLOCK_ALLOWANCE, Claims, unsafe_read_claims
from sso_service.web.pages import link_page, message_page

MAX_AGE = 900
"""Seconds for which a session lasts at most."""

_COOKIE_LENGTH = 4096
"""Characters of a cookie value that are looked at: browsers keep no longer ones (RFC 6265 section 6.1)."""
_RETRY_AFTER = 2.0
"""Seconds after which it makes sense to try again, if the service does not say."""

_COOKIE_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 6265 section 4.1.1: a token of RFC 9110

# What of a URL can stand in a link as it is: all of ASCII that can be seen, but what would begin a fragment.
_AS_IT_IS = "".join(map(chr, range(0x21, 0x7F))).replace("#", "")

# Every refusal: its status, and what a machine is told. People are told by a page.
_REFUSALS = {
    "bad_path": (400, "The path is not canonical."),
    "token_invalid": (401, "The login token is not valid."),
    "token_expired": (401, "The login token has expired."),
    "token_consumed": (401, "The login token was used before."),
    "no_access": (403, "The user has no access here."),
    "not_a_navigation": (403, "Login links work only when a person opens them."),
    "unavailable": (503, "We cannot sign you in now. Try again in a moment."),
    "overloaded": (503, "Too much is going on. Try again in a moment."),
    "outcome_unknown": (503, "We cannot tell whether this link was used. Get a new login link."),
}

log = logging.getLogger(__name__)


class SSOUser(BaseUser, msgspec.Struct, frozen=True, array_like=True):
    """Who is signed in, to which account, with the role and the permissions (`section:action`) of the login."""

    id: int
    email: str
    first_name: str
    last_name: str
    account_id: int
    role: str
    permissions: tuple[str, ...]

    @property
    def is_authenticated(self) -> bool:
        """True."""
        return True

    @property
    def display_name(self) -> str:
        """First and last name."""
        return f"{self.first_name} {self.last_name}"

    @property
    def identity(self) -> str:
        """The user's id in decimal."""
        return str(self.id)


class SSOLogin:
    """ASGI middleware: signs in on `GET <any path>?sso=TOKEN`, and says on every request who is signed in.

    `scope["user"]` is an `SSOUser` or Starlette's `UnauthenticatedUser`; `scope["auth"]` has the scope `authenticated`
    and the user's permissions, for `@requires("posts:edit")`.

    The session is the cookie named by `cookie`, signed with a key made from `api_token`, so that all workers with the
    same API token agree, and a new API token ends all sessions. It lasts `max_age` seconds, and so long the role and
    the permissions in it are those of the login: that a user was disabled or got another role counts when it ends. That
    is why more than 900 is a `ValueError`.

    `timeout`, `ssl_context` and `transport` are those of `AsyncSSOClient`; `clock` tells Unix seconds.
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < max_age <= MAX_AGE:
            raise ValueError(f"max_age must be 1 to {MAX_AGE} seconds: until it ends, the role is that of the login")
        if not _COOKIE_NAME.fullmatch(cookie):
            raise ValueError("this cannot be the name of a cookie")
        self._app = app
        self._cookie = cookie
        self._max_age = max_age
        self._clock = clock
        # Made once: it takes a while, and clients may be made for one login only.
        tls = ssl_context or httpx.create_ssl_context()

        def connect() -> AsyncSSOClient:
            return AsyncSSOClient(service_url, api_token, timeout=timeout, ssl_context=tls, transport=transport)

        connect()  # or the first login would find out that the URL is none
        self._connect = connect
        self._state_key = f"sso_login_{id(self)}"
        # One key per purpose, never the secret itself.
        self._sessions = _sessions(hmac.digest(api_token.encode(), b"sso-login-middleware/v1", "sha256"), clock)
        self._switch_key = hmac.digest(api_token.encode(), b"sso-login-middleware-switch/v1", "sha256")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] in {"http", "websocket"}:
            current = self._current(scope)
            scope["user"] = current or UnauthenticatedUser()
            scope["auth"] = AuthCredentials(["authenticated", *current.permissions] if current else [])
            if scope["type"] == "http" and scope["method"] in {"GET", "HEAD"}:
                values, rest = split_parameter(scope["query_string"])
                if values:
                    response = _answer_without_consuming(scope) or await self._sign_in(scope, values, rest, current)
                    # Servers write their access log from this when the answer begins, and shall not write the token.
                    scope["query_string"] = rest
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Keeps one client for as long as the server lives.

        It goes where the server puts the state of its life, so that only this server's requests find it: a client
        belongs to one event loop, and an application may be served by several, one after the other or side by side.
        """
        async with self._connect() as client:
            if "state" in scope:
                scope["state"][self._state_key] = client
            await self._app(scope, receive, send)

    async def _consume(self, scope: Scope, token: str) -> Login:
        client: AsyncSSOClient | None = scope.get("state", {}).get(self._state_key)
        if client is not None:
            return await client.consume(token)
        # A server that does not tell us of its life would leave us with connections that nobody closes.
        async with self._connect() as client:
            return await client.consume(token)

    def _current(self, scope: Scope) -> SSOUser | None:
        """Who is signed in by the cookie, whose signature and age are checked."""
        value = cookie(scope, self._cookie)
        if not value or len(value) > _COOKIE_LENGTH:
            return None
        try:
            payload, signed_at = self._sessions.loads(value, return_timestamp=True)
            user = msgspec.convert(payload, SSOUser)
        except (BadData, msgspec.ValidationError):
            return None
        # Not by itsdangerous: its own check refuses what a worker signed whose clock is a second ahead.
        age = self._clock() - signed_at.timestamp()
        return user if -CLOCK_ALLOWANCE <= age < self._max_age else None

    async def _sign_in(self, scope: Scope, values: list[bytes], rest: bytes, current: SSOUser | None) -> Response:
        raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
        proofs, rest = split_parameter(rest, "sso_switch")
        # Two tokens are none: whoever added one would otherwise choose which of them is read.
        token = values[0].decode("latin-1") if len(values) == 1 else ""
        try:
            path = judge(raw_path)
            # Nobody has checked these. They can lead to a refusal or a question here, and to nothing else.
            claims = unsafe_read_claims(token)
        except NotCanonical:
            return _refusal(scope, "bad_path")
        except NotAStudioPath:
            return _refusal(scope, "no_access")
        except MalformedToken:
            return _refusal(scope, "token_invalid")
        if path.account_id not in {None, claims.account_id}:
            return _refusal(scope, "no_access")
        target = raw_path + (b"?" + rest if rest else b"")
        if current is not None and current.id != claims.user_id and not self._wants_to_switch(scope, token, proofs):
            return self._ask(scope, token, target, current)
        return await self._redeem(scope, token, path, target, claims, current)

    async def _redeem(
        self, scope: Scope, token: str, path: StudioPath, target: bytes, claims: Claims, current: SSOUser | None
    ) -> Response:
        try:
            login = await self._consume(scope, token)
        except (TokenConsumed, TokenExpired) as error:
            # The service says so of genuine tokens only, so now their claims can be believed. Who has what the token
            # was for (back button, double click) is not sent away.
            if current is not None and (current.id, current.account_id) == (claims.user_id, claims.account_id):
                return _redirect(target)
            return _refusal(scope, error.code)
        except (TokenInvalid, NoAccess) as error:
            return _refusal(scope, error.code)
        except SSOError as error:
            log.warning("login: %s: %s", type(error).__name__, error)
            return _failure(scope, error)
        if path.account_id not in {None, login.account_id}:
            return _refusal(scope, "no_access")
        user = msgspec.structs.astuple(login.user)
        response = _redirect(target)
        response.set_cookie(
            self._cookie,
            self._sessions.dumps([*user, login.account_id, login.role, login.permissions]),
            max_age=self._max_age,
            secure=scope["scheme"] == "https",
            httponly=True,
            samesite="lax",
        )
        return response

    def _ask(self, scope: Scope, token: str, target: bytes, current: SSOUser) -> Response:
        """A page that asks whether `current` is to be replaced, with the link that does it.

        The answer is a link, not a form, so that no body has to be read that the application might read as well. A GET
        that changes who is signed in is safe because of the proof in it: only we can make one, it is shown only here,
        and it is good only for this login token and the session cookie that this very browser has, for five minutes.
        Whoever plants a link in another person's browser does not know that cookie, so they cannot have a proof for it.
        """
        proof = dump_form_token(token, b"", cookie(scope, self._cookie) or "", self._switch_key, now=int(self._clock()))
        href = quote(target, safe=_AS_IT_IS) + ("&" if b"?" in target else "?") + f"sso={token}&sso_switch={proof}"
        return link_page(scope, current=current.email, href=href)

    def _wants_to_switch(self, scope: Scope, token: str, proofs: list[bytes]) -> bool:
        if len(proofs) != 1:
            return False
        keys, now = [self._switch_key], int(self._clock())
        try:
            check_form_token(proofs[0].decode("latin-1"), token, b"", cookie(scope, self._cookie) or "", keys, now=now)
        except InvalidSession:
            return False
        return True


def _sessions(key: bytes, clock: Callable[[], float]) -> URLSafeTimedSerializer:
    """What signs session cookies: HMAC-SHA-256 (itsdangerous' default is SHA-1), at the time that `clock` tells."""

    class Signer(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(clock())

    # The key is derived for its purpose already, so that the signer derives nothing more.
    how = {"key_derivation": "none", "digest_method": hashlib.sha256}
    return URLSafeTimedSerializer(key, signer=Signer, signer_kwargs=how)


def _answer_without_consuming(scope: Scope) -> Response | None:
    """The answer to a GET or HEAD that is not a person's navigation, or None if it is one.

    Link previews, mail scanners and browsers that load ahead would otherwise burn the link before its owner clicks it.
    """
    if scope["method"] == "HEAD":
        return Response(headers={"Cache-Control": "no-store"})
    if is_prefetch(scope):
        return Response(status_code=503, headers={"Cache-Control": "no-store"})
    return None if is_for_a_window(scope) else _refusal(scope, "not_a_navigation")


def _redirect(target: bytes) -> Response:
    """303 to `target`, byte for byte. It is a canonical path and a query, so it stays on this host."""
    # What the next page links to must not learn where this person came from.
    response = Response(status_code=303, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
    response.raw_headers.append((b"location", target))
    return response


def _failure(scope: Scope, error: SSOError) -> Response:
    """The answer when the service did not do its work, whoever is to blame: the person in front of it is not."""
    match error:
        case OutcomeUnknown():
            code = "outcome_unknown"
        case Unavailable(code=code):
            pass
        case _:
            code = "unavailable"
    seconds = _RETRY_AFTER if error.retry_after is None else error.retry_after
    return _refusal(scope, code, {"Retry-After": f"{seconds:.0f}"})


def _refusal(scope: Scope, code: str, more: dict[str, str] | None = None) -> Response:
    """A page that says what happened, or JSON where it is asked for. It repeats nothing of the request."""
    status, message = _REFUSALS[code]
    if not prefers_json(scope):
        return message_page(scope, code, status, headers=more)
    content: dict[str, Any] = {"error": {"code": code, "message": message}}
    return JSONResponse(
        content, status, {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(more or {})}
    )
