"""Single use over HTTP with real databases: exactly one redemption of a token succeeds, whatever fails."""

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
    def record(_c: object, _r: object, statement: str, *_: object) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE", "BEGIN I")):
            written.append(statement)

    before = files_of(database)
    for _ in range(10):
        await asyncio.gather(*(client.issue(api_token) for _ in range(100)))
    assert files_of(database) == before
    assert written == []


async def first_token(client: Client, service: Node, api_token: str) -> str:
    """Issue a token, which creates the user, and wait until the API token's hour of use is recorded."""
    token = await client.issue(api_token)
    await asyncio.gather(*service.issuing._background)
    return token


def files_of(database: Database) -> list[bytes]:
    """The content of the SQLite file and its write-ahead log. Empty for PostgreSQL."""
    path = Path(str(database.url.database))
    return [path.read_bytes(), Path(f"{path}-wal").read_bytes()] if database.is_sqlite else []


# --- Database failures -----------------------------------------------------------------------------------------------


def has_session_cookie(answer: Answer) -> bool:
    return "studio_session" in (answer.header("set-cookie") or "")


@contextmanager
def read_only_file(database: Database) -> Iterator[None]:
    """Emulate a file system that was remounted read-only, with connections opened after that."""
    path = str(database.url.database)
    if os.geteuid() or subprocess.run(["chattr", "+i", path], check=False).returncode:
        pytest.skip("requires root and a file system that supports chattr +i")
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
    database.close()  # the last connection removes the write-ahead log, so the file is complete
    intact = path.read_bytes()
    path.write_bytes(intact[:start] + b"\xff" * 4096 + intact[start + 4096 :])
    yield
    database.close()
    path.write_bytes(intact)


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
async def test_an_unwritable_ledger_gives_503_and_keeps_the_token_valid(
    client: Client, service: Node, database: Database, api_token: str, fault: Callable[[Database], Any]
) -> None:
    token = await first_token(client, service, api_token)
    with fault(database):
        answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
        assert not has_session_cookie(answer)
        assert answer.status == 503, answer
        assert answer.header("retry-after")
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.another().get(f"{PAGE}?sso={token}")).status == 401


@pytest.mark.parametrize("after", [False, True], ids=["before-execution", "after-execution"])
async def test_a_login_whose_commit_loses_its_connection_is_outcome_unknown(
    client: Client, service: Node, database: Database, api_token: str, after: bool
) -> None:
    token = await first_token(client, service, api_token)

    def lose_connection(cursor: Any, statement: str, *_: object) -> None:
        if statement == "COMMIT" and consuming:
            if after:
                cursor.execute(statement)
            cursor.connection.close()
            raise database.engine.dialect.loaded_dbapi.OperationalError("connection lost")
        if "consumed_nonces" in statement:
            consuming.append(statement)

    consuming: list[str] = []
    event.listen(database.engine, "do_execute", lose_connection)
    answer = await client.request("GET", f"{PAGE}?sso={token}", headers=[("accept", "application/json")])
    event.remove(database.engine, "do_execute", lose_connection)
    assert not has_session_cookie(answer)
    assert (answer.status, answer.error) == (503, "outcome_unknown")
    assert answer.header("retry-after")
    assert number_consumed(database) == after
    again = [(await client.another().get(f"{PAGE}?sso={token}")).status for _ in range(2)]
    assert again == ([401, 401] if after else [303, 401])
