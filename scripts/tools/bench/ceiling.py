"""The most that the framework can do: read the body and send a constant answer."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_TOKEN = {"token": "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA", "user_created": False}


async def issue(request: Request) -> Response:
    """Answer 201 to any JSON body."""
    await request.json()
    return JSONResponse(_TOKEN, 201)


async def login(_: Request) -> Response:
    """Answer 303 to any request."""
    return Response(status_code=303, headers={"Location": "/client/123/t/42/posts"})


async def auth(_: Request) -> Response:
    """Answer 204 to any request."""
    return Response(status_code=204)


def create_app() -> Starlette:
    """Return the application."""
    return Starlette(
        routes=[
            Route("/v1/sso_tokens", issue, methods=["POST"]),
            Route("/auth", auth, methods=["GET"]),
            Route("/{path:path}", login, methods=["GET"]),
        ]
    )
