"""The commands `account` and `team`."""

import asyncio
from typing import Any

import click
import msgspec

from sso_service.cli.environment import ID, current_operator, run_accounts
from sso_service.cli.output import Column, json_option, print_list
from sso_service.services.accounts import Accounts


@click.group()
def account() -> None:
    """Accounts: the tenants of the Studio."""


@account.command("add")
@click.argument("name")
@click.option("--id", "account_id", type=ID, metavar="N", help="Its id. Default: the next free one.")
@click.option(
    "--portal-url", metavar="URL", help="The https URL of the page that creates login links. Error pages link to it."
)
def account_add(name: str, account_id: int | None, portal_url: str | None) -> None:
    """Add an account and print its id."""
    added = run_accounts(
        lambda accounts: accounts.add_account(current_operator(), name, account_id=account_id, portal_url=portal_url)
    )
    click.echo(added)


@account.command("list")
@json_option
def account_list(as_json: bool) -> None:
    """List accounts with their teams."""
    columns = (
        Column("ID", "id"),
        Column("NAME", "name"),
        Column("PORTAL", "portal_url"),
        Column("TEAMS", "teams", lambda teams: ", ".join(f"{team['id']} {team['name']}" for team in teams) or "-"),
    )
    print_list(columns, run_accounts(_accounts_with_teams), as_json=as_json)


async def _accounts_with_teams(accounts: Accounts) -> list[dict[str, Any]]:
    # Submitted together, so both reads share a transaction.
    all_accounts, all_teams = await asyncio.gather(accounts.list_accounts(), accounts.list_teams())
    teams: dict[int, list[dict[str, Any]]] = {each.id: [] for each in all_accounts}
    for each in all_teams:
        if each.account_id in teams:  # not an account that was added after the first statement (READ COMMITTED)
            teams[each.account_id].append({"id": each.id, "name": each.name})
    return [msgspec.to_builtins(each) | {"teams": teams[each.id]} for each in all_accounts]


@click.group()
def team() -> None:
    """Teams of an account."""


@team.command("add")
@click.argument("account", type=ID)
@click.argument("name")
@click.option("--id", "team_id", type=ID, metavar="N", help="Its id. Default: the next free one.")
def team_add(account: int, name: str, team_id: int | None) -> None:
    """Add a team to an account and print its id."""
    click.echo(run_accounts(lambda accounts: accounts.add_team(current_operator(), account, name, team_id=team_id)))
