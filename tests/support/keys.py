"""Signing keys of the tests, and login tokens that they sign."""

import secrets
from pathlib import Path

from sso_service import keyring
from sso_service.keyring import SigningKey
from sso_service.tokens import Claims, sign
from tests.support.data import ACCOUNT


def forge(key: SigningKey, now: float, user_id: int = 1) -> str:
    """A token that the holder of `key` makes, service or thief."""
    return sign(Claims(int(now) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)


def keys_in(directory: Path) -> list[SigningKey]:
    """The keys of a directory that are not revoked, newest first."""
    return keyring.KeyRing(keyring.load(directory)[0].values()).known_keys()


TTL = 300
