"""Logins of one account during a flood of page requests by an admin of another one, in a service with processes."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from sso_service.database.transactions import Database
from sso_service.permissions import Role, Scope
from tests.support import administration
from tests.support.data import JANE, JOHN, OTHER_ACCOUNT, OTHER_TEAM, PAGE
from tests.support.databases import changing
from tests.support.processes import serving
from tests.support.studio import add_members
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.anyio

MEMBERS = 20_000
CLIENTS = 300
LOGINS = 40
TEAM_PAGE = f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/settings/team"
SEARCH = f"GET {TEAM_PAGE}?search=missing%d HTTP/1.1\r\n\r\n"
CHANGE = (
    f"POST {TEAM_PAGE}/%d/role HTTP/1.1\r\nSec-Fetch-Site: same-origin\r\n"
    "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 14\r\n\r\nrole=publisher"
)


def populate(database: Database) -> str:
    """Add members to the other account, with John as its admin, and return the secret of an API token for it."""
    with changing(database) as connection:
        add_members(connection, MEMBERS, OTHER_ACCOUNT)
        _, secret = administration.create_api_token(
            connection, account_id=OTHER_ACCOUNT, name="theirs", scopes=frozenset({Scope.WRITE_SSO}), now=1
        )
    return secret


async def log_in(client: httpx.AsyncClient, api_token: str, person: dict[str, str], page: str) -> httpx.Response:
    answer = await client.post("/v1/sso_tokens", json=person, headers={"Authorization": f"Bearer {api_token}"})
    if answer.status_code != 201:
        return answer
    client.cookies.clear()
    return await client.get(f"{page}?sso={answer.json()['token']}")


async def ask_and_leave(port: int, cookie: str, over: asyncio.Event, request: str) -> list[bytes]:
    """Send a request on a new connection again and again, and close it a moment later. Return the statuses received."""
    first, _, rest = request.partition("\r\n")
    content = f"{first}\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n{rest}".encode()
    statuses = []
    while not over.is_set():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(content)
            try:
                async with asyncio.timeout(0.5):
                    statuses.append((await reader.readline())[9:12])
            except TimeoutError:
                pass
            writer.close()
        except OSError:  # the service has closed the connection
            statuses.append(b"")
        await asyncio.sleep(0.1)
    return statuses


@pytest.mark.parametrize(("request_", "done"), [(SEARCH, b"200"), (CHANGE, b"303")], ids=["searches", "changes"])
async def test_logins_work_during_a_flood_of_page_requests_of_another_account(
    env: dict[str, str], tmp_path: Path, api_token: str, database: Database, request_: str, done: bytes
) -> None:
    theirs = populate(database)
    # Without the limit for a session, so that the requests reach the database.
    with serving({**env, "SSO_PAGE_RATE_LIMIT": "1000000/second"}, tmp_path / "log") as running:
        async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE, trust_env=False) as client:
            answer = await log_in(client, theirs, JOHN, f"/client/{OTHER_ACCOUNT}/t/{OTHER_TEAM}/posts")
            assert answer.status_code == 303
            cookie = answer.headers["set-cookie"].partition(";")[0]
            with changing(database) as connection:
                administration.set_role(connection, JOHN["email"], OTHER_ACCOUNT, Role.ADMIN)
            over, port = asyncio.Event(), urlsplit(running.url).port or 0
            flood = [
                asyncio.create_task(ask_and_leave(port, cookie, over, request_ % number))
                for number in range(1, CLIENTS + 1)
            ]
            await asyncio.sleep(1)
            logins = []
            for _ in range(LOGINS):
                logins.append((await log_in(client, api_token, JANE, PAGE)).status_code)
                await asyncio.sleep(0.05)
            ready = (await client.get("/readyz")).status_code
            over.set()
            statuses = [status for each in await asyncio.gather(*flood) for status in each]
    assert logins == [303] * LOGINS
    assert ready == 200
    assert done in statuses, "requests reached the database"
    assert "Traceback" not in running.log.read_text()
    assert len(statuses) > CLIENTS
