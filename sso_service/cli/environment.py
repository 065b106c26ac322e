"""The environment of a command: settings, operator, keys, database, and the use cases on it."""

import asyncio
import getpass
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import click
import msgspec

from sso_service import keyring
from sso_service.cli.output import echo, time_text
from sso_service.database import database_url, migrations, open_database
from sso_service.database.transactions import Database
from sso_service.database.work import Changes, Reads
from sso_service.keyring import KeyRing
from sso_service.services import installation
from sso_service.services.accounts import Accounts, Actor
from sso_service.settings import Settings, read_settings

_DEADLINE = 60.0
"""Seconds that a command waits for the database. Its statements have shorter time-outs, which give better messages."""

T = TypeVar("T")

ID = click.IntRange(1, 2**32 - 1)
"""The id of an account, a team or an API token: login tokens have 32 bits for it."""


def current_settings() -> Settings:
    """Return the settings in the environment variables. Raises `SettingsError`.

    The URL of the database is checked too, so that a command which does not use the database reports a wrong one.
    """
    settings = read_settings(os.environ)
    database_url(settings)
    return settings


def current_operator() -> Actor:
    """Return the operator who runs the command, for the audit log."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # in a container, the user often has no name
        name = str(os.getuid())
    return Actor(operator=name)


def current_time() -> int:
    """Return the time in Unix seconds."""
    return int(time.time())


def read_keys(settings: Settings) -> KeyRing:
    """Return the keys, and warn about broken files. Raises `KeyDirectoryUnreadable`."""
    entries, broken = keyring.load(settings.keys_path)
    for key_id, problem in broken.items():
        echo(f"Warning: {f'{key_id}.json'!r} {problem}; skipped.", err=True)
    return KeyRing(entries.values())


@contextmanager
def database_with_any_schema(settings: Settings) -> Iterator[Database]:
    """Yield the existing database, and close it at the end. Raises `SchemaMismatch`."""
    # Commands consume no tokens, and `serve` starts without a standby: its nodes answer 503 until there is one.
    with closing(open_database(msgspec.structs.replace(settings, require_sync_standby=False))) as database:
        installation.check_database_exists(database)
        yield database


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """Yield the database if it has the schema of this version. Raises `SchemaMismatch` or `Unavailable`."""
    with database_with_any_schema(settings) as database:
        migrations.check(database)
        yield database


def upgrade_schema(settings: Settings, database: Database) -> str | None:
    """Upgrade or create the schema. Return the revision before, None for a new database."""
    upgrade = installation.upgrade(settings, database, current_operator())
    for key in upgrade.created_keys:
        echo(
            f"The database is new, so all keys were revoked. Key {key.id} signs from {time_text(key.signs_from)}.",
            err=True,
        )
    return upgrade.before


def run(use: Callable[[Reads, Changes], Coroutine[Any, Any, T]], settings: Settings | None = None) -> T:
    """Call `use` with access to the database, and return its result. Raises what `opened_database` raises."""
    with opened_database(settings or current_settings()) as database, ThreadPoolExecutor(1) as executor:
        reads = Reads(database, executor, deadline=_DEADLINE)
        changes = Changes(database, executor, deadline=_DEADLINE)
        return asyncio.run(use(reads, changes))


def run_accounts(use: Callable[[Accounts], Coroutine[Any, Any, T]], settings: Settings | None = None) -> T:
    """Call `use` with the use cases of administration, and return its result. Raises what `run` raises."""
    return run(lambda reads, changes: use(Accounts(reads, changes)), settings)
