"""The commands `init` and `serve`."""

import os
from contextlib import closing
from pathlib import Path

import click

from sso_service.cli.environment import (
    current_operator,
    current_settings,
    current_time,
    opened_database,
    read_keys,
    run_accounts,
    upgrade_schema,
)
from sso_service.cli.output import echo
from sso_service.database import open_database
from sso_service.server.listening import listen
from sso_service.services import installation
from sso_service.services.installation import DEMO_ACCOUNT, DEMO_TEAM
from sso_service.services.keys import Keys
from sso_service.settings import Settings, unknown_settings


@click.command()
@click.option("--demo", is_flag=True, help="Also create a demo account, and print a new API token and a login link.")
def init(demo: bool) -> None:
    """Create the database and the first signing key, if they are missing."""
    settings = current_settings()
    with closing(open_database(settings)) as database:
        installation.make_directory_of(database)
        installation.make_directory(settings.keys_path)
        upgrade_schema(settings, database)
        if key := Keys(settings).create_first(current_operator()):
            click.echo(f"Created the signing key {key.id} in {settings.keys_path}.")
        click.echo(f"The database {database} is ready.")
    if demo:
        _create_demo(settings)


@click.command()
@click.option(
    "--workers", type=click.IntRange(1, 64), metavar="N", default=1, show_default=True, help="Number of processes."
)
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this unix socket instead of a port.")
@click.option(
    "--fd", type=click.IntRange(0), metavar="N", help="Listen on this open file descriptor instead of a port."
)
def serve(workers: int, uds: Path | None, fd: int | None) -> None:
    """Run the service.

    It listens on SSO_HOST and SSO_PORT, or on the sockets that systemd passes.
    """
    if uds is not None and fd is not None:
        raise click.ClickException("give either --uds PATH or --fd N")
    settings = current_settings()
    for name in unknown_settings(os.environ):
        echo(f"Warning: {name} is not a setting of this service.", err=True)
    with closing(open_database(settings)) as database:
        if installation.is_embedded(database):
            upgrade_schema(settings, database)
    with opened_database(settings) as database:
        installation.check_database_is_healthy(database)
    read_keys(settings).signing_key(current_time())
    listeners = listen(settings, uds=uds, fd=fd, environ=os.environ)
    # Only this command needs uvicorn, and importing it takes a while.
    from sso_service.server import supervisor  # noqa: PLC0415

    supervisor.run(settings, listeners, workers=workers)


def _create_demo(settings: Settings) -> None:
    key = read_keys(settings).signing_key(current_time())
    demo = run_accounts(
        lambda accounts: installation.create_demo(settings, accounts, current_operator(), key), settings
    )
    base = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
    studio = f"{base}/client/{DEMO_ACCOUNT}/t/{DEMO_TEAM}"
    click.echo(
        f"""
Demo account {DEMO_ACCOUNT}, team {DEMO_TEAM}. Its API token, shown only now: {demo.api_token}

Get a login token:

  curl -s {base}/v1/sso_tokens -H 'Authorization: Bearer {demo.api_token}' \\
    -H 'Content-Type: application/json' \\
    -d '{{"email": "jane.doe@example.com", "first_name": "Jane", "last_name": "Doe"}}'

Sign in with it, in a browser or with curl -i:

  {studio}/posts?sso=TOKEN

Or sign in as the demo admin, once, within {settings.token_ttl} s:

  {studio}/settings?sso={demo.login_token}
"""
    )
