"""The one-time login token: 16 bytes of claims and a 16-byte tag, encoded in 43 characters.

    base64url, no padding, of 32 bytes

    offset  size  field         meaning (all integers unsigned, big-endian)
    0       4     expires_at    Unix seconds; valid while now < expires_at
    4       4     user_id
    8       4     account_id    the account whose API token issued it
    12      4     nonce         random
    16      16    tag           HMAC-SHA-256 over bytes 0..15, first 16 bytes (HMAC-SHA-256-128, RFC 4868)

The expiry comes first because the claims are the primary key of the ledger of consumed tokens: sorted by expiry, it
grows at one end and is purged from the other. The account is in the claims so that a login made by one account's API
token cannot open another account of the same user. The nonce only distinguishes tokens of the same user, account and
second. The tag is the part that cannot be guessed.

Issued tokens are not stored, so this module alone decides whether a token is genuine. It does no I/O and has no clock.
The ledger decides whether a genuine token was used before.
"""

import hashlib
import hmac
import re
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable

import msgspec
from itsdangerous.signer import SigningAlgorithm

from sso_service.errors import ForgedToken, MalformedToken, OverlongToken, TokenExpired

CLOCK_ALLOWANCE = 60
"""Seconds by which the clocks of two nodes may differ before one refuses the other's tokens."""

_LAYOUT = struct.Struct(">IIII")
_TAG_SIZE = 16

# Python's decoder skips characters outside the alphabet and ignores the spare bits of the last character, so many texts
# would decode to the same token. Exactly one is accepted: 43 characters hold 258 bits, 32 bytes need 256, so the two
# lowest bits of the last character must be zero. This leaves every fourth letter of the alphabet.
_FORM = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]", re.ASCII)

# The two alphabets of base64 (RFC 4648 sections 4 and 5). binascii uses the first. The `base64` module would repeat
# checks that `_FORM` has made.
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_STANDARD = bytes.maketrans(b"-_", b"+/")


class Claims(msgspec.Struct, frozen=True):
    """The content of a token: which user may sign in to which account until when. All fields are unsigned 32-bit."""

    expires_at: int
    user_id: int
    account_id: int
    nonce: int

    def pack(self) -> bytes:
        """Return the 16 bytes that are signed, and that identify the token in the ledger."""
        return _LAYOUT.pack(self.expires_at, self.user_id, self.account_id, self.nonce)

    @classmethod
    def unpack(cls, packed: bytes) -> "Claims":
        """Return the claims in 16 bytes made by `pack`."""
        return cls(*_LAYOUT.unpack(packed))

    def has_expired(self, now: int) -> bool:
        """Return whether the lifetime is over at `now` (Unix seconds)."""
        return now >= self.expires_at


class HMACSHA256128(SigningAlgorithm):
    """HMAC-SHA-256 truncated to its first 16 bytes (RFC 4868 section 2.1.1, RFC 2104 section 5).

    The inherited `verify_signature` compares in constant time, so the time of a refusal reveals nothing about the tag.
    """

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        """Return the 16-byte tag of `value` under `key`."""
        return hmac.digest(key, value, "sha256")[:_TAG_SIZE]


_ALGORITHM = HMACSHA256128()


def sign(claims: Claims, token_key: bytes) -> str:
    """Return the token for `claims`, signed with `token_key` (32 bytes, derived for this purpose only)."""
    packed = claims.pack()
    raw = packed + _ALGORITHM.get_signature(token_key, packed)
    return b2a_base64(raw, newline=False)[:-1].translate(_URL_SAFE).decode("ascii")  # 32 bytes end in exactly one "="


def read(token: str, token_keys: Iterable[bytes], *, now: int, lifetime: int) -> Claims:
    """Return the claims of a genuine token that has not expired at `now`.

    Raises what `read_genuine` raises, and after its checks `TokenExpired`.
    """
    claims = read_genuine(token, token_keys, now=now, lifetime=lifetime)
    if claims.has_expired(now):
        raise TokenExpired("the token has expired")
    return claims


def read_genuine(
    token: str, token_keys: Iterable[bytes], *, now: int, lifetime: int, account_id: int | None = None
) -> Claims:
    """Return the claims of a genuine token, which may have expired and may have been consumed.

    `token_keys` are tried newest first. `now` is Unix seconds, `lifetime` is the number of seconds for which tokens are
    issued. With `account_id`, a token of another account counts as forged. Raises `MalformedToken`, `ForgedToken` or
    `OverlongToken`, checked in this order. The signature is checked before any claim is trusted.
    """
    packed, tag = _split(token)
    # Every key is tried even after one has matched. There are few keys, so this costs a microsecond, and the time of an
    # answer does not reveal which key signed.
    matches = [_ALGORITHM.verify_signature(key, packed, tag) for key in token_keys]
    claims = Claims.unpack(packed)
    # Both conditions are evaluated for every token, and before anything else depends on one of them. So neither the
    # answer nor its time reveals to an account that a token of another account is genuine.
    # `sum` and `&`, because `any` and `and` would stop early.
    of_account = account_id is None or claims.account_id == account_id
    if not ((sum(matches) > 0) & of_account):
        raise ForgedToken("no key made this signature for this account")
    # A node whose clock is ahead, or a leaked key, must not give a token a longer life than promised.
    if claims.expires_at > now + lifetime + CLOCK_ALLOWANCE:
        raise OverlongToken("the token claims a longer lifetime than tokens have")
    return claims


def unsafe_read_claims(token: str) -> Claims:
    """Return claims WITHOUT checking the signature: anyone can write these. For diagnosis only.

    Raises `MalformedToken`.
    """
    return Claims.unpack(_split(token)[0])


def ref(token: str) -> str:
    """Return a loggable name of a token: the first 12 hex digits of its SHA-256, which do not reveal the token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _split(token: str) -> tuple[bytes, bytes]:
    if not _FORM.fullmatch(token):
        raise MalformedToken("a login token has 43 characters of A-Z, a-z, 0-9, - and _")
    raw = a2b_base64(token.encode("ascii").translate(_STANDARD) + b"=")
    return raw[: _LAYOUT.size], raw[_LAYOUT.size :]
