"""The page of an account's API tokens: list, create and revoke."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.responses import Response

from sso_service.database.accounts import ACTIVE, EXPIRES_SOON, INACTIVE, ApiTokenRecord, ApiTokenStatus
from sso_service.errors import FieldError
from sso_service.people import check_name
from sso_service.permissions import Role, Scope
from sso_service.web.studio.page_requests import PageRequest

_PAGE_SIZE = 50
"""API tokens on a page."""
_LISTS: dict[str, Sequence[ApiTokenStatus]] = {
    "": ACTIVE,
    "expiring": (ApiTokenStatus.EXPIRING,),
    "revoked": INACTIVE,
}
"""The lists that the page can show, by the query parameter `show`, and the statuses of their API tokens."""
_DAYS = re.compile(r"[0-9]{1,4}", re.ASCII)
_MAX_DAYS = 3650

_PAGE = "settings/api-tokens"


@dataclass(frozen=True, slots=True)
class ApiTokenForm:
    """The form for a new API token, as it was filled in.

    The defaults are those of a form that was not filled in. They do little harm if the API token is stolen: it cannot
    sign in admins, and it expires.
    """

    name: str = ""
    scopes: tuple[str, ...] = (str(Scope.WRITE_SSO),)
    max_role: str = str(Role.EDITOR)
    expires_in: str = "90"
    """Days until the API token expires; empty: never."""

    @property
    def problem(self) -> str | None:
        """The first field with an invalid value, or None."""
        try:
            check_name(self.name)
        except FieldError:
            return "name"
        if not self.scopes or not set(self.scopes) <= set(Scope):
            return "scopes"
        if self.max_role not in {"", *Role}:
            return "max_role"
        if self.expires_in and not (_DAYS.fullmatch(self.expires_in) and 1 <= int(self.expires_in) <= _MAX_DAYS):
            return "expires_in"
        return None


async def show(page_request: PageRequest) -> Response:
    """Show the API tokens, and the form for a new one."""
    return await _page(page_request, ApiTokenForm())


async def create(page_request: PageRequest) -> Response:
    """Create an API token. Only this response contains its secret."""
    form = await page_request.form()
    given = ApiTokenForm(
        form.value("name").strip(), form.values("scope"), form.value("max_role"), form.value("expires_in").strip()
    )
    if given.problem:
        return await _page(page_request, given, problem=given.problem)
    secret = await page_request.node.accounts.create_api_token(
        page_request.actor,
        account_id=page_request.account_id,
        name=given.name,
        scopes=frozenset(map(Scope, given.scopes)),
        max_role=Role(given.max_role) if given.max_role else None,
        lifetime_days=int(given.expires_in) if given.expires_in else None,
    )
    return await _page(page_request, ApiTokenForm(), secret=secret)


async def confirm_revoke(page_request: PageRequest) -> Response:
    """Ask whether to revoke an API token."""
    token = await page_request.node.accounts.find_api_token(page_request.record_id, page_request.account_id)
    return await page_request.render("revoke_api_token.html", tab="api-tokens", api_token=token)


async def revoke(page_request: PageRequest) -> Response:
    """Revoke an API token."""
    await page_request.node.accounts.revoke_api_token(
        page_request.actor, page_request.record_id, page_request.account_id
    )
    return page_request.redirect(_PAGE, notice="revoked")


@dataclass(frozen=True, slots=True)
class ApiTokenPage:
    """One page of a list of API tokens, the newest first, and the ids that lead to its neighbours."""

    api_tokens: Sequence[ApiTokenRecord]
    before: int | None
    """The id of the last API token, if there are older ones."""
    after: int | None
    """The id of the first API token, if there are newer ones."""


async def _list(page_request: PageRequest, show: str) -> ApiTokenPage:
    """Return the page that `before` or `after` in the query names, an id each, or the first one."""
    before, after = page_request.query_id("before"), page_request.query_id("after")
    found = list(
        await page_request.node.accounts.list_api_tokens_of(
            page_request.account_id, statuses=_LISTS[show], before=before, after=after, limit=_PAGE_SIZE + 1
        )
    )
    # One more than the page shows: it proves that the list goes on in the direction of reading.
    more = len(found) > _PAGE_SIZE
    if after is None:
        found, older, newer = found[:_PAGE_SIZE], more, before is not None
    else:
        found, older, newer = found[-_PAGE_SIZE:], True, more
    return ApiTokenPage(found, found[-1].id if found and older else None, found[0].id if found and newer else None)


async def _page(
    page_request: PageRequest, form: ApiTokenForm, *, problem: str | None = None, secret: str | None = None
) -> Response:
    show = given if (given := page_request.query("show")) in _LISTS else ""
    expiring = await page_request.node.accounts.count_expiring_api_tokens(page_request.account_id)
    return await page_request.render(
        "api_tokens.html",
        status=422 if problem else 200,
        tab="api-tokens",
        show=show,
        page=await _list(page_request, show),
        expiring=expiring.count,
        days=EXPIRES_SOON // 86400,
        roles=list(Role),
        form=form,
        problem=problem,
        secret=secret,
        now=page_request.node.trust.now(),
        iso=_iso,
        notice=page_request.notice,
    )


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
