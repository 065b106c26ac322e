"""Signing and verifying in process: the product's tokens, and three libraries that are used for such tokens.

All of them sign values that are prepared in advance: a user, an account, an expiry or a time, and a nonce.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jwt
from itsdangerous import URLSafeTimedSerializer

from scripts.tools.bench.stores import ACCOUNT
from sso_service import tokens
from sso_service.tokens import Claims

_USER = 4711
_LIFETIME = 300


@dataclass(frozen=True)
class Library:
    """A library, with a function that signs a token and one that verifies it."""

    name: str
    sign: Callable[[], str]
    verify: Callable[[str], object]


@dataclass(frozen=True)
class Cost:
    """Microseconds per call in each round, and the length of the token."""

    library: str
    sign_us: list[float]
    verify_us: list[float]
    length: int

    def times(self, other: "Cost") -> float:
        """Return how many times as long as `other` this takes.

        The result is the lower one of signing and verifying, each as the median over the rounds.
        """
        return min(
            median(mine / theirs for mine, theirs in zip(self.sign_us, other.sign_us, strict=True)),
            median(mine / theirs for mine, theirs in zip(self.verify_us, other.verify_us, strict=True)),
        )


OURS, ITSDANGEROUS, PYJWT, SESAME = "ours", "itsdangerous", "PyJWT", "django-sesame"


def measure_libraries(*, rounds: int, calls: int) -> list[Cost]:
    """Measure the cost of each library, in turns."""
    libraries = [_ours(), _itsdangerous(), _pyjwt(), _sesame()]
    costs = []
    for library in libraries:
        token = library.sign()
        library.verify(token)
        costs.append(Cost(library.name, [], [], len(token)))
    for _ in range(rounds):
        for library, cost in zip(libraries, costs, strict=True):
            token = library.sign()
            cost.sign_us.append(_time(library.sign, calls))
            cost.verify_us.append(_time(partial(library.verify, token), calls))
    return costs


def _time(call: Callable[[], object], calls: int) -> float:
    """Return microseconds of CPU time per call. Other processes on this core do not count."""
    begin = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begin) / calls * 1e6


def _ours() -> Library:
    now = int(time.time())
    key = hmac.digest(secrets.token_bytes(32), b"sso-token/v1", "sha256")
    claims = Claims(now + _LIFETIME, _USER, ACCOUNT, secrets.randbits(32))
    return Library(
        OURS,
        lambda: tokens.sign(claims, key),
        lambda token: tokens.read(token, [key], now=now, lifetime=_LIFETIME),
    )


def _itsdangerous() -> Library:
    serializer = URLSafeTimedSerializer(secrets.token_bytes(32), signer_kwargs={"digest_method": hashlib.sha256})
    payload = [_USER, ACCOUNT, secrets.randbits(32)]
    return Library(
        ITSDANGEROUS,
        lambda: str(serializer.dumps(payload)),
        lambda token: serializer.loads(token, max_age=_LIFETIME),
    )


def _pyjwt() -> Library:
    key = secrets.token_bytes(32)
    payload = {
        "sub": str(_USER),
        "account": ACCOUNT,
        "exp": int(time.time()) + _LIFETIME,
        "jti": secrets.token_hex(4),
    }
    return Library(
        PYJWT,
        lambda: str(jwt.encode(payload, key, algorithm="HS256")),
        lambda token: jwt.decode(token, key, algorithms=["HS256"], options={"require": ["exp", "jti"]}),
    )


def _sesame() -> Library:
    """Return django-sesame without the parts that need a database.

    Its tokens have no nonce, no account, and a tag of 80 bits.
    """
    import django
    from django.conf import settings

    settings.configure(
        SECRET_KEY=secrets.token_urlsafe(32),
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
        SESAME_MAX_AGE=_LIFETIME,
    )
    django.setup()
    from django.contrib.auth import get_user_model
    from sesame import tokens_v2

    user: Any = get_user_model()(pk=_USER, password="!" + secrets.token_urlsafe(30))

    def verify(token: str) -> object:
        found = tokens_v2.parse_token(token, lambda _: user)
        assert found is user
        return found

    return Library(SESAME, lambda: str(tokens_v2.create_token(user)), verify)
