"""Issuing login tokens for the holders of API tokens, and authorizing API tokens for every other use."""

import asyncio
import secrets
from typing import Any, TypeVar

import msgspec

from sso_service import tokens
from sso_service.database.directory import (
    ApiToken,
    ApiTokenUses,
    Found,
    Lookup,
    Lookups,
    Provisioning,
    ProvisionRequest,
    digest,
)
from sso_service.errors import (
    InsufficientScope,
    NotAuthenticated,
    OutcomeUnknown,
    RateLimited,
    RoleNotAllowed,
    ServiceError,
    Unavailable,
    UserDisabled,
)
from sso_service.observability.audit import Event, EventName
from sso_service.observability.events import record
from sso_service.people import Person, normalise_email
from sso_service.permissions import Role, Scope
from sso_service.services.quotas import Quota, Quotas
from sso_service.services.trust import Trust
from sso_service.settings import Settings
from sso_service.tokens import Claims

Refusal = TypeVar("Refusal", bound=ServiceError)


class IssuedToken(msgspec.Struct, frozen=True):
    """A new login token (43 characters), and whether its user was created for it."""

    token: str
    user_created: bool


class Issuing:
    """The use cases of an integration: authorize its API token, issue a login token."""

    def __init__(
        self, settings: Settings, trust: Trust, lookups: Lookups, provisioning: Provisioning, uses: ApiTokenUses
    ) -> None:
        self._trust = trust
        self._lookups = lookups
        self._provisioning = provisioning
        self._uses = uses
        self._lifetime = settings.token_ttl
        self._quotas = Quotas(settings.rate)
        self._recorded: dict[int, int] = {}  # the hour of the last recorded use, by id of the API token
        self._background: set[asyncio.Task[Any]] = set()

    async def issue(self, secret: str, person: Person) -> IssuedToken:
        """Issue a login token for `person` in the account of the API token with this secret.

        An unknown person becomes a user, and a user of other accounts a member of this one. Raises `ApiTokenError`,
        `FieldError`, `UserDisabled`, `RoleNotAllowed`, `Unavailable` or `OutcomeUnknown`.
        """
        # Before the database is read: the link must not be dated after a sign-out that the lookup did not see.
        now = self._trust.now()
        found = await self._look_up(secret, person.email)
        api_token = self._check(secret, found.api_token, Scope.WRITE_SSO)
        self.count(secret, api_token)
        email = person.email
        if found.user_id is None and (email := normalise_email(email)) != person.email:
            found = await self._look_up(secret, email)
        user_id, role, created, sessions_from = await self._member(api_token, found, person, email)
        if api_token.max_role is not None and role.exceeds(api_token.max_role):
            raise _refused(RoleNotAllowed(), api_token, user_id)
        # Not before `sessions_from`, which is up to some seconds ahead after "sign out everywhere". Otherwise the new
        # token would be refused like those from before.
        issued_at = max(now, sessions_from)
        if issued_at > now + tokens.CLOCK_ALLOWANCE:  # every node would refuse the token
            raise Unavailable(f"a clock was set back: links of user {user_id} begin only in {issued_at - now} s")
        claims = Claims(issued_at + self._lifetime, user_id, _account_of(api_token), secrets.randbits(32))
        token = tokens.sign(claims, self._trust.signing_key().token_key)
        record(
            Event(
                event=EventName.TOKEN_ISSUED,
                user_id=user_id,
                account_id=claims.account_id,
                ref=tokens.ref(token),
                api_token_id=api_token.id,
                user_created=created,
            )
        )
        return IssuedToken(token, created)

    async def authorize(self, secret: str, scope: Scope) -> ApiToken:
        """Return the API token with this secret, without counting the request.

        Raises `NotAuthenticated`, `InsufficientScope` or `Unavailable`.
        """
        return self._check(secret, (await self._look_up(secret, "")).api_token, scope)

    def count(self, secret: str, api_token: ApiToken) -> None:
        """Count a request of the API token, given with its secret, against `SSO_RATE_LIMIT`. Raises `RateLimited`."""
        try:
            self._quotas.count(secret)
        except RateLimited as error:
            raise _refused(error, api_token) from None

    def quota(self, secret: str) -> Quota | None:
        """Return the quota of the API token with this secret: None without a limit, or if it was never accepted."""
        return self._quotas.of(secret)

    async def _look_up(self, secret: str, email: str) -> Found:
        return await self._lookups.submit(Lookup(digest(secret), email, self._trust.now()))

    async def _member(
        self, api_token: ApiToken, found: Found, person: Person, email: str
    ) -> tuple[int, Role, bool, int]:
        """Return the user's id, their role in the account, whether the user was created, and `sessions_from`."""
        if found.disabled:
            raise _refused(UserDisabled(), api_token, found.user_id)
        if found.user_id is not None and found.role is not None:
            return found.user_id, found.role, False, found.sessions_from
        self._trust.signing_key()  # without one, a user would be created for a token that cannot be signed
        provisioned = await self._provisioning.submit(
            ProvisionRequest(email, person.first_name, person.last_name, _account_of(api_token), self._trust.now())
        )
        if provisioned.role is None:
            raise _refused(UserDisabled(), api_token, provisioned.user_id)
        return provisioned.user_id, provisioned.role, provisioned.created, provisioned.sessions_from

    def _check(self, secret: str, api_token: ApiToken | None, scope: Scope) -> ApiToken:
        # The lookup finds no revoked or expired API token, so the time of the refusal does not reveal the reason, and
        # neither does the event. This catches one that was revoked by hand.
        if api_token is None or api_token.revoked_at is not None:
            raise _refused(NotAuthenticated(), api_token)
        self._quotas.accept(secret)
        # A platform API token never issues, whatever scopes its row contains.
        if scope not in api_token.scopes or (scope is Scope.WRITE_SSO and api_token.account_id is None):
            raise _refused(InsufficientScope(scope), api_token)
        now = self._trust.now()
        self._record_use(api_token, now - now % 3600)
        return api_token

    def _record_use(self, api_token: ApiToken, hour: int) -> None:
        """Write the hour of use in the background, once an hour. The request does not wait for it."""
        if (api_token.last_used_at or 0) < hour and self._recorded.get(api_token.id) != hour:
            self._recorded[api_token.id] = hour
            task = asyncio.create_task(self._write_use(api_token.id, hour))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _write_use(self, token_id: int, hour: int) -> None:
        try:
            await self._uses.submit((token_id, hour))
        except (Unavailable, OutcomeUnknown):
            self._recorded.pop(token_id, None)  # the next use tries again


def _account_of(api_token: ApiToken) -> int:
    assert api_token.account_id is not None  # nosec B101 # noqa: S101 - `_check` refuses to issue for a platform token
    return api_token.account_id


def _refused(error: Refusal, api_token: ApiToken | None, user_id: int | None = None) -> Refusal:
    """Record the refusal and return `error`, for the caller to raise."""
    ids: dict[str, Any] = {"api_token_id": api_token.id, "account_id": api_token.account_id} if api_token else {}
    record(Event(event=EventName.API_REFUSED, reason=error.reason, user_id=user_id, **ids))
    return error
