"""Middleware: request ID, metrics and access log."""

import logging
import os
import re
import string
import time
from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address
from itertools import count

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sso_service.http import header, split_parameter
from sso_service.observability import metrics
from sso_service.observability.logs import RequestContext, current_request
from sso_service.observability.redaction import has_secret_shape
from sso_service.server.listening import UNIX

# Characters that are safe in a header of the response.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}", re.ASCII)
_ADDRESS_LENGTH = 64
"""Maximum length of a client's address, with its zone, in characters."""
_ZONE = re.compile(r"[A-Za-z0-9._-]{1,15}", re.ASCII)  # the name of a network interface
_PATH_LENGTH = 2048
"""Characters of path and query in the access log."""
_IN_TOKENS = string.ascii_letters + string.digits + "_-%\\&#;"
_CLIENT_GONE = 499
"""The status in log and metrics if the client disconnected before the response; nginx uses the same number."""

log = logging.getLogger(__name__)


class AccessLogLine(msgspec.Struct, frozen=True):
    """A line of the access log."""

    event: str
    method: str
    path: str
    status: int
    milliseconds: float


class Observed:
    """The application with `X-Request-ID`, metrics by route, and with `access_log` a log line for each request."""

    def __init__(self, app: ASGIApp, own_paths: Collection[str], *, access_log: bool) -> None:
        self._app = app
        self._own_paths = own_paths
        self._access_log = access_log
        # Request IDs are unique across workers, and made without a system call for each.
        self._prefix = os.urandom(6).hex()
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = header(scope, b"x-request-id")
        # One that could be a secret is not repeated in the response either.
        if not request_id or not _REQUEST_ID.fullmatch(request_id) or has_secret_shape(request_id):
            request_id = f"{self._prefix}-{next(self._numbers):x}"
        client = scope.get("client")
        current_request.set(RequestContext(request_id, _address(client[0]) if client else ""))
        status = _CLIENT_GONE

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
                path = _path_without_token(scope)
                log.info(AccessLogLine("request", scope["method"], path, status, round(seconds * 1000, 1)))

    def route(self, scope: Scope) -> str:
        """Return the route's name for metrics. The names are a fixed set, so a client cannot add metrics."""
        if scope["path"] in self._own_paths:
            return str(scope["path"])
        return "login" if b"sso" in scope["query_string"] else "page"


def _path_without_token(scope: Scope) -> str:
    _, query = split_parameter(scope["query_string"])
    path: str = (scope["raw_path"] + (b"?" + query if query else b"")).decode("latin-1")
    if len(path) <= _PATH_LENGTH:
        return path
    # The end is removed up to a character that no token contains, in no encoding: a part of a token would not be
    # recognized as one.
    return path[:_PATH_LENGTH].rstrip(_IN_TOKENS) + "..."


def _address(host: str) -> str:
    """Return the address of a client in its usual spelling, or `invalid`: a proxy may forward what a client made up."""
    return _valid_address(host) if len(host) <= _ADDRESS_LENGTH else "invalid"


@lru_cache(maxsize=4096)
def _valid_address(host: str) -> str:
    if host == UNIX:
        return host
    address, percent, zone = host.partition("%")
    try:
        valid = str(ip_address(address))
    except ValueError:
        return "invalid"
    return valid + percent + zone if not percent or _ZONE.fullmatch(zone) else "invalid"
