"""Every error that an answer can be: its status, its code, and how it looks as JSON."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import msgspec
from itsdangerous import BadData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sso_service import service
from sso_service.errors import BodyTooLarge, BodyTooSlow, FieldError, OutcomeUnknown, Overloaded, Unavailable

RETRY_AFTER = "2"
"""Seconds after which it makes sense to ask again."""

_TOLD_EVERY = 5.0  # seconds between two lines in the log about what could not be answered

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as it is told to a client."""

    status: int
    code: str
    message: str
    details: dict[str, str] | None = None
    headers: dict[str, str] = field(default_factory=dict)


class InvalidJSON(Exception):
    """The body is not a JSON object."""


class CrossOrigin(Exception):
    """A request that rests on a cookie does not come from a page of this origin."""


def problem_of(error: Exception) -> Problem | None:
    """How `error` is told, or None if it is not one that a client can be told about."""
    match error:
        case service.NotAuthenticated():
            return Problem(
                401, "missing_token", "Missing or invalid API token.", headers={"WWW-Authenticate": "Bearer"}
            )
        case service.InsufficientScope(scope=scope):
            return Problem(
                403, "insufficient_scope", f"The API token lacks the scope {scope}.", {"required_scope": str(scope)}
            )
        case service.RateLimited(retry_after=seconds):
            message = "This API token is used too often. Try again in a moment."
            return Problem(429, "rate_limited", message, headers={"Retry-After": str(seconds)})
        case BodyTooSlow():
            return Problem(408, "request_timeout", "The body took too long.", headers={"Connection": "close"})
        case BodyTooLarge():
            return Problem(413, "payload_too_large", "The body is larger than 16 KiB.", headers={"Connection": "close"})
        case InvalidJSON():
            return Problem(400, "invalid_json", "The body is not a JSON object.")
        case FieldError(field=name, rule="required"):
            return Problem(422, "parameter_missing", str(error), {"field": name, "rule": "required"})
        case FieldError(field=name, rule=rule):
            return Problem(422, "parameter_invalid", str(error), {"field": name, "rule": rule})
        case service.UserDisabled():
            return Problem(403, "user_disabled", "This user is disabled.")
        case service.RoleNotAllowed():
            return Problem(403, "role_not_allowed", "The user's role is above what this API token may sign in.")
        case service.NotSignedIn():
            return Problem(401, "not_signed_in", "Nobody is signed in.")
        case service.TokenConsumed():
            return Problem(410, "token_consumed", "The login token was used before.")
        case service.TokenExpired():
            return Problem(410, "token_expired", "The login token has expired.")
        case BadData():
            return Problem(422, "token_invalid", "The login token is not valid.")
        case service.NoAccess():
            return Problem(403, "no_access", "The user has no access here.")
        case CrossOrigin():
            return Problem(403, "cross_origin", "The request does not come from a page of this site.")
        case Overloaded():
            return _unavailable("overloaded", "Too much is going on. Try again in a moment.")
        case Unavailable():
            return _unavailable("unavailable", "The service cannot do this now. Try again in a moment.")
        case OutcomeUnknown():
            return _unavailable("outcome_unknown", "We cannot tell whether this was done. Get a new login link.")
        case HTTPException(status_code=404):
            return Problem(404, "not_found", "There is nothing here.")
        case HTTPException(status_code=405, headers=allow):
            headers = {"Allow": ", ".join(sorted((allow or {}).get("Allow", "").split(", ")))}
            return Problem(405, "method_not_allowed", "This method is not allowed here.", headers=headers)
        case HTTPException(status_code=status):
            return Problem(status, "bad_request", HTTPStatus(status).phrase + ".")
    return None


def _unavailable(code: str, message: str) -> Problem:
    return Problem(503, code, message, headers={"Retry-After": RETRY_AFTER})


JSON_HEADERS = {
    "Content-Type": "application/json",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON that nobody keeps."""
    return Response(msgspec.json.encode(content), status, {**JSON_HEADERS, **(headers or {})})


def json_error(problem: Problem) -> Response:
    """The JSON form of an error."""
    error: dict[str, object] = {"code": problem.code, "message": problem.message}
    if problem.details:
        error["details"] = problem.details
    return json_response({"error": error}, problem.status, problem.headers)


class Refusals:
    """Tells the log of 503s without a line for each: the first, then now and then how many more, and the end."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # the one in which the next line is due, if one is
        self._last = ""
        self._more = 0

    def note(self, code: str, error: Exception) -> None:
        """A request was turned away because of `error`."""
        self._last = f"{code}: {error}"
        if self._loop is (loop := asyncio.get_running_loop()):
            self._more += 1
            return
        self._loop, self._more = loop, 0
        log.warning("%s", self._last)
        loop.call_later(_TOLD_EVERY, self._tell)

    def _tell(self) -> None:
        if self._loop is not (loop := asyncio.get_running_loop()):
            return
        if self._more:
            log.warning("%d more requests were turned away in %.0f s; %s", self._more, _TOLD_EVERY, self._last)
            self._more = 0
            loop.call_later(_TOLD_EVERY, self._tell)
        else:
            log.info("no request was turned away in the last %.0f s", _TOLD_EVERY)
            self._loop = None


refusals = Refusals()


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler: every error that nobody turned into a page is JSON."""
    problem = problem_of(error)
    if problem is None:  # a bug; Starlette raises it again behind us, and the server logs it
        return json_error(Problem(500, "internal_error", "Something went wrong here."))
    if problem.status == 503:
        refusals.note(problem.code, error)
    return json_error(problem)


EXCEPTION_HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = dict.fromkeys(
    (
        service.NotAuthenticated,
        service.InsufficientScope,
        service.RateLimited,
        service.UserDisabled,
        service.RoleNotAllowed,
        service.NotSignedIn,
        service.TokenConsumed,
        service.TokenExpired,
        service.NoAccess,
        BadData,
        BodyTooLarge,
        BodyTooSlow,
        InvalidJSON,
        FieldError,
        CrossOrigin,
        Unavailable,
        OutcomeUnknown,
        HTTPException,
        Exception,
    ),
    handle,
)
