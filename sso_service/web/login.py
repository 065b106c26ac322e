"""`GET <any path>?sso=TOKEN` and `POST /sso/confirm`: a login token becomes a session and a redirect without it."""

import re
import secrets

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.errors import (
    AddressNotFound,
    CrossOrigin,
    DatabaseError,
    InvalidForm,
    LoginRefused,
    LoginTokenError,
    MethodNotAllowed,
    NotANavigation,
    NotCanonical,
    PathError,
    ServiceError,
    Unavailable,
)
from sso_service.http import (
    cookie,
    has_too_many_parameters,
    is_for_a_window,
    is_prefetch,
    is_same_origin,
    prefers_json,
    split_parameter,
)
from sso_service.paths import judge
from sso_service.problems import problem
from sso_service.services.node import Node
from sso_service.services.redeeming import Question
from sso_service.sessions import FORM_LIFETIME
from sso_service.web.problems import ErrorResponses, json_error
from sso_service.web.requests import FORM_COOKIE, SESSION_COOKIE, form
from sso_service.web.session import cookie_line, current_session
from sso_service.web.studio.pages import message_page, question_page

_REDIRECT_HEADERS = [
    (b"content-length", b"0"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),  # sites that the next page links to must not receive the login link
]
_METHODS = "GET, HEAD, OPTIONS"
_BROWSER_ID = re.compile(r"[A-Za-z0-9_-]{22}", re.ASCII)

# Headers that can show that a GET is not a person's navigation.
_PURPOSE_HEADERS = frozenset({b"sec-purpose", b"purpose", b"x-moz", b"sec-fetch-dest"})


class LoginLink:
    """Every path that is not one of the service's own. Without `sso` in the query it leads to `studio`, or is 404."""

    def __init__(self, node: Node, errors: ErrorResponses, studio: ASGIApp | None = None) -> None:
        self._sign_in = SignIn(node, errors)
        self._studio = studio

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        values, rest = split_parameter(scope["query_string"])
        if values:
            await (await self._response(scope, values, rest))(scope, receive, send)
        elif self._studio:
            await self._studio(scope, receive, send)
        else:
            raise AddressNotFound

    async def _response(self, scope: Scope, values: list[bytes], rest: bytes) -> Response:
        if (response := self._without_consuming(scope)) is not None:
            return response
        if has_too_many_parameters(scope["query_string"]):  # the login token counts as one
            return self._sign_in.refusal(scope, NotCanonical())
        target = scope["raw_path"] + (b"?" + rest if rest else b"")
        # If repeated, the request has no valid token: otherwise an attacker who adds one chooses which of them is read.
        token = values[0].decode("latin-1") if len(values) == 1 else ""
        return await self._sign_in.redeem(scope, token, target)

    def _without_consuming(self, scope: Scope) -> Response | None:
        """Return the response to a request that is not a person's navigation, or None if it is one.

        Link previews, mail scanners and prefetching browsers would otherwise use up the link before the user clicks it.
        """
        method = scope["method"]
        if method == "GET" and _PURPOSE_HEADERS.isdisjoint([name for name, _ in scope["headers"]]):
            return None
        if method == "HEAD":
            return Response(headers={"Cache-Control": "no-store"})
        if method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": _METHODS, "Cache-Control": "no-store"})
        if method != "GET":
            raise MethodNotAllowed(_METHODS)
        if is_prefetch(scope):
            return Response(status_code=503, headers={"Cache-Control": "no-store"})
        return None if self._sign_in.is_for_a_window(scope) else self._sign_in.refusal(scope, NotANavigation())


class Confirm:
    """The answer to the question that a login link may ask first."""

    def __init__(self, node: Node, errors: ErrorResponses) -> None:
        self._sessions = node.sessions
        self._sign_in = SignIn(node, errors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_same_origin(scope):  # before the body is read, so that a foreign form costs nothing
            await self._sign_in.refusal(scope, CrossOrigin())(scope, receive, send)
            return
        try:
            fields = await form(scope, receive, "latin-1")  # a target is bytes
        except ClientDisconnect:
            return
        await (await self._response(scope, fields))(scope, receive, send)

    async def _response(self, scope: Scope, fields: dict[str, list[str]]) -> Response:
        if not self._sign_in.is_for_a_window(scope):
            return self._sign_in.refusal(scope, NotANavigation())
        token, target, replaces, form_token = (
            fields.get(name, [""])[0] for name in ("token", "target", "replaces", "form")
        )
        raw_target = target.encode("latin-1")
        browser = _browser(cookie(scope, FORM_COOKIE) or "", replaces)
        try:
            self._sessions.check_form_token(form_token, token, raw_target, browser)
        except (InvalidForm, Unavailable) as error:
            return self._sign_in.refusal(scope, error)
        return await self._sign_in.redeem(scope, token, raw_target, confirmed=int(replaces))


class SignIn:
    """Redeems a login token for a browser, and answers with a redirect, a question or an error page."""

    def __init__(self, node: Node, errors: ErrorResponses) -> None:
        self._node = node
        self._errors = errors

    async def redeem(self, scope: Scope, token: str, target: bytes, *, confirmed: int | None = None) -> Response:
        """Redeem `token` and redirect to `target` (path and query), or ask first, or refuse."""
        node = self._node
        try:
            path = judge(target.partition(b"?")[0])
            reading = current_session(node, scope)
            outcome = await node.redeeming.sign_in(token, path, reading, confirmed=confirmed)
            if isinstance(outcome, Question):
                return self._ask(scope, token, target, outcome)
            headers = [*_REDIRECT_HEADERS, (b"location", target)]
            if outcome is not None:
                value = node.sessions.sign(outcome)
                line = cookie_line(scope, node.settings, SESSION_COOKIE, value, max_age=node.settings.session_ttl)
                headers.append((b"set-cookie", line.encode("latin-1")))
        except (LoginTokenError, PathError, DatabaseError) as error:
            return self.refusal(scope, error)
        return Redirect(headers)

    def refusal(self, scope: Scope, error: ServiceError) -> Response:
        """Return the error as a page, or as JSON if the client asks for that."""
        described = problem(error.code, page=True)
        self._errors.note(described, error)
        if prefers_json(scope):
            return json_error(described)
        return message_page(
            scope,
            error.code,
            portal_url=error.portal_url if isinstance(error, LoginRefused) else None,
            headers=described.headers,
            framed_by=self._node.settings.origins_of("embed_origins"),
        )

    def is_for_a_window(self, scope: Scope) -> bool:
        """Return whether the browser loads a window, or a frame where embedding is on.

        Which sites may frame the Studio is not decided here but by `frame-ancestors`.
        """
        return is_for_a_window(scope, frames=bool(self._node.settings.origins_of("embed_origins")))

    def _ask(self, scope: Scope, token: str, target: bytes, question: Question) -> Response:
        settings = self._node.settings
        browser_id = cookie(scope, FORM_COOKIE) or ""
        if not _BROWSER_ID.fullmatch(browser_id):  # missing, or not made by this service: it must not be sent back
            browser_id = secrets.token_urlsafe(16)
        user = question.current.user if question.current else None
        replaces = str(user.id if user else 0)
        fields = {
            "token": token,
            "target": target.decode("latin-1"),
            "replaces": replaces,
            "form": self._node.sessions.form_token(token, target, _browser(browser_id, replaces)),
        }
        line = cookie_line(scope, settings, FORM_COOKIE, browser_id, max_age=FORM_LIFETIME)
        return question_page(
            scope,
            current=user.email if user else None,
            fields=fields,
            headers={"Set-Cookie": line},
            framed_by=settings.origins_of("embed_origins"),
        )


class Redirect(Response):
    """303 with raw headers, so that `Location` is sent byte for byte."""

    def __init__(self, raw_headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 303
        self.body = b""
        self.background = None
        self.raw_headers = raw_headers


def _browser(browser_id: str, replaces: str) -> str:
    """Return what a form token is bound to: the browser, and the user that its session belonged to (0: none)."""
    return f"{browser_id}.{replaces}"
