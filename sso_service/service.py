"""The use cases: issue a token, redeem it, say who is signed in. Knows the domain; knows nothing of HTTP."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from itsdangerous import BadData, BadSignature
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from sqlalchemy import Connection

from sso_service import audit, metrics, sessions, tokens
from sso_service.audit import Event, EventName
from sso_service.database import directory, ledger, members
from sso_service.database.directory import ApiToken, Lookup, NewPerson, Place, Standing, User, digest
from sso_service.database.engine import Database
from sso_service.database.group_commit import GroupCommit
from sso_service.database.health import Health, health_all
from sso_service.database.ledger import CLOCK_TOLERANCE, Purger, Redemption, Verdict
from sso_service.errors import (
    ForgedToken,
    InvalidSession,
    MalformedToken,
    NoSigningKey,
    OutcomeUnknown,
    Overloaded,
    OverlongToken,
    TokenExpired,
    Unavailable,
)
from sso_service.keyring import KeyDirectory, SigningKey
from sso_service.paths import StudioPath
from sso_service.people import Person, normalise_email
from sso_service.permissions import Role, Scope, may_view
from sso_service.sessions import Session
from sso_service.settings import Settings
from sso_service.tokens import Claims

KEY_REFRESH = 2.0
"""Seconds between two looks at the key directory: a revocation must count within five."""
KEY_LOOK_TIMEOUT = 0.5
"""Seconds for which a signature that no known key explains waits for a look at the key directory."""
PURGE_INTERVAL = 61.0
"""Seconds between two purge rounds: a little more than the age that a floor must have."""
_THREADS = 16

log = logging.getLogger(__name__)

T = TypeVar("T")
Refusal = TypeVar("Refusal", bound=Exception)


class NotAuthenticated(Exception):
    """No API token, or one that is unknown, revoked or expired. Which of them is nobody's business."""


class InsufficientScope(Exception):
    """The API token is good but not for this."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.scope = scope


class RateLimited(Exception):
    """The API token was used too often. `retry_after` (seconds) says when there is room again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class UserDisabled(Exception):
    """The person was disabled by an operator."""


class RoleNotAllowed(Exception):
    """The person's role is above what the API token may sign in."""


class NotSignedIn(Exception):
    """There is no session, or one that does not count any more."""


class LoginRefused(Exception):
    """A token whose signature held does not sign in. `portal_url` is the way back to where it came from, if known."""

    def __init__(self, portal_url: str | None = None) -> None:
        super().__init__()
        self.portal_url = portal_url


class TokenExpired(LoginRefused):
    """Its time is over."""


class TokenConsumed(LoginRefused):
    """It was used before."""


class NoAccess(LoginRefused):
    """The person is disabled, is not in the account (any more), or the path is not the account's. Nothing consumed."""


class NotAllowed(NoAccess):
    """The person's role may not see that section."""


def reason_of(error: Exception) -> str | None:
    """Why something was refused, in a word for logs and metrics, and for `/verify`; None if `error` is no refusal."""
    match error:
        case MalformedToken():
            return "malformed"
        case BadSignature():
            return "bad_signature"
        case TokenExpired():
            return "expired"
        case TokenConsumed():
            return "consumed"
        case NoAccess():
            return "no_access"
        case NotAuthenticated():
            return "not_authenticated"
        case InsufficientScope():
            return "insufficient_scope"
        case RateLimited():
            return "rate_limited"
        case UserDisabled():
            return "user_disabled"
        case RoleNotAllowed():
            return "role_not_allowed"
        case Overloaded():
            return "overloaded"
        case Unavailable():
            return "unavailable"
        case OutcomeUnknown():
            return "outcome_unknown"
    return None


class Issued(msgspec.Struct, frozen=True):
    """A new token (43 characters), and whether its user was created for it."""

    token: str
    user_created: bool


@dataclass(frozen=True, slots=True)
class Login:
    """Whom a token signs in, and the role that they have now."""

    claims: Claims
    user: User
    role: Role


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Who is signed in, with the role that they have now, and what else holds for the place that was asked about."""

    session: Session
    user: User
    role: Role
    standing: Standing


@dataclass(frozen=True, slots=True)
class Question:
    """Signing in needs a click first. `current` is who would be replaced, if somebody."""

    current: SignedIn | None


@dataclass(frozen=True, slots=True)
class Condition:
    """How this node is doing: what is wrong, as subject and words, and figures, where they are known.

    `signing_key_age` is in seconds; `clock_difference` says by how many seconds this node's clock is ahead of the
    database's.
    """

    problems: dict[str, str]
    signing_key_age: int | None = None
    clock_difference: float | None = None


class Service:
    """All use cases over one database, one key directory and one clock (Unix seconds). For one event loop."""

    def __init__(
        self, settings: Settings, database: Database, keys: KeyDirectory, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self.database = database
        self.keys = keys
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database")
        reads = partial(self._group_commit, transaction=database.reading, late=Unavailable)
        writes = partial(self._group_commit, transaction=database.writing, late=OutcomeUnknown)
        self._lookups = reads("lookup", directory.look_up_all)
        self._standings = reads("standing", directory.standing_of_all)
        self._states = reads("state", ledger.state_of_all)
        self._health = reads("health", health_all)
        self._newcomers = writes("provision", directory.provision_all)
        # Consuming shares no transaction with anything else, so that nothing else can fail or delay it.
        self._redemptions = self._group_commit(
            "redeem", ledger.redeem_all, transaction=database.consuming, late=OutcomeUnknown
        )
        self._uses = writes("use", directory.touch_all)
        self._page_reads = reads("page", _run_all)
        self._page_changes = writes("change", _run_all)
        # Key directories are shared, so they can be slow or hang. One thread reads ours, and nothing else waits for it.
        self._key_reader = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._looking = asyncio.Lock()
        self._next_look: asyncio.Task[bool] | None = None
        self._noted: dict[int, int] = {}
        self._rate = settings.rate
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._background: set[asyncio.Task[Any]] = set()
        self.consumed_rows: int | None = None
        """Rows in the ledger at the last purge round, about."""
        self._leaving = False

    def _group_commit(
        self,
        kind: str,
        work: Callable[[Database, Connection, Sequence[Any]], Sequence[Any]],
        *,
        transaction: Callable[[Connection], AbstractContextManager[None]],
        late: Callable[[str], Exception],
    ) -> GroupCommit[Any, Any]:
        return GroupCommit(
            self.database,
            partial(work, self.database),
            transaction=transaction,
            executor=self._threads,
            late=late,
            observe=metrics.batches(kind),
        )

    # --- for integrations ---

    async def authorize(self, secret: str, scope: Scope) -> ApiToken:
        """The API token with this secret.

        Raises `NotAuthenticated`, `InsufficientScope`, `RateLimited` or `Unavailable`.
        """
        found: directory.Found = await self._lookups.submit(Lookup(digest(secret), ""))
        return self._admit(found.api_token, scope)

    async def issue(self, secret: str, person: Person) -> Issued:
        """A token for `person` in the account of the API token with this secret, who is made a member if need be.

        Raises `NotAuthenticated`, `InsufficientScope`, `RateLimited`, `FieldError`, `UserDisabled`, `RoleNotAllowed`,
        `Unavailable` or `OutcomeUnknown`.
        """
        email = person.email
        found: directory.Found = await self._lookups.submit(Lookup(digest(secret), email))
        api_token = self._admit(found.api_token, Scope.WRITE_SSO)
        if found.user_id is None and (normal := normalise_email(email)) != email:
            email = normal
            found = await self._lookups.submit(Lookup(digest(secret), email))
        account_id = api_token.account_id
        assert account_id is not None  # nosec B101 # noqa: S101 - `_admit` lets no platform API token write
        user_id, role, created = found.user_id, found.role, False
        if found.disabled:
            raise _refused(UserDisabled(), api_token, user_id)
        if user_id is None or role is None:
            self._signing_key(self.now())  # or somebody is created for a token that cannot be signed
            newcomer = NewPerson(email, person.first_name, person.last_name, account_id, self.now())
            provisioned: directory.Provisioned = await self._newcomers.submit(newcomer)
            user_id, role, created = provisioned.user_id, provisioned.role, provisioned.created
            if role is None:
                raise _refused(UserDisabled(), api_token, user_id)
        if api_token.max_role is not None and role.exceeds(api_token.max_role):
            raise _refused(RoleNotAllowed(), api_token, user_id)
        now = self.now()
        claims = Claims(now + self.settings.token_ttl, user_id, account_id, secrets.randbits(32))
        token = tokens.sign(claims, self._signing_key(now).token_key)
        _note(EventName.TOKEN_ISSUED, token, claims, api_token_id=api_token.id, user_created=created)
        return Issued(token, created)

    async def verify(self, secret: str, token: str) -> Login:
        """What `consume` would answer now. Consumes nothing, and raises the same but for `OutcomeUnknown`."""
        claims = await self._read_token_for(await self.authorize(secret, Scope.VERIFY_SSO), token)
        match await self._states.submit(claims.pack()):
            case Verdict.CONSUMED:
                raise TokenConsumed
            case Verdict.EXPIRED:
                raise TokenExpired
        standing: Standing = await self._standings.submit(Place(claims.user_id, claims.account_id))
        if (member := standing.member) is None:
            raise NoAccess
        return Login(claims, *member)

    async def consume(self, secret: str, token: str) -> Login:
        """Redeems `token` for a frontend that keeps sessions of its own.

        Raises `NotAuthenticated`, `InsufficientScope`, `MalformedToken`, `ForgedToken`, `OverlongToken`,
        `TokenExpired`, `TokenConsumed`, `NoAccess`, `Unavailable` or `OutcomeUnknown`.
        """
        with _noting_refusal("api", token):
            # Before it is consumed, so that nothing that fails here costs anybody their link.
            login = await self.verify(secret, token)
            claims = login.claims
            redeemed = await self._redeem(claims, Place(claims.user_id, claims.account_id))
            match redeemed.verdict:
                case Verdict.CONSUMED:
                    raise TokenConsumed
                case Verdict.EXPIRED:
                    raise TokenExpired
                case Verdict.NO_ACCESS:
                    raise NoAccess
        _note(EventName.LOGIN, token, claims, way="api")
        return login

    async def revoke(self, secret: str, token: str) -> bool:
        """Takes back a token by consuming it for nobody: True, or False if it was used before.

        Raises what `consume` raises, except `TokenConsumed` and `NoAccess`: also a token whose user is disabled is
        taken back, since they may be enabled again.
        """
        api_token = await self.authorize(secret, Scope.WRITE_SSO)
        claims = await self._read_token_for(api_token, token)
        redeemed = await self._redeem(claims, None)
        if redeemed.verdict is Verdict.EXPIRED:
            raise TokenExpired
        revoked = redeemed.verdict is Verdict.REDEEMED
        if revoked:
            _note(EventName.TOKEN_REVOKED, token, claims, api_token_id=api_token.id)
        return revoked

    async def _read_token_for(self, api_token: ApiToken, token: str) -> Claims:
        """The claims of a token that is good as far as keys and clock can tell. Asks no database."""
        claims, expired = await self._read_genuine(token)
        if api_token.account_id not in {None, claims.account_id}:
            raise ForgedToken("what other accounts issued is nobody else's business, not even that it exists")
        if expired:
            raise TokenExpired
        return claims

    def _admit(self, api_token: ApiToken | None, scope: Scope) -> ApiToken:
        now = self.now()
        if (
            api_token is None
            or api_token.revoked_at is not None
            or (api_token.expires_at is not None and api_token.expires_at <= now)
        ):
            raise _refused(NotAuthenticated(), api_token)
        # A platform API token signs nobody in, whatever its row says.
        if scope not in api_token.scopes or (scope is Scope.WRITE_SSO and api_token.account_id is None):
            raise _refused(InsufficientScope(scope), api_token)
        self._check_rate(api_token)
        self._note_use(api_token, now - now % 3600)
        return api_token

    def _check_rate(self, api_token: ApiToken) -> None:
        if self._rate is not None and not self._limiter.hit(self._rate, str(api_token.id)):
            room_at = self._limiter.get_window_stats(self._rate, str(api_token.id)).reset_time
            raise _refused(RateLimited(max(1, math.ceil(room_at - time.time()))), api_token)

    def _note_use(self, api_token: ApiToken, hour: int) -> None:
        """Has the hour of use written, once an hour, and lets nobody wait for it."""
        if (api_token.last_used_at or 0) < hour and self._noted.get(api_token.id) != hour:
            self._noted[api_token.id] = hour
            task = asyncio.create_task(self._write_use(api_token.id, hour))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _write_use(self, token_id: int, hour: int) -> None:
        try:
            await self._uses.submit((token_id, hour))
        except (Unavailable, OutcomeUnknown):
            self._noted.pop(token_id, None)  # the next use tries again

    # --- for browsers ---

    async def read_token(self, token: str) -> Claims:
        """The claims of a genuine token, good or not. Consumes nothing and asks no database.

        Raises `MalformedToken`, `ForgedToken`, `OverlongToken`, `TokenExpired`, or `Unavailable` if the keys cannot be
        trusted to be up to date.
        """
        self._check_keys()
        try:
            return self._read_token(token)
        except ForgedToken:
            # Perhaps signed with a key that another node made just now.
            if await self._keys_changed():
                return self._read_token(token)
            raise

    async def _read_genuine(self, token: str) -> tuple[Claims, bool]:
        """The claims of a genuine token, and whether its time is over. Raises what else `read_token` raises."""
        try:
            return await self.read_token(token), False
        except TokenExpired as error:
            return error.claims, True

    def _read_token(self, token: str) -> Claims:
        now, lifetime = self.now(), self.settings.token_ttl
        try:
            keys = [key.token_key for key in self.keys.ring.verifying_keys(now, lifetime)]
            return tokens.read(token, keys, now=now, lifetime=lifetime)
        except ForgedToken:
            # A key that may verify nothing any more can still tell an old token from a forged one. Whatever it signed
            # is refused: only which answer it gets depends on it.
            retired = [key.token_key for key in self.keys.ring.known_keys() if key.token_key not in keys]
            if retired:
                with suppress(ForgedToken, OverlongToken):
                    tokens.read(token, retired, now=now, lifetime=lifetime)
            raise

    async def sign_in(
        self, token: str, path: StudioPath, current: Session | None, *, confirmed: int | None = None
    ) -> Session | Question:
        """Redeems `token` for a session that may go on to `path`; or a question that has to be answered first.

        `current` is the session that the browser has already. If that is the same person's in the same account, a token
        that was used or has expired is no reason to send anyone away: they get what they have. `confirmed` is the
        answer to the question: the id of the user who may be replaced, or 0 for nobody.

        Raises what `read_token` raises, except `TokenExpired`; `TokenExpired`, `TokenConsumed`, `NoAccess`,
        `Unavailable`, `OutcomeUnknown`.
        """
        with _noting_refusal("browser", token):
            outcome = await self._sign_in(token, path, current, confirmed)
        if isinstance(outcome, Question):
            metrics.count_login("browser", "asked")
        elif outcome is current:
            metrics.count_login("browser", "already_signed_in")
        return outcome

    async def _sign_in(
        self, token: str, path: StudioPath, current: Session | None, confirmed: int | None
    ) -> Session | Question:
        claims, expired = await self._read_genuine(token)
        if path.account_id not in {None, claims.account_id}:
            await self._refuse(NoAccess, claims)
        if expired:
            return await self._already_signed_in(claims, path, current) or await self._refuse(TokenExpired, claims)

        someone_else = None
        if current is not None and current.user_id not in {claims.user_id, confirmed}:
            someone_else = await self.signed_in(current)
        if someone_else is not None or (confirmed is None and self.settings.confirm_login):
            # Nothing needs to be asked of who has it already and comes back with the link that was used for it.
            already = await self._already_signed_in(claims, path, current)
            if already is not None and await self._states.submit(claims.pack()) is not None:
                return already
            return Question(someone_else)

        self._signing_key(self.now())  # or a token is consumed for a session that cannot be signed
        redeemed = await self._redeem(claims, Place(claims.user_id, claims.account_id, path.team_id))
        match redeemed.verdict:
            case Verdict.REDEEMED:
                _note(EventName.LOGIN, token, claims, way="browser")
                # Not before `sessions_from`, which may be a second ahead: "sign out everywhere" ended what was before.
                return Session(claims.user_id, claims.account_id, max(self.now(), redeemed.sessions_from))
            case Verdict.NO_ACCESS | Verdict.NO_TEAM:
                return await self._refuse(NoAccess, claims)
            case Verdict.CONSUMED:
                refusal: type[LoginRefused] = TokenConsumed
            case Verdict.EXPIRED:
                refusal = TokenExpired
        return await self._already_signed_in(claims, path, current) or await self._refuse(refusal, claims)

    async def _redeem(self, claims: Claims, place: Place | None) -> ledger.Redeemed:
        """Consumes `claims`, if that can be done. The only way to it."""
        now = self.now()
        if now >= claims.expires_at:  # meanwhile
            return ledger.Redeemed(Verdict.EXPIRED)
        redeemed: ledger.Redeemed = await self._redemptions.submit(Redemption(claims.pack(), place, now))
        return redeemed

    async def _refuse(self, refusal: type[LoginRefused], claims: Claims) -> Session:
        raise refusal(await self._portal_url(claims))

    async def _already_signed_in(self, claims: Claims, path: StudioPath, current: Session | None) -> Session | None:
        if current is None or (current.user_id, current.account_id) != (claims.user_id, claims.account_id):
            return None
        signed_in = await self.signed_in(current, path.team_id)
        return current if signed_in and (path.team_id is None or signed_in.standing.team_exists) else None

    async def _portal_url(self, claims: Claims) -> str | None:
        try:
            standing: Standing = await self._standings.submit(Place(claims.user_id, claims.account_id))
        except Unavailable:
            return None  # what is wrong with the token is known, and a way back is not worth withholding it
        return standing.portal_url

    async def read_session(self, cookie: str) -> Session | None:
        """The session in a cookie that we made and that is not too old, or None. Asks no database."""
        session = self._read_session(cookie)
        if session is None and await self._keys_changed():
            session = self._read_session(cookie)
        return session

    def _read_session(self, cookie: str) -> Session | None:
        now, lifetime = self.now(), self.settings.session_ttl
        keys = [key.session_key for key in self.keys.ring.verifying_keys(now, lifetime)]
        try:
            return sessions.load_session(cookie, keys, now=now, lifetime=lifetime)
        except InvalidSession:
            return None

    async def signed_in(self, session: Session, team_id: int | None = None) -> SignedIn | None:
        """What holds now for the holder of `session`, or None if they have been signed out, disabled or removed.

        Raises `Unavailable`.
        """
        place = Place(session.user_id, session.account_id, team_id)
        standing: Standing = await self._standings.submit(place)
        if (member := standing.member) is None or session.issued_at < member[0].sessions_from:
            return None
        return SignedIn(session, *member, standing)

    async def admit(self, session: Session, paths: Collection[StudioPath]) -> SignedIn:
        """The holder of `session`, if they may see every one of `paths` now. Asks once for each team among them.

        Raises `NotSignedIn`, `NoAccess` (also if there is no path, since nothing was asked for then), `NotAllowed` or
        `Unavailable`.
        """
        admitted = None
        for team_id in {path.team_id for path in paths}:
            admitted = await self.signed_in(session, team_id)
            if admitted is None:
                raise NotSignedIn
            for path in paths:
                if path.team_id == team_id:
                    _check_may_see(admitted, path)
        if admitted is None:
            raise NoAccess
        return admitted

    def session_cookie(self, session: Session) -> str:
        """The signed cookie value of a session that a token was consumed for.

        Raises `OutcomeUnknown` if the keys were lost meanwhile: it is too late to say that nothing happened.
        """
        try:
            return sessions.dump_session(session, self._signing_key(self.now()).session_key)
        except Unavailable as error:
            raise OutcomeUnknown(str(error)) from error

    def form_token(self, token: str, target: bytes, browser: str) -> str:
        """A form token for the question whether `token` shall sign in this `browser` and lead to `target`."""
        now = self.now()
        return sessions.dump_form_token(token, target, browser, self._signing_key(now).form_key, now=now)

    def check_form_token(self, form_token: str, token: str, target: bytes, browser: str) -> None:
        """Raises `InvalidSession` unless `form_token` was made for this."""
        now = self.now()
        keys = [key.form_key for key in self.keys.ring.verifying_keys(now, sessions.FORM_LIFETIME)]
        sessions.check_form_token(form_token, token, target, browser, keys, now=now)

    async def sign_out_everywhere(self, signed_in: SignedIn) -> None:
        """Ends all sessions of whoever is signed in. Raises `Unavailable` or `OutcomeUnknown`."""
        user_id = signed_in.session.user_id
        await self.change(partial(members.sign_out_user, user_id=user_id, database=self.database))
        audit.record(Event(event=EventName.SIGNED_OUT_EVERYWHERE, user_id=user_id))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` reads. Raises what it raises, or `Unavailable`."""
        result: T = await self._page_reads.submit(work)
        return result

    async def change(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, once what it changed is durable. It may be called again if nothing came of it.

        Raises what it raises, `Unavailable` or `OutcomeUnknown`.
        """
        result: T = await self._page_changes.submit(work)
        return result

    # --- for operators ---

    async def condition(self) -> Condition:
        """How this node is doing now."""
        problems: dict[str, str] = {}
        key_age = difference = None
        if self._leaving:
            problems["node"] = "it was told to stop"
        try:
            key_age = self.now() - self._signing_key(self.now()).signs_from
        except Unavailable as error:
            problems["keys"] = str(error)
        try:
            health: Health = await self._health.submit(None)
        except Unavailable as error:
            problems["database"] = str(error)
        else:
            if health.problem:
                problems["database"] = health.problem
            if abs(difference := self._clock() - health.now) > CLOCK_TOLERANCE:
                problems["clock"] = f"this node's clock and the database's differ by {difference:.0f} s"
        return Condition(problems, key_age, difference)

    def leave(self) -> None:
        """From now on this node is not ready, so that balancers send nobody; it still does its work."""
        self._leaving = True

    async def run_in_background(self) -> None:
        """Keeps keys up to date and the ledger small, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_keys_fresh())
            group.create_task(self._keep_ledger_small())

    async def _keep_keys_fresh(self) -> None:
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._key_reader, self.keys.refresh)
            except Exception:
                log.exception("keys: cannot be read; the next look tries again")
            await asyncio.sleep(KEY_REFRESH)

    async def _keep_ledger_small(self) -> None:
        purger = Purger(self.database, clock=self._clock)
        while True:
            # Spread a little, so that workers that started together do not purge together for ever.
            await asyncio.sleep(PURGE_INTERVAL + secrets.randbelow(1000) / 100)
            try:
                done = await asyncio.to_thread(purger.run)
            except (Unavailable, OutcomeUnknown) as error:
                log.warning("purge: %s", error)
            except Exception:
                log.exception("purge: failed; the next round tries again")
            else:
                self.consumed_rows = done.rows
                if done.skipped:
                    log.warning("purge: skipped, since %s", done.skipped)

    def close(self) -> None:
        """Lets go of threads and connections."""
        self._key_reader.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)
        self.database.close()

    # --- keys and time ---

    def now(self) -> int:
        """Unix seconds."""
        return int(self._clock())

    async def _keys_changed(self) -> bool:
        """Whether the key directory was changed, and read, because of a signature that no known key explains.

        One look serves all who ask before it begins. One that is under way serves nobody else: it may be too early to
        see the key that signed what they bring.
        """
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        return await asyncio.shield(self._next_look)

    async def _look(self) -> bool:
        async with self._looking:
            self._next_look = None
            look = asyncio.get_running_loop().run_in_executor(self._key_reader, self.keys.refresh_if_changed)
            try:
                return await asyncio.wait_for(look, KEY_LOOK_TIMEOUT)
            except TimeoutError:
                return False

    def _check_keys(self) -> None:
        if self.keys.stale:
            raise Unavailable("the key directory cannot be listed, so a revocation may have been missed")

    def _signing_key(self, now: int) -> SigningKey:
        self._check_keys()
        try:
            return self.keys.ring.signing_key(now)
        except NoSigningKey as error:
            raise Unavailable(str(error)) from error


def _record(event: Event) -> None:
    """Counts it and writes it down."""
    metrics.count(event)
    audit.record(event)


def _note(event: EventName, token: str, claims: Claims | None, **fields: Any) -> None:
    """Records what became of a token. `claims` only if its signature held."""
    user_id, account_id = (claims.user_id, claims.account_id) if claims else (None, None)
    _record(Event(event=event, user_id=user_id, account_id=account_id, ref=tokens.ref(token), **fields))


@contextmanager
def _noting_refusal(way: str, token: str) -> Iterator[None]:
    """Notes why somebody was not signed in."""
    try:
        yield
    except (BadData, LoginRefused, Unavailable, OutcomeUnknown) as error:
        genuine = isinstance(error, LoginRefused | OutcomeUnknown)
        claims = tokens.unsafe_read_claims(token) if genuine else None
        _note(EventName.LOGIN_REFUSED, token, claims, way=way, reason=reason_of(error))
        raise


def _refused(error: Refusal, api_token: ApiToken | None, user_id: int | None = None) -> Refusal:
    """`error`, to be raised, after it was recorded."""
    token_id, account_id = (api_token.id, api_token.account_id) if api_token else (None, None)
    _record(
        Event(
            event=EventName.API_REFUSED,
            reason=reason_of(error),
            api_token_id=token_id,
            account_id=account_id,
            user_id=user_id,
        )
    )
    return error


def _check_may_see(signed_in: SignedIn, path: StudioPath) -> None:
    standing = signed_in.standing
    if path.account_id not in {None, signed_in.session.account_id} or (path.team_id and not standing.team_exists):
        raise NoAccess
    if path.section is not None and not may_view(signed_in.role, path.section):
        raise NotAllowed


def _run_all(_: Database, connection: Connection, works: Sequence[Callable[[Connection], Any]]) -> list[Any]:
    return [work(connection) for work in works]
