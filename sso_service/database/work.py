"""Reads and changes that pages and commands make: any function of a connection.

Unlike the operations of logins, these share no statement. A batch of them would only make a transaction longer.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import Connection

from sso_service.database.group_commit import GroupCommit

T = TypeVar("T")

Work = Callable[[Connection], T]
"""A function that runs within a transaction. It may run again if the transaction had no effect."""


class _Works(GroupCommit[Work[Any], Any]):
    max_batch = 1

    def run_batch(self, connection: Connection, ops: Sequence[Work[Any]]) -> list[Any]:
        return [work(connection) for work in ops]

    async def run(self, work: Work[T]) -> T:
        """Return the result of `work`. Raises what `work` raises, `Unavailable`, and for changes `OutcomeUnknown`."""
        return cast("T", await self.submit(work))


class Reads(_Works):
    """Runs work that only reads."""

    kind = "page"
    transaction = "reading"


class Changes(_Works):
    """Runs work that changes something, and returns its result once the change is durable."""

    kind = "change"
    transaction = "writing"
