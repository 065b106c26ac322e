"""The promise: exactly one redemption of a token succeeds, whatever happens. Over HTTP, with real databases."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from sso_service.database.transactions import Database
from sso_service.services.node import Node
from tests.support.client import Answer, Client
from tests.support.data import PAGE
from tests.support.ledger import number_consumed
from tests.support.outages import lost_table, read_only

pytestmark = pytest.mark.anyio


async def test_issuing_a_thousand_tokens_for_a_known_user_writes_nothing(
    client: Client, service: Node, database: Database, api_token: str
) -> None:
    await first_token(client, service, api_token)
    written: list[str] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def note(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE", "BEGIN I")):
            written.append(statement)

    before = files_of(database)
    for _ in range(10):
        await asyncio.gather(*(client.issue(api_token) for _ in range(100)))
    assert files_of(database) == before
    assert written == []


async def first_token(client: Client, service: Node, api_token: str) -> str:
    """A token for a person who is known by now. The hour of use, which is written beside the request, is written."""
    token = await client.issue(api_token)
    await asyncio.gather(*service.issuing._background)
    return token


def files_of(database: Database) -> list[bytes]:
    """The content of an SQLite database and its log."""
    path = Path(str(database.url.database))
    return [path.read_bytes(), Path(f"{path}-wal").read_bytes()] if database.is_sqlite else []


# --- when the database cannot say yes --------------------------------------------------------------------------------


def session_in(answer: Answer) -> bool:
    return "studio_session" in (answer.header("set-cookie") or "")


@contextmanager
def read_only_file(database: Database) -> Iterator[None]:
    """As on a file system that was mounted anew to be read only, and connections that were opened then."""
    path = str(database.url.database)
    if os.geteuid() or subprocess.run(["chattr", "+i", path], check=False).returncode:
        pytest.skip("only root, and only on some file systems, can keep everybody from writing to a file")
    try:
        database.close()
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextmanager
def damaged_table(database: Database) -> Iterator[None]:
    path = Path(str(database.url.database))
    with database.connect() as connection:
        find = "SELECT rootpage FROM sqlite_schema WHERE name = 'consumed_nonces'"
        start = (connection.exec_driver_sql(find).scalar_one() - 1) * 4096
    database.close()  # the last connection leaves no log behind, so the file is all there is
    sound = path.read_bytes()
    path.write_bytes(sound[:start] + b"\xff" * 4096 + sound[start + 4096 :])
    yield
    database.close()
    path.write_bytes(sound)


@pytest.mark.parametrize(
    ("database_url", "fault"),
    [
        ("sqlite", lost_table),
        ("sqlite", damaged_table),
        ("sqlite", read_only_file),
        ("postgresql", lost_table),
        ("postgresql", read_only),
    ],
    indirect=["database_url"],
)
async def test_while_the_ledger_cannot_be_written_the_answer_is_503_and_the_token_is_good_afterwards(
    client: Client, service: Node, database: Database, api_token: str, fault: Callable[[Database], Any]
) -> None:
    token = await first_token(client, service, api_token)
    with fault(database):
        answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
        assert not session_in(answer)
        assert answer.status == 503, answer
        assert answer.header("retry-after")
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.another().get(f"{PAGE}?sso={token}")).status == 401


@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
async def test_a_login_whose_commit_loses_its_connection_is_none_and_says_that_the_outcome_is_unknown(
    client: Client, service: Node, database: Database, api_token: str, after: bool
) -> None:
    token = await first_token(client, service, api_token)

    def lose_connection(cursor: Any, statement: str, *_: object) -> None:
        if statement == "COMMIT" and consuming:
            if after:
                cursor.execute(statement)
            cursor.connection.close()
            raise database.engine.dialect.loaded_dbapi.OperationalError("the connection was lost")
        if "consumed_nonces" in statement:
            consuming.append(statement)

    consuming: list[str] = []
    event.listen(database.engine, "do_execute", lose_connection)
    answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
    event.remove(database.engine, "do_execute", lose_connection)
    assert not session_in(answer)
    assert (answer.status, answer.error) == (503, "outcome_unknown")
    assert answer.header("retry-after")
    assert number_consumed(database) == after
    again = [(await client.another().get(f"{PAGE}?sso={token}")).status for _ in range(2)]
    assert again == ([401, 401] if after else [303, 401])
