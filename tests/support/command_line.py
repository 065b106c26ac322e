"""The command line, run in this process."""

import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from unittest import mock

from click.testing import CliRunner
from sqlalchemy import URL

from sso_service import cli
from sso_service.database import database_at
from sso_service.database.transactions import Database
from tests.support.processes import command


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did: its exit code, and what it printed where."""

    code: int
    out: str
    err: str


def run(*arguments: str, env: Mapping[str, str]) -> Outcome:
    """`sso-service <arguments>` in this process."""
    opened: list[Database] = []

    def open_database(url: URL) -> Database:
        opened.append(database_at(url))
        return opened[-1]

    with mock.patch.object(cli, "Database", open_database):
        result = CliRunner().invoke(cli.main, arguments, env=env)
    for database in opened:  # a command may leave that to the end of its process
        database.close()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


API_TOKEN = re.compile(r"wf_live_[A-Za-z0-9_-]{43}")


def refused(*arguments: str, env: Mapping[str, str]) -> str:
    """The one line that a command ends with which does not do what it was told."""
    done = command(*arguments, env=env)
    assert (done.returncode, done.stdout) == (1, ""), done
    [line] = done.stderr.splitlines()
    return line


def succeed(*arguments: str, env: Mapping[str, str]) -> str:
    """What a command that must succeed prints on stdout; on stderr it prints nothing."""
    outcome = run(*arguments, env=env)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return outcome.out


def assert_refused(outcome: Outcome, *words: str) -> None:
    """One line on stderr that has all `words`, nothing on stdout, exit code 1."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("Error: ")
    assert "[SQL" not in outcome.err
    for word in words:
        assert word in outcome.err


def curl(printed: str) -> tuple[str, dict[str, str], str]:
    """URL, headers and body of the `curl` line, read as a shell reads it."""
    [line] = re.findall(r"(?m)^ *curl (?:.*\\\n)*.*", printed)
    words = shlex.split(line.replace("\\\n", " "))
    options = list(itertools.pairwise(words))
    headers = dict(value.split(": ", 1) for option, value in options if option == "-H")
    [url] = [word for word in words if word.startswith("http")]
    [body] = [value for option, value in options if option == "-d"]
    return url, headers, body
