"""The OpenAPI document holds while the database goes away and comes back."""

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from sso_service.database.engine import Database
from sso_service.permissions import Scope
from tests.integration.test_openapi import make_api_token
from tests.support._old import JANE, PAGE, Client, closed, serving
from tests.support.repository import SUPPORT

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)]

CONFIG = """
[auth.openapi]
api_token.bearer = "${API_TOKEN}"
studio_session.api_key = "${STUDIO_SESSION}"

[generation]
deterministic = true
database = "none"

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
]
"""All that hold whatever the state of the database is. The others expect to be given what they ask for."""


async def test_whatever_the_database_does_the_answer_is_one_that_is_documented(
    client: Client, database: Database, database_url: str, tmp_path: Path
) -> None:
    secret = make_api_token(database, *Scope)
    await client.get(f"{PAGE}?sso={await client.issue(secret)}")
    (tmp_path / "openapi.json").write_bytes((await client.get("/openapi.json")).body)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": str(SUPPORT / "schemathesis_hooks.py"),
        "API_TOKEN": secret,
        "STUDIO_SESSION": client.cookies["studio_session"],
    }
    arguments = f"run openapi.json --checks {','.join(CHECKS)} --phases examples,fuzzing --max-time 15 --workers 4"
    report = "--continue-on-failure --no-color --report har --report-har-path seen.har --url"
    with serving({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}, tmp_path / "log") as running:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", *arguments.split(), *report.split(), running.url),
            cwd=tmp_path,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = asyncio.create_task(process.communicate())
        while not output.done():
            await asyncio.wait([output], timeout=1)
            with closed(database_url):
                await asyncio.wait([output], timeout=1)
        told, _ = await output
        assert process.returncode == 0, told.decode()

        # When it is back, all is as it was.
        async with httpx.AsyncClient(base_url=running.url) as browser, asyncio.timeout(10):
            while (await browser.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.05)
            issued = await browser.post("/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {secret}"})
            assert (await browser.get(f"{PAGE}?sso={issued.json()['token']}")).status_code == 303
            assert (await browser.get("/session")).status_code == 200
    assert "Traceback" not in (tmp_path / "log").read_text()

    entries = json.loads((tmp_path / "seen.har").read_text())["log"]["entries"]
    statuses = Counter(entry["response"]["status"] for entry in entries)
    assert min(statuses[200], statuses[503]) > 20  # it was there, and it was away
