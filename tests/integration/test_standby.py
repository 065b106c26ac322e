"""A node that requires a synchronous standby consumes nothing without one, but serves everything else."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import Node
from sso_service.settings import Settings, read_settings
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import PAGE
from tests.support.databases import on_postgresql
from tests.support.ledger import number_consumed

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(settings: Settings, keys_dir: Path, clock: Clock) -> Iterator[Node]:
    """A node that requires a standby, while the server of these tests has none."""
    service = Node(
        settings,
        open_database(msgspec.structs.replace(settings, require_sync_standby=True)),
        KeyDirectory(keys_dir),
        clock=clock,
    )
    yield service
    service.close()


def test_a_synchronous_standby_is_required_only_if_configured() -> None:
    assert not read_settings({}).require_sync_standby
    assert read_settings({"SSO_REQUIRE_SYNC_STANDBY": "1"}).require_sync_standby


@on_postgresql
async def test_nothing_is_consumed_without_a_synchronous_standby(
    client: Client, api_token: str, verifier: str, database: Database
) -> None:
    token = await client.issue(api_token)
    login = await client.get(f"{PAGE}?sso={token}", accept="application/json")
    consume = await client.post_json("/v1/sso_tokens/consume", {"token": token}, token=verifier)
    revoke = await client.post_json("/v1/sso_tokens/revoke", {"token": token}, token=api_token)
    for answer in (login, consume, revoke):
        assert (answer.status, answer.error, answer.header("retry-after")) == (503, "unavailable", "2")
    assert number_consumed(database) == 0
    verified = await client.post_json("/v1/sso_tokens/verify", {"token": token}, token=verifier)
    assert verified.json()["active"] is True
    ready = await client.get("/readyz")
    assert (ready.status, ready.json()["problems"]) == (
        503,
        {"database": "there is no synchronous standby, and one is required"},
    )


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_sqlite_ignores_the_standby_requirement(client: Client, api_token: str) -> None:
    assert (await client.get(f"{PAGE}?sso={await client.issue(api_token)}")).status == 303
    assert (await client.get("/readyz")).status == 200
