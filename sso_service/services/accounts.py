"""Administration of accounts, teams, API tokens, users and members, for the command line and for the Studio pages.

Each use case makes one change and writes its audit event. A change by an admin takes effect only if the user is an
admin of the account at that moment, and never removes the account's last admin. A change by an operator is not
restricted. All use cases raise `Unavailable`; changes also raise `OutcomeUnknown`.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from sso_service.database import accounts, members
from sso_service.database.accounts import ACTIVE, Account, ApiTokenRecord, ApiTokenStatus, Expiring, Team
from sso_service.database.directory import ProvisionRequest, provision
from sso_service.database.members import Member, MemberPage, Membership, UserRecord
from sso_service.database.work import Changes, Reads, Work
from sso_service.errors import NotFound, OperatorError
from sso_service.observability import audit
from sso_service.observability.audit import Event, EventName
from sso_service.people import Person, check_name
from sso_service.permissions import Role, Scope

# Error pages link to this URL, so the schemes `javascript:` and `http:` and all control characters are refused.
_PORTAL_URL = re.compile(r"https://[A-Za-z0-9.-]+(:[0-9]+)?([/?#][!-~]{0,1900})?")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Actor:
    """The author of a change, for the audit log: an operator, an admin, or the user themselves if neither is set."""

    operator: str | None = None
    """The operator's name on the machine."""
    admin_id: int | None = None
    """The user id of an admin of the account."""


class Accounts:
    """The use cases of administration.

    `searches` runs reads that may take long, so that others do not wait for them.
    """

    def __init__(
        self,
        reads: Reads,
        changes: Changes,
        *,
        searches: Reads | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reads = reads
        self._searches = searches or reads
        self._changes = changes
        self._clock = clock

    # --- reading

    async def list_accounts(self) -> list[Account]:
        """Return all accounts."""
        return await self._reads.run(accounts.list_accounts)

    async def find_account(self, account_id: int) -> Account:
        """Return the account. Raises `NotFound`."""
        return await self._reads.run(partial(accounts.find_account, account_id=account_id))

    async def list_teams(self, account_id: int | None = None) -> list[Team]:
        """Return the teams of an account, or all teams."""
        return await self._reads.run(partial(accounts.list_teams, account_id=account_id))

    async def describe(self, account_id: int) -> tuple[Account, list[Team]]:
        """Return the account and its teams, in one read. Raises `NotFound`."""
        return await self._reads.run(partial(accounts.find_account_with_teams, account_id=account_id))

    async def list_api_tokens(self) -> list[ApiTokenRecord]:
        """Return all API tokens."""
        return await self._reads.run(accounts.list_api_tokens)

    async def list_api_tokens_of(
        self,
        account_id: int,
        *,
        statuses: Sequence[ApiTokenStatus] = ACTIVE,
        created_by: int | None = None,
        before: int | None = None,
        after: int | None = None,
        limit: int,
    ) -> Sequence[ApiTokenRecord]:
        """Return at most `limit` API tokens of an account that have one of `statuses`, the newest first.

        `before` or `after` is an id: only older or only newer ones. With `created_by`, only those of this user.
        """
        work = partial(
            accounts.list_api_tokens_of,
            account_id=account_id,
            now=int(self._clock()),
            statuses=statuses,
            created_by=created_by,
            before=before,
            after=after,
            limit=limit,
        )
        return await self._reads.run(work)

    async def count_expiring_api_tokens(self, account_id: int | None = None) -> Expiring:
        """Return how many active API tokens expire soon, of an account or of all."""
        work = partial(accounts.count_expiring_api_tokens, account_id=account_id, now=int(self._clock()))
        return await self._reads.run(work)

    async def find_api_token(self, token_id: int, account_id: int) -> ApiTokenRecord:
        """Return the account's API token. Raises `NotFound`."""
        return await self._reads.run(partial(accounts.find_api_token, token_id=token_id, account_id=account_id))

    async def find_user(self, email: str) -> UserRecord:
        """Return the user with this normalised address. Raises `NotFound`."""
        return await self._reads.run(partial(members.find_user, email=email))

    async def list_memberships(self, user_id: int) -> list[Membership]:
        """Return the accounts of a user with the role in each."""
        return await self._reads.run(partial(members.list_memberships, user_id=user_id))

    async def find_member(self, account_id: int, user_id: int) -> Member:
        """Return the member. Raises `NotFound`."""
        return await self._reads.run(partial(members.find_member, account_id=account_id, user_id=user_id))

    async def has_other_admin(self, account_id: int, user_id: int) -> bool:
        """Return whether the account has an admin, not disabled, other than this user."""
        return await self._reads.run(partial(members.has_other_admin, account_id=account_id, user_id=user_id))

    async def find_member_by_email(self, account_id: int, email: str) -> Member:
        """Return the member with this normalised address. Raises `NotFound`, whose message contains the address."""
        await self.find_account(account_id)
        user = await self.find_user(email)
        try:
            return await self.find_member(account_id, user.id)
        except NotFound:
            raise NotFound(f"{email} is not a member of account {account_id}") from None

    async def list_members(self, account_id: int, *, search: str, offset: int, limit: int) -> MemberPage:
        """Return `limit` members from `offset` on whose name or address contains `search`, and how many there are."""
        if not search.isprintable():  # no name contains it, and for SQLite a text ends at the first NUL
            return MemberPage([], 0)
        return await self._searches.run(
            partial(members.list_members, account_id=account_id, search=search, offset=offset, limit=limit)
        )

    # --- accounts, teams, API tokens

    async def add_account(
        self, actor: Actor, name: str, *, account_id: int | None = None, portal_url: str | None = None
    ) -> int:
        """Add an account and return its id.

        Raises `FieldError` for the name, `OperatorError` for the portal URL, or `Conflict`.
        """
        if portal_url is not None and not _PORTAL_URL.fullmatch(portal_url):
            raise OperatorError("the portal URL must be an https URL, in ASCII and of at most 2000 characters")
        work = partial(accounts.add_account, name=check_name(name), account_id=account_id, portal_url=portal_url)
        new = await self._changes.run(work)
        _record(EventName.ACCOUNT_ADDED, actor, account_id=new)
        return new

    async def add_team(self, actor: Actor, account_id: int, name: str, *, team_id: int | None = None) -> int:
        """Add a team and return its id. Raises `FieldError` for the name, `NotFound` or `Conflict`."""
        work = partial(accounts.add_team, account_id=account_id, name=check_name(name), team_id=team_id)
        new = await self._changes.run(work)
        _record(EventName.TEAM_ADDED, actor, account_id=account_id)
        return new

    async def create_api_token(
        self,
        actor: Actor,
        *,
        account_id: int | None,
        name: str,
        scopes: frozenset[Scope],
        max_role: Role | None = None,
        lifetime_days: int | None = None,
    ) -> str:
        """Create an API token and return its secret, which is not stored.

        `account_id` None makes a platform API token. Without `lifetime_days` it does not expire. Raises `FieldError`
        for the name, `NotFound`, or `NotAnAdmin` for an admin.
        """
        now = int(self._clock())
        work = partial(
            accounts.create_api_token,
            account_id=account_id,
            name=check_name(name),
            scopes=scopes,
            max_role=max_role,
            now=now,
            expires_at=None if lifetime_days is None else now + lifetime_days * 86400,
            created_by=actor.admin_id,
        )
        token_id, secret = await self._change(actor, account_id, work)
        _record(EventName.API_TOKEN_CREATED, actor, api_token_id=token_id, account_id=account_id)
        return secret

    async def revoke_api_token(self, actor: Actor, token_id: int, account_id: int | None = None) -> ApiTokenRecord:
        """Revoke an API token, of this account if one is given. Raises `NotFound`, or `NotAnAdmin` for an admin."""
        now = int(self._clock())
        work = partial(accounts.revoke_api_token, token_id=token_id, account_id=account_id, now=now)
        revoked = await self._change(actor, account_id, work)
        _record(EventName.API_TOKEN_REVOKED, actor, api_token_id=revoked.id, account_id=revoked.account_id)
        return revoked

    async def log_expiring_api_tokens(self) -> None:
        """Log the API tokens that expire soon: each once a day, however many processes of the service do so."""
        for each in await self._changes.run(partial(accounts.take_expiring_api_tokens, now=int(self._clock()))):
            date = datetime.fromtimestamp(each.expires_at, UTC)
            _record(
                EventName.API_TOKEN_EXPIRING, Actor(), api_token_id=each.id, account_id=each.account_id, expires_at=date
            )

    # --- members

    async def add_member(self, actor: Actor, account_id: int, person: Person, role: Role) -> int:
        """Make a person a member with this role, as a new user if unknown, and return the user id.

        Only for operators. The address of `person` is normalised. Raises `NotFound` for a disabled user who is
        not a member.
        """
        request = ProvisionRequest(
            person.email, person.first_name, person.last_name, account_id, now=int(self._clock())
        )
        [provisioned] = await self._changes.run(partial(provision, self._changes.database, people=[request]))
        await self.set_role(actor, account_id, provisioned.user_id, role)
        return provisioned.user_id

    async def set_role(
        self, actor: Actor, account_id: int, user_id: int, role: Role, *, revoke_api_tokens: bool = False
    ) -> list[ApiTokenRecord]:
        """Change a member's role. Raises `NotFound`, and for an admin `NotAnAdmin` or `LastAdmin`.

        Returns the account's active API tokens that the member created, unless the new role is admin. With
        `revoke_api_tokens` they are revoked in the same transaction.
        """
        work = partial(members.set_role, account_id=account_id, user_id=user_id, role=role)
        if role is Role.ADMIN:
            await self._change(actor, account_id, work)
            created = []
        else:
            created = await self._end_rights(actor, account_id, user_id, work, revoke=revoke_api_tokens)
        _record(EventName.ROLE_CHANGED, actor, user_id=user_id, account_id=account_id, role=role)
        return _record_revoked(actor, created, revoke_api_tokens)

    async def remove_member(
        self, actor: Actor, account_id: int, user_id: int, *, revoke_api_tokens: bool = False
    ) -> list[ApiTokenRecord]:
        """Remove a member from the account. Raises `NotFound`, and for an admin `NotAnAdmin` or `LastAdmin`.

        Returns the account's active API tokens that the member created. With `revoke_api_tokens` they are revoked in
        the same transaction.
        """
        work = partial(members.remove_member, account_id=account_id, user_id=user_id)
        created = await self._end_rights(actor, account_id, user_id, work, revoke=revoke_api_tokens)
        _record(EventName.MEMBER_REMOVED, actor, user_id=user_id, account_id=account_id)
        return _record_revoked(actor, created, revoke_api_tokens)

    async def sign_out_member(self, actor: Actor, account_id: int, user_id: int) -> None:
        """End all sessions and outstanding login links of a member in this account.

        Raises `NotFound`, `Overloaded`, or `NotAnAdmin`.
        """
        work = partial(
            members.sign_out_member,
            account_id=account_id,
            user_id=user_id,
            database=self._changes.database,
            by_member=actor == Actor(),
        )
        await self._sign_out(actor, account_id, user_id, work)

    # --- users

    async def add_search_texts(self) -> None:
        """Make all users searchable, in short transactions. It changes nothing if they are."""
        while await self._reads.run(members.lacks_search_text):
            await self._changes.run(members.add_search_texts)

    async def sign_out_user(self, actor: Actor, user_id: int) -> None:
        """End all sessions and outstanding login links of a user, in all accounts. Raises `Overloaded`."""
        work = partial(members.sign_out_user, user_id=user_id, database=self._changes.database)
        await self._sign_out(actor, None, user_id, work)

    async def disable_user(
        self, actor: Actor, user_id: int, *, revoke_api_tokens: bool = False
    ) -> list[ApiTokenRecord]:
        """Disable a user: all current and future tokens and sessions are rejected.

        Returns the active API tokens that the user created, in all accounts. With `revoke_api_tokens` they are revoked
        in the same transaction.
        """
        work = partial(members.disable_user, user_id=user_id, database=self._changes.database)
        created = await self._end_rights(actor, None, user_id, work, revoke=revoke_api_tokens)
        _record(EventName.USER_DISABLED, actor, user_id=user_id)
        return _record_revoked(actor, created, revoke_api_tokens)

    async def enable_user(self, actor: Actor, user_id: int) -> None:
        """Undo `disable_user`."""
        await self._changes.run(partial(members.enable_user, user_id=user_id))
        _record(EventName.USER_ENABLED, actor, user_id=user_id)

    async def _end_rights(
        self, actor: Actor, account_id: int | None, user_id: int, work: Work[None], *, revoke: bool
    ) -> list[ApiTokenRecord]:
        now = int(self._clock())
        ending = members.with_created_api_tokens(work, user_id=user_id, account_id=account_id, now=now, revoke=revoke)
        return await self._change(actor, account_id, ending)

    async def _sign_out(self, actor: Actor, account_id: int | None, user_id: int, work: Work[int]) -> None:
        """Run `work`, which signs the user out and returns the new `sessions_from`, and write its audit event.

        On PostgreSQL a login does not see the sign-out before its commit. If that took long, the login may be dated
        after `sessions_from`. Then the user is signed out once more. SQLite runs one transaction after the other.
        """
        database = self._changes.database
        sessions_from = await self._change(actor, account_id, work)
        _record(EventName.SIGNED_OUT_EVERYWHERE, actor, user_id=user_id, account_id=account_id)
        if not database.is_sqlite and sessions_from <= await self._reads.run(
            partial(members.database_time, database=database)
        ):
            await self._change(actor, account_id, work)

    async def _change(self, actor: Actor, account_id: int | None, work: Work[T]) -> T:
        if actor.admin_id is not None:
            assert account_id is not None  # nosec B101 # noqa: S101 - an admin acts within an account
            work = members.as_admin(work, account_id=account_id, admin_id=actor.admin_id)
        return await self._changes.run(work)


def _record(name: EventName, actor: Actor, **fields: Any) -> None:
    audit.record(Event(event=name, operator=actor.operator, by_user_id=actor.admin_id, **fields))


def _record_revoked(actor: Actor, created: list[ApiTokenRecord], revoked: bool) -> list[ApiTokenRecord]:
    for each in created if revoked else ():
        _record(EventName.API_TOKEN_REVOKED, actor, api_token_id=each.id, account_id=each.account_id)
    return created
