"""The Studio's sections and the routes of its pages, for installations where no real Studio is behind the service."""

from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from sso_service.errors import AddressNotFound
from sso_service.permissions import ACTIONS, SECTIONS, may
from sso_service.services.node import Node
from sso_service.web.studio import api_tokens, team
from sso_service.web.studio.page_requests import PageRequest, RequireSession, View

_TEAM = "/client/{account:int}/t/{team:int}"
_SETTINGS = f"{_TEAM}/settings"


def studio(node: Node) -> ASGIApp:
    """Return the pages as an application. It responds to other paths with 404."""
    routes = [
        Route("/", View(get=home)),
        Route("/client/{account:int}", View(get=home)),
        Route(_TEAM, View(get=home)),
        Route(_SETTINGS, View(get=settings)),
        Route(f"{_SETTINGS}/api-tokens", View(get=api_tokens.show, post=api_tokens.create)),
        Route(f"{_SETTINGS}/api-tokens/{{id}}/revoke", View(get=api_tokens.confirm_revoke, post=api_tokens.revoke)),
        Route(f"{_SETTINGS}/team", View(get=team.show)),
        Route(f"{_SETTINGS}/team/{{id}}/role", View(post=team.set_role)),
        Route(f"{_SETTINGS}/team/{{id}}/remove", View(get=team.confirm_remove, post=team.remove)),
        Route(f"{_SETTINGS}/team/{{id}}/sign-out", View(post=team.sign_out)),
        Route(f"{_TEAM}/{{section}}", View(get=section)),
    ]
    return RequireSession(Router(routes, redirect_slashes=False, default=_not_found), node)


async def home(page_request: PageRequest) -> Response:
    """Redirect to the posts of the team in the path, else of the account's first team."""
    team_id = page_request.path.team_id
    if team_id is None:
        teams = await page_request.node.accounts.list_teams(page_request.account_id)
        if not teams:
            raise AddressNotFound
        team_id = teams[0].id
    query = "?chromeless=1" if page_request.chromeless else ""
    return RedirectResponse(f"/client/{page_request.account_id}/t/{team_id}/posts{query}", 303)


async def section(page_request: PageRequest) -> Response:
    """Show who is signed in, and what their role may do in the section."""
    name = page_request.request.path_params["section"]
    if name not in SECTIONS:
        raise AddressNotFound
    actions = [(action, may(page_request.signed_in.role, name, action)) for action in ACTIONS]
    return await page_request.render("section.html", actions=actions)


async def settings(page_request: PageRequest) -> Response:
    """Redirect to the first page of the settings."""
    return page_request.redirect("settings/api-tokens")


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise AddressNotFound
