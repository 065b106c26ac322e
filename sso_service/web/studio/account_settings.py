"""Settings of an account, for its admins: API tokens, and the members of the team."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from sso_service import audit
from sso_service.audit import Event, EventName
from sso_service.database import administration, members
from sso_service.database.members import Members
from sso_service.errors import LastAdmin, NotAnAdmin, NotFound, RoleForbidden
from sso_service.permissions import Role, Scope
from sso_service.web.requests import form
from sso_service.web.visits import Visit, visit_of

_PAGE_SIZE = 50
"""Members on a page."""
_API_TOKENS = 200
"""API tokens on their page."""
_NOTICES = frozenset({"role", "removed", "signed_out", "revoked"})

T = TypeVar("T")


# --- API tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewApiToken:
    """What the form asks for, as it was filled in."""

    name: str = ""
    scopes: tuple[str, ...] = (str(Scope.WRITE_SSO),)
    max_role: str = ""
    expires_in: str = ""

    @property
    def problem(self) -> str | None:
        """The field that is wrong, if one is."""
        if not 1 <= len(self.name) <= 100 or not self.name.isprintable():
            return "name"
        if not self.scopes or not set(self.scopes) <= set(Scope):
            return "scopes"
        if self.max_role not in {"", *Role}:
            return "max_role"
        if self.expires_in and not (
            re.fullmatch("[0-9]{1,4}", self.expires_in, re.ASCII) and 1 <= int(self.expires_in) <= 3650
        ):
            return "expires_in"
        return None


class ApiTokens(HTTPEndpoint):
    """The account's API tokens, and a form for a new one."""

    async def get(self, request: Request) -> Response:
        """All of them."""
        return await _api_tokens_page(visit_of(request), NewApiToken())

    async def post(self, request: Request) -> Response:
        """Makes one. Its secret is on the page that answers, and nowhere else."""
        visit, fields = visit_of(request), await form(request.scope, request.receive)
        wanted = NewApiToken(
            fields.get("name", [""])[0].strip(),
            tuple(fields.get("scope", [])),
            fields.get("max_role", [""])[0],
            fields.get("expires_in", [""])[0].strip(),
        )
        if wanted.problem:
            return await _api_tokens_page(visit, wanted, status=422)
        token_id, secret = await _change(visit, partial(_create, visit=visit, wanted=wanted))
        _record(visit, EventName.API_TOKEN_CREATED, api_token_id=token_id)
        return await _api_tokens_page(visit, NewApiToken(), secret=secret)


def _create(connection: Connection, *, visit: Visit, wanted: NewApiToken) -> tuple[int, str]:
    now = visit.service.now()
    return administration.create_api_token(
        connection,
        account_id=visit.account_id,
        name=wanted.name,
        scopes=frozenset(Scope(scope) for scope in wanted.scopes),
        max_role=Role(wanted.max_role) if wanted.max_role else None,
        expires_at=now + int(wanted.expires_in) * 86400 if wanted.expires_in else None,
        now=now,
    )


async def _api_tokens_page(
    visit: Visit, given: NewApiToken, *, secret: str | None = None, status: int = 200
) -> Response:
    listed = partial(administration.list_api_tokens_of, account_id=visit.account_id, limit=_API_TOKENS)
    return await visit.page(
        "api_tokens.html",
        status=status,
        tab="api-tokens",
        api_tokens=await visit.service.read(listed),
        teams=await visit.service.read(partial(administration.list_teams, account_id=visit.account_id)),
        roles=list(Role),
        given=given,
        problem=given.problem if status == 422 else None,
        secret=secret,
        now=visit.service.now(),
        iso=_iso,
        notice=_notice(visit),
    )


class RevokeApiToken(HTTPEndpoint):
    """Asks whether an API token shall be revoked, and does it."""

    async def get(self, request: Request) -> Response:
        """The question."""
        visit = visit_of(request)
        find = partial(administration.find_api_token, token_id=_id(request), account_id=visit.account_id)
        token = await _found(visit, find)
        return await visit.page("revoke_api_token.html", tab="api-tokens", api_token=token)

    async def post(self, request: Request) -> Response:
        """The answer."""
        visit, token_id = visit_of(request), _id(request)

        def revoke(connection: Connection) -> None:
            token = administration.find_api_token(connection, token_id, visit.account_id)
            administration.revoke_api_token(connection, token.id, now=visit.service.now())

        await _change(visit, revoke)
        _record(visit, EventName.API_TOKEN_REVOKED, api_token_id=token_id)
        return _back(visit, "settings/api-tokens", notice="revoked")


# --- members ---------------------------------------------------------------------------------------------------------


async def team(request: Request) -> Response:
    """The account's members, a page at a time."""
    visit = visit_of(request)
    return await _team_page(visit, request.query_params.get("search", ""), request.query_params.get("page", "1"))


async def _team_page(visit: Visit, search: str, page: str, *, problem: str | None = None) -> Response:
    search = search.strip()[:100]
    number = max(1, int(page)) if re.fullmatch("[0-9]{1,6}", page, re.ASCII) else 1
    found = await _list_members(visit, search, number)
    pages = max(1, math.ceil(found.total / _PAGE_SIZE))
    if number > pages:  # there were more of them a moment ago
        number = pages
        found = await _list_members(visit, search, number)
    return await visit.page(
        "team.html",
        status=409 if problem == "last_admin" else 422 if problem else 200,
        tab="team",
        members=found.members,
        total=found.total,
        pages=pages,
        page=number,
        search=search,
        roles=list(Role),
        problem=problem,
        notice=_notice(visit),
    )


async def _list_members(visit: Visit, search: str, page: int) -> Members:
    if not search.isprintable():  # so no name has it; and to SQLite a text ends at the first NUL
        return Members([], 0)
    listed = partial(
        members.list_members,
        account_id=visit.account_id,
        search=search,
        offset=(page - 1) * _PAGE_SIZE,
        limit=_PAGE_SIZE,
    )
    return await visit.service.read(listed)


class MemberRole(HTTPEndpoint):
    """Gives a member another role."""

    async def post(self, request: Request) -> Response:
        """Does it, and goes back to the page from which it was asked."""
        visit, fields = visit_of(request), await form(request.scope, request.receive)
        search, page, role = (fields.get(name, [""])[0] for name in ("search", "page", "role"))
        if role not in set(Role):
            return await _team_page(visit, search, page, problem="role")
        work = partial(
            members.set_member_role,
            account_id=visit.account_id,
            user_id=_id(request),
            role=Role(role),
        )
        try:
            await _change(visit, work)
        except LastAdmin:
            return await _team_page(visit, search, page, problem="last_admin")
        _record(visit, EventName.ROLE_CHANGED, user_id=_id(request), role=role)
        return _back(visit, "settings/team", search=search, page=page, notice="role")


class RemoveMember(HTTPEndpoint):
    """Asks whether a member shall be taken out of the account, and does it."""

    async def get(self, request: Request) -> Response:
        """The question."""
        visit = visit_of(request)
        find = partial(members.find_member, account_id=visit.account_id, user_id=_id(request))
        return await visit.page("remove_member.html", tab="team", member=await _found(visit, find))

    async def post(self, request: Request) -> Response:
        """The answer."""
        visit = visit_of(request)
        work = partial(members.remove_member, account_id=visit.account_id, user_id=_id(request))
        try:
            await _change(visit, work)
        except LastAdmin:
            return await _team_page(visit, "", "1", problem="last_admin")
        _record(visit, EventName.MEMBER_REMOVED, user_id=_id(request))
        return _back(visit, "settings/team", notice="removed")


class SignOutMember(HTTPEndpoint):
    """Ends all sessions of a member."""

    async def post(self, request: Request) -> Response:
        """Does it, and goes back to the page from which it was asked."""
        visit, fields = visit_of(request), await form(request.scope, request.receive)
        work = partial(
            members.sign_out_member,
            account_id=visit.account_id,
            user_id=_id(request),
            database=visit.service.database,
        )
        await _change(visit, work)
        _record(visit, EventName.SIGNED_OUT_EVERYWHERE, user_id=_id(request))
        search, page = (fields.get(name, [""])[0] for name in ("search", "page"))
        return _back(visit, "settings/team", search=search, page=page, notice="signed_out")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _id(request: Request) -> int:
    """The id in the path. Of what nothing can have, there is no page."""
    if not re.fullmatch("[1-9][0-9]{0,9}", request.path_params["id"], re.ASCII):
        raise HTTPException(404)
    return int(request.path_params["id"])


async def _change(visit: Visit, work: Callable[[Connection], T]) -> T:
    """What `work` returns. Whoever asks must still be an admin when it is done."""

    def as_admin(connection: Connection) -> T:
        members.check_admin(connection, visit.account_id, visit.user.id)
        return work(connection)

    try:
        return await visit.service.change(as_admin)
    except NotFound:
        raise HTTPException(404) from None
    except NotAnAdmin:
        raise RoleForbidden from None


def _record(visit: Visit, event: EventName, **fields: Any) -> None:
    audit.record(Event(event=event, account_id=visit.account_id, by_user_id=visit.user.id, **fields))


async def _found(visit: Visit, find: Callable[[Connection], T]) -> T:
    try:
        return await visit.service.read(find)
    except NotFound:
        raise HTTPException(404) from None


def _back(visit: Visit, path: str, **parameters: str) -> Response:
    return RedirectResponse(visit.link(path, **parameters), 303)


def _notice(visit: Visit) -> str | None:
    notice = visit.request.query_params.get("notice")
    return notice if notice in _NOTICES else None


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def settings(request: Request) -> Response:
    """To the first of its pages."""
    return _back(visit_of(request), "settings/api-tokens")


_TEAM = "/client/{account:int}/t/{team:int}/settings"

ROUTES = [
    Route(_TEAM, settings),
    Route(f"{_TEAM}/api-tokens", ApiTokens),
    Route(f"{_TEAM}/api-tokens/{{id}}/revoke", RevokeApiToken),
    Route(f"{_TEAM}/team", team),
    Route(f"{_TEAM}/team/{{id}}/role", MemberRole),
    Route(f"{_TEAM}/team/{{id}}/remove", RemoveMember),
    Route(f"{_TEAM}/team/{{id}}/sign-out", SignOutMember),
]
