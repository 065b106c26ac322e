"""Settings: defaults, parsing, and errors that name the variable without repeating its value."""

import re
import traceback
from pathlib import Path

import pytest

from sso_service.database import database_url
from sso_service.errors import SettingsError
from sso_service.settings import Settings, read_settings
from tests.support.repository import DEPLOY, README, ROOT

SECRET = "hunter2"


def test_the_defaults_are_the_documented_ones() -> None:
    settings = read_settings({})
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.database_url == "sqlite:///var/sso.db"
    assert settings.keys_dir == "keys"
    assert settings.token_ttl == 300
    assert settings.session_ttl == 43200
    assert settings.confirm_login is False


def test_a_variable_sets_the_field_of_its_name() -> None:
    settings = read_settings(
        {
            "SSO_HOME": "/srv/sso",
            "SSO_HOST": "::",
            "SSO_PORT": "8443",
            "SSO_DATABASE_URL": "sqlite:///data/sso.db",
            "SSO_KEYS_DIR": "signing",
            "SSO_TOKEN_TTL": "60",
            "SSO_SESSION_TTL": "3600",
            "SSO_CONFIRM_LOGIN": "1",
        }
    )
    assert (settings.home, settings.host, settings.port) == ("/srv/sso", "::", 8443)
    assert (settings.database_url, settings.keys_dir) == ("sqlite:///data/sso.db", "signing")
    assert (settings.token_ttl, settings.session_ttl, settings.confirm_login) == (60, 3600, True)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read_settings({"SSO_PORT": "", "SSO_DATABASE_URL": "", "SSO_CONFIRM_LOGIN": ""}) == read_settings({})


def test_other_variables_are_ignored() -> None:
    assert read_settings({"PORT": "x", "sso_port": "x", "PATH": "/bin", "XSSO_PORT": "x"}) == read_settings({})


def test_settings_are_immutable() -> None:
    settings = read_settings({})
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("true", True), ("false", False)])
def test_a_switch_is_on_or_off(value: str, expected: bool) -> None:
    assert read_settings({"SSO_CONFIRM_LOGIN": value}).confirm_login is expected


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSO_PORT", SECRET),
        ("SSO_PORT", "-1"),
        ("SSO_PORT", "65536"),
        ("SSO_PORT", "80.5"),
        ("SSO_PORT", "99999999999999999999999"),
        ("SSO_TOKEN_TTL", SECRET),
        ("SSO_TOKEN_TTL", "0"),
        ("SSO_TOKEN_TTL", "-300"),
        ("SSO_SESSION_TTL", SECRET),
        ("SSO_SESSION_TTL", "-43200"),
        ("SSO_CONFIRM_LOGIN", SECRET),
        ("SSO_CONFIRM_LOGIN", "22"),
        ("SSO_DATABASE_URL", SECRET),
        ("SSO_DATABASE_URL", "/var/lib/hunter2.db"),
        ("SSO_DATABASE_URL", "mysql://sso:hunter2@db.example/sso"),
        ("SSO_DATABASE_URL", "hunter2://db.example/sso"),
        ("SSO_DATABASE_URL", "postgresql://sso:x@db.example:hunter2/sso"),
        ("SSO_DATABASE_URL", "postgresql://sso@db.example:hunter2"),
        ("SSO_DATABASE_URL", "postgresql://sso:hunter2/sso"),
        ("SSO_DATABASE_URL", "sqlite://"),
        ("SSO_DATABASE_URL", "sqlite:///:memory:"),
    ],
)
def test_an_error_names_the_variable_and_never_repeats_the_value(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        database_url(read_settings({variable: value}))
    assert variable in str(caught.value)
    assert value not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# --- Paths and the database ------------------------------------------------------------------------------------------


def test_relative_paths_are_resolved_against_sso_home() -> None:
    settings = read_settings({"SSO_HOME": "/srv/sso"})
    assert settings.keys_path == Path("/srv/sso/keys")
    assert database_url(settings).database == "/srv/sso/var/sso.db"


def test_sso_home_defaults_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for settings in (read_settings({}), read_settings({"SSO_HOME": "."})):
        assert settings.keys_path.absolute() == tmp_path / "keys"
        assert database_url(settings).database == str(tmp_path / "var" / "sso.db")
    assert read_settings({"SSO_HOME": "home"}).keys_path.absolute() == tmp_path / "home" / "keys"
    assert database_url(read_settings({"SSO_HOME": "home"})).database == str(tmp_path / "home" / "var" / "sso.db")


def test_absolute_paths_are_unchanged() -> None:
    settings = read_settings(
        {"SSO_HOME": "/srv/sso", "SSO_KEYS_DIR": "/etc/sso/keys", "SSO_DATABASE_URL": "sqlite:////data/sso.db"}
    )
    assert settings.keys_path == Path("/etc/sso/keys")
    assert database_url(settings).database == "/data/sso.db"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_a_postgresql_url_selects_psycopg_and_is_otherwise_kept(scheme: str) -> None:
    given = f"{scheme}://sso:p%40ss@db.example:5433/sso?sslmode=verify-full"
    url = database_url(read_settings({"SSO_DATABASE_URL": given}))
    assert url.drivername == "postgresql+psycopg"
    assert (url.username, url.password) == ("sso", "p@ss")
    assert (url.host, url.port, url.database) == ("db.example", 5433, "sso")
    assert dict(url.query) == {"sslmode": "verify-full"}


def test_settings_created_in_code_equal_settings_that_were_read() -> None:
    assert Settings(home="/srv/sso", token_ttl=60) == read_settings({"SSO_HOME": "/srv/sso", "SSO_TOKEN_TTL": "60"})


POSTGRESQL = re.compile(r"postgresql(?:\+psycopg)?://[^\s'\"`<>]+")
LOCAL = re.compile(r"postgresql://(?:[^@/]*@)?(?:localhost|127\.0\.0\.1|\[::1\])?(?::\d+)?/[^?]*(?:\?host=/.*)?")


def test_every_example_of_a_postgresql_url_verifies_the_server() -> None:
    """Without this, an attacker in the network can imitate the database and let a login token work twice."""
    files = [README, *DEPLOY.iterdir(), *(ROOT / "sso_service").rglob("*.md"), *(ROOT / "sso_service").rglob("*.py")]
    found = [url for file in files for url in POSTGRESQL.findall(file.read_text("utf-8"))]
    assert len(found) >= 4
    assert [url for url in found if "sslmode=verify-full" not in url and not LOCAL.fullmatch(url)] == []
