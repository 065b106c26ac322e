"""The command `keys`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import click

from sso_service.cli.environment import current_operator, current_settings, current_time, read_keys
from sso_service.cli.output import Column, json_option, print_list, time_text
from sso_service.errors import KeyRingError
from sso_service.keyring import ROTATION_LEAD, Entry, SigningKey
from sso_service.services.keys import Keys

report_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would be done without doing it.")


@click.group()
def keys() -> None:
    """Signing keys."""


@keys.command("list")
@json_option
def keys_list(as_json: bool) -> None:
    """List keys, newest first, with the present use of each."""
    settings = current_settings()
    columns = (Column("ID", "id"), Column("STATE", "state"), Column("SIGNS FROM", "signs_from", time_text))
    print_list(columns, Keys(settings).describe(read_keys(settings)), as_json=as_json)


@keys.command("rotate")
@click.option(
    "--lead",
    type=click.IntRange(0, 86400),
    metavar="SECONDS",
    default=ROTATION_LEAD,
    show_default=True,
    help="Seconds until the new key signs. Every node has to read it before.",
)
@click.option("--prune", "and_prune", is_flag=True, help="Then delete keys that can verify nothing any more.")
@dry_run_option
@report_option
def keys_rotate(lead: int, and_prune: bool, dry_run: bool, as_json: bool) -> None:
    """Create a new signing key.

    Logins are not affected: the previous key verifies until everything that it signed has expired.
    """
    settings = current_settings()
    with _reported("rotate", Keys(settings), as_json=as_json, dry_run=dry_run) as (changes, report):
        if dry_run:
            read_keys(settings)
            signs_from = time_text(current_time() + lead)
            report.add(f"A new key would be created in {settings.keys_path}. It would sign from {signs_from}.", made=[])
        else:
            report.add_created([changes.rotate(current_operator(), lead=lead)])
        if and_prune:
            report.add_pruned(changes.prune(current_operator(), dry_run=dry_run))


@keys.command("revoke")
@click.argument("key_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Revoke every key, for example after restoring a database.")
@report_option
def keys_revoke(key_id: str | None, everything: bool, as_json: bool) -> None:
    """Invalidate everything that a key signed, within 5 s: login tokens, sessions, forms."""
    if everything == (key_id is not None):
        raise click.ClickException("give either the id of a key or --all")
    with _reported("revoke", Keys(current_settings()), as_json=as_json) as (changes, report):
        if key_id is not None:
            created = changes.revoke(current_operator(), key_id)
            report.add(f"Key {key_id} is revoked.", revoked=key_id)
        else:
            created = changes.revoke_all(current_operator())
            report.add("All keys are revoked.", revoked="all")
        report.add_created(created)


@keys.command("prune")
@dry_run_option
@report_option
def keys_prune(dry_run: bool, as_json: bool) -> None:
    """Delete keys that can verify nothing any more."""
    with _reported("prune", Keys(current_settings()), as_json=as_json, dry_run=dry_run) as (changes, report):
        report.add_pruned(changes.prune(current_operator(), dry_run=dry_run))


class _Report:
    """Reports changes to the keys: as sentences at once, or as one line of JSON at the end."""

    def __init__(self, event: str, *, as_json: bool, dry_run: bool) -> None:
        self._as_json = as_json
        self._dry_run = dry_run
        self._fields: dict[str, object] = {"event": f"keys.{event}", "dry_run": dry_run}

    def add(self, text: str, **fields: object) -> None:
        """Report `text`, or `fields` in JSON."""
        self._fields.update(fields)
        if not self._as_json:
            click.echo(text)

    def add_created(self, created: Sequence[SigningKey]) -> None:
        """Report new keys."""
        self._fields["made"] = [{"id": key.id, "signs_from": key.signs_from} for key in created]
        for key in created:
            self.add(f"Key {key.id} signs from {time_text(key.signs_from)}.")

    def add_pruned(self, pruned: Sequence[Entry]) -> None:
        """Report deleted keys, or those that would be deleted."""
        verb = "would be" if self._dry_run else "is"
        lines = [f"Key {entry.id} {verb} deleted." for entry in pruned] or ["There is no key to delete."]
        self.add("\n".join(lines), pruned=[entry.id for entry in pruned])

    def end(self, **fields: object) -> None:
        """Print the JSON, if there is any."""
        if self._as_json:
            click.echo(json.dumps(self._fields | fields))


@contextmanager
def _reported(event: str, keys: Keys, *, as_json: bool, dry_run: bool = False) -> Iterator[tuple[Keys, _Report]]:
    """Yield the use cases and a report, and exclude other processes unless it is a dry run."""
    report = _Report(event, as_json=as_json, dry_run=dry_run)
    try:
        with nullcontext() if dry_run else keys.locked():
            yield keys, report
    except KeyRingError as error:
        report.end(error=str(error))  # with the changes before the error
        raise
    report.end()
