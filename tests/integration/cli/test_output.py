"""The output of commands: stored names and arguments control no terminal, and messages repeat no secret."""

import json
import secrets

import pytest
import sqlalchemy

from sso_service.database.transactions import Database
from tests.support.command_line import EMAIL, run, succeed
from tests.support.data import ACCOUNT
from tests.support.databases import changing, on_sqlite

HOSTILE = "a\x1b]0;owned\x07\x9b31m\x7f\u202eb\u2028c"
SHOWN = r"a\u001b]0;owned\u0007\u009b31m\u007f\u202eb\u2028c"
PERSIAN = "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627"


@on_sqlite
def test_a_stored_name_cannot_send_escape_sequences_to_the_terminal(
    env: dict[str, str], database: Database, jane: int
) -> None:
    with changing(database) as connection:
        for statement in (
            f"UPDATE users SET first_name = :hostile, last_name = :persian WHERE id = {jane}",
            f"UPDATE accounts SET name = :hostile WHERE id = {ACCOUNT}",
        ):
            connection.execute(sqlalchemy.text(statement), {"hostile": HOSTILE, "persian": PERSIAN})
    show = succeed("user", "show", EMAIL, env=env)
    listed, as_json = (succeed("account", "list", *options, env=env) for options in ((), ("--json",)))
    for printed in (show, listed, as_json):
        assert SHOWN in printed
        assert HOSTILE not in printed
        assert not set(printed) & set("\x1b\x07\x9b\x7f\u202e\u2028")
    assert PERSIAN in show
    assert HOSTILE in {account["name"] for account in json.loads(as_json)}


@pytest.mark.parametrize("arguments", ["", "inspect x", "user show", "team add 1 x --id", "keys rotate --lead"])
def test_an_error_message_repeats_neither_a_secret_nor_escape_sequences(
    sqlite_env: dict[str, str], arguments: str
) -> None:
    token = secrets.token_urlsafe(32)
    for misplaced in (
        token,
        f"--{token}",
        f"wf_live_{token}",
        f"https://studio.example/?sso={token}",
        "\x1b[31m\u202ex",
    ):
        outcome = run(*arguments.split(), misplaced, env=sqlite_env)
        assert outcome.code != 0
        assert token not in outcome.out + outcome.err
        assert not set(outcome.err) & set("\x1b\u202e")
