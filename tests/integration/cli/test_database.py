"""The commands `db` and `purge`."""

import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import text

from sso_service.database import database_at, purging
from sso_service.database.ledger import Verdict
from sso_service.database.schema import SCHEMA_VERSION
from sso_service.database.transactions import Database
from tests.support.command_line import EMAIL, assert_refused, run, succeed, table
from tests.support.databases import Query, changing, emptied, on_sqlite
from tests.support.files import contents
from tests.support.token_maker import TokenMaker


def test_db_current_prints_the_schema_and_changes_nothing(env: dict[str, str], keys_dir: Path) -> None:
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    emptied(env["SSO_DATABASE_URL"])
    for _ in range(2):
        assert succeed("db", "current", env=env) == "none\n"


def test_db_upgrade_creates_the_schema_and_keeps_data(env: dict[str, str]) -> None:
    emptied(env["SSO_DATABASE_URL"])
    assert SCHEMA_VERSION in succeed("db", "upgrade", env=env)
    assert succeed("db", "current", env=env) == f"{SCHEMA_VERSION}\n"
    succeed("account", "add", "Kept", "--id", "7", env=env)
    succeed("db", "upgrade", env=env)
    assert table(succeed("account", "list", env=env))[0][1] == "Kept"


def test_upgrading_a_current_schema_revokes_no_key(env: dict[str, str], keys_dir: Path) -> None:
    before = contents(keys_dir)
    succeed("db", "upgrade", env=env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("init",), ("db", "upgrade"), ("account", "list")], ids=" ".join)
def test_a_schema_of_a_newer_version_is_refused(
    env: dict[str, str], keys_dir: Path, database: Database, arguments: tuple[str, ...]
) -> None:
    with changing(database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = contents(keys_dir)
    assert_refused(run(*arguments, env=env), "9999")
    assert succeed("db", "current", env=env) == "9999\n"
    assert contents(keys_dir) == before


@on_sqlite
def test_db_copy_prints_the_number_of_rows(env: dict[str, str], jane: int, tmp_path: Path) -> None:
    printed = succeed("db", "copy", "--to", "sqlite:///new/copy.db", env=env)
    assert {"accounts: 2", "teams: 2", "users: 1", "memberships: 1"} <= set(printed.splitlines())
    copied = env | {"SSO_DATABASE_URL": "sqlite:///new/copy.db"}
    assert succeed("user", "show", EMAIL, env=copied) == succeed("user", "show", EMAIL, env=env)
    assert_refused(run("db", "copy", "--to", "sqlite:///new/copy.db", env=env), "new/copy.db", "not empty")


@on_sqlite
def test_db_copy_names_a_table_whose_rows_are_refused(env: dict[str, str], jane: int, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "sso.db", isolation_level=None)) as connection:
        connection.execute("INSERT INTO teams (id, account_id, name) VALUES (1, 1, 'orphan')")
    outcome = run("db", "copy", "--to", "sqlite:///copy.db", env=env)
    assert_refused(outcome, "copy.db", "teams", "FOREIGN KEY")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause, which the command does not make."""
    seconds: list[float] = []
    monkeypatch.setattr("sso_service.cli.database.time.sleep", seconds.append)
    monkeypatch.setattr(purging, "FLOOR_AGE", 0.0)
    return seconds


def test_purge_deletes_old_rows_after_waiting_a_minute(maker: TokenMaker, query: Query, pauses: list[float]) -> None:
    old, recent, live = (maker.claims(expires_at=maker.now + offset) for offset in (-7200, -3000, 300))
    for claims in (old, recent, live):
        maker.consume(claims)
    outcome = run("purge", env=maker.env)
    assert outcome.code == 0
    assert outcome.out.startswith("1 ")
    assert len(pauses) == 1
    assert pauses[0] >= 60
    rows = [bytes(row.claims) for row in query("SELECT claims FROM consumed_nonces ORDER BY claims")]
    assert rows == [recent.pack(), live.pack()]
    assert maker.redeem(old) is Verdict.EXPIRED


def test_purging_an_empty_ledger_succeeds(env: dict[str, str], pauses: list[float]) -> None:
    outcome = run("purge", env=env)
    assert (outcome.code, outcome.out[:2]) == (0, "0 ")


def test_only_one_purge_deletes_at_a_time(
    maker: TokenMaker, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    maker.consume(maker.claims(expires_at=maker.now - 7200))
    other = database_at(maker.database.url)
    with ExitStack() as stack:

        def begin(_: float) -> None:
            stack.enter_context(other.purging(stack.enter_context(other.connect())))

        monkeypatch.setattr("sso_service.cli.database.time.sleep", begin)
        outcome = run("purge", env=maker.env)
    assert (outcome.code, outcome.out) == (0, "0 deleted. Another purge is running and deletes the rest.\n")
    other.close()


def test_nothing_is_purged_while_clocks_disagree(
    maker: TokenMaker,
    query: Query,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maker.consume(maker.claims(expires_at=maker.now - 7200))
    monkeypatch.setattr(purging, "CLOCK_TOLERANCE", -1)
    assert_refused(run("purge", env=maker.env), "clock")
    assert pauses == []
    assert len(query("SELECT claims FROM consumed_nonces")) == 1
