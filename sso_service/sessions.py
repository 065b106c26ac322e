"""What a browser carries after login: the session cookie, and the form token of a page that asks before it signs in.

Both are itsdangerous' timed serializer with SHA-256, over keys of their own purpose. Pure: keys and the time are given.
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
"""Seconds for which a confirmation page may be answered: as long as the login token behind it lives."""


COOKIE_LENGTH = 128
"""Characters of a cookie value that are looked at. Ours have 82 at most."""


class Session(msgspec.Struct, frozen=True):
    """Who is signed in, to which account, since when (Unix seconds). What they may do is read anew at each request."""

    user_id: int
    account_id: int
    issued_at: int


class _HMACSHA256(SigningAlgorithm):
    """HMAC-SHA-256 (RFC 2104) in one call; itsdangerous' own default is SHA-1."""

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        return hmac.digest(key, value, "sha256")


# The keys are derived for their purpose already, so that the signer derives nothing more.
_SIGNING: dict[str, Any] = {"algorithm": _HMACSHA256(), "key_derivation": "none"}


def dump_session(session: Session, session_key: bytes) -> str:
    """The cookie value for `session`, signed with `session_key` (32 bytes)."""
    return _dump([session.user_id, session.account_id], session_key, now=session.issued_at)


def load_session(cookie: str, session_keys: Sequence[bytes], *, now: int, lifetime: int) -> Session:
    """The session in a cookie value that one of `session_keys` (newest first) signed less than `lifetime` seconds ago.

    Raises `InvalidSession`. Whether the user still has access is for the database to say.
    """
    # itsdangerous decodes what it gets before it has looked at the signature, and skips what is no base64: anybody
    # could have us keep megabytes, and one valid cookie would have any number of spellings, long ones among them.
    if len(cookie) > COOKIE_LENGTH:
        raise InvalidSession("too long")
    session = _signed_session(cookie, tuple(session_keys))
    _check_age(now - session.issued_at, lifetime)
    return session


# A browser sends its cookie with everything that it asks for, and a proxy asks us about each. What is remembered is
# that these keys signed this, which never changes: another set of keys, as after a revocation, is asked anew, and the
# age and all that the database says are looked at each time. Refusals are not remembered.
@lru_cache(maxsize=4096)
def _signed_session(cookie: str, keys: tuple[bytes, ...]) -> Session:
    payload, issued_at = _signed(cookie, keys)
    match payload:
        case [int(user_id), int(account_id)]:
            return Session(user_id, account_id, issued_at)
    raise InvalidSession("not a session")


def dump_form_token(token: str, target: bytes, browser: str, form_key: bytes, *, now: int) -> str:
    """A form token that binds the answer to a confirmation page to what the page asked.

    It is good only for this login `token`, this `target` (path and query) and this `browser` (the value of a cookie
    that only this browser has), so an answer cannot be planted by another site nor moved to another login.
    """
    return _dump(_binding(token, target, browser), form_key, now=now)


def check_form_token(
    form_token: str, token: str, target: bytes, browser: str, form_keys: Sequence[bytes], *, now: int
) -> None:
    """Raise `InvalidForm` unless `form_token` was made for exactly this within the last `FORM_LIFETIME` seconds."""
    try:
        payload, made_at = _signed(form_token, form_keys)
        _check_age(now - made_at, FORM_LIFETIME)
    except InvalidSession as error:
        raise InvalidForm(str(error)) from error
    if not isinstance(payload, str) or not hmac.compare_digest(payload, _binding(token, target, browser)):
        raise InvalidForm("the form was made for something else")


def _binding(token: str, target: bytes, browser: str) -> str:
    # A digest, so that the page's source shows neither the login token's hash nor the cookie. Each part is hashed by
    # itself first, so that nothing can be moved from one part to the next.
    parts = (token.encode("utf-8", "surrogatepass"), target, browser.encode("utf-8", "surrogatepass"))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _dump(payload: Any, key: bytes, *, now: int) -> str:
    # What `URLSafeTimedSerializer.dumps` makes of it, at a given time, and without its attempt to compress what is too
    # short for that.
    value = base64_encode(msgspec.json.encode(payload)) + b"." + base64_encode(int_to_bytes(now))
    return _signer(key).sign(value).decode("ascii")


@lru_cache(maxsize=16)
def _signer(key: bytes) -> Signer:
    return Signer(key, **_SIGNING)


def _signed(value: str, keys: Sequence[bytes]) -> tuple[Any, int]:
    """What one of `keys` signed, and when. Raises `InvalidSession`."""
    if not keys:
        raise InvalidSession("no key may verify this")
    try:
        # itsdangerous wants the keys oldest first, and tries them from the last backwards.
        serializer = URLSafeTimedSerializer(list(reversed(keys)), signer_kwargs=_SIGNING)
        payload, signed_at = serializer.loads(value, return_timestamp=True)
    except (BadData, ValueError) as error:  # ValueError: text that cannot be encoded
        raise InvalidSession("the signature does not hold") from error
    return payload, int(signed_at.timestamp())


def _check_age(age: int, lifetime: int) -> None:
    # Not by itsdangerous: its own check refuses what a node signed whose clock is a second ahead.
    if not -CLOCK_ALLOWANCE <= age < lifetime:
        raise InvalidSession("too old, or from the future")
