"""Errors that the clients raise, as one ladder. They describe a response, or its absence, to the caller of the API.

    SSOError
        InvalidAPIToken, InsufficientScope, InvalidParameter, UserDisabled, RoleNotAllowed
        TokenRefused            TokenInvalid, TokenExpired, TokenConsumed, NoAccess
        Unavailable
        OutcomeUnknown          UnexpectedAnswer

`sso_service.errors` holds other classes, some with the same names: those are raised inside the service.
"""


class SSOError(Exception):
    """The service refused the request, failed, or did not respond. Never contains an API token or a login token.

    `code` and `message` come from the service. `status` is the HTTP status, or None without a response. `details` are
    further fields of the error. `retry_after` is the content of `Retry-After` in seconds, or None.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        details: dict[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(code, message, status, details, retry_after)  # all of them, so that the error can be pickled
        self.code = code
        self.message = message
        self.status = status
        self.details = details or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class InvalidAPIToken(SSOError):
    """401: the API token is unknown, revoked or expired."""


class InsufficientScope(SSOError):
    """403: the API token is valid but lacks a scope."""

    @property
    def required_scope(self) -> str:
        """The missing scope."""
        return self.details.get("required_scope", "")


class InvalidParameter(SSOError):
    """422: an argument is missing or breaks a rule."""

    @property
    def field(self) -> str:
        """The argument: `email`, `first_name`, `last_name` or `token`."""
        return self.details.get("field", "")

    @property
    def rule(self) -> str:
        """The broken rule: `required`, `type`, `max_length`, `email` or `characters`."""
        return self.details.get("rule", "")


class UserDisabled(SSOError):
    """403: an operator has disabled the user."""


class RoleNotAllowed(SSOError):
    """403: the user's role is above the `max_role` of the API token."""


class TokenRefused(SSOError):
    """The login token does not sign in."""


class TokenInvalid(TokenRefused):
    """422: the text is not a login token, the token is forged, or another account issued it."""


class TokenExpired(TokenRefused):
    """410: the login token is genuine, but its lifetime is over."""


class TokenConsumed(TokenRefused):
    """410: the login token is genuine, but it was used before."""


class NoAccess(TokenRefused):
    """403: the login token is genuine, but its user is disabled or not in the account. The token was not consumed."""


class Unavailable(SSOError):
    """503, no connection, or no response to a request that may be repeated: retry later."""


class OutcomeUnknown(SSOError):
    """503, or no response: the operation may have been done or not. The user needs a new login link."""


class UnexpectedAnswer(OutcomeUnknown):
    """The response does not come from the service: a proxy's page, a redirect (never followed), or another server."""
