"""The command `api-token`."""

from collections.abc import Sequence
from dataclasses import asdict

import click

from sso_service.cli.environment import ID, current_operator, current_settings, current_time, run_accounts
from sso_service.cli.output import Column, duration_text, echo, json_option, print_list, time_text
from sso_service.permissions import Role, Scope


@click.group()
def api_token() -> None:
    """API tokens of integrations and frontends."""


@api_token.command("create")
@click.option("--account", "account_id", type=ID, metavar="N", help="The account that it belongs to.")
@click.option("--platform", is_flag=True, help="Make it valid for all accounts. Only with the scope verify:sso.")
@click.option("--name", metavar="NAME", required=True, help="A name for lists, such as the integration's.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="A permitted use. Repeat the option for several.",
)
@click.option(
    "--max-role",
    type=click.Choice([role.value for role in Role]),
    help="Refuse login tokens to users with a higher role. Recommended: editor. Default: no limit.",
)
@click.option(
    "--expires-in",
    "days",
    type=click.IntRange(1, 3650),
    metavar="DAYS",
    help="Days until it expires. Recommended: 90. Default: never.",
)
def api_token_create(
    account_id: int | None, platform: bool, name: str, scopes: Sequence[str], max_role: str | None, days: int | None
) -> None:
    """Create an API token and print its secret, which is shown only now.

    Recommended for an intranet: --scope write:sso --max-role editor --expires-in 90. Without a limit, a stolen API
    token can sign in admins, for as long as it is not revoked.
    """
    if platform == (account_id is not None):
        raise click.ClickException("give either --account N or --platform")
    if platform and Scope.WRITE_SSO in scopes:
        raise click.ClickException(f"a platform API token cannot have the scope {Scope.WRITE_SSO}")
    secret = run_accounts(
        lambda accounts: accounts.create_api_token(
            current_operator(),
            account_id=account_id,
            name=name,
            scopes=frozenset(map(Scope, scopes)),
            max_role=Role(max_role) if max_role else None,
            lifetime_days=days,
        )
    )
    click.echo(secret)


@api_token.command("list")
@json_option
def api_token_list(as_json: bool) -> None:
    """List API tokens. HINT is the end of the secret.

    The status is active, expiring (within 14 days), expired or revoked. CREATED BY is the admin who created it on the
    settings page.
    """
    columns = (
        Column("ID", "id"),
        Column("ACCOUNT", "account_id", lambda account_id: "platform" if account_id is None else str(account_id)),
        Column("NAME", "name"),
        Column("STATUS", "status"),
        Column("HINT", "hint", lambda hint: f"...{hint}"),
        Column("SCOPES", "scopes", " ".join),
        Column("MAX ROLE", "max_role"),
        Column("CREATED", "created_at", time_text),
        Column("CREATED BY", "created_by_email"),
        Column("LAST USED", "last_used_at", time_text),
        Column("EXPIRES", "expires_at", time_text),
        Column("REVOKED", "revoked_at", time_text),
    )
    now = current_time()
    listed = [
        {**asdict(each), "status": each.status(now)}
        for each in run_accounts(lambda accounts: accounts.list_api_tokens())
    ]
    print_list(columns, listed, as_json=as_json)


@api_token.command("revoke")
@click.argument("token_id", metavar="ID", type=ID)
def api_token_revoke(token_id: int) -> None:
    """Revoke an API token. Its next request is refused."""
    settings = current_settings()
    revoked = run_accounts(lambda accounts: accounts.revoke_api_token(current_operator(), token_id), settings)
    echo(f"API token {revoked.id} ({revoked.name}) is revoked.")
    if Scope.WRITE_SSO in revoked.scopes:
        echo(
            f"Login tokens that it created stay valid for up to {settings.token_ttl} s, and their sessions for up to "
            f"{duration_text(settings.session_ttl)}.\nIf it leaked, end them too:\n"
            "  sso-service keys revoke --all      all login links and sessions: everyone has to sign in again\n"
            "  sso-service user sign-out EMAIL    the login links and sessions of one user"
        )
