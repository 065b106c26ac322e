"""What the framework can do at most: read the body and answer something constant."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_TOKEN = {"token": "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA", "user_created": False}


async def issue(request: Request) -> Response:
    """201, whatever comes."""
    await request.json()
    return JSONResponse(_TOKEN, 201)


async def login(_: Request) -> Response:
    """303, whatever comes."""
    return Response(status_code=303, headers={"Location": "/client/123/t/42/posts"})


async def auth(_: Request) -> Response:
    """204, whatever comes."""
    return Response(status_code=204)


def create_app() -> Starlette:
    """The application."""
    return Starlette(
        routes=[
            Route("/v1/sso_tokens", issue, methods=["POST"]),
            Route("/auth", auth, methods=["GET"]),
            Route("/{path:path}", login, methods=["GET"]),
        ]
    )
