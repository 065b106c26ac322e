"""The commands `account` and `team`."""

import json

import pytest

from tests.support.command_line import assert_refused, assert_usage_error, run, succeed, table
from tests.support.data import ACCOUNT, OTHER_ACCOUNT, OTHER_TEAM, PORTAL, TEAM
from tests.support.databases import on_sqlite

TOO_LARGE = "99999999999999999999"


def test_account_add_prints_the_id_of_a_listed_account(env: dict[str, str]) -> None:
    assert succeed("account", "add", "Chosen", "--id", "2000", "--portal-url", PORTAL, env=env) == "2000\n"
    assert succeed("account", "add", "Next", env=env) == "2001\n"
    assert table(succeed("account", "list", env=env))[-2:] == [
        ["2000", "Chosen", PORTAL, "-"],
        ["2001", "Next", "-", "-"],
    ]


def test_team_add_prints_the_id_of_a_listed_team(env: dict[str, str]) -> None:
    assert succeed("team", "add", str(OTHER_ACCOUNT), "Chosen", "--id", "3000", env=env) == "3000\n"
    assert succeed("team", "add", str(OTHER_ACCOUNT), "Next", env=env) == "3001\n"
    row = table(succeed("account", "list", env=env))[-1]
    assert row[0] == str(OTHER_ACCOUNT)
    assert row[-1].endswith("3000 Chosen, 3001 Next")


@on_sqlite
def test_account_list_prints_json(env: dict[str, str]) -> None:
    succeed("account", "add", "Bücher & <Co>", "--id", "2000", env=env)
    assert json.loads(succeed("account", "list", "--json", env=env)) == [
        {"id": ACCOUNT, "name": "One", "portal_url": PORTAL, "teams": [{"id": TEAM, "name": "Team"}]},
        {"id": OTHER_ACCOUNT, "name": "Other", "portal_url": None, "teams": [{"id": OTHER_TEAM, "name": "Other team"}]},
        {"id": 2000, "name": "Bücher & <Co>", "portal_url": None, "teams": []},
    ]


@pytest.mark.parametrize("number", ["0", "-1", "4294967296", TOO_LARGE])
@pytest.mark.parametrize("arguments", [("account", "add", "New"), ("team", "add", str(ACCOUNT), "New")])
def test_an_id_must_fit_into_a_token(sqlite_env: dict[str, str], arguments: tuple[str, ...], number: str) -> None:
    assert_usage_error(run(*arguments, "--id", number, env=sqlite_env), "--id", "1<=x<=4294967295")


@pytest.mark.parametrize("name", ["", "   ", "x" * 101, "line\nbreak", "New\n", "\tNew", "New\u00a0", "\x1b[31mred"])
@pytest.mark.parametrize("arguments", [("account", "add"), ("team", "add", str(ACCOUNT))])
def test_a_name_has_1_to_100_printable_characters(
    sqlite_env: dict[str, str], arguments: tuple[str, ...], name: str
) -> None:
    assert_refused(run(*arguments, name, env=sqlite_env), "name")


@pytest.mark.parametrize(
    "url",
    [
        "http://portal.example/",
        "javascript:alert(1)",
        "portal.example",
        "https://",
        "//x",
        "https://[",
        "https:///x",
        "https://portal.example/\x1b[31m",
        "https://portal.example/ x",
    ],
)
def test_a_portal_url_is_an_https_url(sqlite_env: dict[str, str], url: str) -> None:
    assert_refused(run("account", "add", "New", "--portal-url", url, env=sqlite_env), "https")
    assert "New" not in succeed("account", "list", env=sqlite_env)


@pytest.mark.parametrize(
    ("arguments", "number"),
    [(("account", "add", "New", "--id", str(ACCOUNT)), ACCOUNT), (("team", "add", "999", "New", "--id", "42"), TEAM)],
)
def test_an_id_in_use_is_refused(env: dict[str, str], arguments: tuple[str, ...], number: int) -> None:
    before = succeed("account", "list", env=env)
    assert_refused(run(*arguments, env=env), str(number), "exists")
    assert succeed("account", "list", env=env) == before
