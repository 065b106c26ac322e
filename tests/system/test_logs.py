"""The log of a running service: text or JSON, a request's id on every line of it, and no token on any."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.tools.ports import free_port
from sso_service.tokens import ref
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import on_sqlite
from tests.support.processes import command, serving, wait_for_port


def serve_some(env: dict[str, str], log: Path, api_token: str) -> tuple[str, str]:
    """The log of a service that issued a token, signed in with it, and refused it; and that token."""
    with serving(env, log) as running, httpx.Client(base_url=running.url) as client:
        bearer = {"Authorization": f"Bearer {api_token}"}
        token: str = client.post("/v1/sso_tokens", json=JANE, headers=bearer).json()["token"]
        for query in (f"a=1&sso={token}&b=2", f"%73so={token}"):
            client.get(f"{PAGE}?{query}", headers={"X-Request-ID": "from-the-proxy"})
        client.cookies.clear()
        client.get(f"{PAGE}?sso={token}")
        client.post(f"/session?sso={token}")
        client.get("/healthz")
    return log.read_text(), token


def environment(database_url: str, tmp_path: Path, keys_dir: Path, **others: str) -> dict[str, str]:
    return {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir), **others}


@on_sqlite
def test_every_line_is_a_json_object_if_so_configured(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = environment(database_url, tmp_path, keys_dir, SSO_LOG_FORMAT="json", SSO_ACCESS_LOG="1")
    text, token = serve_some(env, tmp_path / "log", api_token)
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert all(re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z", line["time"]) for line in lines)
    assert {line["level"] for line in lines} == {"info"}
    assert any("startup complete" in line.get("message", "") for line in lines)

    (login,) = [line for line in lines if line.get("event") == "login"]
    assert login["ref"] == ref(token)
    assert login["request_id"] == "from-the-proxy"
    assert login["client"] == "127.0.0.1"
    (refused,) = [line for line in lines if line.get("event") == "login_refused"]
    requests = [line for line in lines if line.get("event") == "request"]
    assert [(line["method"], line["path"], line["status"]) for line in requests] == [
        ("POST", "/v1/sso_tokens", 201),
        ("GET", f"{PAGE}?a=1&b=2", 303),
        ("GET", PAGE, 303),
        ("GET", PAGE, 401),
        ("POST", "/session", 405),
        ("GET", "/healthz", 200),
    ]
    assert requests[3]["request_id"] == refused["request_id"] != "from-the-proxy"
    assert all(0 < line["milliseconds"] < 60_000 for line in requests)
    assert token not in text
    assert api_token not in text


@on_sqlite
def test_text_has_the_same_and_no_access_log_unless_asked_for(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    text, token = serve_some(environment(database_url, tmp_path, keys_dir), tmp_path / "log", api_token)
    (login,) = [line for line in text.splitlines() if " login " in line]
    assert re.fullmatch(
        rf"\S+Z INFO    login user_id=1 account_id=123 ref={ref(token)} way=browser "
        "request_id=from-the-proxy client=127.0.0.1",
        login,
    )
    assert "/session" not in text
    assert token not in text
    assert api_token not in text


@on_sqlite
@pytest.mark.anyio
async def test_a_request_id_is_taken_over_if_a_log_can_hold_it_and_made_if_not(client: Client) -> None:
    async def id_of(*given: str) -> str:
        return (
            await client.request("GET", "/session", headers=[("x-request-id", value) for value in given])
        ).request_id

    for good in ("1", "6b2f4a0e-9d1c-4a1e-8f6e-1c2d3e4f5a6b", "Root=1-67891233-abcdef012345678912345678", "a" * 128):
        assert await id_of(good) == good
    made = [await id_of(*given) for given in ((), ("",), ("a b",), ('"',), ("a" * 129,), ("\u00e4",), ("a\r\nb",))]
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", each) for each in made)
    assert len(set(made)) == len(made)


def test_a_format_that_there_is_not_is_a_clear_error(tmp_path: Path) -> None:
    done = command("serve", env={"SSO_HOME": str(tmp_path), "SSO_LOG_FORMAT": "xml"})
    assert done.returncode == 1
    assert "SSO_LOG_FORMAT" in done.stderr
    assert "Traceback" not in done.stderr


@on_sqlite
def test_a_log_that_cannot_be_written_keeps_nobody_from_signing_in(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = environment(database_url, tmp_path, keys_dir, SSO_PORT=str(port := free_port()), SSO_ACCESS_LOG="1")
    with Path("/dev/full").open("w") as full:
        service = subprocess.Popen(
            [sys.executable, "-m", "sso_service", "serve"], env={**os.environ, **env}, stderr=full
        )
    try:
        wait_for_port(port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            bearer = {"Authorization": f"Bearer {api_token}"}
            for _ in range(3):
                token = client.post("/v1/sso_tokens", json=JANE, headers=bearer).json()["token"]
                assert client.get(f"{PAGE}?sso={token}").status_code == 303
    finally:
        service.terminate()
        service.wait(20)
