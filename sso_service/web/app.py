"""The ASGI application: routes, error handling, and what runs beside the requests."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.routing import Route

from sso_service.database.engine import Database
from sso_service.keyring import KeyDirectory
from sso_service.service import Service
from sso_service.settings import read_settings
from sso_service.web.api import CreateToken
from sso_service.web.errors import EXCEPTION_HANDLERS
from sso_service.web.login import Confirm, Login
from sso_service.web.operations import Readyz, healthz
from sso_service.web.session import SessionEndpoint, logout


def create_app(service: Service | None = None) -> Starlette:
    """The application. Without a `service` it builds one from the environment, as each worker does."""
    if service is None:
        settings = read_settings(os.environ)
        service = Service(settings, Database(settings.database), KeyDirectory(settings.keys_path))
    service.keys.refresh()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        background = asyncio.create_task(service.run_in_background())
        try:
            yield
        finally:
            background.cancel()
            with suppress(asyncio.CancelledError):
                await background
            service.close()

    app = Starlette(
        routes=[
            Route("/v1/sso_tokens", CreateToken(service), methods=["POST"]),
            Route("/session", SessionEndpoint(service).get, methods=["GET"]),
            Route("/logout", logout, methods=["POST"]),
            Route("/sso/confirm", Confirm(service), methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", Readyz(service).get, methods=["GET"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    # Any path that is not one of the service's own may be where a login link leads. Redirecting it to a path with or
    # without a slash first would hand the token around once more.
    app.router.default = Login(service)
    app.router.redirect_slashes = False
    return app
