"""Visits to the pages of a Studio: the address is judged, and whoever asks is admitted, before any page sees them."""

from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs, urlencode

from sqlalchemy import Connection
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.database.administration import find_account, list_teams
from sso_service.database.directory import User
from sso_service.errors import (
    CrossOrigin,
    NoAccess,
    NotAStudioPath,
    NotCanonical,
    NotSignedIn,
    OutcomeUnknown,
    RoleForbidden,
    Unavailable,
)
from sso_service.http import accepts_html, is_same_origin
from sso_service.paths import StudioPath, judge
from sso_service.permissions import SECTIONS, Role, may_view
from sso_service.service import Service, SignedIn
from sso_service.web.errors import problem_of
from sso_service.web.pages import message_page, page
from sso_service.web.session import current_session


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page by somebody who may see it."""

    request: Request
    service: Service
    user: User
    role: Role
    account_id: int
    path: StudioPath
    chromeless: bool
    """The page is shown within another one, which has its own navigation."""

    def bare(self, path: str) -> str:
        """The address of a page of this team."""
        return f"/client/{self.account_id}/t/{self.path.team_id}/{path}"

    def link(self, path: str, **parameters: object) -> str:
        """Likewise, for a link: with parameters, and chromeless if this page is."""
        given = {name: value for name, value in parameters.items() if value}
        query = urlencode({**given, **({"chromeless": 1} if self.chromeless else {})})
        return self.bare(path) + (f"?{query}" if query else "")

    async def page(self, template: str, *, status: int = 200, **context: object) -> Response:
        """The page, in the frame that all pages of a Studio share."""
        names = await self.service.read(partial(_names, account_id=self.account_id, team_id=self.path.team_id))
        common: dict[str, object] = {
            "account_id": self.account_id,
            "account_name": names[0],
            "team_name": names[1],
            "user": self.user,
            "role": self.role,
            "section": self.path.section,
            "sections": [section for section in SECTIONS if may_view(self.role, section)],
            "chromeless": self.chromeless,
            "link": self.link,
            "bare": self.bare,
            "notice": None,
        }
        framed_by = self.service.settings.origins_of("embed_origins")
        return page(self.request.scope, template, common | context, status=status, framed_by=framed_by)


def visit_of(request: Request) -> Visit:
    """The visit that `Door` let in."""
    visit: Visit = request.scope["visit"]
    return visit


class Door:
    """Lets in who is signed in and may see what the path addresses. Errors are pages where pages are asked for."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        self._service = service
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            visit = await self._admit(scope)
            # The path as it was judged: what is spelt in another way is another page.
            # And errors come to us: Starlette's routes would answer some by themselves outside of an application, and
            # others within one by its handlers, which make JSON of them.
            ours = {"app": self, "starlette.exception_handlers": ({}, {})}
            await self._app({**scope, **ours, "path": _spelling(scope), "visit": visit}, receive, send)
        except ClientDisconnect:
            return
        except Exception as error:
            if not accepts_html(scope):
                raise
            response = await self._failure(scope, error)
            await response(scope, receive, send)

    async def _admit(self, scope: Scope) -> Visit:
        try:
            path = judge(scope["raw_path"])
        except (NotCanonical, NotAStudioPath):
            raise HTTPException(404) from None
        if path.account_id is None and scope["raw_path"] != b"/":
            raise HTTPException(404)
        session = await current_session(self._service, scope)
        if session is None:
            raise NotSignedIn
        signed_in = await self._service.admit(session, [path])
        if scope["method"] == "POST" and not is_same_origin(scope):
            raise CrossOrigin
        return _visit(scope, self._service, signed_in, path)

    async def _failure(self, scope: Scope, error: Exception) -> Response:
        match error:
            case NotSignedIn():
                status, what = 401, "not_signed_in"
            case RoleForbidden():
                status, what = 403, "not_allowed"
            case NoAccess():
                status, what = 403, "no_access"
            case CrossOrigin():
                status, what = 403, "cross_origin"
            case Unavailable():
                status, what = 503, "page_unavailable"
            case OutcomeUnknown():
                status, what = 503, "change_unknown"
            case HTTPException(status_code=404):
                status, what = 404, "not_found"
            case _:
                raise error
        problem = problem_of(error)
        return message_page(
            scope,
            what,
            status,
            headers=problem.headers if problem else None,
            framed_by=self._service.settings.origins_of("embed_origins"),
        )


def _spelling(scope: Scope) -> str:
    return scope["raw_path"].decode("latin-1").rstrip("/") or "/"


def _visit(scope: Scope, service: Service, signed_in: SignedIn, path: StudioPath) -> Visit:
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    chromeless = query.get("chromeless", ["0"])[-1].lower() not in {"0", "false", "no"}
    return Visit(
        Request(scope), service, signed_in.user, signed_in.role, signed_in.session.account_id, path, chromeless
    )


def _names(connection: Connection, *, account_id: int, team_id: int | None) -> tuple[str, str | None]:
    teams = {row.id: row.name for row in list_teams(connection, account_id)}
    return find_account(connection, account_id).name, teams.get(team_id)
