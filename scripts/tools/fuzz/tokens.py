"""Target: the parser of login tokens, compared with a verifier that shares no code with it."""

import hashlib
import hmac
import string

from sso_service.errors import ForgedToken, MalformedToken, OverlongToken, TokenExpired
from sso_service.tokens import Claims, read, sign

ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
LIFETIME = 300
SECRET = bytes(range(32))
KEY, *OTHER_KEYS = (
    hmac.digest(SECRET, b"sso-%b/v1" % purpose, "sha256") for purpose in (b"token", b"session", b"form")
)
OTHER_KEYS += [SECRET, hmac.digest(bytes(32), b"sso-token/v1", "sha256"), b""]

Outcome = type[Exception] | tuple[int, ...]


def verified(token: str, key: bytes, now: int) -> Outcome:
    """Return the error or the four claims that the specification demands, computed on the token as one large number."""
    if len(token) != 43 or not set(token) <= set(ALPHABET):
        return MalformedToken
    number = 0
    for character in token:
        number = number << 6 | ALPHABET.index(character)
    if number % 4:
        return MalformedToken
    raw = (number >> 2).to_bytes(32, "big")
    if hmac.new(key, raw[:16], hashlib.sha256).digest()[:16] != raw[16:]:
        return ForgedToken
    claims = tuple(int.from_bytes(raw[at : at + 4], "big") for at in (0, 4, 8, 12))
    if claims[0] - now > LIFETIME + 60:
        return OverlongToken
    return claims if claims[0] > now else TokenExpired


def outcome(token: str, *keys: bytes, now: int) -> Outcome:
    """Return the result of the service. Any error except the four documented ones is a finding and is not caught."""
    try:
        claims = read(token, keys, now=now, lifetime=LIFETIME)
    except (MalformedToken, ForgedToken, OverlongToken, TokenExpired) as error:
        return type(error)
    return claims.expires_at, claims.user_id, claims.account_id, claims.nonce


def check(data: bytes) -> None:
    """Check a token and an alteration of it.

    `data` holds 16 bytes of claims, 2 bytes for the time around their expiry, and then the changes to the token and
    what is appended to it.
    """
    claims = Claims.unpack(data[:16].ljust(16, b"\0"))
    now = claims.expires_at - int.from_bytes(data[16:18], "big") % 512 + 64
    token = sign(claims, KEY)
    changes = data[18:61].ljust(43, b"\0")
    altered = "".join(chr(ord(old) ^ change) for old, change in zip(token, changes, strict=True))
    altered += data[61:].decode("utf-8", "surrogateescape")
    assert (verified(altered, KEY, now) in {MalformedToken, ForgedToken}) == (altered != token)
    for text in (token, altered, data.decode("latin-1")):
        expected = verified(text, KEY, now)
        assert outcome(text, KEY, now=now) == outcome(text, *OTHER_KEYS, KEY, now=now) == expected
        assert outcome(text, *OTHER_KEYS, now=now) in {MalformedToken, ForgedToken}


_CLAIMS = Claims(expires_at=1_900_000_000, user_id=1, account_id=123, nonce=0xDEADBEEF).pack()
SEEDS = [
    _CLAIMS + b"\1\0",
    *(_CLAIMS + now.to_bytes(2, "big") for now in (0, 63, 64, 65, 423, 424, 425)),  # around expiry and longest lifetime
    *(_CLAIMS + b"\1\0" + bytes(place) + bytes([change]) for place in (0, 20, 42) for change in range(1, 8)),
    _CLAIMS + b"\1\0" + bytes(43) + b"=",
    sign(Claims.unpack(_CLAIMS), KEY).encode(),
    bytes(16),
    b"\xff" * 61,
]
