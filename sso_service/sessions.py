"""The two values that a browser holds: the session cookie, and the form token of a confirmation page.

Both use the format of itsdangerous' timed serializer with SHA-256, each with keys derived for its purpose. Pure: keys
and time are arguments.
"""

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
from itsdangerous import BadData, Signer, URLSafeTimedSerializer
from itsdangerous.encoding import base64_encode, int_to_bytes
from itsdangerous.signer import SigningAlgorithm

from sso_service.errors import InvalidForm, InvalidSession
from sso_service.tokens import CLOCK_ALLOWANCE

FORM_LIFETIME = 300
"""Seconds for which a confirmation page can be submitted: the default lifetime of the login token behind it."""

COOKIE_LENGTH = 128
"""Maximum length of a cookie value in characters. Genuine ones have at most 82."""


class Session(msgspec.Struct, frozen=True):
    """The signed-in user, the account, and the time of login (Unix seconds). Permissions are read at each request."""

    user_id: int
    account_id: int
    issued_at: int


class _HMACSHA256(SigningAlgorithm):
    """HMAC-SHA-256 (RFC 2104) in one call. The default of itsdangerous is SHA-1."""

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        return hmac.digest(key, value, "sha256")


# The keys are already derived for their purpose, so the signer must not derive them again.
_SIGNING: dict[str, Any] = {"algorithm": _HMACSHA256(), "key_derivation": "none"}


def dump_session(session: Session, session_key: bytes) -> str:
    """Return the cookie value for `session`, signed with `session_key` (32 bytes)."""
    return _dump([session.user_id, session.account_id], session_key, now=session.issued_at)


def load_session(cookie: str, session_keys: Sequence[bytes], *, now: int, lifetime: int) -> Session:
    """Return the session in a cookie value.

    One of `session_keys` (newest first) must have signed it less than `lifetime` seconds ago. Raises `InvalidSession`.
    The caller checks in the database whether the user still has access.
    """
    # itsdangerous decodes a value before it checks the signature, and skips characters that are not base64. Without
    # this limit, an attacker could fill the cache with megabytes: one valid cookie has any number of spellings of any
    # length.
    if len(cookie) > COOKIE_LENGTH:
        raise InvalidSession("too long")
    session = _signed_session(cookie, tuple(session_keys))
    _check_age(now - session.issued_at, lifetime)
    return session


# A browser sends its cookie with every request, and a proxy checks each request here, so verified signatures are
# cached. Whether these keys signed this value never changes, and after a revocation the set of keys is another cache
# key. The age and the user's access are checked at each request. Refusals are not cached.
@lru_cache(maxsize=4096)
def _signed_session(cookie: str, keys: tuple[bytes, ...]) -> Session:
    payload, issued_at = _signed(cookie, keys)
    match payload:
        case [int(user_id), int(account_id)]:
            return Session(user_id, account_id, issued_at)
    raise InvalidSession("not a session")


def dump_form_token(token: str, target: bytes, browser: str, form_key: bytes, *, now: int) -> str:
    """Return a form token that binds the answer to a confirmation page to the question on that page.

    It is valid only for this login `token`, this `target` (path and query) and this `browser` (the value of a cookie
    that only this browser has). So another site cannot forge an answer, and an answer cannot be used for another login.
    """
    return _dump(_binding(token, target, browser), form_key, now=now)


def check_form_token(
    form_token: str, token: str, target: bytes, browser: str, form_keys: Sequence[bytes], *, now: int
) -> None:
    """Raise `InvalidForm` unless `form_token` was made for these values within the last `FORM_LIFETIME` seconds."""
    try:
        payload, made_at = _signed(form_token, form_keys)
        _check_age(now - made_at, FORM_LIFETIME)
    except InvalidSession as error:
        raise InvalidForm(str(error)) from error
    if not isinstance(payload, str) or not hmac.compare_digest(payload, _binding(token, target, browser)):
        raise InvalidForm("the form belongs to another login or browser")


def _binding(token: str, target: bytes, browser: str) -> str:
    # A digest, so that the source of the page reveals neither the cookie nor a hash of the login token. Each part is
    # hashed separately first, so that no byte can move from one part to the next.
    parts = (token.encode("utf-8", "surrogatepass"), target, browser.encode("utf-8", "surrogatepass"))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _dump(payload: Any, key: bytes, *, now: int) -> str:
    # The format of `URLSafeTimedSerializer.dumps`, with a given time. That method would also try to compress the
    # payload, which is too short for that.
    value = base64_encode(msgspec.json.encode(payload)) + b"." + base64_encode(int_to_bytes(now))
    return _signer(key).sign(value).decode("ascii")


@lru_cache(maxsize=16)
def _signer(key: bytes) -> Signer:
    return Signer(key, **_SIGNING)


def _signed(value: str, keys: Sequence[bytes]) -> tuple[Any, int]:
    """Return the payload that one of `keys` signed, and the time of signing. Raises `InvalidSession`."""
    if not keys:
        raise InvalidSession("no key may verify this")
    try:
        # itsdangerous expects the keys oldest first, and tries the last one first.
        serializer = URLSafeTimedSerializer(list(reversed(keys)), signer_kwargs=_SIGNING)
        payload, signed_at = serializer.loads(value, return_timestamp=True)
    except (BadData, ValueError) as error:  # ValueError: the text cannot be encoded
        raise InvalidSession("no key made this signature") from error
    return payload, int(signed_at.timestamp())


def _check_age(age: int, lifetime: int) -> None:
    # itsdangerous' own check is not used: it rejects a value from a node whose clock is one second ahead.
    if not -CLOCK_ALLOWANCE <= age < lifetime:
        raise InvalidSession("too old, or from the future")
