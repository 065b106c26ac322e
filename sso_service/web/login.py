"""`GET <any path>?sso=TOKEN` and `POST /sso/confirm`: a token becomes a session, the browser gets the clean URL."""

import re
import secrets

from itsdangerous import BadSignature
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.errors import (
    CrossOrigin,
    InvalidSession,
    LoginRefused,
    MalformedToken,
    NoAccess,
    NotAStudioPath,
    NotCanonical,
    OutcomeUnknown,
    TokenConsumed,
    TokenExpired,
    Unavailable,
)
from sso_service.http import cookie, is_for_a_window, is_prefetch, is_same_origin, prefers_json, split_parameter
from sso_service.paths import judge
from sso_service.service import Question, Service
from sso_service.sessions import FORM_LIFETIME
from sso_service.web.errors import Problem, json_error, problem_of, refusals
from sso_service.web.pages import message_page, question_page
from sso_service.web.requests import FORM_COOKIE, SESSION_COOKIE, form
from sso_service.web.session import current_session, set_cookie

_REDIRECT_HEADERS = [
    (b"content-length", b"0"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),  # what the next page links to must not learn where this person came from
]
_METHODS = "GET, HEAD, OPTIONS"
_BROWSER = re.compile(r"[A-Za-z0-9_-]{22}", re.ASCII)

# Headers that can tell that a GET is not a person's navigation.
_TELLING = frozenset({b"sec-purpose", b"purpose", b"x-moz", b"sec-fetch-dest"})


class NotANavigation(Exception):
    """What asks is not a person who opens the link in a window."""


class Login:
    """Every path that is not one of the service's own. Without `sso` it is `elsewhere`, or there is nothing here."""

    def __init__(self, service: Service, elsewhere: ASGIApp | None = None) -> None:
        self._service = service
        self._elsewhere = elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        values, rest = split_parameter(scope["query_string"])
        if not values and self._elsewhere:
            await self._elsewhere(scope, receive, send)
            return
        if not values:
            raise HTTPException(404)
        response = _answer_without_consuming(self._service, scope) or await self._sign_in(scope, values, rest)
        await response(scope, receive, send)

    async def _sign_in(self, scope: Scope, values: list[bytes], rest: bytes) -> Response:
        target = scope["raw_path"] + (b"?" + rest if rest else b"")
        # Two tokens are none: whoever added one would otherwise choose which of them is read.
        token = values[0].decode("latin-1") if len(values) == 1 else ""
        return await sign_in(self._service, scope, token, target)


class Confirm:
    """The answer to the question that `Login` may ask first."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_same_origin(scope):  # before anything is read, since that keeps a request in flight
            await refusal(self._service, scope, CrossOrigin())(scope, receive, send)
            return
        try:
            fields = await form(scope, receive, "latin-1")  # a target is bytes
        except ClientDisconnect:
            return
        await (await self._sign_in(scope, fields))(scope, receive, send)

    async def _sign_in(self, scope: Scope, fields: dict[str, list[str]]) -> Response:
        if not _is_for_a_window(self._service, scope):
            return refusal(self._service, scope, NotANavigation())
        token, target, replaces, form_token = (
            fields.get(name, [""])[0] for name in ("token", "target", "replaces", "form")
        )
        raw_target = target.encode("latin-1")
        asked = _asked(cookie(scope, FORM_COOKIE) or "", replaces)
        try:
            self._service.check_form_token(form_token, token, raw_target, asked)
        except InvalidSession as error:
            return refusal(self._service, scope, error)
        return await sign_in(self._service, scope, token, raw_target, confirmed=int(replaces))


async def sign_in(
    service: Service, scope: Scope, token: str, target: bytes, *, confirmed: int | None = None
) -> Response:
    """Redeems `token` and redirects to `target` (path and query), asks first, or says why not."""
    try:
        path = judge(target.partition(b"?")[0])
        current = await current_session(service, scope)
        outcome = await service.sign_in(token, path, current, confirmed=confirmed)
        if isinstance(outcome, Question):
            return _ask(service, scope, token, target, outcome)
        redirect = [*_REDIRECT_HEADERS, (b"location", target)]
        if outcome != current:
            value = service.session_cookie(outcome)
            line = set_cookie(scope, service.settings, SESSION_COOKIE, value, max_age=service.settings.session_ttl)
            redirect.append((b"set-cookie", line.encode("latin-1")))
    except Exception as error:
        return refusal(service, scope, error)
    return Redirect(redirect)


class Redirect(Response):
    """303 with headers that are bytes already, among them a `Location` that is sent as it came."""

    def __init__(self, raw_headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 303
        self.body = b""
        self.background = None
        self.raw_headers = raw_headers


def refusal(service: Service, scope: Scope, error: Exception) -> Response:
    """A page, or JSON where it is asked for, that says why. Raises `error` again if it is not one to be told."""
    portal_url = error.portal_url if isinstance(error, LoginRefused) else None
    match error:
        case NotCanonical():
            problem = Problem(400, "bad_path", "The path is not canonical.")
        case NotAStudioPath():
            problem = Problem(403, "no_access", "The path is not one of this account.")
        case MalformedToken() | BadSignature():
            problem = Problem(401, "token_invalid", "The login token is not valid.")
        case TokenExpired():
            problem = Problem(401, "token_expired", "The login token has expired.")
        case TokenConsumed():
            problem = Problem(401, "token_consumed", "The login token was used before.")
        case NoAccess():
            problem = Problem(403, "no_access", "The user has no access here.")
        case InvalidSession():
            problem = Problem(403, "form_invalid", "The form is not valid any more.")
        case Unavailable() | OutcomeUnknown() | CrossOrigin():
            known = problem_of(error)
            assert known is not None  # nosec B101 # noqa: S101 - all three are in its table
            problem = known
        case NotANavigation():
            problem = Problem(403, "not_a_navigation", "Login links work only when a person opens them.")
        case _:
            raise error
    if problem.status == 503:
        refusals.note(problem.code, error)
    if prefers_json(scope):
        return json_error(problem)
    return message_page(
        scope,
        problem.code,
        problem.status,
        portal_url=portal_url,
        headers=problem.headers,
        framed_by=service.settings.origins_of("embed_origins"),
    )


def _ask(service: Service, scope: Scope, token: str, target: bytes, question: Question) -> Response:
    browser = cookie(scope, FORM_COOKIE) or ""
    if not _BROWSER.fullmatch(browser):  # none yet, or one that is not ours and had better not be sent back
        browser = secrets.token_urlsafe(16)
    user = question.current.user if question.current else None
    replaces = str(user.id if user else 0)
    fields = {
        "token": token,
        "target": target.decode("latin-1"),
        "replaces": replaces,
        "form": service.form_token(token, target, _asked(browser, replaces)),
    }
    line = set_cookie(scope, service.settings, FORM_COOKIE, browser, max_age=FORM_LIFETIME)
    return question_page(
        scope,
        current=user.email if user else None,
        fields=fields,
        headers={"Set-Cookie": line},
        framed_by=service.settings.origins_of("embed_origins"),
    )


def _asked(browser: str, replaces: str) -> str:
    """Whom the question was put to: a browser, in which this user (0: nobody) was signed in."""
    return f"{browser}.{replaces}"


def _answer_without_consuming(service: Service, scope: Scope) -> Response | None:
    """The answer to whatever is not a person's navigation, or None if it is one.

    Link previews, mail scanners and browsers that load ahead would otherwise burn the link before its owner clicks it.
    """
    method = scope["method"]
    if method == "GET" and _TELLING.isdisjoint([name for name, _ in scope["headers"]]):
        return None
    if method == "HEAD":
        return Response(headers={"Cache-Control": "no-store"})
    if method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": _METHODS, "Cache-Control": "no-store"})
    if method != "GET":
        raise HTTPException(405, headers={"Allow": _METHODS})
    if is_prefetch(scope):
        return Response(status_code=503, headers={"Cache-Control": "no-store"})
    return None if _is_for_a_window(service, scope) else refusal(service, scope, NotANavigation())


def _is_for_a_window(service: Service, scope: Scope) -> bool:
    """A frame is a window where embedding is on. Who may have it is the business of `frame-ancestors`."""
    return is_for_a_window(scope, frames=bool(service.settings.origins_of("embed_origins")))
