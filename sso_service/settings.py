"""Every setting with its variable and default, read once into one object. No other module reads the environment."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import limits
import msgspec
from limits import RateLimitItem
from msgspec import Meta

from sso_service.errors import SettingsError

LogFormat = Literal["text", "json"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename=lambda field: f"SSO_{field.upper()}"):
    """The settings. The field `token_ttl` is the variable `SSO_TOKEN_TTL`, and so on."""

    home: str = "."
    """Directory against which relative paths resolve. `scripts/serve` sets it to the repository."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """TCP port to listen on; `0` lets the system choose one."""
    database_url: str = "sqlite:///var/sso.db"
    """Database: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME?sslmode=verify-full`."""
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
    """Requests that an API token may make in each worker, such as `100/minute`; unlimited if empty. Checks of
    malformed, forged or expired login tokens do not count."""
    page_rate_limit: str = "300/minute"
    """Requests for pages of the Studio that a session may make in each worker, and a third of those that an account may
    make. A person who clicks does not reach the default."""
    max_in_flight: Annotated[int, Meta(ge=1)] = 4096
    """Requests that a worker may have in progress, counted once their body has arrived. Further requests get 503
    `overloaded`."""
    max_connections: Annotated[int, Meta(ge=1)] = 4096
    """Connections that a worker may have open, at most four fifths of its file descriptors. Further ones are closed at
    once."""
    drain: Annotated[int, Meta(ge=0, le=300)] = 0
    """Seconds for which a node keeps serving after SIGTERM, while `/readyz` reports not ready."""
    require_sync_standby: bool = False
    """Consume login tokens only while PostgreSQL has a synchronous standby; otherwise answer 503."""
    metrics_token: str = ""
    """Bearer token required for `/metrics` and for the details of `/readyz`. If empty, only clients on the same machine
    get both: by loopback or a unix socket, and without a proxy in between."""
    log_format: LogFormat = "text"
    """Format of the log: lines of text, or one JSON object per line."""
    access_log: bool = False
    """Write a log line for each request, without login tokens."""
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
        """Return the origins in a field. Raises `SettingsError`."""
        try:
            return _origins(getattr(self, field))
        except ValueError:
            raise SettingsError(
                f"SSO_{field.upper()} must hold origins such as https://intranet.example, without a path"
            ) from None

    @property
    def rate(self) -> RateLimitItem | None:
        """The rate limit, or None. Raises `SettingsError`."""
        return _rate("SSO_RATE_LIMIT", self.rate_limit) if self.rate_limit else None

    @property
    def page_rate(self) -> RateLimitItem:
        """The rate limit of pages. Raises `SettingsError`."""
        return _rate("SSO_PAGE_RATE_LIMIT", self.page_rate_limit)


def _rate(variable: str, value: str) -> RateLimitItem:
    try:
        return limits.parse(value)
    except ValueError:
        raise SettingsError(f"{variable} must be such as 100/minute or 5000/hour") from None


# An origin as browsers write it (RFC 6454 section 6.2). Without TLS only on the local machine: otherwise an attacker in
# the network could serve a page under that origin.
_ORIGIN = re.compile(r"(https://[a-z0-9.-]+|http://(?:localhost|127\.0\.0\.1))(?::([1-9][0-9]{0,4}))?")


def _is_origin(text: str) -> bool:
    if not (found := _ORIGIN.fullmatch(text)):
        return False
    port = int(found[2] or 0)
    # Browsers omit the default port, so an origin that contains it would never match.
    return port <= 65535 and port != (443 if text.startswith("https:") else 80)


@lru_cache(maxsize=16)
def _origins(value: str) -> tuple[str, ...]:
    origins = tuple(value.replace(",", " ").split())
    if not all(map(_is_origin, origins)):
        raise ValueError
    return origins


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`. An empty variable counts as not set. Raises `SettingsError`."""
    given = {name: value for name, value in environ.items() if name.startswith("SSO_") and value != ""}
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        raise SettingsError(f"{path.rstrip('`')}: {problem.lower()}") from None
    # Report errors now and not at first use.
    settings.origins_of("embed_origins")
    settings.origins_of("cors_origins")
    _ = settings.rate, settings.page_rate
    return settings


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """Return the `SSO_*` variables in `environ` that are not settings, probably misspelled."""
    known = {field.encode_name for field in msgspec.structs.fields(Settings)}
    return sorted(name for name in environ if name.startswith("SSO_") and name not in known)
