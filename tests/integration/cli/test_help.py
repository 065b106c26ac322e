"""The commands as a whole: their list, their help texts, and what they import."""

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sso_service.cli import main
from tests.support.command_line import succeed


def commands_of(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command and group."""
    for name, found in group.commands.items():
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from commands_of(found, (*path, name))


@pytest.mark.parametrize("path", list(commands_of(main)), ids=" ".join)
def test_every_command_has_a_help_text(path: tuple[str, ...], tmp_path: Path) -> None:
    printed = succeed(*path, "--help", env={"SSO_HOME": str(tmp_path), "SSO_PORT": "x"})
    assert len(printed.splitlines()) > 3
    assert printed == succeed(*path, "-h", env={"SSO_HOME": str(tmp_path)})


def test_the_commands_are_those_of_the_documentation() -> None:
    assert {" ".join(path) for path in commands_of(main)} == {
        "init",
        "serve",
        "account",
        "account add",
        "account list",
        "team",
        "team add",
        "api-token",
        "api-token create",
        "api-token list",
        "api-token revoke",
        "user",
        "user show",
        "user set-role",
        "user remove",
        "user disable",
        "user enable",
        "user sign-out",
        "keys",
        "keys list",
        "keys rotate",
        "keys revoke",
        "keys prune",
        "db",
        "db upgrade",
        "db current",
        "db copy",
        "inspect",
        "purge",
    }
