"""The session of a frontend: the user that applications see in the ASGI scope, and the cookie that carries it.

`SSOUser`, `AnonymousUser` and `Credentials` have the attributes of Starlette's classes, so `request.user`,
`request.auth` and `@requires(...)` work in Starlette and FastAPI without a dependency on them.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from itsdangerous import BadData, TimestampSigner, URLSafeTimedSerializer

from sso_service.client.models import Login
from sso_service.http import Scope, cookie, set_cookie
from sso_service.tokens import CLOCK_ALLOWANCE

_MAX_LENGTH = 4096
"""Characters of a cookie value that are read: browsers keep no longer cookies (RFC 6265 section 6.1)."""

_COOKIE_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 6265 section 4.1.1: a token of RFC 9110


class SSOUser(msgspec.Struct, frozen=True, array_like=True):
    """The signed-in user, with the account, the role and the permissions (`section:action`) of the login."""

    id: int
    email: str
    first_name: str
    last_name: str
    account_id: int
    role: str
    permissions: tuple[str, ...]

    @property
    def is_authenticated(self) -> bool:
        """True."""
        return True

    @property
    def display_name(self) -> str:
        """First and last name."""
        return f"{self.first_name} {self.last_name}"

    @property
    def identity(self) -> str:
        """The user's id in decimal."""
        return str(self.id)


class AnonymousUser:
    """The user of a request without a session."""

    is_authenticated = False
    display_name = ""
    identity = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The scopes that `@requires(...)` checks."""

    scopes: list[str]


class SessionCookie:
    """The cookie `name`: an `SSOUser`, signed with a key derived from the API token, valid for `max_age` seconds.

    `clock` returns Unix seconds. Raises `ValueError` if `name` is not a cookie name.
    """

    def __init__(self, name: str, api_token: str, max_age: int, clock: Callable[[], float]) -> None:
        if not _COOKIE_NAME.fullmatch(name):
            raise ValueError("the cookie name contains characters that are not allowed")
        self._name = name
        self._max_age = max_age
        self._clock = clock
        # A key of its own for each purpose, so that no value signed for one purpose is valid for another.
        self._serializer = _serializer(hmac.digest(api_token.encode(), b"sso-login-middleware/v1", "sha256"), clock)

    def value(self, scope: Scope) -> str:
        """Return the value that the browser sent, unchecked, or an empty string."""
        return cookie(scope, self._name) or ""

    def read(self, scope: Scope) -> SSOUser | None:
        """Return the signed-in user, or None if the cookie is missing, forged or too old."""
        value = self.value(scope)
        if not value or len(value) > _MAX_LENGTH:
            return None
        try:
            payload, signed_at = self._serializer.loads(value, return_timestamp=True)
            user = msgspec.convert(payload, SSOUser)
        except (BadData, msgspec.ValidationError):
            return None
        # The age is checked here, because itsdangerous refuses a cookie from a worker whose clock is a second ahead.
        age = self._clock() - signed_at.timestamp()
        return user if -CLOCK_ALLOWANCE <= age < self._max_age else None

    def header(self, login: Login, *, https: bool) -> str:
        """Return the `Set-Cookie` line that signs in the user of `login`."""
        user = msgspec.structs.astuple(login.user)
        value = self._serializer.dumps([*user, login.account_id, login.role, login.permissions])
        return set_cookie(self._name, value, max_age=self._max_age, https=https)


def _serializer(key: bytes, clock: Callable[[], float]) -> URLSafeTimedSerializer:
    """Return a serializer that signs with HMAC-SHA-256 (itsdangerous' default is SHA-1), at the time of `clock`."""

    class Signer(TimestampSigner):
        def get_timestamp(self) -> int:
            return int(clock())

    # The key is already derived for its purpose, so the signer derives nothing more.
    options = {"key_derivation": "none", "digest_method": hashlib.sha256}
    return URLSafeTimedSerializer(key, signer=Signer, signer_kwargs=options)
