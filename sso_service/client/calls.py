"""Calls of the service's API: the content of each request and the meaning of each response. No I/O.

An unused login token is worthless after five minutes, so creating one twice is harmless. Consuming twice would report a
login whose response was lost as "used before", and revoking twice would report the first revocation as a use. These two
are marked as `once`: without a response their outcome is unknown.
"""

import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx
import msgspec

from sso_service.client.errors import (
    InsufficientScope,
    InvalidAPIToken,
    InvalidParameter,
    NoAccess,
    OutcomeUnknown,
    RoleNotAllowed,
    SSOError,
    TokenConsumed,
    TokenExpired,
    TokenInvalid,
    Unavailable,
    UnexpectedAnswer,
    UserDisabled,
)
from sso_service.client.models import Created, Login, Verification
from sso_service.http import ErrorBody

Result = TypeVar("Result")

_PATH = "/v1/sso_tokens"

_ERRORS: dict[str, type[SSOError]] = {
    "missing_token": InvalidAPIToken,
    "insufficient_scope": InsufficientScope,
    "parameter_missing": InvalidParameter,
    "parameter_invalid": InvalidParameter,
    "user_disabled": UserDisabled,
    "role_not_allowed": RoleNotAllowed,
    "token_invalid": TokenInvalid,
    "token_expired": TokenExpired,
    "token_consumed": TokenConsumed,
    "no_access": NoAccess,
    "unavailable": Unavailable,
    "overloaded": Unavailable,
    "outcome_unknown": OutcomeUnknown,
}

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# Without a connection to the service, or through the proxy to it, the request was not sent.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class Revoked(msgspec.Struct, frozen=True):
    """The response to a revocation: False if the login token was used before."""

    revoked: bool


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """A request: its path and JSON body, the type of its result, and whether it must not be sent twice."""

    path: str
    body: dict[str, str]
    result: type[Result]
    once: bool = False


def create(email: str, first_name: str, last_name: str) -> Call[Created]:
    """Return the call that creates a login token."""
    return Call(_PATH, {"email": email, "first_name": first_name, "last_name": last_name}, Created)


def verify(token: str) -> Call[Verification]:
    """Return the call that verifies a login token without consuming it."""
    return Call(f"{_PATH}/verify", {"token": token}, Verification)


def consume(token: str) -> Call[Login]:
    """Return the call that consumes a login token."""
    return Call(f"{_PATH}/consume", {"token": token}, Login, once=True)


def revoke(token: str) -> Call[Revoked]:
    """Return the call that revokes a login token."""
    return Call(f"{_PATH}/revoke", {"token": token}, Revoked, once=True)


def read_response(call: Call[Result], response: httpx.Response) -> Result:
    """Return the result in `response`. Raises the `SSOError` that the response describes."""
    status = response.status_code
    try:
        if response.is_success:
            return msgspec.json.decode(response.content, type=call.result)
        error = msgspec.json.decode(response.content, type=ErrorBody).error
    except _UNDECODABLE:
        # The message quotes nothing from the response, which may contain a copy of the request with its tokens.
        message = f"The response with status {status} does not come from the service."
        raise UnexpectedAnswer("unexpected_answer", message, status, None, _retry_after(response)) from None
    # With an unknown code and a status of 500 or more, the operation may have been done or not.
    error_class = _ERRORS.get(error.code, OutcomeUnknown if status >= 500 else SSOError)
    raise error_class(error.code, error.message, status, error.details or None, _retry_after(response))


def without_response(call: Call[Any], error: httpx.HTTPError) -> SSOError:
    """Return the error for a request that got no response because of `error`."""
    reason = type(error).__name__
    if call.once and not isinstance(error, _NOT_SENT):
        message = f"The request may have arrived, but no response came ({reason}). It may have been done or not."
        return OutcomeUnknown("outcome_unknown", message)
    return Unavailable("unavailable", f"The service cannot be reached or does not respond ({reason}).")


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds in `Retry-After` (RFC 9110 section 10.2.3). The service never sends a date; it is ignored."""
    value = response.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"[0-9]{1,9}", value) else None
