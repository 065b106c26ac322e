"""The API tokens that a user created: listed, and revoked, when the user stops being an admin."""

import json
import shlex
import time

import pytest

from sso_service.database.accounts import EXPIRES_SOON
from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from tests.support import administration
from tests.support.command_line import EMAIL, assert_refused, run, succeed, table
from tests.support.data import ACCOUNT, OTHER_ACCOUNT
from tests.support.databases import Query, changing, on_sqlite

REMOVE = ("remove", "--account", str(ACCOUNT))
DEMOTE = ("set-role", "--account", str(ACCOUNT), "publisher")
DISABLE = ("disable",)


@pytest.fixture
def created(database: Database, jane: int) -> None:
    """API tokens that Jane created: 1 and 2 in an account where she is an admin, 3 in another one; 4 is not hers."""
    with changing(database) as connection:
        administration.set_role(connection, EMAIL, ACCOUNT, Role.ADMIN)
        for name, account_id, creator in (
            ("intranet", ACCOUNT, jane),
            ("portal", ACCOUNT, jane),
            ("elsewhere", OTHER_ACCOUNT, jane),
            ("operator's", ACCOUNT, None),
        ):
            administration.create_api_token(
                connection,
                account_id=account_id,
                name=name,
                scopes=frozenset({Scope.WRITE_SSO}),
                now=int(time.time()),
                created_by=creator,
            )


def active(query: Query) -> list[int]:
    return [row.id for row in query("SELECT id FROM api_tokens WHERE revoked_at IS NULL ORDER BY id")]


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize(("arguments", "ids"), [(REMOVE, [1, 2]), (DEMOTE, [1, 2]), (DISABLE, [1, 2, 3])])
def test_ending_an_admins_rights_prints_commands_that_revoke_their_tokens(
    env: dict[str, str], query: Query, arguments: tuple[str, ...], ids: list[int]
) -> None:
    printed = succeed("user", arguments[0], EMAIL, *arguments[1:], env=env)
    assert "intranet" in printed
    assert active(query) == [1, 2, 3, 4]
    commands = [shlex.split(line.partition("      ")[0])[1:] for line in printed.splitlines() if "sso-service" in line]
    assert commands == [["api-token", "revoke", str(each)] for each in ids]
    for command in commands:
        succeed(*command, env=env)
    assert active(query) == sorted({1, 2, 3, 4} - set(ids))


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize(("arguments", "ids"), [(REMOVE, [1, 2]), (DEMOTE, [1, 2]), (DISABLE, [1, 2, 3])])
def test_an_option_revokes_the_api_tokens_of_a_former_admin(
    env: dict[str, str], query: Query, arguments: tuple[str, ...], ids: list[int]
) -> None:
    printed = succeed("user", arguments[0], EMAIL, *arguments[1:], "--revoke-api-tokens", env=env)
    assert "Revoked the API tokens" in printed
    assert active(query) == sorted({1, 2, 3, 4} - set(ids))
    again = ("user", "disable", EMAIL, "--revoke-api-tokens")
    succeed(*again, env=env)
    assert succeed(*again, env=env) == f"{EMAIL} is disabled.\n"


@on_sqlite
@pytest.mark.usefixtures("created")
def test_an_admin_keeps_api_tokens(env: dict[str, str], query: Query) -> None:
    admin = ("user", "set-role", EMAIL, "--account", str(ACCOUNT), "admin")
    assert "intranet" not in succeed(*admin, env=env)
    assert_refused(run(*admin, "--revoke-api-tokens", env=env), "--revoke-api-tokens")
    assert active(query) == [1, 2, 3, 4]


@on_sqlite
@pytest.mark.usefixtures("created")
def test_api_token_list_shows_creator_and_status(env: dict[str, str], jane: int, database: Database) -> None:
    now = int(time.time())
    with changing(database) as connection:
        for name, expires_at in (("soon", now + EXPIRES_SOON - 60), ("expired", now - 60)):
            scopes = frozenset({Scope.WRITE_SSO})
            administration.create_api_token(
                connection, account_id=ACCOUNT, name=name, scopes=scopes, now=now, expires_at=expires_at
            )
    succeed("api-token", "revoke", "1", env=env)
    rows = table(succeed("api-token", "list", env=env))
    assert [row[3] for row in rows] == ["revoked", "active", "active", "active", "expiring", "expired"]
    assert [EMAIL in row for row in rows] == [True, True, True, False, False, False]
    listed = json.loads(succeed("api-token", "list", "--json", env=env))
    assert [each["status"] for each in listed] == [row[3] for row in rows]
    creator = (listed[0]["created_by"], listed[0]["created_by_name"], listed[0]["created_by_email"])
    assert creator == (jane, "Jane Doe", EMAIL)
    assert listed[3]["created_by"] is None
