"""`/metrics`: what is counted, the state of the node, and the Bearer token that protects both."""

import subprocess
import sys
from pathlib import Path

import pytest

from sso_service import keyring
from sso_service.database import open_database
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.permissions import Role, Scope
from sso_service.services.node import Node
from sso_service.settings import read_settings
from sso_service.web.app import create_app
from tests.support import administration
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.metrics import Samples, sample_of, samples_in
from tests.support.outages import a_database_that

pytestmark = pytest.mark.anyio


class Counted:
    """The increase of counters since `start`: all tests of this process share the counters."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before: Samples = {}

    async def start(self) -> "Counted":
        self._before = await self._now()
        return self

    async def increase(self, name: str, **labels: str) -> float:
        return sample_of(await self._now(), name, labels) - sample_of(self._before, name, labels)

    async def _now(self) -> Samples:
        answer = await self._client.get("/metrics")
        assert answer.status == 200
        assert (answer.header("content-type") or "").startswith("text/plain")
        assert answer.header("cache-control") == "no-store"
        return samples_in(answer.text)


async def test_issues_and_logins_are_counted_by_outcome(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock
) -> None:
    counted = await Counted(client).start()
    used = await client.issue(api_token)
    browser = client.another()
    await browser.get(f"{PAGE}?sso={used}")
    await browser.get(f"{PAGE}?sso={used}")
    await client.another().get(f"{PAGE}?sso={used}")
    await client.another().get(f"{PAGE}?sso=x")
    await client.another().get(f"{PAGE}?sso={'A' * 43}")
    await client.post_json("/v1/sso_tokens/consume", {"token": await client.issue(api_token)}, token=verifier)
    await client.post_json("/v1/sso_tokens/revoke", {"token": await client.issue(api_token)}, token=api_token)
    await browser.get(f"{PAGE}?sso={await client.issue(api_token, JOHN)}")
    late = await client.issue(api_token)
    clock.advance(300)
    await client.another().get(f"{PAGE}?sso={late}")
    await client.post_json("/v1/sso_tokens/consume", {"token": late}, token=verifier)

    assert await counted.increase("sso_tokens_issued_total", user_created="yes") == 2
    assert await counted.increase("sso_tokens_issued_total", user_created="no") == 3
    assert await counted.increase("sso_tokens_revoked_total") == 1
    for outcome, number in {
        "signed_in": 1,
        "already_signed_in": 1,
        "asked": 1,
        "consumed": 1,
        "malformed": 1,
        "bad_signature": 1,
        "expired": 1,
        "no_access": 0,
    }.items():
        assert await counted.increase("sso_logins_total", way="browser", outcome=outcome) == number, outcome
    assert await counted.increase("sso_logins_total", way="api", outcome="signed_in") == 1
    assert await counted.increase("sso_logins_total", way="api", outcome="expired") == 1


async def test_refused_api_tokens_are_counted_by_reason(client: Client, api_token: str, verifier: str) -> None:
    counted = await Counted(client).start()
    await client.post_json("/v1/sso_tokens", JANE, token="wf_live_unknown")
    await client.post_json("/v1/sso_tokens", JANE, token=verifier)
    assert await counted.increase("sso_api_refusals_total", reason="not_authenticated") == 1
    assert await counted.increase("sso_api_refusals_total", reason="insufficient_scope") == 1


async def test_requests_are_counted_under_a_fixed_set_of_routes(client: Client, api_token: str) -> None:
    counted = await Counted(client).start()
    token = await client.issue(api_token)
    await client.post_json("/v1/sso_tokens", JANE)
    await client.get(f"/client/{ACCOUNT}/whatever?sso={token}")
    for path in ("/a", "/b", "/c?sso", "/d?x=1"):
        await client.get(path)
    assert await counted.increase("sso_requests_total", route="/v1/sso_tokens", status="201") == 1
    assert await counted.increase("sso_requests_total", route="/v1/sso_tokens", status="401") == 1
    assert await counted.increase("sso_request_seconds_count", route="/v1/sso_tokens") == 2
    assert await counted.increase("sso_requests_total", route="page", status="404") == 3
    assert await counted.increase("sso_requests_total", route="login", status="401") == 1
    assert await counted.increase("sso_requests_total", route="login", status="403") == 1


async def test_a_request_whose_client_disconnects_is_counted_as_499(client: Client, api_token: str) -> None:
    counted = await Counted(client).start()
    with pytest.raises(IndexError):  # raised by the test client, because there is no response
        await client.request("POST", "/v1/sso_tokens", headers=[("authorization", f"Bearer {api_token}")], pieces=[])
    assert await counted.increase("sso_requests_total", route="/v1/sso_tokens", status="499") == 1


async def test_size_and_duration_of_batches_are_measured(client: Client, api_token: str) -> None:
    counted = await Counted(client).start()
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    assert await counted.increase("sso_batch_size_count", kind="redeem") == 1
    assert await counted.increase("sso_batch_size_sum", kind="redeem") == 1
    assert await counted.increase("sso_batch_seconds_count", kind="redeem") == 1


async def test_the_state_of_the_node_is_exposed(client: Client, service: Node, clock: Clock, keys_dir: Path) -> None:
    async def gauges() -> dict[str, float]:
        samples = samples_in((await client.get("/metrics")).text)
        return {name: samples[name, frozenset()] for name, labels in samples if not labels}

    now = await gauges()
    assert now["sso_ready"] == 1
    assert now["sso_signing_key_age_seconds"] in {3600, 3601}
    assert abs(now["sso_clock_difference_seconds"]) < 5
    clock.advance(100)
    later = await gauges()
    assert later["sso_ready"] == 0
    assert later["sso_signing_key_age_seconds"] == now["sso_signing_key_age_seconds"] + 100
    assert 95 < later["sso_clock_difference_seconds"] < 105
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    service.keys.refresh()
    assert (await gauges())["sso_signing_key_age_seconds"] == 0


async def test_metrics_are_available_during_a_database_outage(tmp_path: Path, keys_dir: Path) -> None:
    with a_database_that("refuses to connect", tmp_path) as url:
        settings = read_settings({"SSO_DATABASE_URL": url})
        service = Node(settings, open_database(settings), KeyDirectory(keys_dir))
        answer = await Client(create_app(service)).get("/metrics")
        service.close()
    samples = samples_in(answer.text)
    assert sample_of(samples, "sso_ready") == 0
    assert ("sso_clock_difference_seconds", frozenset()) not in samples


@on_sqlite
async def test_metrics_and_readiness_details_require_the_metrics_token(
    database: Database, keys_dir: Path, clock: Clock, api_token: str
) -> None:
    settings = read_settings({"SSO_METRICS_TOKEN": "hunter2"})
    client = Client(create_app(Node(settings, database, KeyDirectory(keys_dir), clock=clock)))
    clock.advance(100)  # so that there is something to be told

    async def get(path: str, secret: str | None) -> Answer:
        return await client.request("GET", path, headers=[("authorization", f"Bearer {secret}")] if secret else [])

    for secret in (None, "hunter", "hunter22", "", api_token, "h\u00fcnter2"):
        refused = await get("/metrics", secret)
        assert refused.status == 401
        assert refused.error == "missing_token"
        assert refused.header("www-authenticate") == "Bearer"
        assert "sso_" not in refused.text.replace("sso_tokens", "")
        assert (await get("/readyz", secret)).json() == {"status": "not ready"}
    assert "sso_requests_total" in (await get("/metrics", "hunter2")).text
    assert set((await get("/readyz", "hunter2")).json()["problems"]) == {"clock"}


FORWARDING = [
    *("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Uri", "X-Real-IP", "Forwarded", "Via"),
    *("X-Original-URI", "X-Original-Forwarded-For", "X-Client-IP", "X-Cluster-Client-IP"),
]


@on_sqlite
async def test_without_a_metrics_token_only_clients_of_the_same_machine_see_metrics_and_details(
    client: Client, clock: Clock
) -> None:
    clock.advance(100)  # so that there is a problem to report

    async def sees(address: str, *headers: tuple[str, str]) -> bool:
        from_there = Client(client.app, address=address)
        ready = (await from_there.request("GET", "/readyz", headers=headers)).json()
        metrics = await from_there.request("GET", "/metrics", headers=headers)
        assert ready["status"] == "not ready"
        assert metrics.status == (200 if "problems" in ready else 401)
        return "problems" in ready

    for local in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "unix"):
        assert await sees(local), local
        for name in FORWARDING:
            for value in ("127.0.0.1", "", "localhost"):
                assert not await sees(local, (name, value)), (local, name)
    for remote in ("192.0.2.1", "10.0.0.1", "0.0.0.0", "::", "fe80::1", "::ffff:10.0.0.1", "localhost", "", "unix:x"):
        assert not await sees(remote), remote
        assert not await sees(remote, ("Authorization", "Bearer ")), remote


@on_sqlite
async def test_no_metric_contains_an_address_or_a_token(client: Client, api_token: str, database: Database) -> None:
    token = await client.issue(api_token)
    await client.get(f"{PAGE}?sso={token}")
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    text = (await client.get("/metrics")).text
    assert not [secret for secret in (token, api_token, JANE["email"], str(Scope.WRITE_SSO)) if secret in text]


def test_a_command_does_not_import_the_metrics() -> None:
    """`serve` is a command. The directory of the counters must be set before `prometheus_client` is imported."""
    program = "import sys, sso_service.cli.main; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
