"""Signing keys, and login tokens signed with them."""

import secrets
from pathlib import Path

from sso_service import keyring
from sso_service.keyring import SigningKey
from sso_service.tokens import Claims, sign
from tests.support.data import ACCOUNT

TTL = 300
"""Lifetime of login tokens in seconds: the default setting."""


def forge(key: SigningKey, now: float, user_id: int = 1) -> str:
    """Return a login token signed with `key`, as the service or an attacker with the key would make it."""
    return sign(Claims(int(now) + TTL, user_id, ACCOUNT, secrets.randbits(32)), key.token_key)


def keys_in(directory: Path) -> list[SigningKey]:
    """Return the keys of a directory that are not revoked, newest first."""
    return keyring.KeyRing(keyring.load(directory)[0].values()).known_keys()
