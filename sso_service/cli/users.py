"""The command `user`."""

from collections.abc import Callable, Coroutine
from typing import Any

import click

from sso_service.cli.environment import ID, current_operator, run_accounts
from sso_service.cli.output import Column, print_list, time_text
from sso_service.database.members import Member, Membership, UserRecord
from sso_service.people import normalise_email
from sso_service.permissions import Role
from sso_service.services.accounts import Accounts

Change = Callable[[Accounts, int], Coroutine[Any, Any, None]]
"""A use case for the user with an id."""

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
    click.echo(f"{found.email}  {found.first_name} {found.last_name}")
    click.echo(f"id {found.id}, created {time_text(found.created_at)}")
    if found.disabled_at is not None:
        click.echo(f"disabled since {time_text(found.disabled_at)}")
    if found.sessions_from > found.created_at:
        click.echo(f"sessions and login links from before {time_text(found.sessions_from)} have ended")
    columns = (Column("ACCOUNT", "account_id"), Column("NAME", "account_name"), Column("ROLE", "role"))
    print_list(columns, memberships, as_json=False)


@user.command("set-role")
@click.argument("email")
@account_option
@click.argument("role", type=click.Choice([role.value for role in Role]))
def user_set_role(email: str, account_id: int, role: str) -> None:
    """Change a member's role, from the next request on."""
    _change(email, lambda use, user_id: use.set_role(current_operator(), account_id, user_id, Role(role)), account_id)
    click.echo(f"{email} is {role} in account {account_id}.")


@user.command("remove")
@click.argument("email")
@account_option
def user_remove(email: str, account_id: int) -> None:
    """Remove a member from an account."""
    _change(email, lambda use, user_id: use.remove_member(current_operator(), account_id, user_id), account_id)
    click.echo(f"{email} is no longer in account {account_id}. A new login link of the account adds them again.")


@user.command("disable")
@click.argument("email")
def user_disable(email: str) -> None:
    """Disable a user: all current and future login tokens and sessions are refused."""
    _change(email, lambda use, user_id: use.disable_user(current_operator(), user_id))
    click.echo(f"{email} is disabled.")


@user.command("enable")
@click.argument("email")
def user_enable(email: str) -> None:
    """Undo disable."""
    _change(email, lambda use, user_id: use.enable_user(current_operator(), user_id))
    click.echo(f"{email} is enabled.")


@user.command("sign-out")
@click.argument("email")
def user_sign_out(email: str) -> None:
    """End all sessions of a user, in all accounts."""
    _change(email, lambda use, user_id: use.sign_out_user(current_operator(), user_id))
    click.echo(f"{email} is signed out everywhere.")


def _change(email: str, change: Change, account_id: int | None = None) -> None:
    """Make a change to the user with this address, who must be a member of the account if one is given."""

    async def find_and_change(accounts: Accounts) -> None:
        address = normalise_email(email)
        if account_id is None:
            found: UserRecord | Member = await accounts.find_user(address)
        else:
            found = await accounts.find_member_by_email(account_id, address)
        await change(accounts, found.id)

    run_accounts(find_and_change)
