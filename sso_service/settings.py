"""Every setting, its variable and its default. Read once into one object; nothing else reads the environment."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import limits
import msgspec
from limits import RateLimitItem
from msgspec import Meta
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from sso_service.logs import LogFormat


class SettingsError(Exception):
    """A variable has a value that it cannot have; the message names the variable and never repeats the value."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename=lambda field: f"SSO_{field.upper()}"):
    """The settings. The field `token_ttl` is the variable `SSO_TOKEN_TTL`, and so on."""

    home: str = "."
    """Directory against which relative paths resolve. `scripts/serve` sets it to the repository."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """TCP port to listen on; `0` lets the system choose one."""
    database_url: str = "sqlite:///var/sso.db"
    """Database: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`."""
    keys_dir: str = "keys"
    """Directory of the signing keys. All nodes of an installation share it."""
    token_ttl: Annotated[int, Meta(ge=1, le=3600)] = 300
    """Lifetime of a login token, in seconds. All nodes need the same value."""
    session_ttl: Annotated[int, Meta(ge=60, le=30 * 86400)] = 43200
    """Lifetime of a session, in seconds. All nodes need the same value."""
    confirm_login: bool = False
    """Ask for a click before a login link signs the user in."""
    studio_pages: bool = True
    """Serve the built-in pages of a Studio. Turn it off when a real Studio is behind the service."""
    embed_origins: str = ""
    """Origins whose pages may show the Studio in a frame, such as `https://intranet.example`, separated by spaces or
    commas."""
    cors_origins: str = ""
    """Origins whose scripts may call the API from a browser, separated by spaces or commas."""
    rate_limit: str = ""
    """Requests that an API token may make in each worker, such as `100/minute`; unlimited if empty."""
    max_in_flight: Annotated[int, Meta(ge=1)] = 4096
    """Complete requests that a worker may have in progress. Further requests get 503 `overloaded`."""
    drain: Annotated[int, Meta(ge=0, le=300)] = 0
    """Seconds for which a node that received SIGTERM reports not ready by `/readyz` but keeps serving."""
    require_sync_standby: bool = False
    """Consume login tokens only while PostgreSQL has a synchronous standby; otherwise answer 503."""
    metrics_token: str = ""
    """Bearer token required for `/metrics` and for the details of `/readyz`. If empty, every client gets both."""
    log_format: LogFormat = "text"
    """Format of the log: lines of text, or one JSON object a line."""
    access_log: bool = False
    """Write a log line for each request, without its `sso` parameter."""
    tracing: bool = False
    """Send OpenTelemetry traces; needs the extra `tracing`."""
    trusted_proxies: str = "127.0.0.1"
    """Addresses or networks of proxies, separated by commas. `X-Forwarded-For` and `X-Forwarded-Proto` count only from
    these, and from clients of a unix socket."""

    @property
    def keys_path(self) -> Path:
        """The key directory."""
        return Path(self.home, self.keys_dir)

    def origins_of(self, field: Literal["embed_origins", "cors_origins"]) -> tuple[str, ...]:
        """The origins in a field. Raises `SettingsError`."""
        try:
            return _origins(getattr(self, field))
        except ValueError:
            raise SettingsError(
                f"SSO_{field.upper()} must hold origins such as https://intranet.example, without a path"
            ) from None

    @property
    def rate(self) -> RateLimitItem | None:
        """The rate limit, if there is one. Raises `SettingsError`."""
        try:
            return limits.parse(self.rate_limit) if self.rate_limit else None
        except ValueError:
            raise SettingsError("SSO_RATE_LIMIT must be such as 100/minute or 5000/hour") from None

    @property
    def database(self) -> URL:
        """The database's URL, with the driver that we use and an absolute path."""
        try:
            url = make_url(self.database_url)
        except (ArgumentError, ValueError):  # ValueError: a port that is no number
            raise SettingsError("SSO_DATABASE_URL is not a URL such as sqlite:///var/sso.db") from None
        match url.get_backend_name():
            case "sqlite":
                if url.database in {None, "", ":memory:"}:
                    raise SettingsError("SSO_DATABASE_URL: an SQLite database must be a file, or it is lost at exit")
                return url.set(drivername="sqlite", database=str(Path(self.home, str(url.database)).absolute()))
            case "postgresql" | "postgres":
                return url.set(drivername="postgresql+psycopg")
        raise SettingsError("SSO_DATABASE_URL must begin with sqlite: or postgresql:")


# An origin as browsers write it (RFC 6454 section 6.2). Without TLS only on one's own machine: whoever sits between
# could otherwise put a page of theirs into it.
_ORIGIN = re.compile(r"(https://[a-z0-9.-]+|http://(?:localhost|127\.0\.0\.1))(?::([1-9][0-9]{0,4}))?")


def _is_origin(text: str) -> bool:
    if not (found := _ORIGIN.fullmatch(text)):
        return False
    port = int(found[2] or 0)
    # Browsers leave the usual port out, so an origin that has it is nobody's.
    return port <= 65535 and port != (443 if text.startswith("https:") else 80)


@lru_cache(maxsize=16)
def _origins(value: str) -> tuple[str, ...]:
    origins = tuple(value.replace(",", " ").split())
    if not all(map(_is_origin, origins)):
        raise ValueError
    return origins


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`; a variable that is empty counts as not set. Raises `SettingsError`."""
    given = {name: value for name, value in environ.items() if name.startswith("SSO_") and value != ""}
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise SettingsError(f"{path.rstrip('`')}: {problem.lower()}") from None
    # What is wrong is to be found now, not at first use.
    settings.database.get_backend_name()
    settings.origins_of("embed_origins")
    settings.origins_of("cors_origins")
    _ = settings.rate
    return settings


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """The `SSO_*` variables in `environ` that are no settings: misspelt, most likely."""
    known = {field.encode_name for field in msgspec.structs.fields(Settings)}
    return sorted(name for name in environ if name.startswith("SSO_") and name not in known)
