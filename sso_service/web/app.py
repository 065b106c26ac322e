"""The ASGI application: routes, error handling, and what runs beside the requests."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.database.engine import Database
from sso_service.errors import Overloaded
from sso_service.keyring import KeyDirectory
from sso_service.server.draining import drain_first
from sso_service.service import Service
from sso_service.settings import read_settings
from sso_service.web.api import consume_token, create_token, revoke_token, verify_token
from sso_service.web.auth import ForwardAuth
from sso_service.web.errors import EXCEPTION_HANDLERS, handle, problem_of
from sso_service.web.login import Confirm, Login
from sso_service.web.observed import Observed
from sso_service.web.openapi import openapi_endpoints
from sso_service.web.operations import Metrics, Readyz, healthz
from sso_service.web.session import Logout, SessionEndpoint
from sso_service.web.studio import studio


def service_from(environ: Mapping[str, str], kind: type[Service] = Service) -> Service:
    """The service that the settings in `environ` describe. Raises `SettingsError`."""
    settings = read_settings(environ)
    database = Database(settings.database, require_sync_standby=settings.require_sync_standby)
    return kind(settings, database, KeyDirectory(settings.keys_path))


def create_app(service: Service | None = None) -> ASGIApp:
    """The application. Without a `service` it builds one from the environment, as each worker does."""
    if service is None:
        service = service_from(os.environ)
    service.keys.refresh()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # What is there now stays. Not to look at it again at each collection, and to collect less often than after
        # every 700 objects, saves a third of the time with many requests in flight.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        background = asyncio.create_task(service.run_in_background())
        drain_first(service.settings.drain, service.leave)
        try:
            yield
        finally:
            background.cancel()
            with suppress(asyncio.CancelledError):
                await background
            service.close()

    elsewhere = studio(service) if service.settings.studio_pages else None
    issue, session, auth, login = (
        create_token(service),
        SessionEndpoint(service),
        ForwardAuth(service),
        Login(service, elsewhere),
    )
    openapi, docs = openapi_endpoints()
    app = Starlette(
        routes=[
            Route("/v1/sso_tokens", issue, methods=["POST"]),
            Route("/v1/sso_tokens/verify", verify_token(service), methods=["POST"]),
            Route("/v1/sso_tokens/consume", consume_token(service), methods=["POST"]),
            Route("/v1/sso_tokens/revoke", revoke_token(service), methods=["POST"]),
            Route("/auth", auth, methods=["GET"]),
            Route("/session", session, methods=["GET"]),
            Route("/logout", Logout(service), methods=["POST"]),
            Route("/sso/sign-out-everywhere", Logout(service, everywhere=True), methods=["POST"]),
            Route("/sso/confirm", Confirm(service), methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", Readyz(service).get, methods=["GET"]),
            Route("/metrics", Metrics(service).get, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/docs", docs, methods=["GET"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    # Any path that is not one of the service's own may be where a login link leads. Redirecting it to a path with or
    # without a slash first would hand the token around once more.
    app.router.default = login
    app.router.redirect_slashes = False
    short: dict[tuple[str, str], ASGIApp] = {
        ("POST", "/v1/sso_tokens"): issue,
        ("GET", "/auth"): auth,
        ("GET", "/session"): session,
    }
    routes = [route for route in app.routes if isinstance(route, Route)]
    whole: ASGIApp = ShortWay(app, short, login, routes, max_in_flight=service.settings.max_in_flight)
    if origins := service.settings.origins_of("cors_origins"):
        whole = ApiForOrigins(whole, origins)
    observed = Observed(whole, routes, access_log=service.settings.access_log)
    if service.settings.tracing:
        from sso_service.observability.tracing import Traced  # noqa: PLC0415 - an extra, which need not be there

        return Traced(observed, observed.route)
    return observed


class ApiForOrigins:
    """The application, whose API the scripts of some origins may call from a browser. Nothing else of it."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._api = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_the_api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._api if of_the_api else self._app)(scope, receive, send)


class ShortWay:
    """The application, with a short way to the endpoints that carry the load, and a limit on that.

    Starlette's own, through two middlewares and a regular expression for each route, takes as long as all that we do.
    """

    def __init__(
        self,
        app: Starlette,
        endpoints: Mapping[tuple[str, str], ASGIApp],
        login: Login,
        routes: Sequence[Route],
        *,
        max_in_flight: int,
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._login = login
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._own_paths = {route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/healthz":
            await self._app(scope, receive, send)
        elif self._in_flight >= self._max_in_flight:
            # At once, while there is still somebody who can say it: whatever waits longer than its client is in vain.
            await (await handle(Request(scope), Overloaded("too many requests are in flight")))(scope, receive, send)
        else:
            self._in_flight += 1
            try:
                await self._answer(scope, partial(self._receive, receive), send)
            finally:
                self._in_flight -= 1

    async def _receive(self, receive: Receive) -> Message:
        # Who has not sent all of the request is not in flight: it takes no more than a connection, and anybody could
        # take all places by sending slowly.
        self._in_flight -= 1
        try:
            message = await receive()
        finally:
            self._in_flight += 1
        if self._in_flight > self._max_in_flight:
            raise Overloaded("too many requests are in flight")
        return message

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"]))
        if endpoint is None and scope["query_string"] and scope["path"] not in self._own_paths:
            endpoint = self._login
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            await endpoint(scope, receive, send)
        except Exception as error:
            await (await handle(Request(scope), error))(scope, receive, send)
            if problem_of(error) is None:
                raise  # a bug: the server logs it
