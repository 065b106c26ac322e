"""Requests for Studio pages: the path is checked and a session required before a view runs; errors become pages."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlencode

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.errors import AddressNotFound, CrossOrigin, MethodNotAllowed, NotSignedIn, PathError, ServiceError
from sso_service.http import accepts_html, form_fields, is_same_origin
from sso_service.paths import StudioPath, judge_target
from sso_service.permissions import SECTIONS, may_view
from sso_service.problems import ENTRIES, api_problem
from sso_service.services.accounts import Actor
from sso_service.services.node import Node
from sso_service.services.sessions import SignedIn
from sso_service.web.requests import form, unless_disconnected
from sso_service.web.session import current_session
from sso_service.web.studio.pages import message_page, page

# On a page of the Studio there is no login link, so its texts for these errors differ from those of the login.
_PAGE_CODES = {"unavailable": "page_unavailable", "overloaded": "page_unavailable", "outcome_unknown": "change_unknown"}

_NOTICES = frozenset({"role", "removed", "signed_out", "revoked"})
_RECORD_ID = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a submitted form. A field that is missing counts as empty."""

    fields: Mapping[str, list[str]]

    def value(self, name: str) -> str:
        """Return the first value of a field."""
        return self.fields.get(name, [""])[0]

    def values(self, name: str) -> tuple[str, ...]:
        """Return all values of a field, such as those of checkboxes."""
        return tuple(self.fields.get(name, ()))


@dataclass(frozen=True, slots=True)
class PageRequest:
    """A request for a page, by a user who may view it."""

    request: Request
    node: Node
    signed_in: SignedIn
    path: StudioPath
    fields: Mapping[str, list[str]] = field(default_factory=dict)
    """The fields of the submitted form."""

    @property
    def account_id(self) -> int:
        """The account of the session, which is that of the path."""
        return self.signed_in.session.account_id

    @property
    def actor(self) -> Actor:
        """The user, as the admin who makes a change."""
        return Actor(admin_id=self.signed_in.user.id)

    @property
    def record_id(self) -> int:
        """The id in the path. Raises `AddressNotFound` if it is not a valid one."""
        if (found := _record_id(self.request.path_params["id"])) is None:
            raise AddressNotFound
        return found

    @property
    def chromeless(self) -> bool:
        """Whether the page is embedded in another one, which has its own navigation."""
        return self.query("chromeless", "0").lower() not in {"0", "false", "no"}

    @property
    def notice(self) -> str | None:
        """The result of a change, which the redirect to this page reports."""
        notice = self.query("notice")
        return notice if notice in _NOTICES else None

    def query(self, name: str, default: str = "") -> str:
        """Return the last value of a query parameter."""
        parameters: Mapping[str, list[str]] = self.request.scope["parameters"]
        return parameters.get(name, [default])[-1]

    def query_id(self, name: str) -> int | None:
        """Return the id in a query parameter, or None if it is not a valid one."""
        return _record_id(self.query(name))

    async def form(self) -> Form:
        """Return the submitted form."""
        return Form(self.fields)

    def address(self, subpath: str) -> str:
        """Return the path of a page of this team, without a query."""
        return f"/client/{self.account_id}/t/{self.path.team_id}/{subpath}"

    def link(self, subpath: str, **parameters: object) -> str:
        """Return the URL of a page of this team with those parameters that are not empty. It stays chromeless."""
        given = {name: value for name, value in parameters.items() if value}
        query = urlencode({**given, **({"chromeless": 1} if self.chromeless else {})})
        return self.address(subpath) + (f"?{query}" if query else "")

    def redirect(self, subpath: str, **parameters: object) -> Response:
        """Return a redirect to a page of this team: see `link`."""
        return RedirectResponse(self.link(subpath, **parameters), 303)

    async def render(self, template: str, *, status: int = 200, **context: object) -> Response:
        """Render a page of the Studio. `context` adds to what every page shows."""
        account, teams = await self.node.accounts.describe(self.account_id)
        role = self.signed_in.role
        common: dict[str, object] = {
            "account": account,
            "teams": teams,
            "team_name": next((team.name for team in teams if team.id == self.path.team_id), None),
            "user": self.signed_in.user,
            "role": role,
            "section": self.path.section,
            "sections": [section for section in SECTIONS if may_view(role, section)],
            "chromeless": self.chromeless,
            "address": self.address,
            "link": self.link,
            "notice": None,
        }
        framed_by = self.node.settings.origins_of("embed_origins")
        return page(self.request.scope, template, common | context, status=status, framed_by=framed_by)


def _record_id(text: str) -> int | None:
    return int(text) if _RECORD_ID.fullmatch(text) else None


Handler = Callable[[PageRequest], Awaitable[Response]]


class View:
    """ASGI endpoint of a page, behind `RequireSession`: one handler for each method. HEAD is handled like GET."""

    def __init__(self, *, get: Handler | None = None, post: Handler | None = None) -> None:
        handlers = {"GET": get, "HEAD": get, "POST": post}
        self._handlers = {method: handler for method, handler in handlers.items() if handler}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["method"])
        if handler is None:
            raise MethodNotAllowed(", ".join(self._handlers))
        page_request: PageRequest = scope["page_request"]
        # Read first: a slow sender must not take the turn of others.
        page_request = replace(page_request, fields=await form(scope, receive))
        if scope["method"] == "POST":
            response = await _change(handler, page_request)
        else:
            response = await unless_disconnected(_show(handler, page_request), receive)
        await response(scope, receive, send)


async def _show(handler: Handler, page_request: PageRequest) -> Response:
    async with page_request.node.page_limits.turn(page_request.account_id):
        return await handler(page_request)


async def _change(handler: Handler, page_request: PageRequest) -> Response:
    async with page_request.node.page_limits.turn(page_request.account_id):
        if await page_request.request.is_disconnected():
            raise ClientDisconnect
        # From here on the change is not abandoned. Otherwise it could be made without its audit event.
        return await handler(page_request)


class RequireSession:
    """Middleware: a request needs a session that may view its path. Adds `page_request` to the scope.

    Browsers get errors as pages. Errors that have no page, and errors for other clients, are raised.
    """

    def __init__(self, app: ASGIApp, node: Node) -> None:
        self._app = app
        self._node = node

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            path, signed_in = await self._authorize(scope)
            # Routes match the raw path, as it was checked: another spelling of a section is another section.
            inner = {**scope, "path": scope["raw_path"].decode("latin-1").rstrip("/") or "/"}
            inner["parameters"] = form_fields(scope["query_string"])
            inner["page_request"] = PageRequest(Request(inner, receive), self._node, signed_in, path)
            await self._app(inner, receive, send)
        except ClientDisconnect:
            return
        except ServiceError as error:
            code = _PAGE_CODES.get(error.code, error.code)
            if not accepts_html(scope) or code not in ENTRIES or ENTRIES[code].title is None:
                raise
            framed_by = self._node.settings.origins_of("embed_origins")
            headers = api_problem(error).headers
            await message_page(scope, code, headers=headers, framed_by=framed_by)(scope, receive, send)

    async def _authorize(self, scope: Scope) -> tuple[StudioPath, SignedIn]:
        try:
            path = judge_target(scope["raw_path"] + b"?" + scope["query_string"])
        except PathError:
            raise AddressNotFound from None
        if path.account_id is None and scope["raw_path"] != b"/":
            raise AddressNotFound
        session = await current_session(self._node, scope)
        if session is None:
            raise NotSignedIn
        self._node.page_limits.count(session)  # before the database does anything for it
        signed_in = await self._node.sessions.authorize(session, [path])
        if scope["method"] == "POST" and not is_same_origin(scope):
            raise CrossOrigin
        return path, signed_in
