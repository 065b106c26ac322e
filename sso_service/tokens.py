"""The one-time login token: sixteen bytes of claims and a sixteen-byte tag, in 43 characters.

    base64url, no padding, of 32 bytes

    offset  size  field         meaning (all integers unsigned, big-endian)
    0       4     expires_at    Unix seconds; valid while now < expires_at
    4       4     user_id
    8       4     account_id    the account whose API token issued it
    12      4     nonce         random
    16      16    tag           HMAC-SHA-256 over bytes 0..15, first 16 bytes (HMAC-SHA-256-128, RFC 4868)

Expiry comes first because the claims are the primary key of the table of consumed tokens: sorted by expiry, it is
appended to at one end and purged from the other. The account is among the claims because a login made by one account's
API token must not open the other accounts of the same user. The nonce only tells apart tokens of one user, account and
second; what cannot be guessed is the tag.

A token is not stored, so this module is all there is to decide whether one is genuine. It does no I/O and has no clock.
Whether a genuine token was used before is for the ledger to say.
"""

import hashlib
import hmac
import re
import struct
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable

import msgspec
from itsdangerous import BadData, BadSignature, BadTimeSignature, SignatureExpired
from itsdangerous.signer import SigningAlgorithm

CLOCK_ALLOWANCE = 60
"""Seconds by which the clocks of two nodes may differ before a token of one is refused by the other."""

_LAYOUT = struct.Struct(">IIII")
_TAG_SIZE = 16

# Python's decoder skips characters outside the alphabet and ignores the spare bits of the last one, so that many
# spellings would decode to one token. Exactly one is accepted: 43 characters hold 258 bits, 32 bytes need 256, and the
# last character's two lowest bits must therefore be zero, which leaves every fourth letter of the alphabet.
_FORM = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]", re.ASCII)


# The two alphabets of base64 (RFC 4648 sections 4 and 5). binascii knows the first; `base64` would add checks that the
# form above makes superfluous.
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_STANDARD = bytes.maketrans(b"-_", b"+/")


class MalformedToken(BadData):
    """The text is not of a token's form; nothing can be said about its content."""


class ForgedToken(BadSignature):
    """The tag was not made by any key that may still verify."""


class OverlongToken(BadTimeSignature):
    """The tag is good, but the token claims to live longer than any that we issue."""


class ExpiredToken(SignatureExpired):
    """The tag is good and the time is over. `claims` can be trusted."""

    def __init__(self, claims: "Claims") -> None:
        super().__init__("the token has expired")
        self.claims = claims


class Claims(msgspec.Struct, frozen=True):
    """What a token says: who may sign in to which account until when. All fields are 32-bit unsigned integers."""

    expires_at: int
    user_id: int
    account_id: int
    nonce: int

    def pack(self) -> bytes:
        """The sixteen bytes that are signed, and that name the token in the ledger."""
        return _LAYOUT.pack(self.expires_at, self.user_id, self.account_id, self.nonce)

    @classmethod
    def unpack(cls, packed: bytes) -> "Claims":
        """The claims in sixteen bytes made by `pack`."""
        return cls(*_LAYOUT.unpack(packed))


class HMACSHA256128(SigningAlgorithm):
    """HMAC-SHA-256 truncated to its first 16 bytes (RFC 4868 section 2.1.1, RFC 2104 section 5).

    The inherited `verify_signature` compares in constant time, so the time of a refusal tells nothing of the tag.
    """

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        """The 16-byte tag of `value` under `key`."""
        return hmac.digest(key, value, "sha256")[:_TAG_SIZE]


_ALGORITHM = HMACSHA256128()


def sign(claims: Claims, token_key: bytes) -> str:
    """The token for `claims`, signed with `token_key` (32 bytes, derived for this purpose only)."""
    packed = claims.pack()
    raw = packed + _ALGORITHM.get_signature(token_key, packed)
    return b2a_base64(raw, newline=False)[:-1].translate(_URL_SAFE).decode("ascii")  # 32 bytes end in exactly one "="


def read(token: str, token_keys: Iterable[bytes], *, now: int, lifetime: int) -> Claims:
    """The claims of a genuine token that is not expired at `now`. This neither consumes it nor asks if it was consumed.

    `token_keys` are tried in order; give them newest first. `now` is Unix seconds, `lifetime` the seconds for which
    tokens are issued.

    Raises `MalformedToken`, `ForgedToken`, `OverlongToken` or `ExpiredToken`, checked in this order. The signature is
    checked before anything that the claims say is believed.
    """
    packed, tag = _split(token)
    # Every key is tried even though one may have matched: with few keys this costs a microsecond, and the time of an
    # answer does not tell which key signed.
    matches = [_ALGORITHM.verify_signature(key, packed, tag) for key in token_keys]
    if not any(matches):
        raise ForgedToken("no key made this signature")
    claims = Claims.unpack(packed)
    # A node whose clock is ahead, or a leaked key, must not give a token a longer life than the promise says.
    if claims.expires_at > now + lifetime + CLOCK_ALLOWANCE:
        raise OverlongToken("the token claims to live longer than tokens do")
    if now >= claims.expires_at:
        raise ExpiredToken(claims)
    return claims


def unsafe_read_claims(token: str) -> Claims:
    """DANGER: the claims of a token whose signature was not checked; anyone can write these. For diagnosis only.

    Raises `MalformedToken`.
    """
    return Claims.unpack(_split(token)[0])


def ref(token: str) -> str:
    """A name for a token, for logs: the first 12 hex digits of its SHA-256. The token cannot be had from it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _split(token: str) -> tuple[bytes, bytes]:
    if not _FORM.fullmatch(token):
        raise MalformedToken("a token is 43 characters of A-Z, a-z, 0-9, - and _")
    raw = a2b_base64(token.encode("ascii").translate(_STANDARD) + b"=")
    return raw[: _LAYOUT.size], raw[_LAYOUT.size :]
