"""The Python client, and frontends with its middleware, over the network."""

import asyncio
import html
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from scripts.tools.ports import free_port
from sso_service import tokens
from sso_service.client import AsyncSSOClient, SSOClient, TokenConsumed, TokenExpired
from sso_service.database.transactions import Database
from sso_service.key_directory import KeyDirectory
from sso_service.tokens import Claims
from tests.support.api import BOTH, make_api_token
from tests.support.client import Client
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE
from tests.support.databases import on_sqlite
from tests.support.frontend import fastapi_frontend, frontend
from tests.support.processes import serving, wait_for_port
from tests.support.python_client import Kind, call, error_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", [SSOClient, AsyncSSOClient])
@on_sqlite
async def test_the_client_works_with_a_service_over_the_network(
    kind: Kind, database: Database, database_url: str, keys_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = make_api_token(database, scopes=BOTH)[1]
    with serving({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}, tmp_path / "log") as running:
        call_client = partial(call, kind, url=running.url, api_token=secret)
        url = await call_client("login_url", studio_url=f"{running.url}{PAGE}?chromeless=1#top", **JANE)
        async with httpx.AsyncClient() as browser:
            answer = await browser.get(url)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{PAGE}?chromeless=1")

        token = (await call_client("create_token", **JANE)).token
        assert (await call_client("verify", token=token)).active
        assert (await call_client("consume", token=token)).user.email == JANE["email"]
        assert type(await error_of(call_client("consume", token=token))) is TokenConsumed
        assert await call_client("revoke", token=token) is False
        key = KeyDirectory(keys_dir)
        key.refresh()
        signing = key.ring.signing_key(int(time.time()))
        old = tokens.sign(Claims(int(time.time()), 1, ACCOUNT, 0), signing.token_key)
        assert type(await error_of(call_client("consume", token=old))) is TokenExpired
    for each in (secret, token, old):
        assert each not in caplog.text


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """Serve `app` with uvicorn until the end of the block. Yields its URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@on_sqlite
@pytest.mark.parametrize("make", [frontend, fastapi_frontend])
def test_a_frontend_signs_users_in_over_the_network(
    make: Callable[..., ASGIApp],
    database: Database,
    database_url: str,
    keys_dir: Path,
    api_token: str,
    verifier: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}
    headers = {"Authorization": f"Bearer {api_token}"}
    with serving(env, tmp_path / "log") as service, httpx.Client(headers=headers) as intranet:

        def issue(person: dict[str, str]) -> str:
            token: str = intranet.post(f"{service.url}/v1/sso_tokens", json=person).json()["token"]
            return token

        jane, again, john = issue(JANE), issue(JANE), issue(JOHN)
        app = make(service_url=service.url, api_token=verifier)
        with running(app) as url, httpx.Client(base_url=url) as browser:
            assert browser.get("/edit").status_code == 403
            answer = browser.get(f"{PAGE}?a=1&sso={jane}")
            assert (answer.status_code, answer.headers["location"]) == (303, f"{PAGE}?a=1")
            assert browser.get("/edit").status_code == 204
            assert browser.get("/who").json()["email"] == JANE["email"]
            assert browser.get(f"{PAGE}?sso={jane}").status_code == 303
            question = browser.get(f"{PAGE}?sso={john}")
            assert question.status_code == 200
            (href,) = re.findall(r'<a [^>]*href="([^"]*)"', question.text)
            assert browser.get(html.unescape(href)).headers["location"] == PAGE
            assert browser.get("/who").json()["email"] == JOHN["email"]
            assert httpx.get(f"{url}/?sso={jane}").status_code == 401
        # The next server of the same application has another event loop.
        with running(app) as url:
            assert httpx.get(f"{url}/?sso={again}").status_code == 303
        for person in (JANE, JOHN):
            assert asyncio.run(Client(app).get(f"/?sso={issue(person)}")).status == 303
    with running(app) as url:
        answer = httpx.get(f"{url}/?sso={jane}")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    access_log = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert any(f"GET {PAGE}?a=1 HTTP/1.1" in line for line in access_log)
    for secret in (jane, again, john, api_token, verifier):
        assert not any(secret in record.getMessage() for record in caplog.records if record.name.startswith("uvicorn"))
        assert secret not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("sso_service"))
