"""Login tokens: their format, their signature, their expiry, and the refusal of all other texts."""

import hashlib
import hmac
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import BadData, BadSignature, SignatureExpired
from itsdangerous.signer import SigningAlgorithm

from sso_service.errors import ForgedToken, MalformedToken, OverlongToken, TokenExpired
from sso_service.tokens import HMACSHA256128, Claims, read, read_genuine, ref, sign, unsafe_read_claims
from tests.support.repository import TESTS

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
LIFETIME = 300
NOW = 1_899_999_900
KEY = hmac.digest(bytes(range(32)), b"sso-token/v1", "sha256")
OTHER_KEY = hmac.digest(bytes(32), b"sso-token/v1", "sha256")
CLAIMS = Claims(expires_at=1_900_000_000, user_id=1, account_id=123, nonce=0xDEADBEEF)
TOKEN = "cT-zAAAAAAEAAAB73q2-77ZWSycVSMWcdGWPaRxidQA"

uint32 = st.integers(0, 2**32 - 1)
any_claims = st.builds(Claims, expires_at=uint32, user_id=uint32, account_id=uint32, nonce=uint32)


def read_now(token: str, *keys: bytes) -> Claims:
    return read(token, keys or (KEY,), now=NOW, lifetime=LIFETIME)


# --- Format and signature --------------------------------------------------------------------------------------------


def test_the_first_test_vector_is_signed_and_read() -> None:
    assert sign(CLAIMS, KEY) == TOKEN
    assert read_now(TOKEN) == CLAIMS


def test_the_claims_are_four_big_endian_integers_with_the_expiry_first() -> None:
    claims = Claims(expires_at=0x01020304, user_id=0x05060708, account_id=0x090A0B0C, nonce=0x0D0E0F10)
    assert claims.pack() == bytes(range(1, 17))
    assert Claims.unpack(bytes(range(1, 17))) == claims


def test_packed_claims_sort_by_expiry() -> None:
    soon = Claims(expires_at=255, user_id=2**32 - 1, account_id=2**32 - 1, nonce=2**32 - 1)
    later = Claims(expires_at=256, user_id=0, account_id=0, nonce=0)
    assert soon.pack() < later.pack()


def test_the_tag_is_hmac_sha_256_128_of_rfc_4868() -> None:
    algorithm = HMACSHA256128()
    assert isinstance(algorithm, SigningAlgorithm)
    # Section 2.7.2.1 of the RFC, test case AUTH256-1, truncated to 16 bytes.
    assert algorithm.get_signature(b"\x0b" * 32, b"Hi There").hex() == "198a607eb44bfbc69903a0f1cf2bbdc5"


@given(any_claims, st.binary(min_size=32, max_size=32), st.integers(1, LIFETIME + 60))
def test_every_token_has_43_url_safe_characters_and_reads_as_signed(claims: Claims, key: bytes, remaining: int) -> None:
    token = sign(claims, key)
    assert len(token) == 43
    assert set(token) <= set(ALPHABET)
    assert read(token, [key], now=claims.expires_at - remaining, lifetime=LIFETIME) == claims


@pytest.mark.parametrize("field", ["expires_at", "user_id", "account_id", "nonce"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_claims_that_exceed_32_bits_are_not_signed(field: str, value: int) -> None:
    fields = {"expires_at": NOW, "user_id": 1, "account_id": 1, "nonce": 1, field: value}
    with pytest.raises(struct.error):
        sign(Claims(**fields), KEY)


def test_a_token_of_any_given_key_is_accepted_in_any_order_of_keys() -> None:
    assert read_now(TOKEN, OTHER_KEY, KEY) == read_now(TOKEN, KEY, OTHER_KEY) == CLAIMS
    assert read(TOKEN, iter([OTHER_KEY, KEY]), now=NOW, lifetime=LIFETIME) == CLAIMS


def test_a_token_of_another_key_is_forged() -> None:
    with pytest.raises(ForgedToken):
        read_now(TOKEN, OTHER_KEY)


def test_without_keys_every_token_is_forged() -> None:
    with pytest.raises(ForgedToken):
        read(TOKEN, [], now=NOW, lifetime=LIFETIME)


def alterations(token: str) -> Iterator[str]:
    """About 8,000 small alterations of `token`, none of which may be accepted."""
    raw = urlsafe_b64decode(token + "=")
    for bit in range(256):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield urlsafe_b64encode(flipped)[:-1].decode()
    for length in range(43):
        yield token[:length]
        yield token[43 - length :]
    for extra in [*ALPHABET, "=", "==", "+", "/", " ", "\t", "\n", "\r\n", "\0", "\x85", "\u2028", "%3D", "&", token]:
        yield token + extra
        yield extra + token
    for position in range(43):
        before, after = token[:position], token[position + 1 :]
        # Other letters; standard base64; white space; digits and letters outside ASCII. In the last position, three of
        # the other letters differ only in the spare bits.
        for other in ALPHABET + "+/= \t\n\r\0%.\u0663\u0967\uff13\U0001d7dc\uff21\u0430\u212a\xe9":
            yield before + other + after
            yield before + other + token[position:]
        yield before + after
    # Texts that a lenient decoder would decode to the same bytes.
    yield token.translate(str.maketrans("-_", "+/"))
    yield token.swapcase()
    yield raw.hex()
    yield sign(Claims.unpack(raw[:16]), OTHER_KEY)


@pytest.mark.slow
def test_none_of_100_000_altered_tokens_is_accepted() -> None:
    random = Random(4868)  # the same alterations on every run
    refused = 0
    for _ in range(15):
        user, account, nonce = (random.getrandbits(32) for _ in range(3))
        token = sign(Claims(NOW + random.randint(1, LIFETIME), user, account, nonce), KEY)
        for altered in alterations(token):
            if altered != token:
                with pytest.raises((MalformedToken, ForgedToken)):
                    read_now(altered)
                refused += 1
    assert refused >= 100_000


@given(st.text() | st.text(ALPHABET, min_size=43, max_size=43))
def test_any_other_text_is_refused_with_one_kind_of_error(text: str) -> None:
    with pytest.raises(BadData):
        read_now(text)


@pytest.mark.parametrize("last", ALPHABET)
def test_a_last_character_with_spare_bits_set_is_malformed(last: str) -> None:
    spare_bits_are_zero = ALPHABET.index(last) % 4 == 0
    with pytest.raises(ForgedToken if spare_bits_are_zero else MalformedToken):
        read_now(TOKEN[:-1] + last, OTHER_KEY)


# --- Expiry ----------------------------------------------------------------------------------------------------------


def test_a_token_is_valid_until_the_last_second_before_its_expiry() -> None:
    assert read(TOKEN, [KEY], now=CLAIMS.expires_at - 1, lifetime=LIFETIME) == CLAIMS


@pytest.mark.parametrize("late", [0, 1, 86_400])
def test_a_token_is_refused_from_the_second_of_its_expiry_on(late: int) -> None:
    now = CLAIMS.expires_at + late
    with pytest.raises(TokenExpired):
        read(TOKEN, [KEY], now=now, lifetime=LIFETIME)
    assert read_genuine(TOKEN, [KEY], now=now, lifetime=LIFETIME) == CLAIMS


@pytest.mark.parametrize("lifetime", [30, 300, 3600])
def test_a_token_that_exceeds_lifetime_and_clock_allowance_is_refused(lifetime: int) -> None:
    longest = CLAIMS.expires_at - lifetime - 60
    assert read(TOKEN, [KEY], now=longest, lifetime=lifetime) == CLAIMS
    with pytest.raises(OverlongToken):
        read(TOKEN, [KEY], now=longest - 1, lifetime=lifetime)


# --- Order of checks -------------------------------------------------------------------------------------------------

EXPIRED = CLAIMS.expires_at
TOO_EARLY = CLAIMS.expires_at - LIFETIME - 61


@pytest.mark.parametrize(
    ("token", "key", "now", "error"),
    [
        (TOKEN + "\n", OTHER_KEY, EXPIRED, MalformedToken),
        (TOKEN + "\n", OTHER_KEY, TOO_EARLY, MalformedToken),
        (TOKEN + "\n", KEY, EXPIRED, MalformedToken),
        (TOKEN, OTHER_KEY, EXPIRED, ForgedToken),
        (TOKEN, OTHER_KEY, TOO_EARLY, ForgedToken),
        (TOKEN, KEY, TOO_EARLY, OverlongToken),
        (TOKEN, KEY, EXPIRED, TokenExpired),
    ],
)
def test_format_is_checked_before_signature_and_signature_before_expiry(
    token: str, key: bytes, now: int, error: type[BadData]
) -> None:
    with pytest.raises(BadData) as caught:
        read(token, [key], now=now, lifetime=LIFETIME)
    assert type(caught.value) is error


def test_the_errors_extend_those_of_itsdangerous() -> None:
    assert issubclass(MalformedToken, BadData)
    assert not issubclass(MalformedToken, BadSignature)
    assert issubclass(ForgedToken, BadSignature)
    assert not issubclass(ForgedToken, SignatureExpired)
    assert issubclass(OverlongToken, BadSignature)
    assert not issubclass(OverlongToken, SignatureExpired)
    assert issubclass(TokenExpired, SignatureExpired)


# --- ref and unverified claims ---------------------------------------------------------------------------------------


def test_a_ref_is_the_first_12_hex_digits_of_the_sha_256_of_the_token() -> None:
    assert ref(TOKEN) == hashlib.sha256(TOKEN.encode()).hexdigest()[:12]
    assert ref(TOKEN) != ref(sign(CLAIMS, OTHER_KEY))


@given(st.text() | st.just("\udcff"))
def test_any_text_has_a_ref(text: str) -> None:
    assert len(bytes.fromhex(ref(text))) == 6


def test_unverified_claims_require_only_the_format_of_a_token() -> None:
    assert unsafe_read_claims(sign(CLAIMS, OTHER_KEY)) == CLAIMS
    with pytest.raises(MalformedToken):
        unsafe_read_claims(TOKEN + "=")


@pytest.mark.parametrize("broken", [TOKEN + "\n", TOKEN[:-1] + "E"])
def test_an_error_contains_nothing_of_the_token(broken: str) -> None:
    with pytest.raises(BadData) as caught:
        read_now(broken)
    assert TOKEN[:8] not in f"{caught.value!s} {caught.value!r} {vars(caught.value)}"


# --- Test vectors ----------------------------------------------------------------------------------------------------


class Vector(msgspec.Struct, forbid_unknown_fields=True):
    secret: str
    claims: Claims
    token: str


class Invalid(msgspec.Struct, forbid_unknown_fields=True):
    why: str
    reason: str
    secret: str
    now: int
    token: str


class Vectors(msgspec.Struct, forbid_unknown_fields=True):
    about: str
    lifetime: int
    vectors: list[Vector]
    invalid: list[Invalid]


VECTORS = msgspec.json.decode((TESTS / "vectors.json").read_bytes(), type=Vectors)
REASONS = {
    "malformed": MalformedToken,
    "bad_signature": ForgedToken,
    "overlong": OverlongToken,
    "expired": TokenExpired,
}


def derived(secret: str) -> bytes:
    return hmac.digest(bytes.fromhex(secret), b"sso-token/v1", "sha256")


def test_the_first_vector_is_the_documented_one() -> None:
    assert VECTORS.vectors[0] == Vector(bytes(range(32)).hex(), CLAIMS, TOKEN)


@pytest.mark.parametrize("vector", VECTORS.vectors, ids=lambda vector: vector.token)
def test_a_vector_follows_from_the_documentation_alone(vector: Vector) -> None:
    claims = vector.claims
    packed = struct.pack(">IIII", claims.expires_at, claims.user_id, claims.account_id, claims.nonce)
    raw = packed + hmac.digest(derived(vector.secret), packed, "sha256")[:16]
    assert urlsafe_b64encode(raw).decode().rstrip("=") == vector.token


@pytest.mark.parametrize("vector", VECTORS.vectors, ids=lambda vector: vector.token)
def test_a_vector_is_signed_and_read(vector: Vector) -> None:
    key = derived(vector.secret)
    assert sign(vector.claims, key) == vector.token
    for now in (vector.claims.expires_at - VECTORS.lifetime, vector.claims.expires_at - 1):
        assert read(vector.token, [key], now=now, lifetime=VECTORS.lifetime) == vector.claims


@pytest.mark.parametrize("invalid", VECTORS.invalid, ids=lambda invalid: invalid.why)
def test_an_invalid_vector_is_refused_for_its_reason(invalid: Invalid) -> None:
    with pytest.raises(BadData) as caught:
        read(invalid.token, [derived(invalid.secret)], now=invalid.now, lifetime=VECTORS.lifetime)
    assert type(caught.value) is REASONS[invalid.reason]
