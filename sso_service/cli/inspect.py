"""The command `inspect`."""

import asyncio
from functools import partial

import click

from sso_service import tokens
from sso_service.cli.environment import current_settings, current_time, read_keys, run
from sso_service.cli.output import echo, time_text
from sso_service.database.directory import Access, AccessQuery, check_access
from sso_service.database.ledger import Verdict, check_states
from sso_service.database.work import Reads
from sso_service.errors import ForgedToken, MalformedToken, OverlongToken
from sso_service.keyring import KeyRing, SigningKey
from sso_service.settings import Settings
from sso_service.tokens import Claims


@click.command()
@click.argument("token")
def inspect(token: str) -> None:
    """Explain a login token: its claims, its key, whether it was used, and why it would be refused."""
    settings, now = current_settings(), current_time()
    _print("ref", tokens.ref(token))
    try:
        claims = tokens.unsafe_read_claims(token)
    except MalformedToken as error:
        _print("refused", f"malformed: {error}")
        return
    ring = read_keys(settings)
    key = _find_key(token, ring, settings, now)
    issued_at = claims.expires_at - settings.token_ttl
    _print("signed by", key.id if key else "no known key: the fields below may be forged")
    _print("user", claims.user_id)
    _print("account", claims.account_id)
    _print("issued", f"{time_text(issued_at)}, {now - issued_at} s ago")
    _print("expires", f"{time_text(claims.expires_at)}, in {claims.expires_at - now} s")
    _print("nonce", f"{claims.nonce:08x}")
    if key is None:
        _print("refused", "bad signature")
        return
    state, access = run(lambda reads, _: _look_up(reads, claims), settings)
    if access.user is not None:
        _print("email", access.user.email)
    _print("consumed", "yes" if state is Verdict.CONSUMED else "no")
    verifies = key in ring.verifying_keys(now, settings.token_ttl)
    if refusal := _refusal(claims, state, access, verifies=verifies, now=now, lifetime=settings.token_ttl):
        _print("refused", refusal)
    else:
        _print("good", "it would sign in")


def _find_key(token: str, ring: KeyRing, settings: Settings, now: int) -> SigningKey | None:
    """Return the key that signed the token, whether or not it may still verify."""
    for key in ring.known_keys():
        try:
            tokens.read_genuine(token, [key.token_key], now=now, lifetime=settings.token_ttl)
        except ForgedToken:
            continue
        except OverlongToken:  # raised only after the signature was found valid
            pass
        return key
    return None


async def _look_up(reads: Reads, claims: Claims) -> tuple[Verdict | None, Access]:
    query = AccessQuery(claims.user_id, claims.account_id)
    # Submitted together, so both reads share a transaction.
    [state], [access] = await asyncio.gather(
        reads.run(partial(check_states, claims=[claims.pack()])),
        reads.run(partial(check_access, reads.database, queries=[query])),
    )
    return state, access


def _refusal(
    claims: Claims, state: Verdict | None, access: Access, *, verifies: bool, now: int, lifetime: int
) -> str | None:
    """Return the reason why the service would refuse the token, or None."""
    if claims.expires_at > now + lifetime + tokens.CLOCK_ALLOWANCE:
        return "it claims a longer lifetime than login tokens have"
    if claims.has_expired(now) or state is Verdict.EXPIRED:
        return "expired"
    if not verifies:
        return "its key no longer verifies"
    if state is Verdict.CONSUMED:
        return "already used"
    if access.member is None:
        return "the user is disabled or not in the account"
    if claims.expires_at - lifetime < access.member[0].sessions_from:
        return "expired: the user was signed out everywhere, or joined the account, after it was issued"
    return None


def _print(name: str, value: object) -> None:
    echo(f"{name:<10} {value}")
