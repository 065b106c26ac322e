"""The page of an account's members: list, search, change roles, sign out, remove."""

import math
import re
from collections.abc import Sequence

from starlette.responses import Response

from sso_service.database.accounts import ApiTokenRecord
from sso_service.database.members import MemberPage
from sso_service.errors import LastAdmin
from sso_service.permissions import Role
from sso_service.web.studio.page_requests import PageRequest

_PAGE_SIZE = 50
"""Members on a page."""
_PAGE_NUMBER = re.compile(r"[0-9]{1,6}", re.ASCII)
_SEARCH_LENGTH = 100
_CREATED_SHOWN = 50
"""API tokens that a question lists at most."""

_PAGE = "settings/team"
_PROBLEMS = {"role": 422, "last_admin": 409}
"""Status of the page for each problem with a change."""


async def show(page_request: PageRequest) -> Response:
    """Show one page of the members, or of those whose name or address contains the search."""
    return await _page(page_request, page_request.query("search"), page_request.query("page", "1"))


async def set_role(page_request: PageRequest) -> Response:
    """Change a member's role, and return to the page of the form.

    If an admin who created API tokens would lose this role, a page shows them and asks first.
    """
    form = await page_request.form()
    search, page, role = form.value("search"), form.value("page"), form.value("role")
    if role not in set(Role):
        return await _page(page_request, search, page, problem="role")
    accounts, member_id = page_request.node.accounts, page_request.record_id
    if role != Role.ADMIN and not form.value("confirmed"):
        member = await accounts.find_member(page_request.account_id, member_id)
        created = await _created_api_tokens(page_request) if member.role is Role.ADMIN else []
        if created and await accounts.has_other_admin(page_request.account_id, member_id):  # else it is refused below
            return await page_request.render(
                "change_role.html",
                tab="team",
                member=member,
                new_role=role,
                search=search,
                page=page,
                created=created,
                shown=_CREATED_SHOWN,
            )
    try:
        await accounts.set_role(
            page_request.actor,
            page_request.account_id,
            member_id,
            Role(role),
            revoke_api_tokens=bool(form.value("revoke_api_tokens")),
        )
    except LastAdmin:
        return await _page(page_request, search, page, problem="last_admin")
    return page_request.redirect(_PAGE, search=search, page=page, notice="role")


async def confirm_remove(page_request: PageRequest) -> Response:
    """Ask whether to remove a member."""
    member = await page_request.node.accounts.find_member(page_request.account_id, page_request.record_id)
    created = await _created_api_tokens(page_request)
    return await page_request.render(
        "remove_member.html", tab="team", member=member, created=created, shown=_CREATED_SHOWN
    )


async def remove(page_request: PageRequest) -> Response:
    """Remove a member from the account, and revoke the API tokens that the member created if that is asked for."""
    form = await page_request.form()
    try:
        await page_request.node.accounts.remove_member(
            page_request.actor,
            page_request.account_id,
            page_request.record_id,
            revoke_api_tokens=bool(form.value("revoke_api_tokens")),
        )
    except LastAdmin:
        return await _page(page_request, "", "1", problem="last_admin")
    return page_request.redirect(_PAGE, notice="removed")


async def _created_api_tokens(page_request: PageRequest) -> Sequence[ApiTokenRecord]:
    """Return the account's active API tokens that the member created: one more than are shown, if there are."""
    return await page_request.node.accounts.list_api_tokens_of(
        page_request.account_id, created_by=page_request.record_id, limit=_CREATED_SHOWN + 1
    )


async def sign_out(page_request: PageRequest) -> Response:
    """End a member's sessions in this account, and return to the page of the form."""
    form = await page_request.form()
    await page_request.node.accounts.sign_out_member(
        page_request.actor, page_request.account_id, page_request.record_id
    )
    return page_request.redirect(_PAGE, search=form.value("search"), page=form.value("page"), notice="signed_out")


async def _page(page_request: PageRequest, search: str, page: str, *, problem: str | None = None) -> Response:
    search = search.strip()[:_SEARCH_LENGTH]
    number = max(1, int(page)) if _PAGE_NUMBER.fullmatch(page) else 1

    async def members_from(number: int) -> MemberPage:
        return await page_request.node.accounts.list_members(
            page_request.account_id, search=search, offset=(number - 1) * _PAGE_SIZE, limit=_PAGE_SIZE
        )

    found = await members_from(number)
    pages = max(1, math.ceil(found.total / _PAGE_SIZE))
    if number > pages:  # members were removed since the link was made
        number = pages
        found = await members_from(number)
    return await page_request.render(
        "team.html",
        status=_PROBLEMS[problem] if problem else 200,
        tab="team",
        members=found.members,
        total=found.total,
        more=found.more,
        pages=pages,
        page=number,
        search=search,
        roles=list(Role),
        problem=problem,
        notice=page_request.notice,
    )
