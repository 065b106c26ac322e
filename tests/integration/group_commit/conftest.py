"""Fixtures of the group commit tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event

from sso_service.database.transactions import Database
from tests.support.group_commit import Harness, execute


@pytest.fixture
def harnesses(database: Database) -> Iterator[Callable[..., Harness]]:
    """Create group commits on the database, which has an empty table of notes."""
    execute(database, "CREATE TABLE notes (n INTEGER PRIMARY KEY)")
    made: list[Harness] = []

    def make(**options: Any) -> Harness:
        made.append(Harness(database, **options))
        return made[-1]

    yield make
    for harness in made:
        harness.threads.shutdown()


@pytest.fixture
def harness(harnesses: Callable[..., Harness]) -> Harness:
    return harnesses()


@pytest.fixture
def statements(database: Database) -> list[str]:
    """Every statement that is sent to the database from now on."""
    seen: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def record(_c: object, _r: object, statement: str, *_: object) -> None:
        seen.append(statement)

    return seen
