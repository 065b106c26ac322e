"""Sessions: reading the cookie, checking what its user may do now, signing out."""

from collections.abc import Collection
from dataclasses import dataclass

from sso_service import sessions
from sso_service.database.directory import Access, AccessChecks, AccessQuery, User
from sso_service.errors import InvalidSession, NoAccess, NotSignedIn, OutcomeUnknown, RoleForbidden, Unavailable
from sso_service.paths import StudioPath
from sso_service.permissions import Role, may_view
from sso_service.services.trust import Trust
from sso_service.sessions import Session


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A valid session with its user, the user's current role, and the access that was checked."""

    session: Session
    user: User
    role: Role
    access: Access


class Sessions:
    """The use cases of sessions. `lifetime` is in seconds."""

    def __init__(self, trust: Trust, access_checks: AccessChecks, *, lifetime: int) -> None:
        self._trust = trust
        self._access_checks = access_checks
        self._lifetime = lifetime

    # --- the cookie

    async def read(self, cookie: str) -> Session | None:
        """Return the session in a cookie that a known key signed and that is not too old, or None.

        This does not query the database: `check` does. Raises `Unavailable` if no key can be trusted now.
        """
        session = self._read(cookie)
        if session is None and await self._trust.keys_changed():
            session = self._read(cookie)
        return session

    def _read(self, cookie: str) -> Session | None:
        now = self._trust.now()
        keys = [key.session_key for key in self._trust.verifying_keys(now, self._lifetime)]
        try:
            return sessions.load_session(cookie, keys, now=now, lifetime=self._lifetime)
        except InvalidSession:
            return None

    def sign(self, session: Session) -> str:
        """Return the cookie value of a session for which a token was consumed.

        Raises `OutcomeUnknown` if the keys were lost after that: the token is used, so `Unavailable` would be wrong.
        """
        try:
            return sessions.dump_session(session, self._trust.signing_key().session_key)
        except Unavailable as error:
            raise OutcomeUnknown(str(error)) from error

    # --- access

    async def check(self, session: Session, team_id: int | None = None) -> SignedIn | None:
        """Return the session with its user and their role now, or None if they were signed out, disabled or removed.

        With `team_id`, `access.team_exists` reports whether the team belongs to the account. Raises `Unavailable`.
        """
        access = await self._access_checks.submit(AccessQuery(session.user_id, session.account_id, team_id))
        if (member := access.member) is None or session.issued_at < member[0].sessions_from:
            return None
        return SignedIn(session, *member, access)

    async def authorize(self, session: Session, paths: Collection[StudioPath]) -> SignedIn:
        """Return the session if its user may view every one of `paths` now. Each team among them costs one query.

        Raises `NotSignedIn`, `NoAccess` (also without any path, because then nothing was checked), `RoleForbidden` or
        `Unavailable`.
        """
        signed_in = None
        for team_id in {path.team_id for path in paths}:
            signed_in = await self.check(session, team_id)
            if signed_in is None:
                raise NotSignedIn
            for path in paths:
                if path.team_id == team_id:
                    _check_may_view(signed_in, path)
        if signed_in is None:
            raise NoAccess
        return signed_in

    # --- forms

    def form_token(self, token: str, target: bytes, browser: str) -> str:
        """Return a form token for the question whether `browser` is to be signed in by `token`, to go to `target`."""
        return sessions.dump_form_token(
            token, target, browser, self._trust.signing_key().form_key, now=self._trust.now()
        )

    def check_form_token(self, form_token: str, token: str, target: bytes, browser: str) -> None:
        """Raise `InvalidForm` unless `form_token` was made for these values, or `Unavailable`."""
        now = self._trust.now()
        keys = [key.form_key for key in self._trust.verifying_keys(now, sessions.FORM_LIFETIME)]
        sessions.check_form_token(form_token, token, target, browser, keys, now=now)


def _check_may_view(signed_in: SignedIn, path: StudioPath) -> None:
    of_account = path.account_id in {None, signed_in.session.account_id}
    if not of_account or (path.team_id and not signed_in.access.team_exists):
        raise NoAccess
    if path.section is not None and not may_view(signed_in.role, path.section):
        raise RoleForbidden
