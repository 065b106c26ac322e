"""The command `sso-service` with its groups, and how it reports errors."""

import logging.config
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from sso_service import __version__
from sso_service.cli.accounts import account, team
from sso_service.cli.api_tokens import api_token
from sso_service.cli.database import db, purge
from sso_service.cli.inspect import inspect
from sso_service.cli.keys import keys
from sso_service.cli.output import harmless
from sso_service.cli.setup import init, serve
from sso_service.cli.users import user
from sso_service.errors import AccountError, DatabaseError, FieldError, KeysBusy, OperatorError, OutcomeUnknown
from sso_service.observability import logs


class TryLater(click.ClickException):
    """A failure that may not occur again later."""

    exit_code = os.EX_TEMPFAIL  # 75, see sysexits.h


class OneLineErrors(click.Group):
    """Reports the service's errors, in sub-commands too, as one line on stderr, and exits with code 1."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the options before the command. Raises `click.ClickException`."""
        with _harmless_messages():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises `click.ClickException`, which click reports."""
        with _harmless_messages():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeysBusy as error:
            raise TryLater(_first_line(error)) from error
        except OutcomeUnknown as error:
            raise click.ClickException(f"the change may or may not have been made: {_first_line(error)}") from error
        except (OperatorError, AccountError, DatabaseError, FieldError) as error:
            raise click.ClickException(_first_line(error)) from error


@contextmanager
def _harmless_messages() -> Iterator[None]:
    """Remove secrets and escape sequences from the messages of errors: they quote arguments and stored names."""
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = harmless(error.message)  # click declares the attribute final
        raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """One-time login tokens for a Studio. Settings are SSO_* environment variables."""
    logging.config.dictConfig(logs.config_of_commands())
    # New files and directories are private: the database contains addresses, the key directory contains secrets.
    os.umask(0o077)


for command in (init, serve, account, team, api_token, user, keys, db, inspect, purge):
    main.add_command(command)
