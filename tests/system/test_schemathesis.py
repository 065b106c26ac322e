"""Schemathesis: the OpenAPI document holds, also while the database goes away and comes back."""

import asyncio
import json
import os
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from anyio import run_process

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

pytestmark = pytest.mark.anyio

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


@on_postgresql
async def test_whatever_the_database_does_the_answer_is_one_that_is_documented(
    client: Client, database: Database, database_url: str, tmp_path: Path
) -> None:
    _, secret = make_api_token(database, scopes=frozenset(Scope))
    await client.get(f"{PAGE}?sso={await client.issue(secret)}")
    (tmp_path / "openapi.json").write_bytes((await client.get("/openapi.json")).body)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
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


@on_sqlite
async def test_schemathesis_finds_nothing_that_is_not_as_documented(
    client: Client, database: Database, database_url: str, tmp_path: Path
) -> None:
    _, secret = make_api_token(database, scopes=frozenset(Scope))
    await client.get(f"{PAGE}?sso={await client.issue(secret)}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SCHEMATHESIS_HOOKS": str(SUPPORT / "schemathesis_hooks.py"),
        "API_TOKEN": secret,
        "STUDIO_SESSION": client.cookies["studio_session"],
    }
    # From a file: the operation that it loads the document from would not be tested.
    (tmp_path / "openapi.json").write_bytes((await client.get("/openapi.json")).body)
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "--config-file",
        str(SUPPORT / "schemathesis.toml"),
    ]
    arguments = "run openapi.json --checks all --no-color --report har --report-har-path seen.har --url"
    with serving({"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url}, tmp_path / "log") as running:
        done = await run_process(
            [*command, *arguments.split(), running.url], cwd=tmp_path, env=environment, check=False
        )
    told = done.stdout.decode()
    assert done.returncode == 0, told + done.stderr.decode()
    assert f"Tested: {len(OPERATIONS)}" in told

    # It was not for lack of trying: every success that is documented has occurred.
    seen = set()
    for entry in json.loads((tmp_path / "seen.har").read_text())["log"]["entries"]:
        method, path = entry["request"]["method"], urlsplit(entry["request"]["url"]).path
        path = path if path in DOCUMENT["paths"] else LOGIN
        seen.add((method, path, str(entry["response"]["status"])))
    successes = {
        (method, path, status)
        for (method, path), operation in OPERATIONS.items()
        for status in operation["responses"]
        if status < "400" and path != "/sso/confirm"
    }
    # These are pages, which are asked for by `Accept`, and OpenAPI knows no parameter of that name.
    successes -= {("POST", path, "200") for path in SIGN_OUTS}
    assert successes <= seen
