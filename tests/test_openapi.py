"""The OpenAPI document says what the service does, all of it and nothing else, and the service does what it says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import html5lib
import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from sso_service.client import SSOClient
from sso_service.database import administration
from sso_service.database.engine import Database
from sso_service.permissions import Scope
from sso_service.service import Service
from sso_service.settings import Settings
from sso_service.web.app import ShortWay, create_app
from sso_service.web.openapi import document
from tests.support import ACCOUNT, JANE, PAGE, Client, Running, serving

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)]

LOGIN = "/{path}"
"""How the document writes "any other path"."""


@pytest.fixture
def secret(database: Database) -> str:
    """An API token with all scopes."""
    with database.connect() as connection, database.writing(connection):
        _, secret = administration.create_api_token(
            connection, account_id=ACCOUNT, name="tests", scopes=frozenset(Scope), now=1
        )
    return secret


@pytest.fixture
def running(settings: Settings, keys_dir: Path, tmp_path: Path) -> Iterator[Running]:
    env = {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    with serving(env, tmp_path / "log") as running:
        yield running


def check(running: Running, *headers: str, mode: str = "all") -> "subprocess.CompletedProcess[str]":
    """Requests of every kind that the document allows, and of kinds that it does not, and a look at each answer."""
    # All operations need the same headers here, and warnings would be about that.
    arguments = ["--config-file", str(Path(__file__).parent / "schemathesis.toml"), "run", "--no-color"]
    arguments += [
        "--checks=all",
        "--max-examples=25",
        "--warnings=off",
        f"--mode={mode}",
        f"{running.url}/openapi.json",
    ]
    for header in headers:
        arguments += ["--header", header]
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *arguments],
        cwd=running.log.parent,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_answer_to_every_request_is_as_the_document_says(running: Running, secret: str) -> None:
    done = check(running, f"Authorization: Bearer {secret}")
    assert done.returncode == 0, done.stdout
    assert "14 selected / 14 total" in done.stdout


def test_so_is_every_answer_to_who_is_signed_in(running: Running, secret: str) -> None:
    with SSOClient(running.url, secret) as client:
        answer = httpx.get(client.login_url(running.url + PAGE, **JANE))
    cookie = answer.headers["set-cookie"].partition(";")[0]
    # Nothing that the document forbids: a cookie that should be missing is sent all the same.
    headers = [f"Cookie: {cookie}", "Sec-Fetch-Site: same-origin", f"X-Original-URI: {PAGE}"]
    done = check(running, *headers, mode="positive")
    assert done.returncode == 0, done.stdout


async def test_the_document_is_openapi_3_1(client: Client) -> None:
    content = (await client.get("/openapi.json")).json()
    assert content == document()
    assert content["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(content).validate()


def test_the_document_has_every_route_and_nothing_else(service: Service) -> None:
    app = create_app(service)
    assert isinstance(app, ShortWay)
    routes = {(method.lower(), route.path) for route in app.routes for method in (route.methods or set()) - {"HEAD"}}
    documented = {(method, path) for path, methods in document()["paths"].items() for method in methods}
    assert {one for one in documented if one[1] != LOGIN} == routes


async def test_the_page_needs_nothing_and_nobody_else(client: Client) -> None:
    answer = await client.get("/docs")
    assert answer.status == 200
    html5lib.HTMLParser(strict=True).parse(answer.text)
    assert "<script" not in answer.text
    assert set(re.findall(r'(?:src|href|action)="([^"#]+)', answer.text)) == {"/openapi.json"}
    policy = answer.header("content-security-policy") or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


async def test_the_page_tells_of_every_operation_and_every_error(client: Client) -> None:
    page = (await client.get("/docs")).text
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert f'id="{operation["operationId"]}"' in page
            assert "curl" in operation["x-codeSamples"][0]["source"]
    for code in document()["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]:
        assert f"<code>{code}</code>" in page, code
