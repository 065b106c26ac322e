"""How commands print lists, times and durations."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from sso_service.characters import escape_active
from sso_service.observability.redaction import redact

json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON array, with times in Unix seconds.")
"""The option of every list."""


def harmless(text: str) -> str:
    """Return text that may come from outside, such as a name or an argument, without secrets and escape sequences.

    Lines are kept. A stored name must not control the terminal. An operator may have pasted a secret in the wrong
    place, and the terminal may be recorded.
    """
    return "\n".join(map(escape_active, redact(text).expandtabs().split("\n")))


def echo(text: str, *, err: bool = False) -> None:
    """Print text that may come from outside."""
    click.echo(harmless(text), err=err)


def time_text(seconds: int | None) -> str:
    """Return Unix seconds as a date and time in UTC (RFC 3339), or `-`."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def duration_text(seconds: int) -> str:
    """Return a duration in full hours if possible, otherwise in seconds."""
    return f"{seconds // 3600} h" if seconds % 3600 == 0 else f"{seconds} s"


def _text(value: object) -> str:
    return "-" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, the field of a record that it shows, and how."""

    title: str
    field: str
    text: Callable[[Any], str] = _text


def print_list(columns: Sequence[Column], records: Sequence[object], *, as_json: bool) -> None:
    """Print structs, dataclasses or dictionaries as an aligned table, or as a JSON array of objects."""
    rows: list[dict[str, Any]] = msgspec.to_builtins(records, order="deterministic")  # which sorts sets
    if as_json:
        click.echo(escape_active(json.dumps(rows, ensure_ascii=False)))
        return
    lines = [[column.title for column in columns]]
    lines += [[escape_active(column.text(row[column.field])) for column in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
