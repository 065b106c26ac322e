"""The command `user`."""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import click

from sso_service.cli.environment import ID, current_operator, run_accounts
from sso_service.cli.output import Column, echo, print_list, time_text
from sso_service.database.accounts import ApiTokenRecord
from sso_service.database.members import Member, Membership, UserRecord
from sso_service.people import normalise_email
from sso_service.permissions import Role
from sso_service.services.accounts import Accounts

T = TypeVar("T")

Change = Callable[[Accounts, int], Coroutine[Any, Any, T]]
"""A use case for the user with an id."""

revoke_option = click.option("--revoke-api-tokens", "revoke", is_flag=True, help="Also revoke the listed API tokens.")
account_option = click.option("--account", "account_id", type=ID, metavar="N", required=True, help="The account's id.")


@click.group()
def user() -> None:
    """Users and their roles in accounts."""


@user.command("show")
@click.argument("email")
def user_show(email: str) -> None:
    """Show a user and the user's accounts."""

    async def find(accounts: Accounts) -> tuple[UserRecord, list[Membership]]:
        found = await accounts.find_user(normalise_email(email))
        return found, await accounts.list_memberships(found.id)

    found, memberships = run_accounts(find)
    echo(f"{found.email}  {found.first_name} {found.last_name}")
    echo(f"id {found.id}, created {time_text(found.created_at)}")
    if found.disabled_at is not None:
        echo(f"disabled since {time_text(found.disabled_at)}")
    if found.sessions_from > found.created_at:
        echo(f"sessions and login links from before {time_text(found.sessions_from)} have ended")
    columns = (Column("ACCOUNT", "account_id"), Column("NAME", "account_name"), Column("ROLE", "role"))
    print_list(columns, memberships, as_json=False)


@user.command("set-role")
@click.argument("email")
@account_option
@click.argument("role", type=click.Choice([role.value for role in Role]))
@revoke_option
def user_set_role(email: str, account_id: int, role: str, revoke: bool) -> None:
    """Change a member's role, from the next request on.

    Without the role admin, active API tokens that the member created in the account are listed.
    """
    if revoke and role == Role.ADMIN:
        raise click.ClickException("--revoke-api-tokens is for members who are not admins any more")
    created = _change(
        email,
        lambda use, user_id: use.set_role(
            current_operator(), account_id, user_id, Role(role), revoke_api_tokens=revoke
        ),
        account_id,
    )
    echo(f"{email} is {role} in account {account_id}.")
    _print_created(created, revoked=revoke)


@user.command("remove")
@click.argument("email")
@account_option
@revoke_option
def user_remove(email: str, account_id: int, revoke: bool) -> None:
    """Remove a member from an account, and list the active API tokens that the member created in it."""
    created = _change(
        email,
        lambda use, user_id: use.remove_member(current_operator(), account_id, user_id, revoke_api_tokens=revoke),
        account_id,
    )
    echo(f"{email} is no longer in account {account_id}. A new login link of the account adds them again.")
    _print_created(created, revoked=revoke)


@user.command("disable")
@click.argument("email")
@revoke_option
def user_disable(email: str, revoke: bool) -> None:
    """Disable a user: all current and future login tokens and sessions are refused.

    Active API tokens that the user created, in any account, are listed.
    """
    created = _change(
        email, lambda use, user_id: use.disable_user(current_operator(), user_id, revoke_api_tokens=revoke)
    )
    echo(f"{email} is disabled.")
    _print_created(created, revoked=revoke)


@user.command("enable")
@click.argument("email")
def user_enable(email: str) -> None:
    """Undo disable."""
    _change(email, lambda use, user_id: use.enable_user(current_operator(), user_id))
    echo(f"{email} is enabled.")


@user.command("sign-out")
@click.argument("email")
def user_sign_out(email: str) -> None:
    """End all sessions and unused login links of a user, in all accounts."""
    _change(email, lambda use, user_id: use.sign_out_user(current_operator(), user_id))
    echo(f"{email} is signed out everywhere.")


def _print_created(created: Sequence[ApiTokenRecord], *, revoked: bool) -> None:
    """Print the active API tokens that the user created, and how to revoke them if that was not done."""
    if created and revoked:
        echo("Revoked the API tokens that this user created:")
    elif created:
        echo("This user created API tokens that are still active, and may have their secrets. To revoke them:")
    for each in created:
        command = "" if revoked else "sso-service api-token revoke "
        echo(f"  {command}{each.id}      {each.name}, account {each.account_id}")


def _change(email: str, change: Change[T], account_id: int | None = None) -> T:
    """Make a change to the user with this address, who must be a member of the account if one is given."""

    async def find_and_change(accounts: Accounts) -> T:
        address = normalise_email(email)
        if account_id is None:
            found: UserRecord | Member = await accounts.find_user(address)
        else:
            found = await accounts.find_member_by_email(account_id, address)
        return await change(accounts, found.id)

    return run_accounts(find_and_change)
