"""The pages of a Studio, until a real one stands behind the service: the sections, and what a role may do in them."""

from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from sso_service.database.administration import list_teams
from sso_service.permissions import ACTIONS, SECTIONS, may
from sso_service.service import Service
from sso_service.web.settings import ROUTES as SETTINGS_ROUTES
from sso_service.web.visits import Door, visit_of


async def home(request: Request) -> Response:
    """To the posts of the account's first team, or of the one in the path."""
    visit = visit_of(request)
    team_id = visit.path.team_id
    if team_id is None:
        teams = await visit.service.read(partial(list_teams, account_id=visit.account_id))
        if not teams:
            raise HTTPException(404)
        team_id = teams[0].id
    query = "?chromeless=1" if visit.chromeless else ""
    return RedirectResponse(f"/client/{visit.account_id}/t/{team_id}/posts{query}", 303)


async def section(request: Request) -> Response:
    """Who is signed in, and what their role may do here."""
    visit = visit_of(request)
    name = request.path_params["section"]
    if name not in SECTIONS:
        raise HTTPException(404)
    actions = [(action, may(visit.role, name, action)) for action in ACTIONS]
    return await visit.page("section.html", actions=actions)


def studio(service: Service) -> ASGIApp:
    """The pages. Whatever else they are asked for is 404."""
    return Door(
        service,
        Router(
            [
                Route("/", home),
                Route("/client/{account:int}", home),
                Route("/client/{account:int}/t/{team:int}", home),
                *SETTINGS_ROUTES,
                Route("/client/{account:int}/t/{team:int}/{section}", section),
            ],
            redirect_slashes=False,
        ),
    )
