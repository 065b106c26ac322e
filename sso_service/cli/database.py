"""The commands `db` and `purge`."""

import time
from contextlib import closing

import click
import msgspec

from sso_service.cli.environment import current_settings, database_with_any_schema, opened_database, upgrade_schema
from sso_service.database import copying, migrations, open_database
from sso_service.database.purging import FLOOR_AGE, Purger
from sso_service.database.schema import SCHEMA_VERSION
from sso_service.services import installation


@click.group()
def db() -> None:
    """The database and its schema."""


@db.command("upgrade")
def db_upgrade() -> None:
    """Upgrade the schema to this version."""
    settings = current_settings()
    with database_with_any_schema(settings) as database:
        before = upgrade_schema(settings, database)
    click.echo(f"Schema {before or 'none'} -> {SCHEMA_VERSION}.")


@db.command("current")
def db_current() -> None:
    """Print the schema of the database."""
    with database_with_any_schema(current_settings()) as database:
        click.echo(migrations.current(database) or "none")


@db.command("copy")
@click.option("--to", "url", metavar="URL", required=True, help="The URL of the new database, which must be empty.")
def db_copy(url: str) -> None:
    """Copy everything into another database, of either kind. Stop the service first."""
    settings = current_settings()
    with database_with_any_schema(settings) as source:
        target = open_database(msgspec.structs.replace(settings, database_url=url))
        with closing(target):
            installation.make_directory_of(target)
            for name, rows in copying.copy(source, target).items():
                click.echo(f"{name}: {rows}")
    click.echo(
        "Now set SSO_DATABASE_URL to the new database. If the service kept running on the old one, the copy may lack\n"
        "login tokens that were used since. In this case revoke all keys: sso-service keys revoke --all"
    )


@click.command()
def purge() -> None:
    """Delete consumed login tokens that expired long ago. Takes a minute.

    The service does this by itself.
    """
    with opened_database(current_settings()) as database:
        purger = Purger(database)
        done = purger.run()
        if not done.skipped:
            click.echo(f"Waiting {FLOOR_AGE:.0f} s until every earlier statement has ended.", err=True)
            time.sleep(FLOOR_AGE)
            done = purger.run()
    if done.skipped:
        raise click.ClickException(f"nothing was purged: {done.skipped}")
    click.echo(
        f"{done.deleted} deleted." + (" Another purge is running and deletes the rest." if done.elsewhere else "")
    )
