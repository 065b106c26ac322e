"""Limits on clients: the rate of an API token, requests in flight, and the time that a body may take."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from sso_service.database.transactions import Database
from sso_service.errors import SettingsError
from sso_service.key_directory import KeyDirectory
from sso_service.services.node import Node
from sso_service.settings import Settings, read_settings
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import JANE, PAGE
from tests.support.databases import changing

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]

URL = "/v1/sso_tokens"


@pytest.fixture
def limits() -> Mapping[str, object]:
    return {}


@pytest.fixture
def service(settings: Settings, database: Database, keys_dir: Path, clock: Clock, limits: Mapping[str, object]) -> Node:
    return Node(msgspec.structs.replace(settings, **limits), database, KeyDirectory(keys_dir), clock=clock)


@pytest.mark.parametrize("limits", [{"rate_limit": "3/hour"}])
async def test_the_rate_limit_applies_to_each_api_token_separately(
    client: Client, api_token: str, verifier: str
) -> None:
    token = await client.issue(api_token)
    for _ in range(2):
        await client.issue(api_token)
    # Invalid requests count as well.
    for content in (JANE, {}):
        answer = await client.post_json(URL, content, token=api_token)
        assert (answer.status, answer.error) == (429, "rate_limited")
        assert 1 <= int(answer.header("retry-after") or "") <= 3600
    assert (await client.post_json(f"{URL}/verify", {"token": token}, token=verifier)).status == 200
    # Logins have no API token, so they are not limited.
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    assert (await client.post_json(URL, JANE, token="wf_live_unknown")).status == 401


async def test_requests_are_unlimited_without_the_setting(client: Client, api_token: str) -> None:
    for _ in range(200):
        await client.issue(api_token)


@pytest.mark.parametrize("limit", ["often", "0", "10", "10/fortnight", "-1/minute", "100 per"])
async def test_an_invalid_rate_limit_is_refused_at_start(limit: str, database_url: str) -> None:
    with pytest.raises(SettingsError, match="SSO_RATE_LIMIT"):
        read_settings({"SSO_RATE_LIMIT": limit, "SSO_DATABASE_URL": database_url})


@pytest.mark.parametrize("limits", [{"max_in_flight": 3}])
async def test_requests_above_the_limit_of_a_worker_are_refused_at_once(
    client: Client, api_token: str, database: Database
) -> None:
    *tokens, token = [await client.issue(api_token) for _ in range(4)]
    late, ends = asyncio.Event(), asyncio.Event()
    headers = [("authorization", f"Bearer {api_token}")]
    # Requests with incomplete bodies are not in flight. The first body ends while the worker is full, the others later.
    sending = [
        asyncio.create_task(client.request("POST", URL, headers=headers, body=json.dumps(JANE).encode(), ends=end))
        for end in (late, ends, ends, ends, ends)
    ]
    await asyncio.sleep(0)
    with changing(database):
        waiting = [asyncio.create_task(client.another().get(f"{PAGE}?sso={token}")) for token in tokens]
        await asyncio.sleep(0)
        for target in (URL, f"{PAGE}?sso={token}", "/session"):
            assert is_overloaded(await client.get(target))
        assert is_overloaded(await client.request("PUT", "/session"))
        # The health check is exempt from the limit, and so is a wrong method on it.
        assert (await client.get("/healthz")).status == 200
        assert (await client.request("PUT", "/healthz")).status == 405
        late.set()
        assert is_overloaded(await sending[0])
    assert [answer.status for answer in await asyncio.gather(*waiting)] == [303] * 3
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303
    ends.set()
    statuses = [answer.status for answer in await asyncio.gather(*sending[1:])]
    assert sorted(statuses) == [201, 201, 201, 503]


def is_overloaded(answer: Answer) -> bool:
    return (answer.status, answer.error, answer.header("retry-after")) == (503, "overloaded", "2")


async def test_a_body_that_does_not_end_is_refused_after_the_time_out(
    client: Client, api_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sso_service.web.requests._BODY_TIMEOUT", 0.01)
    headers = [("authorization", f"Bearer {api_token}")]
    answer = await client.request("POST", URL, headers=headers, body=json.dumps(JANE).encode(), ends=asyncio.Event())
    assert (answer.status, answer.error, answer.header("connection")) == (408, "request_timeout", "close")
    # An unauthorized client gets 401 first.
    assert (
        await client.request("POST", URL, headers=[("authorization", "Bearer x")], ends=asyncio.Event())
    ).status == 401
