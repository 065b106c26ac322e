"""Every error of the service, as one ladder: catch a class at the level that matters.

Each class has a `code`, the name under which `problems.py` describes it to clients, and a `reason`, the word that logs,
metrics and `/v1/sso_tokens/verify` use. Messages never contain a login token, an API token or a key.

    ServiceError
        LoginTokenError         a login token does not sign in
            InvalidToken        not genuine: MalformedToken, ForgedToken, OverlongToken
            LoginRefused        genuine: TokenExpired, TokenConsumed, NoAccess, RoleForbidden
        ApiTokenError           NotAuthenticated, InsufficientScope, RateLimited
        UserDisabled, RoleNotAllowed, NotSignedIn, PagesRateLimited, InvalidSession, InvalidForm
        RequestError            InvalidJSON, FieldError, BodyTooLarge, BodyTooSlow, CrossOrigin, NotANavigation,
                                AddressNotFound, MethodNotAllowed
            PathError           NotCanonical, NotAStudioPath
        DatabaseError           Unavailable (Overloaded), OutcomeUnknown
        AccountError            NotFound, Conflict, NotAnAdmin, LastAdmin
        OperatorError           SettingsError, SchemaMismatch, CannotListen
            KeyRingError        KeysBusy, KeyDirectoryUnreadable, NoSigningKey, UnknownKey
"""

from itsdangerous import BadData, BadSignature, BadTimeSignature, SignatureExpired


class ServiceError(Exception):
    """Base class of all errors of the service."""

    code: str = "internal_error"
    reason: str = ""
    details: dict[str, str] | None = None
    """Further fields for programs: `field` and `rule`, or `required_scope`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "reason" not in vars(cls) and "code" in vars(cls):
            cls.reason = cls.code


# --- login tokens ----------------------------------------------------------------------------------------------------


class LoginTokenError(ServiceError, BadData):
    """The login token does not sign in."""

    code = "token_invalid"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class InvalidToken(LoginTokenError):
    """The login token is not genuine. Nothing in it can be trusted."""


class MalformedToken(InvalidToken):
    """The text does not have the form of a login token."""

    reason = "malformed"


class ForgedToken(InvalidToken, BadSignature):
    """No key that may still verify made the tag, or the token is for another account than the API token."""

    reason = "bad_signature"


class OverlongToken(InvalidToken, BadTimeSignature):
    """The tag is good, but the token claims to live longer than the service issues tokens for."""

    reason = "bad_signature"


class LoginRefused(LoginTokenError):
    """The login token is genuine but does not sign in. `portal_url` is the account's portal, if it is known."""

    def __init__(self, message: str = "", *, portal_url: str | None = None) -> None:
        super().__init__(message)
        self.portal_url = portal_url


class TokenExpired(LoginRefused, SignatureExpired):
    """The lifetime of the login token is over, or the ledger's floor has passed it."""

    code = "token_expired"
    reason = "expired"


class TokenConsumed(LoginRefused):
    """The login token was used before."""

    code = "token_consumed"
    reason = "consumed"


class NoAccess(LoginRefused):
    """The user is disabled or not a member, or the path belongs to another account. The token is not consumed."""

    code = "no_access"


class RoleForbidden(NoAccess):
    """The user's role may not view that section."""

    code = "not_allowed"
    reason = "no_access"


# --- API tokens, users, sessions -------------------------------------------------------------------------------------


class ApiTokenError(ServiceError):
    """The API token does not authorize the request."""


class NotAuthenticated(ApiTokenError):
    """The API token is missing, unknown, revoked or expired. A client cannot find out which."""

    code = "missing_token"
    reason = "not_authenticated"


class InsufficientScope(ApiTokenError):
    """The API token is valid but lacks `scope`."""

    code = "insufficient_scope"

    def __init__(self, scope: str) -> None:
        super().__init__(scope)
        self.details = {"required_scope": scope}


class RateLimited(ApiTokenError):
    """The API token was used too often. After `retry_after` seconds it may be used again."""

    code = "rate_limited"

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class UserDisabled(ServiceError):
    """An operator has disabled the user."""

    code = "user_disabled"


class RoleNotAllowed(ServiceError):
    """The user's role is above the `max_role` of the API token."""

    code = "role_not_allowed"


class NotSignedIn(ServiceError):
    """There is no session, or it has ended."""

    code = "not_signed_in"


class PagesRateLimited(ServiceError):
    """The session or its account requests pages too often. After `retry_after` seconds it may request one again."""

    code = "pages_rate_limited"
    reason = "rate_limited"

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class InvalidSession(ServiceError, BadData):
    """The session cookie is not genuine, too old, or from the future."""

    code = "not_signed_in"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class InvalidForm(InvalidSession):
    """The form token was not made for this answer, or its page was open for too long."""

    code = "form_invalid"


# --- requests --------------------------------------------------------------------------------------------------------


class RequestError(ServiceError):
    """The request itself is wrong."""


class InvalidJSON(RequestError):
    """The body is not a JSON object in UTF-8."""

    code = "invalid_json"


class FieldError(RequestError):
    """A field of the body breaks a rule: `required`, `type`, `max_length`, `email` or `characters`."""

    code = "parameter_invalid"

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field} {_RULES[rule]}.")
        self.field = field
        self.rule = rule
        self.details = {"field": field, "rule": rule}
        if rule == "required":
            self.code = "parameter_missing"


_RULES = {
    "required": "is required",
    "type": "must be a string",
    "max_length": "is too long",
    "characters": "contains characters that are not allowed",
    "email": "is not an e-mail address",
}


class BodyTooLarge(RequestError):
    """The body is over 16 KiB. The rest of it was not read."""

    code = "payload_too_large"


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""

    code = "request_timeout"


class CrossOrigin(RequestError):
    """A request that relies on a cookie does not come from a page of this origin."""

    code = "cross_origin"


class NotANavigation(RequestError):
    """The request does not come from a person who opens a login link in a window."""

    code = "not_a_navigation"


class AddressNotFound(RequestError):
    """Nothing exists at this address."""

    code = "not_found"


class MethodNotAllowed(RequestError):
    """The address does not support the method. `allowed` lists those that it supports, sorted."""

    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed


class PathError(RequestError):
    """A login must not redirect to this path."""

    code = "bad_path"


class NotCanonical(PathError):
    """The path can be read in more than one way."""


class NotAStudioPath(PathError):
    """The path claims to be below `/client` but does not have the form of a Studio path."""

    code = "no_access"


# --- database --------------------------------------------------------------------------------------------------------


class DatabaseError(ServiceError):
    """The database did not confirm the operation."""


class Unavailable(DatabaseError):
    """The operation cannot be done at the moment, and nothing happened.

    `retryable` is true if the server aborted the transaction because of another one, so a retry may succeed. `begun` is
    false if the transaction never began, so its operations cannot be the cause.
    """

    code = "unavailable"

    def __init__(self, message: str, *, retryable: bool = False, begun: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.begun = begun


class Overloaded(Unavailable):
    """More requests wait than can be answered in time, and nothing happened."""

    code = "overloaded"


class OutcomeUnknown(DatabaseError):
    """`COMMIT` was sent and there is no answer that can be trusted: the operation may have happened or not."""

    code = "outcome_unknown"


# --- accounts --------------------------------------------------------------------------------------------------------


class AccountError(ServiceError):
    """A change to accounts, teams, members or API tokens is not possible."""


class NotFound(AccountError):
    """There is no such account, team, user, member or API token. The message names it."""

    code = "not_found"


class Conflict(AccountError):
    """The account or team exists already. The message names it."""


class NotAnAdmin(AccountError):
    """The user who requests the change is not, or no longer, an admin of the account."""

    code = "not_allowed"


class LastAdmin(AccountError):
    """The change would leave the account without an admin."""

    code = "last_admin"


# --- operators -------------------------------------------------------------------------------------------------------


class OperatorError(ServiceError):
    """An error that an operator corrects. The message is one sentence for the command line."""


class SettingsError(OperatorError):
    """A setting has an invalid value. The message names the variable and never repeats the value."""


class SchemaMismatch(OperatorError):
    """The database does not have the schema of this version. The message names the remedy."""


class CannotListen(OperatorError):
    """The address is in use or not allowed, or the descriptor is not a listening socket."""


class KeyRingError(OperatorError):
    """A problem with the signing keys."""


class KeysBusy(KeyRingError):
    """Another process is changing the keys."""


class KeyDirectoryUnreadable(KeyRingError):
    """The key directory cannot be listed or written."""


class NoSigningKey(KeyRingError):
    """No key may sign now."""


class UnknownKey(KeyRingError):
    """There is no key with this id."""
