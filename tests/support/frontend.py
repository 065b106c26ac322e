"""A frontend that an integrator might write."""

from typing import Any

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sso_service.client.middleware import SSOLogin
from tests.support.python_client import SERVICE_URL


async def who(request: HTTPConnection) -> Response:
    """What the application knows of who asks, and what it was asked."""
    user = request.user
    content: dict[str, Any] = {"scopes": request.auth.scopes, "name": user.display_name, "query": request.url.query}
    if user.is_authenticated:
        content["email"] = user.email
        content["account"] = user.account_id
    return JSONResponse(content)


@requires("posts:edit")
async def edit(request: Request) -> Response:
    return Response(status_code=204)


@requires(["authenticated", "settings:edit"])
async def settings_page(request: Request) -> Response:
    return Response(status_code=204)


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_bytes(bytes((await who(socket)).body))
    await socket.close()


def frontend(**options: Any) -> Starlette:
    """A frontend that an integrator might write."""
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
