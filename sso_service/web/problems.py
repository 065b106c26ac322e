"""Errors as HTTP responses: JSON for API clients, and the log of requests that were answered with 503."""

import asyncio
import logging
from contextvars import Context

import msgspec
from starlette.responses import Response

from sso_service.errors import ServiceError
from sso_service.http import JSON_HEADERS, Problem, error_body
from sso_service.problems import ENTRIES, api_problem, problem

_LOG_INTERVAL = 5.0  # seconds between two log lines about requests that were answered with 503

log = logging.getLogger(__name__)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response that caches must not keep."""
    return Response(msgspec.json.encode(content), status, {**JSON_HEADERS, **(headers or {})})


def json_error(described: Problem) -> Response:
    """Return the JSON form of an error."""
    return Response(error_body(described), described.status, {**JSON_HEADERS, **described.headers})


def problem_of(error: Exception) -> Problem | None:
    """Return `error` as an API client sees it, or None for a bug.

    Errors outside the ladder are bugs, and so are those that the table of problems does not describe, such as an
    operator's. The server must log these, because no client can tell what happened.
    """
    if isinstance(error, ServiceError) and error.code in ENTRIES and error.code != "internal_error":
        return api_problem(error)
    return None


class ErrorResponses:
    """Turns errors into responses, and logs those that are answered with 503.

    These do not get a log line each. The log has the first one, then a count at intervals, and the end.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # the event loop in which the next line is due
        self._last = ""
        self._more = 0

    def json(self, error: Exception) -> Response:
        """Return the JSON response to any error. A bug gets 500; the caller raises it again for the server's log."""
        described = problem_of(error) or problem("internal_error")
        self.note(described, error)
        return json_error(described)

    def note(self, described: Problem, error: Exception) -> None:
        """Log the error if it is answered with 503."""
        if described.status != 503:
            return
        self._last = f"{described.code}: {error}"
        if self._loop is (loop := asyncio.get_running_loop()):
            self._more += 1
            return
        self._loop, self._more = loop, 0
        log.warning("%s", self._last)
        # In a context of its own: the present one belongs to this request, and the report is about others.
        loop.call_later(_LOG_INTERVAL, self._report, context=Context())

    def _report(self) -> None:
        if self._loop is not (loop := asyncio.get_running_loop()):
            return
        if self._more:
            log.warning("%d more requests got 503 in %.0f s; %s", self._more, _LOG_INTERVAL, self._last)
            self._more = 0
            loop.call_later(_LOG_INTERVAL, self._report)
        else:
            log.info("no request got 503 in the last %.0f s", _LOG_INTERVAL)
            self._loop = None
