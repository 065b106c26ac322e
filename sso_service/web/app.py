"""The ASGI application: the routing table, the limits around it, and the work that runs beside the requests."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.database import open_database
from sso_service.errors import MethodNotAllowed, Overloaded
from sso_service.key_directory import KeyDirectory
from sso_service.server.capacity import limit_connections
from sso_service.server.draining import drain_first
from sso_service.services.node import Node
from sso_service.settings import read_settings
from sso_service.web.api import consume_token, create_token, revoke_token, verify_token
from sso_service.web.auth import ForwardAuth
from sso_service.web.login import Confirm, LoginLink
from sso_service.web.observed import Observed
from sso_service.web.openapi import docs_endpoint, openapi_endpoint
from sso_service.web.operations import Metrics, Readyz, healthz
from sso_service.web.problems import ErrorResponses, problem_of
from sso_service.web.quota import QUOTA_HEADERS, QuotaHeaders
from sso_service.web.session import Logout, SessionEndpoint
from sso_service.web.studio.sections import studio


@dataclass(frozen=True, slots=True)
class Route:
    """One of the service's own paths. It responds under any load unless it is `limited`. With GET it supports HEAD."""

    method: str
    path: str
    endpoint: ASGIApp
    limited: bool = True


def routing_table(node: Node, errors: ErrorResponses) -> list[Route]:
    """Return the service's own paths. Every other path can be the target of a login link."""
    return [
        Route("POST", "/v1/sso_tokens", create_token(node)),
        Route("POST", "/v1/sso_tokens/verify", verify_token(node)),
        Route("POST", "/v1/sso_tokens/consume", consume_token(node)),
        Route("POST", "/v1/sso_tokens/revoke", revoke_token(node)),
        Route("GET", "/auth", ForwardAuth(node)),
        Route("GET", "/session", SessionEndpoint(node)),
        Route("POST", "/logout", Logout(node)),
        Route("POST", "/sso/sign-out-everywhere", Logout(node, everywhere=True)),
        Route("POST", "/sso/confirm", Confirm(node, errors)),
        Route("GET", "/healthz", healthz, limited=False),
        Route("GET", "/readyz", Readyz(node)),
        Route("GET", "/metrics", Metrics(node)),
        Route("GET", "/openapi.json", openapi_endpoint()),
        Route("GET", "/docs", docs_endpoint()),
    ]


def node_from(environ: Mapping[str, str], kind: type[Node] = Node) -> Node:
    """Return the node that the settings in `environ` describe. Raises `SettingsError`."""
    settings = read_settings(environ)
    return kind(settings, open_database(settings), KeyDirectory(settings.keys_path))


def create_app(node: Node | None = None) -> ASGIApp:
    """Return the application. Without a `node` it makes one from the environment, as each worker does."""
    if node is None:
        node = node_from(os.environ)
    node.keys.refresh()
    settings = node.settings
    errors = ErrorResponses()
    routes = routing_table(node, errors)
    own_paths = {route.path for route in routes}
    login_link = LoginLink(node, errors, studio(node) if settings.studio_pages else None)
    app: ASGIApp = Dispatcher(
        routes, login_link, errors, lifespan=partial(_lifespan, node), max_in_flight=settings.max_in_flight
    )
    if settings.rate is not None:
        app = QuotaHeaders(app, node.issuing)
    if origins := settings.origins_of("cors_origins"):
        app = ApiForOrigins(app, origins)
    observed = Observed(app, own_paths, access_log=settings.access_log)
    if settings.tracing:
        from sso_service.observability.tracing import Traced  # noqa: PLC0415 - an extra that may not be installed

        return Traced(observed, observed.route)
    return observed


@asynccontextmanager
async def _lifespan(node: Node, _: object) -> AsyncIterator[None]:
    # The present objects stay alive. Garbage collection skips them and runs after 20,000 new objects instead of 700,
    # which saves a third of the time with many requests in flight.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    background = asyncio.create_task(node.run_in_background())
    limit_connections(node.settings.max_connections)
    drain_first(node.settings.drain, node.drain)
    try:
        yield
    finally:
        background.cancel()
        with suppress(asyncio.CancelledError):
            await background
        # In a thread: the event loop goes on, so operations of a database that does not answer end at their deadline.
        await asyncio.to_thread(node.close)


@dataclass(slots=True)
class _Body:
    """Whether the body of a request has arrived."""

    complete: bool = False


class Dispatcher:
    """Finds the endpoint of a request, limits how many run at a time, and turns their errors into JSON.

    A dictionary instead of Starlette's routing: matching a regular expression for each route, within two middlewares,
    takes as long as everything that this service does for a request.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        login_link: LoginLink,
        errors: ErrorResponses,
        *,
        lifespan: Callable[[object], AbstractAsyncContextManager[None]],
        max_in_flight: int,
    ) -> None:
        self._routes: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self._routes.setdefault(route.path, {})
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route
        self._login_link = Route("", "", login_link)
        self._errors = errors
        self._lifespan = Router(lifespan=lifespan)
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._lifespan(scope, receive, send)
            return
        try:
            route = self._find(scope)
            if route.limited:
                await self._run_limited(route.endpoint, scope, receive, send)
            else:
                await route.endpoint(scope, receive, send)
        except Exception as error:
            await self._errors.json(error)(scope, receive, send)
            if problem_of(error) is None:
                raise  # a bug: the server logs it

    def _find(self, scope: Scope) -> Route:
        methods = self._routes.get(scope["path"])
        if methods is None:
            # Any other path can be the target of a login link. It is not redirected to a variant with or without a
            # slash, which would send the login token once more.
            return self._login_link
        if (route := methods.get(scope["method"])) is None:
            if any(each.limited for each in methods.values()):
                self._check_load()  # under load it is rejected like any other request
            raise MethodNotAllowed(", ".join(sorted(methods)))
        return route

    async def _run_limited(self, endpoint: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        # Rejected immediately: work that outlives the client's time-out is wasted.
        self._check_load()
        self._in_flight += 1
        try:
            await endpoint(scope, partial(self._receive, receive, _Body()), send)
        finally:
            self._in_flight -= 1

    async def _receive(self, receive: Receive, body: _Body) -> Message:
        if body.complete:  # nothing can follow but the end of the connection
            return await receive()
        # A request counts as in flight only once its body has arrived. Otherwise a client could occupy all places by
        # sending slowly; until then it only occupies a connection.
        self._in_flight -= 1
        try:
            message = await receive()
        finally:
            self._in_flight += 1
        self._check_load(of_this_request=1)
        body.complete = not message.get("more_body", False)
        return message

    def _check_load(self, *, of_this_request: int = 0) -> None:
        if self._in_flight - of_this_request >= self._max_in_flight:
            raise Overloaded("too many requests are in flight")


class ApiForOrigins:
    """The application with CORS: scripts from `origins` may call the API in a browser, and no other path."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._api = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After", *QUOTA_HEADERS],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_api = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (self._api if is_api else self._app)(scope, receive, send)
