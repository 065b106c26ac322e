"""The command `user`."""

from collections.abc import Callable, Coroutine
from typing import Any

import click

from sso_service.cli.environment import ID, current_operator, run_accounts
from sso_service.cli.output import Column, print_list, time_text
from sso_service.database.members import Membership, UserRecord
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
    if found.sessions_from:
        click.echo(f"sessions that began before {time_text(found.sessions_from)} have ended")
    columns = (Column("ACCOUNT", "account_id"), Column("NAME", "account_name"), Column("ROLE", "role"))
    print_list(columns, memberships, as_json=False)


@user.command("set-role")
@click.argument("email")
@account_option
@click.argument("role", type=click.Choice([role.value for role in Role]))
def user_set_role(email: str, account_id: int, role: str) -> None:
    """Change a member's role, from the next request on."""
    _change_member(
        email,
        account_id,
        lambda accounts, user_id: accounts.set_role(current_operator(), account_id, user_id, Role(role)),
    )
    click.echo(f"{email} is {role} in account {account_id}.")


@user.command("remove")
@click.argument("email")
@account_option
def user_remove(email: str, account_id: int) -> None:
    """Remove a member from an account."""
    _change_member(
        email,
        account_id,
        lambda accounts, user_id: accounts.remove_member(current_operator(), account_id, user_id),
    )
    click.echo(f"{email} is no longer in account {account_id}. A new login link of the account adds them again.")


@user.command("disable")
@click.argument("email")
def user_disable(email: str) -> None:
    """Disable a user: all current and future login tokens and sessions are refused."""
    _change_user(email, lambda accounts, user_id: accounts.disable_user(current_operator(), user_id))
    click.echo(f"{email} is disabled.")


@user.command("enable")
@click.argument("email")
def user_enable(email: str) -> None:
    """Undo disable."""
    _change_user(email, lambda accounts, user_id: accounts.enable_user(current_operator(), user_id))
    click.echo(f"{email} is enabled.")


@user.command("sign-out")
@click.argument("email")
def user_sign_out(email: str) -> None:
    """End all sessions of a user, in all accounts."""
    _change_user(email, lambda accounts, user_id: accounts.sign_out_user(current_operator(), user_id))
    click.echo(f"{email} is signed out everywhere.")


def _change_user(email: str, change: Change) -> None:
    async def use(accounts: Accounts) -> None:
        found = await accounts.find_user(normalise_email(email))
        await change(accounts, found.id)

    run_accounts(use)


def _change_member(email: str, account_id: int, change: Change) -> None:
    async def use(accounts: Accounts) -> None:
        member = await accounts.find_member_by_email(account_id, normalise_email(email))
        await change(accounts, member.id)

    run_accounts(use)
