"""Python client of the service, for integrations and frontends: `SSOClient`, and `AsyncSSOClient` for async code.

Requires the extra `client` and nothing of the server. The ASGI middleware is in `sso_service.client.middleware`.

`create_token` and `login_url` retry while the service is unavailable. `consume` and `revoke` are never retried: they
raise `OutcomeUnknown` if the request may have arrived and no response came.
"""

from sso_service.client.asynchronous import AsyncSSOClient
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
    TokenRefused,
    Unavailable,
    UnexpectedAnswer,
    UserDisabled,
)
from sso_service.client.models import Created, Login, User, Verification
from sso_service.client.sync import SSOClient

__all__ = [
    "AsyncSSOClient",
    "Created",
    "InsufficientScope",
    "InvalidAPIToken",
    "InvalidParameter",
    "Login",
    "NoAccess",
    "OutcomeUnknown",
    "RoleNotAllowed",
    "SSOClient",
    "SSOError",
    "TokenConsumed",
    "TokenExpired",
    "TokenInvalid",
    "TokenRefused",
    "Unavailable",
    "UnexpectedAnswer",
    "User",
    "UserDisabled",
    "Verification",
]
