"""Installing the service: directories, the database's schema, and the demo data."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits

from sso_service import keyring
from sso_service.database import migrations
from sso_service.database.health import check_health
from sso_service.database.transactions import Database
from sso_service.errors import OperatorError, SchemaMismatch
from sso_service.keyring import SigningKey
from sso_service.people import Person
from sso_service.permissions import Role, Scope
from sso_service.services.accounts import Accounts, Actor
from sso_service.services.keys import Keys
from sso_service.settings import Settings
from sso_service.tokens import Claims, sign

DEMO_ACCOUNT = 123
DEMO_TEAM = 42
DEMO_ADMIN = Person("admin@example.com", "Demo", "Admin")
_DEMO_API_TOKEN = "demo"  # nosec B105 # noqa: S105 - its name, not its secret


@dataclass(frozen=True, slots=True)
class Upgrade:
    """The result of an upgrade.

    `before` is the revision before it, None for a new database. `created_keys` replace the keys that were revoked
    because the database was new.
    """

    before: str | None
    created_keys: Sequence[SigningKey] = ()


@dataclass(frozen=True, slots=True)
class Demo:
    """The secrets of the demo account: its API token, and a login token for its admin."""

    api_token: str
    login_token: str


def check_database_exists(database: Database) -> None:
    """Raise `SchemaMismatch` if an SQLite file is missing: connecting to it would create an empty one."""
    if database.is_sqlite and not _file(database).is_file():
        raise SchemaMismatch(f"there is no database {database}; run: sso-service init")


def is_embedded(database: Database) -> bool:
    """Return whether the database is an SQLite file in an existing directory. `serve` creates and upgrades it."""
    return database.is_sqlite and _file(database).parent.is_dir()


def check_database_is_healthy(database: Database) -> None:
    """Raise `OperatorError` if the database cannot keep the promise of single use now, or `Unavailable`."""
    with database.connect() as connection, database.reading(connection):
        problem = check_health(database, connection).problem
    if problem:
        raise OperatorError(f"the database {database}: {problem}")


def make_directory_of(database: Database) -> None:
    """Create the directory of an SQLite file, if it is missing. Raises `OperatorError`."""
    if database.is_sqlite:
        make_directory(_file(database).parent)


def make_directory(path: Path) -> None:
    """Create a private directory, if it is missing. Raises `OperatorError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"cannot create the directory {path}: {error.strerror}") from error


def upgrade(settings: Settings, database: Database, actor: Actor) -> Upgrade:
    """Upgrade the schema to this version, or create it.

    Raises `SchemaMismatch`, `KeyDirectoryUnreadable`, `Unavailable` or `OutcomeUnknown`.
    """
    created: list[SigningKey] = []

    def revoke_keys() -> None:
        # The ledger of a new database is empty, so it would accept tokens that an earlier database has recorded as
        # used. Therefore every existing key is revoked before the schema is committed. If that fails, there is no
        # schema, and the next attempt starts again.
        entries, broken = keyring.load(settings.keys_path) if settings.keys_path.is_dir() else ({}, {})
        if entries or broken:
            created.extend(Keys(settings).revoke_all(actor))

    return Upgrade(migrations.upgrade(database, before_creation=revoke_keys), created)


async def create_demo(settings: Settings, accounts: Accounts, actor: Actor, key: SigningKey) -> Demo:
    """Create the demo account, its team and its admin where they are missing, and replace its API token.

    `key` signs the login token. Raises what the use cases of `Accounts` raise.
    """
    if all(account.id != DEMO_ACCOUNT for account in await accounts.list_accounts()):
        await accounts.add_account(actor, "Demo", account_id=DEMO_ACCOUNT)
    if all(team.id != DEMO_TEAM for team in await accounts.list_teams(DEMO_ACCOUNT)):
        await accounts.add_team(actor, DEMO_ACCOUNT, "Demo team", team_id=DEMO_TEAM)
    user_id = await accounts.add_member(actor, DEMO_ACCOUNT, DEMO_ADMIN, Role.ADMIN)
    for old in await accounts.list_api_tokens():
        if (old.account_id, old.name, old.revoked_at) == (DEMO_ACCOUNT, _DEMO_API_TOKEN, None):
            await accounts.revoke_api_token(actor, old.id)
    api_token = await accounts.create_api_token(
        actor, account_id=DEMO_ACCOUNT, name=_DEMO_API_TOKEN, scopes=frozenset(Scope)
    )
    claims = Claims(int(time.time()) + settings.token_ttl, user_id, DEMO_ACCOUNT, randbits(32))
    return Demo(api_token, sign(claims, key.token_key))


def _file(database: Database) -> Path:
    return Path(str(database.url.database))
