"""Frontends that an integrator might write with the middleware, and a browser's steps in front of them."""

import html
import re
from typing import Any

import fastapi
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sso_service.client.middleware import SSOLogin
from tests.support.client import Answer, Client
from tests.support.data import JANE
from tests.support.hostile_links import refused
from tests.support.python_client import SERVICE_URL


def _content(request: HTTPConnection) -> dict[str, Any]:
    """Return what the application reads from the request: scopes, user and query."""
    user = request.user
    content: dict[str, Any] = {"scopes": request.auth.scopes, "name": user.display_name, "query": request.url.query}
    if user.is_authenticated:
        content |= {"id": user.identity, "email": user.email, "account": user.account_id}
    return content


async def who(request: Request) -> Response:
    return JSONResponse(_content(request))


@requires("posts:edit")
async def edit(request: Request) -> Response:
    return Response(status_code=204)


@requires(["authenticated", "settings:edit"])
async def settings_page(request: Request) -> Response:
    return Response(status_code=204)


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_json(_content(socket), mode="binary")
    await socket.close()


def frontend(**options: Any) -> Starlette:
    """Return a frontend in Starlette. `options` are those of the middleware."""
    app = Starlette(
        routes=[
            Route("/edit", edit),
            Route("/settings", settings_page),
            WebSocketRoute("/ws", talk),
            Route("/{path:path}", who, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"]),
        ]
    )
    app.add_middleware(SSOLogin, **{"service_url": SERVICE_URL, **options})
    return app


def fastapi_frontend(**options: Any) -> fastapi.FastAPI:
    """Return the same frontend in FastAPI."""
    app = fastapi.FastAPI()
    app.add_middleware(SSOLogin, **{"service_url": SERVICE_URL, **options})

    @app.get("/edit", status_code=204)
    @requires("posts:edit")
    async def edit(request: fastapi.Request) -> None:
        pass

    @app.get("/settings", status_code=204)
    @requires(["authenticated", "settings:edit"])
    def settings_page(request: fastapi.Request) -> None:
        pass

    @app.get("/{path:path}")
    async def who(request: fastapi.Request) -> dict[str, Any]:
        return _content(request)

    return app


async def email_of(browser: Client) -> str | None:
    """Return the e-mail address of the signed-in user, as the application reads it."""
    email: str | None = (await browser.get("/who")).json().get("email")
    return email


async def sign_in(browser: Client, client: Client, api_token: str, person: dict[str, str] = JANE) -> str:
    """Sign in `person` and return the login token that was used."""
    token = await client.issue(api_token, person)
    assert (await browser.get(f"/who?sso={token}")).status == 303
    assert await email_of(browser) == person["email"]
    return token


async def refusal_of(browser: Client, target: str | bytes) -> tuple[int, str]:
    """Return status and error code of a login that is refused."""
    answer = await browser.get(target, accept="application/json")
    assert refused(answer)
    assert answer.header("cache-control") == "no-store"
    return answer.status, answer.error


def link_in(answer: Answer) -> str:
    """Return the link of the page that asks before another user is signed in."""
    assert answer.status == 200
    assert refused(answer)
    (href,) = re.findall(r'<a [^>]*href="([^"]*)"', answer.text)
    return html.unescape(href)
