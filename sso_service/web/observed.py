"""What is seen of every request from outside: its id, its metrics, and a line in the access log."""

import logging
import os
import re
import time
from collections.abc import Collection, Sequence
from itertools import count

import msgspec
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.http import header, split_parameter
from sso_service.observability import metrics
from sso_service.observability.logs import RequestContext, current_request

# What a log can hold without being misread by whoever reads it.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_GONE = 499
"""The status, in log and metrics, of a request whose client went away before the answer; nginx's number for it."""

log = logging.getLogger(__name__)


class Request(msgspec.Struct, frozen=True):
    """A line of the access log."""

    event: str
    method: str
    path: str
    status: int
    milliseconds: float

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status} {self.milliseconds} ms"


class Observed:
    """The application, with `X-Request-ID`, metrics by route, and with `access_log` a line for each request."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route], *, access_log: bool) -> None:
        self.routes = routes
        self._app = app
        self._own_paths: Collection[str] = {route.path for route in routes}
        self._access_log = access_log
        # Not to be guessed, not even by chance the same as another worker's, and made without asking the kernel.
        self._prefix = os.urandom(6).hex()
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = header(scope, b"x-request-id")
        if not request_id or not _REQUEST_ID.fullmatch(request_id):
            request_id = f"{self._prefix}-{next(self._numbers):x}"
        client = scope.get("client")
        current_request.set(RequestContext(request_id, client[0] if client else ""))
        status = _GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            metrics.count_request(self.route(scope), status, seconds)
            if self._access_log:
                log.info(Request("request", scope["method"], _without_token(scope), status, round(seconds * 1000, 1)))

    def route(self, scope: Scope) -> str:
        """A name of which there are few: whoever asks must not be able to make new ones."""
        if scope["path"] in self._own_paths:
            return str(scope["path"])
        return "login" if b"sso" in scope["query_string"] else "page"


def _without_token(scope: Scope) -> str:
    _, query = split_parameter(scope["query_string"])
    path = scope["raw_path"] + (b"?" + query if query else b"")
    return str(path.decode("latin-1"))
