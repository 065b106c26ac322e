"""Schemathesis: the running service matches the OpenAPI document, also while the database goes away and returns."""

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from sso_service.database.transactions import Database
from sso_service.permissions import Scope
from tests.support.api import make_api_token
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import on_postgresql, on_sqlite
from tests.support.openapi import DOCUMENT, LOGIN, OPERATIONS, SIGN_OUTS
from tests.support.outages import closed
from tests.support.processes import serving
from tests.support.repository import ROOT, SUPPORT
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.anyio

CONFIG_FOR_OUTAGES = """
[auth.openapi]
api_token.bearer = "${API_TOKEN}"
studio_session.api_key = "${STUDIO_SESSION}"

[generation]
deterministic = true
database = "none"

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
CHECKS_FOR_OUTAGES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
"""The checks that hold in any state of the database. The others expect that every valid request succeeds."""


async def start_schemathesis(
    directory: Path, client: Client, secret: str, *, config: Path, options: str, url: str
) -> asyncio.subprocess.Process:
    """Start schemathesis against `url`, with the session of `client`. It records responses in `directory`/seen.har."""
    # A file, because schemathesis does not test the operation that it loads the document from.
    (directory / "openapi.json").write_bytes((await client.get("/openapi.json")).body)
    arguments = f"run openapi.json {options} --no-color --report har --report-har-path seen.har --url {url}"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), *arguments.split()),
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SCHEMATHESIS_HOOKS": str(SUPPORT / "schemathesis_hooks.py"),
            "API_TOKEN": secret,
            "STUDIO_SESSION": client.cookies["studio_session"],
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


def seen(directory: Path) -> list[dict[str, Any]]:
    """Return the recorded requests with their responses."""
    entries: list[dict[str, Any]] = json.loads((directory / "seen.har").read_text())["log"]["entries"]
    return entries


@on_sqlite
async def test_every_response_of_the_service_is_documented(
    client: Client, database: Database, database_url: str, tmp_path: Path
) -> None:
    _, secret = make_api_token(database, scopes=frozenset(Scope))
    await client.get(f"{PAGE}?sso={await client.issue(secret)}")
    with serving({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}, tmp_path / "log") as running:
        process = await start_schemathesis(
            tmp_path,
            client,
            secret,
            config=SUPPORT / "schemathesis.toml",
            options="--checks all",
            url=running.url,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert f"Tested: {len(OPERATIONS)}" in output.decode()

    # Every documented success occurred, so the tests above did reach the endpoints.
    responses = set()
    for entry in seen(tmp_path):
        method, path = entry["request"]["method"], urlsplit(entry["request"]["url"]).path
        responses.add((method, path if path in DOCUMENT["paths"] else LOGIN, str(entry["response"]["status"])))
    successes = {
        (method, path, status)
        for (method, path), operation in OPERATIONS.items()
        for status in operation["responses"]
        if status < "400" and path != "/sso/confirm"
    }
    # Pages are requested with `Accept`, which OpenAPI does not permit as a parameter.
    successes -= {("POST", path, "200") for path in SIGN_OUTS}
    assert successes <= responses


@on_postgresql
async def test_every_response_during_outages_is_documented(
    client: Client, database: Database, database_url: str, tmp_path: Path
) -> None:
    _, secret = make_api_token(database, scopes=frozenset(Scope))
    await client.get(f"{PAGE}?sso={await client.issue(secret)}")
    (config := tmp_path / "outages.toml").write_text(CONFIG_FOR_OUTAGES)
    options = f"--checks {','.join(CHECKS_FOR_OUTAGES)} --phases examples,fuzzing --max-examples 40 --workers 4"
    with serving({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}, tmp_path / "log") as running:
        process = await start_schemathesis(
            tmp_path, client, secret, config=config, options=f"{options} --continue-on-failure", url=running.url
        )
        communicating = asyncio.create_task(process.communicate())
        while not communicating.done():
            await asyncio.wait([communicating], timeout=1)
            with closed(database_url):
                await asyncio.wait([communicating], timeout=1)
        output, _ = await communicating
        assert process.returncode == 0, output.decode()

        # After the last outage the service works as before.
        async with httpx.AsyncClient(base_url=running.url) as browser, asyncio.timeout(PATIENCE):
            while (await browser.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - no event announces it
                await asyncio.sleep(0.05)
            issued = await browser.post("/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {secret}"})
            assert (await browser.get(f"{PAGE}?sso={issued.json()['token']}")).status_code == 303
            assert (await browser.get("/session")).status_code == 200
    assert "Traceback" not in (tmp_path / "log").read_text()

    statuses = Counter(entry["response"]["status"] for entry in seen(tmp_path))
    assert min(statuses[200], statuses[503]) > 20  # the database was reachable, and unreachable, for many requests
