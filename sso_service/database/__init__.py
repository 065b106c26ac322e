"""The database. SQLAlchemy is imported here and in no other package."""

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from sso_service.database.postgresql import PostgresqlDatabase
from sso_service.database.sqlite import SqliteDatabase
from sso_service.database.transactions import Database
from sso_service.errors import SettingsError
from sso_service.settings import Settings


def open_database(settings: Settings) -> Database:
    """Return the database of the settings. It connects when it is first used. Raises `SettingsError`."""
    return database_at(database_url(settings), require_sync_standby=settings.require_sync_standby)


def database_at(url: URL, *, require_sync_standby: bool = False) -> Database:
    """Return the database at `url`, an SQLAlchemy URL with driver.

    With `require_sync_standby`, PostgreSQL consumes tokens only while there is a synchronous standby.
    """
    if url.get_backend_name() == "sqlite":
        return SqliteDatabase(url)
    return PostgresqlDatabase(url, require_sync_standby=require_sync_standby)


def database_url(settings: Settings) -> URL:
    """Return `SSO_DATABASE_URL` with the driver in use and an absolute path. Raises `SettingsError`."""
    try:
        url = make_url(settings.database_url)
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        raise SettingsError("SSO_DATABASE_URL is not a URL such as sqlite:///var/sso.db") from None
    match url.get_backend_name():
        case "sqlite":
            if url.database in {None, "", ":memory:"}:
                raise SettingsError("SSO_DATABASE_URL: an SQLite database must be a file, or it is lost at exit")
            return url.set(drivername="sqlite", database=str(Path(settings.home, str(url.database)).absolute()))
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
    raise SettingsError("SSO_DATABASE_URL must begin with sqlite: or postgresql:")
