"""Signing keys: which key signs, and which keys verify."""

import hmac
from itertools import permutations

import pytest

from sso_service.errors import ForgedToken, NoSigningKey, TokenExpired
from sso_service.keyring import Entry, KeyRing, SigningKey
from sso_service.tokens import Claims, read, sign
from tests.support.keyring import LIFETIMES, NOW, TOKENS, ids, key, tombstone, verifying

# --- The signing key -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "signing"), [(1000, "a"), (1999, "a"), (2000, "b"), (2999, "b"), (3000, "c"), (NOW, "c")]
)
def test_the_latest_key_whose_start_has_passed_signs(now: int, signing: str) -> None:
    for entries in permutations([key("a", 1000), key("b", 2000), key("c", 3000)]):
        assert KeyRing(entries).signing_key(now).id == signing


@pytest.mark.parametrize("ids_in_order", [("a", "b"), ("B", "a"), ("1", "A"), ("9", "91"), ("-", "_"), ("2030", "odd")])
def test_of_keys_with_equal_start_the_greater_id_signs(ids_in_order: tuple[str, str]) -> None:
    for entries in permutations([key(key_id, 1000) for key_id in ids_in_order]):
        assert KeyRing(entries).signing_key(1000).id == ids_in_order[1]


@pytest.mark.parametrize(
    "entries",
    [[], [key("pending", NOW + 1)], [tombstone("a", 1000)], [key("a", 1000), tombstone("b", 2000)]],
    ids=["no-key", "pending-key-only", "tombstone-only", "tombstone-latest"],
)
def test_without_a_signing_key_the_error_names_the_command_to_run(entries: list[Entry]) -> None:
    with pytest.raises(NoSigningKey, match="sso-service keys rotate"):
        KeyRing(entries).signing_key(NOW)


def test_each_purpose_has_its_own_derived_key() -> None:
    secret = bytes(range(32))
    made = SigningKey("a", secret, created_at=0, signs_from=0)
    for derived, purpose in (
        (made.token_key, b"sso-token/v1"),
        (made.session_key, b"sso-session/v1"),
        (made.form_key, b"sso-form/v1"),
    ):
        assert derived == hmac.digest(secret, purpose, "sha256")


# --- Verifying keys --------------------------------------------------------------------------------------------------


@LIFETIMES
def test_a_key_verifies_for_lifetime_plus_a_minute_after_its_successor(lifetime: int) -> None:
    ring = KeyRing([key("old", 1000), key("new", 2000)])
    end = 2000 + lifetime + 60
    assert verifying(ring, 1999, lifetime) == verifying(ring, end - 1, lifetime) == ["new", "old"]
    assert verifying(ring, end, lifetime) == verifying(ring, 10**9, lifetime) == ["new"]


def test_each_key_has_its_own_window_and_the_newest_is_tried_first() -> None:
    ring = KeyRing([key("b", 2000), key("a", 1000), key("c", 2100)])
    assert verifying(ring, 2359) == ["c", "b", "a"]
    assert verifying(ring, 2360) == ["c", "b"]
    assert verifying(ring, 2460) == ["c"]


def test_a_pending_key_verifies_already() -> None:
    """The clock of the node that signs may be ahead."""
    assert verifying(KeyRing([key("a", 1000), key("b", NOW + 60)]), NOW) == ["b", "a"]


def test_a_tombstone_does_not_verify_but_counts_as_a_successor() -> None:
    ring = KeyRing([key("a", 1000), tombstone("b", 2000), key("c", NOW)])
    assert verifying(ring, 2000 + TOKENS + 59) == ["c", "a"]
    assert verifying(ring, 2000 + TOKENS + 60) == ["c"]


def test_of_keys_with_equal_start_the_lesser_id_is_succeeded_immediately() -> None:
    ring = KeyRing([key("y", 1000), key("x", 1000)])
    assert verifying(ring, 1000 + TOKENS + 59) == ["y", "x"]
    assert verifying(ring, 1000 + TOKENS + 60) == ["y"]


def test_an_expired_token_of_a_retired_key_is_expired_not_forged() -> None:
    retired = key("retired", 1000)
    ring = KeyRing([retired, key("new", 2000)])
    token = sign(Claims(expires_at=1300, user_id=1, account_id=1, nonce=1), retired.token_key)
    with pytest.raises(ForgedToken):
        read(token, [k.token_key for k in ring.verifying_keys(NOW, TOKENS)], now=NOW, lifetime=TOKENS)
    with pytest.raises(TokenExpired):
        read(token, [k.token_key for k in ring.known_keys()], now=NOW, lifetime=TOKENS)


def test_a_revoked_key_is_not_a_known_key() -> None:
    assert ids(KeyRing([key("a", 1000), tombstone("b", 2000), key("c", NOW)]).known_keys()) == ["c", "a"]
