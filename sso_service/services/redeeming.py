"""Redeeming login tokens: in a browser, or for a frontend with its own sessions. Also verifying and revoking them."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sso_service import tokens
from sso_service.database.directory import AccessChecks, AccessQuery, ApiToken, User
from sso_service.database.ledger import Redeemed, Redemption, Redemptions, StateChecks, Verdict
from sso_service.errors import (
    DatabaseError,
    ForgedToken,
    LoginRefused,
    LoginTokenError,
    NoAccess,
    OutcomeUnknown,
    OverlongToken,
    TokenConsumed,
    TokenExpired,
    Unavailable,
)
from sso_service.observability import metrics
from sso_service.observability.audit import Event, EventName
from sso_service.observability.events import record
from sso_service.paths import StudioPath
from sso_service.permissions import Role, Scope
from sso_service.services.sessions import Sessions, SignedIn
from sso_service.services.trust import Trust
from sso_service.sessions import Session
from sso_service.settings import Settings
from sso_service.tokens import Claims

Authorize = Callable[[str, Scope], Awaitable[ApiToken]]
"""`Issuing.authorize`: from the secret of an API token and a scope to the API token."""

Count = Callable[[str, ApiToken], None]
"""`Issuing.count`: raises `RateLimited` if the API token, given with its secret, has no quota left."""


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A login token that signs in, with its user and their current role."""

    claims: Claims
    user: User
    role: Role


@dataclass(frozen=True, slots=True)
class Question:
    """Signing in needs a click first. `current` is the session that would be replaced, if there is one."""

    current: SignedIn | None


class Redeeming:
    """The use cases of a login token once it is issued."""

    def __init__(
        self,
        settings: Settings,
        trust: Trust,
        sessions: Sessions,
        authorize: Authorize,
        count: Count,
        redemptions: Redemptions,
        states: StateChecks,
        access_checks: AccessChecks,
    ) -> None:
        self._trust = trust
        self._sessions = sessions
        self._authorize = authorize
        self._count = count
        self._redemptions = redemptions
        self._states = states
        self._access_checks = access_checks
        self._lifetime = settings.token_ttl
        self._confirm = settings.confirm_login

    # --- for frontends and integrations

    async def verify(self, secret: str, token: str) -> VerifiedToken:
        """Return what `consume` would return now, without consuming. Raises the same, except `OutcomeUnknown`."""
        return await self._verify(await self._authorize(secret, Scope.VERIFY_SSO), secret, token)

    async def _verify(self, api_token: ApiToken, secret: str, token: str) -> VerifiedToken:
        claims = await self._read_for(api_token, secret, token)
        _refuse_unless_redeemable(await self._states.submit(claims.pack()))
        access = await self._access_checks.submit(AccessQuery(claims.user_id, claims.account_id))
        if access.member is None:
            raise NoAccess
        if self._issued_at(claims) < access.member[0].sessions_from:
            raise TokenExpired("the user was signed out everywhere after it was issued")
        return VerifiedToken(claims, *access.member)

    async def consume(self, secret: str, token: str) -> VerifiedToken:
        """Redeem `token` for a frontend that has its own sessions.

        Raises subclasses of `ApiTokenError` and `LoginTokenError`, `Unavailable` or `OutcomeUnknown`.
        """
        known: dict[str, int] = {}
        with _recording_refusal("api", token, known):
            api_token = await self._authorize(secret, Scope.VERIFY_SSO)
            known["api_token_id"] = api_token.id
            # Verified before it is consumed, so that a failure here does not use up the link.
            verified = await self._verify(api_token, secret, token)
            claims = verified.claims
            redeemed = await self._redeem(claims, AccessQuery(claims.user_id, claims.account_id), now=self._trust.now())
            _refuse_unless_redeemable(None if redeemed.verdict is Verdict.REDEEMED else redeemed.verdict)
        _record(EventName.LOGIN, token, claims, way="api", **known)
        return verified

    async def revoke(self, secret: str, token: str) -> bool:
        """Consume `token` without signing in. Return False if it was used before.

        The token of a disabled user is revoked too, because the user may be enabled again, and so is a token from
        before a sign-out. Raises what `consume` raises, except `TokenConsumed` and `NoAccess`.
        """
        api_token = await self._authorize(secret, Scope.WRITE_SSO)
        claims = await self._read_for(api_token, secret, token)
        redeemed = await self._redeem(claims, None, now=self._trust.now())
        if redeemed.verdict is Verdict.EXPIRED:
            raise TokenExpired
        revoked = redeemed.verdict is Verdict.REDEEMED
        if revoked:
            _record(EventName.TOKEN_REVOKED, token, claims, api_token_id=api_token.id)
        return revoked

    async def _read_for(self, api_token: ApiToken, secret: str, token: str) -> Claims:
        """Return the claims of a genuine, unexpired token of the API token's account, without using the database.

        Only such tokens count against the rate limit. Any client can make a frontend check forged ones, or an old one
        of its own, without limit, and could use up the frontend's quota.
        """
        claims = await self._read_genuine(token, api_token.account_id)
        if claims.has_expired(self._trust.now()):
            raise TokenExpired
        self._count(secret, api_token)
        return claims

    # --- for browsers

    async def sign_in(
        self, token: str, path: StudioPath, reading: Awaitable[Session | None], *, confirmed: int | None = None
    ) -> Session | Question | None:
        """Redeem `token` for a session that may go on to `path`, or return a question that has to be answered first.

        `reading` returns the browser's present session. If that belongs to the same user in the same account, a token
        that was used or has expired is not an error: the session goes on, and the result is None. `confirmed` is None
        until the question is answered, then the id of the user who may be replaced, or 0 for none.

        Raises subclasses of `LoginTokenError`, `Unavailable` or `OutcomeUnknown`.
        """
        with _recording_refusal("browser", token):
            current = await reading  # here, so that a login which fails because of the cookie's keys is recorded, too
            outcome = await self._sign_in(token, path, current, confirmed)
        if isinstance(outcome, Question):
            metrics.count_login("browser", "asked")
        elif outcome is current:
            metrics.count_login("browser", "already_signed_in")
            return None
        return outcome

    async def _sign_in(
        self, token: str, path: StudioPath, current: Session | None, confirmed: int | None
    ) -> Session | Question:
        claims = await self._read_genuine(token)
        if path.account_id not in {None, claims.account_id}:
            raise await self._refusal(NoAccess, claims)
        if claims.has_expired(self._trust.now()):
            return await self._continue_or_refuse(TokenExpired, claims, path, current)

        other = None
        if current is not None and current.user_id not in {claims.user_id, confirmed}:
            other = await self._sessions.check(current)
        if other is not None or (confirmed is None and self._confirm):
            # No question for a user who is signed in already and returns with the link that was used for it.
            same = await self._current_if_same(claims, path, current)
            if same is not None and (
                self._issued_at(claims) < same.user.sessions_from
                or await self._states.submit(claims.pack()) is not None
            ):
                return same.session
            return Question(other)

        self._trust.signing_key()  # without one, a token would be consumed for a session that cannot be signed
        # The session begins now, before the database answers: a sign-out that comes after the answer has a later date.
        begins_at = self._trust.now()
        redeemed = await self._redeem(
            claims, AccessQuery(claims.user_id, claims.account_id, path.team_id), now=begins_at
        )
        match redeemed.verdict:
            case Verdict.REDEEMED:
                _record(EventName.LOGIN, token, claims, way="browser")
                # Not before `sessions_from`, which can be some seconds ahead after "sign out everywhere".
                return Session(claims.user_id, claims.account_id, max(begins_at, redeemed.sessions_from))
            case Verdict.NO_ACCESS | Verdict.NO_TEAM:
                raise await self._refusal(NoAccess, claims)
            case Verdict.CONSUMED:
                return await self._continue_or_refuse(TokenConsumed, claims, path, current)
            case Verdict.EXPIRED:
                return await self._continue_or_refuse(TokenExpired, claims, path, current)

    async def _continue_or_refuse(
        self, refusal: type[LoginRefused], claims: Claims, path: StudioPath, current: Session | None
    ) -> Session:
        """Return the current session if it is the one that the token was for. Otherwise raise `refusal`."""
        if (same := await self._current_if_same(claims, path, current)) is not None:
            return same.session
        raise await self._refusal(refusal, claims)

    async def _current_if_same(self, claims: Claims, path: StudioPath, current: Session | None) -> SignedIn | None:
        if current is None or (current.user_id, current.account_id) != (claims.user_id, claims.account_id):
            return None
        signed_in = await self._sessions.check(current, path.team_id)
        return signed_in if signed_in and (path.team_id is None or signed_in.access.team_exists) else None

    async def _refusal(self, refusal: type[LoginRefused], claims: Claims) -> LoginRefused:
        """Return the error with the account's portal, which is the way back for the user."""
        try:
            access = await self._access_checks.submit(AccessQuery(claims.user_id, claims.account_id))
        except Unavailable:
            return refusal()  # the reason for the refusal is certain; only the way back is missing
        return refusal(portal_url=access.portal_url)

    # --- shared

    async def _redeem(self, claims: Claims, access: AccessQuery | None, *, now: int) -> Redeemed:
        """Consume `claims` at `now` (Unix seconds) if possible. Every use case that consumes a token does it here."""
        if claims.has_expired(now):  # it may have expired since it was read
            return Redeemed(Verdict.EXPIRED)
        return await self._redemptions.submit(Redemption(claims.pack(), access, self._issued_at(claims), now))

    def _issued_at(self, claims: Claims) -> int:
        return claims.expires_at - self._lifetime

    async def _read_genuine(self, token: str, account_id: int | None = None) -> Claims:
        """Return the claims of a genuine token, which may have expired, without using the database.

        With `account_id`, a token of another account takes every step of a forged one, including the check for new
        keys, so that it gets the same answer after the same time. Raises a subclass of `InvalidToken`, or `Unavailable`
        if no key can be trusted now.
        """
        try:
            return self._read(token, account_id)
        except ForgedToken:
            # Perhaps another node has just made the key that signed it.
            if await self._trust.keys_changed():
                return self._read(token, account_id)
            raise

    def _read(self, token: str, account_id: int | None) -> Claims:
        now = self._trust.now()
        keys = [key.token_key for key in self._trust.verifying_keys(now, self._lifetime)]
        try:
            return tokens.read_genuine(token, keys, now=now, lifetime=self._lifetime, account_id=account_id)
        except ForgedToken:
            # A retired key still distinguishes an expired token from a forged one. Everything that it signed is
            # refused; only the answer depends on it.
            retired = [key.token_key for key in self._trust.known_keys() if key.token_key not in keys]
            if retired:
                with suppress(ForgedToken, OverlongToken):
                    claims = tokens.read_genuine(
                        token, retired, now=now, lifetime=self._lifetime, account_id=account_id
                    )
                    if claims.has_expired(now):
                        return claims
            raise


def _refuse_unless_redeemable(verdict: Verdict | None) -> None:
    """Raise the error for `verdict`. None means that the token can be redeemed, or was just redeemed."""
    match verdict:
        case Verdict.CONSUMED:
            raise TokenConsumed
        case Verdict.EXPIRED:
            raise TokenExpired
        case Verdict.NO_ACCESS:
            raise NoAccess


def _record(event: EventName, token: str, claims: Claims | None, **fields: Any) -> None:
    """Record an event of a login token. `claims` are given only if the signature is valid."""
    user_id, account_id = (claims.user_id, claims.account_id) if claims else (None, None)
    record(Event(event=event, user_id=user_id, account_id=account_id, ref=tokens.ref(token), **fields))


@contextmanager
def _recording_refusal(way: str, token: str, known: Mapping[str, int] = MappingProxyType({})) -> Iterator[None]:
    """Record the reason if the block refuses to sign in, with the fields that are in `known` by then."""
    try:
        yield
    except (LoginTokenError, DatabaseError) as error:
        genuine = isinstance(error, LoginRefused | OutcomeUnknown)
        claims = tokens.unsafe_read_claims(token) if genuine else None
        _record(EventName.LOGIN_REFUSED, token, claims, way=way, reason=error.reason, **known)
        raise
