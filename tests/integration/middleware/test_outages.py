"""The middleware when the service fails, and the clients that it keeps."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.tools.ports import free_port
from sso_service.services.node import Node
from sso_service.web.app import create_app
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import JANE, PAGE
from tests.support.frontend import email_of, frontend, refusal_of, sign_in
from tests.support.hostile_links import refused
from tests.support.python_client import FORGED
from tests.support.wire import Wire, error_body, listening, never_responds

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("reply", "expected", "retry_after"),
    [
        ((503, error_body("unavailable"), {"Retry-After": "7"}), "unavailable", "7"),
        ((503, error_body("overloaded")), "overloaded", "2"),
        ((503, error_body("outcome_unknown"), {"Retry-After": "2"}), "outcome_unknown", "2"),
        ((502, b"<html>Bad gateway</html>"), "outcome_unknown", "2"),
        ((200, b"<html>Hello</html>"), "outcome_unknown", "2"),
        ((200, b"{}"), "outcome_unknown", "2"),
        ((302, b"", {"Location": "https://login.example/"}), "outcome_unknown", "2"),
        ((500, error_body("internal_error")), "outcome_unknown", "2"),
        ((401, error_body("missing_token")), "unavailable", "2"),
        ((403, error_body("insufficient_scope")), "unavailable", "2"),
        ((404, error_body("not_found")), "unavailable", "2"),
        (httpx.ConnectError("refused"), "unavailable", "2"),
        (httpx.ReadError("reset"), "outcome_unknown", "2"),
    ],
)
async def test_a_failure_of_the_service_is_reported_and_logged_once(
    caplog: pytest.LogCaptureFixture, reply: Any, expected: str, retry_after: str
) -> None:
    wire = Wire(reply)
    browser = Client(frontend(api_token="wf_live_secret", transport=wire))
    answer = await browser.get(f"{PAGE}?sso={FORGED}", accept="application/json")
    assert (answer.status, answer.error, answer.header("retry-after")) == (503, expected, retry_after)
    assert (refused(answer), answer.header("cache-control"), len(wire.requests)) == (True, "no-store", 1)
    (record,) = [record for record in caplog.records if record.name == "sso_service.client.middleware"]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert FORGED not in caplog.text
    assert "secret" not in caplog.text

    page = await browser.get(f"{PAGE}?sso={FORGED}", accept_language="de")
    assert (page.status, page.header("retry-after")) == (503, retry_after)
    unknown = "Wir wissen nicht, ob dieser Link benutzt wurde" in page.text
    assert unknown == (expected == "outcome_unknown")
    assert ("Der Link wurde nicht benutzt." in page.text) == (not unknown)


@pytest.mark.slow
async def test_sessions_survive_an_outage_of_the_service(
    browser: Client, client: Client, api_token: str, platform: str, clock: Clock
) -> None:
    await sign_in(browser, client, api_token)
    async with listening(never_responds) as (url, received):
        for where, expected in ((f"http://127.0.0.1:{free_port()}", "unavailable"), (url, "outcome_unknown")):
            browser.app = frontend(service_url=where, api_token=platform, timeout=1, clock=clock)
            assert await email_of(browser) == JANE["email"]
            token = await client.issue(api_token)
            assert await refusal_of(browser, f"{PAGE}?sso={token}") == (503, expected)
            assert await email_of(browser) == JANE["email"]
    assert len(received) == 1


# --- clients and event loops -----------------------------------------------------------------------------------------


class CountingTransport(httpx.ASGITransport):
    """A transport that counts how often it is closed."""

    closed = 0

    async def aclose(self) -> None:
        self.closed += 1


@asynccontextmanager
async def started(app: ASGIApp, state: dict[str, Any] | None) -> AsyncIterator[None]:
    """Start and stop `app` as a server with the lifespan protocol does."""
    incoming, outgoing = asyncio.Queue[Message](), asyncio.Queue[Message]()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, **({} if state is None else {"state": state})}
    lifespan = asyncio.ensure_future(app(scope, incoming.get, outgoing.put))
    await incoming.put({"type": "lifespan.startup"})
    assert (await outgoing.get())["type"] == "lifespan.startup.complete"
    yield
    await incoming.put({"type": "lifespan.shutdown"})
    assert (await outgoing.get())["type"] == "lifespan.shutdown.complete"
    await lifespan


async def test_one_client_is_kept_for_the_lifetime_of_the_server(
    service: Node, client: Client, api_token: str, verifier: str, clock: Clock
) -> None:
    transport = CountingTransport(create_app(service))
    app = frontend(api_token=verifier, transport=transport, clock=clock)
    state: dict[str, Any] = {}

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": dict(state)}, receive, send)

    browser = Client(with_state)
    before = transport.closed
    async with started(app, state):
        for _ in range(3):
            await sign_in(browser, client, api_token)
        assert transport.closed == before
    assert transport.closed == before + 1


@pytest.mark.parametrize("state", [None, {}])
async def test_without_lifespan_state_each_login_closes_its_client(
    service: Node,
    client: Client,
    api_token: str,
    verifier: str,
    clock: Clock,
    state: dict[str, Any] | None,
) -> None:
    transport = CountingTransport(create_app(service))
    app = frontend(api_token=verifier, transport=transport, clock=clock)
    browser = Client(app)
    await sign_in(browser, client, api_token)
    await sign_in(browser, client, api_token)
    assert transport.closed == 2
    async with started(app, state):
        await sign_in(browser, client, api_token)
    assert transport.closed == 4
