"""The command line, run in this process."""

import asyncio
import itertools
import re
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from click.testing import CliRunner

from sso_service.cli import main
from tests.support.data import JANE
from tests.support.processes import command

API_TOKEN = re.compile(r"wf_live_[A-Za-z0-9_-]{43}")
EMAIL = JANE["email"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a command: its exit code, and its output on stdout and stderr."""

    code: int
    out: str
    err: str


def run(*arguments: str, env: Mapping[str, str]) -> Outcome:
    """Run `sso-service <arguments>` in this process."""
    invoke = partial(CliRunner().invoke, main, arguments, env=env)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        result = invoke()
    else:  # the command starts an event loop, and a thread can run only one
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(invoke).result()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run_as_process(*arguments: str, env: Mapping[str, str]) -> Outcome:
    """Run `sso-service <arguments>` in a new process."""
    done = command(*arguments, env=env)
    return Outcome(done.returncode, done.stdout, done.stderr)


def refused(*arguments: str, env: Mapping[str, str]) -> str:
    """Run a command that must fail in a new process, and return its error message, which is one line."""
    done = command(*arguments, env=env)
    assert (done.returncode, done.stdout) == (1, ""), done
    [line] = done.stderr.splitlines()
    return line


def succeed(*arguments: str, env: Mapping[str, str]) -> str:
    """Run a command that must succeed without output on stderr, and return its output."""
    outcome = run(*arguments, env=env)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return outcome.out


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Assert exit code 1, no output, and one line on stderr that contains all `words`."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("Error: ")
    assert "[SQL" not in outcome.err
    for word in words:
        assert word in outcome.err


def assert_usage_error(outcome: Outcome, *words: str) -> None:
    """Assert exit code 2, no output, and a last line on stderr that contains all `words`."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    line = outcome.err.splitlines()[-1]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def table(output: str) -> list[list[str]]:
    """Return the cells of a printed list, without the titles. Columns are at least two spaces apart."""
    return [re.split(r" {2,}", line) for line in output.splitlines()[1:]]


def states(env: Mapping[str, str]) -> dict[str, str]:
    """Return the state of each key by id, newest first, as `keys list` prints it."""
    return {row[0]: row[1] for row in table(succeed("keys", "list", env=env))}


def curl(printed: str) -> tuple[str, dict[str, str], str]:
    """Return URL, headers and body of the printed `curl` command, parsed as a shell does."""
    [line] = re.findall(r"(?m)^ *curl (?:.*\\\n)*.*", printed)
    words = shlex.split(line.replace("\\\n", " "))
    options = list(itertools.pairwise(words))
    headers = dict(value.split(": ", 1) for option, value in options if option == "-H")
    [url] = [word for word in words if word.startswith("http")]
    [body] = [value for option, value in options if option == "-d"]
    return url, headers, body
