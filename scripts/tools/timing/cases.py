"""Refusals whose time must not reveal their reason, and planted leaks that the test must find."""

import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from sqlalchemy import insert, select, update

from sso_service import keyring, tokens
from sso_service.database import accounts, migrations, open_database
from sso_service.database.accounts import TOKEN_PREFIX
from sso_service.database.directory import Lookup, digest
from sso_service.database.directory import look_up as look_up_batch
from sso_service.database.schema import api_tokens
from sso_service.database.transactions import Database
from sso_service.errors import ForgedToken, NotAuthenticated
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Scope
from sso_service.services.node import Node
from sso_service.settings import read_settings
from sso_service.tokens import Claims

_POOL = 5000
"""API tokens of each kind. Both kinds have the same number, so caches treat them alike. The number is large, so their
places in the index do not matter.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """Two kinds of input for one call. If `planted`, the time of the call reveals the kind."""

    title: str
    call: Callable[[str], Awaitable[None]]
    kinds: tuple[Callable[[], str], Callable[[], str]]
    planted: bool = False


@contextmanager
def cases(directory: Path) -> Iterator[Iterator[Case]]:
    """Yield all cases, on a service with SQLite and keys of its own below `directory`."""
    settings = read_settings({"SSO_HOME": str(directory), "SSO_DATABASE_URL": "sqlite:///sso.db"})
    settings.keys_path.mkdir(mode=0o700)
    for age in (7200, 3600):
        keyring.rotate(settings.keys_path, now=int(time.time()) - age, lead=0)
    # Nothing refreshes the keys during the test, so the clocks stand still and they never become stale.
    keys = KeyDirectory(settings.keys_path, monotonic=lambda: 0.0, since_boot=lambda: 0.0)
    keys.refresh()
    database = open_database(settings)
    migrations.upgrade(database)
    service = Node(settings, database, keys)
    try:
        yield chain(_api_tokens(service, database), _login_tokens(service), _accounts(service, database))
    finally:
        service.close()


def _api_tokens(service: Node, database: Database) -> Iterator[Case]:
    now = service.trust.now()
    unknown, revoked, expired, badly_revoked = (
        [TOKEN_PREFIX + secrets.token_urlsafe(32) for _ in range(_POOL)] for _ in range(4)
    )
    with database.connect() as connection, database.writing(connection):
        account_id = accounts.add_account(connection, "One")
        common = {"account_id": account_id, "hint": "", "scopes": Scope.WRITE_SSO, "created_at": now}
        rows = [
            {**common, "name": name, "digest": digest(secret), "expires_at": expires_at}
            for name, pool, expires_at in (
                ("well", revoked, None),
                ("expired", expired, now - 1),
                ("badly", badly_revoked, None),
            )
            for secret in pool
        ]
        # The lookup of an unknown API token reads the row of another one. Mixed, so that rows of one kind do not share
        # pages of the file, which the processor would then have in its cache.
        secrets.SystemRandom().shuffle(rows)
        connection.execute(insert(api_tokens), rows)
        for token_id in connection.scalars(select(api_tokens.c.id).where(api_tokens.c.name == "well")).all():
            accounts.revoke_api_token(connection, token_id, now=now)
        connection.execute(update(api_tokens).where(api_tokens.c.name == "badly").values(revoked_at=now))

    async def authorize(secret: str) -> None:
        with suppress(NotAuthenticated):
            await service.issuing.authorize(secret, Scope.WRITE_SSO)
            raise AssertionError("accepted")

    async def look_up(secret: str) -> None:
        with suppress(NotAuthenticated):
            [found] = look_up_batch(database, reading, [Lookup(digest(secret), "", now)])
            service.issuing._check(secret, found.api_token, Scope.WRITE_SSO)
            raise AssertionError("accepted")

    for name, refused in (("revoked", revoked), ("expired", expired)):
        kinds = (partial(secrets.choice, unknown), partial(secrets.choice, refused))
        yield Case(f"API token, unknown or {name}", authorize, kinds)
        with database.connect() as reading, database.reading(reading):
            yield Case("the same, without the noise of threads", look_up, kinds)
    with database.connect() as reading, database.reading(reading):
        kinds = (partial(secrets.choice, unknown), partial(secrets.choice, badly_revoked))
        yield Case("planted: found first, then refused", look_up, kinds, planted=True)


def _login_tokens(service: Node) -> Iterator[Case]:
    now, lifetime = service.trust.now(), service.settings.token_ttl
    ring = service.keys.ring
    keys = [key.token_key for key in ring.verifying_keys(now, lifetime)]
    signing = ring.signing_key(now).token_key

    def forged(wrong: int) -> str:
        claims = Claims(now + lifetime, secrets.randbits(32), secrets.randbits(32), secrets.randbits(32))
        raw = bytearray(urlsafe_b64decode(tokens.sign(claims, signing) + "="))
        raw[wrong] ^= 1 + secrets.randbelow(255)
        return urlsafe_b64encode(raw).rstrip(b"=").decode()

    async def read(token: str) -> None:
        with suppress(ForgedToken):
            tokens.read(token, keys, now=now, lifetime=lifetime)
            raise AssertionError("accepted")

    async def read_in_service(token: str) -> None:
        with suppress(ForgedToken):
            await service.redeeming._read_genuine(token)
            raise AssertionError("accepted")

    async def compare_until_it_differs(token: str) -> None:
        raw = urlsafe_b64decode(token + "=")
        right = tokens.HMACSHA256128().get_signature(signing, raw[:16])
        if all(ours == theirs for ours, theirs in zip(right, raw[16:], strict=True)):
            raise AssertionError("accepted")

    kinds = (lambda: forged(16), lambda: forged(31))
    yield Case("login token, first or last byte of its tag", read, kinds)
    yield Case("the same, through the service", read_in_service, kinds)
    yield Case("planted: compared up to the first difference", compare_until_it_differs, kinds, planted=True)


def _accounts(service: Node, database: Database) -> Iterator[Case]:
    """Another account's genuine login token and a forged one, for an API token of account One."""
    now, lifetime = service.trust.now(), service.settings.token_ttl
    signing = service.keys.ring.signing_key(now).token_key
    with database.connect() as connection, database.writing(connection):
        account_id = accounts.add_account(connection, "One")
        _, secret = accounts.create_api_token(
            connection, account_id=account_id, name="frontend", scopes=frozenset(Scope), now=now
        )

    def signed(key: bytes) -> str:
        of_another = 1000 + secrets.randbelow(2**31)
        return tokens.sign(Claims(now + lifetime, secrets.randbits(32), of_another, secrets.randbits(32)), key)

    async def read(token: str) -> None:
        with suppress(ForgedToken):
            await service.redeeming._read_genuine(token, account_id)
            raise AssertionError("accepted")

    async def use(call: Callable[[str, str], Awaitable[object]], token: str) -> None:
        with suppress(ForgedToken):
            await call(secret, token)
            raise AssertionError("accepted")

    async def compare_account_last(token: str) -> None:
        with suppress(ForgedToken):
            if (await service.redeeming._read_genuine(token)).account_id != account_id:
                raise ForgedToken
            raise AssertionError("accepted")

    kinds = (lambda: signed(bytes(32)), lambda: signed(signing))
    yield Case("login token, forged or of another account", read, kinds)
    for name in ("verify", "consume", "revoke"):
        yield Case(f"the same, {name}", partial(use, getattr(service.redeeming, name)), kinds)
    yield Case("planted: the account compared last", compare_account_last, kinds, planted=True)
