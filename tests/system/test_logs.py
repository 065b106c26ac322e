"""The log of a running service: text or JSON, with request IDs and without tokens."""

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
from tests.support.waiting import PATIENCE


def log_of_a_login(env: dict[str, str], log: Path, api_token: str) -> tuple[str, str]:
    """Run a service that issues a token, signs in with it and refuses it. Return its log and the token."""
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
def test_every_line_of_a_json_log_is_an_object(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = environment(database_url, tmp_path, keys_dir, SSO_LOG_FORMAT="json", SSO_ACCESS_LOG="1")
    text, token = log_of_a_login(env, tmp_path / "log", api_token)
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
def test_the_text_log_has_no_access_log_by_default(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    text, token = log_of_a_login(environment(database_url, tmp_path, keys_dir), tmp_path / "log", api_token)
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
async def test_a_request_id_is_accepted_only_if_it_is_safe_to_log(client: Client) -> None:
    async def id_for(*given: str) -> str:
        return (
            await client.request("GET", "/session", headers=[("x-request-id", value) for value in given])
        ).request_id

    for good in ("1", "6b2f4a0e-9d1c-4a1e-8f6e-1c2d3e4f5a6b", "Root=1-67891233-abcdef012345678912345678", "a." * 64):
        assert await id_for(good) == good
    made = [
        await id_for(*given)
        for given in (
            (),
            ("",),
            ("a b",),
            ('"',),
            ("a." * 65,),
            ("A" * 43,),
            (f"1.{'a' * 50}",),
            ("\u00e4",),
            ("a\r\nb",),
        )
    ]
    assert all(re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", each) for each in made)
    assert len(set(made)) == len(made)


def test_an_unknown_log_format_is_a_clear_error(tmp_path: Path) -> None:
    done = command("serve", env={"SSO_HOME": str(tmp_path), "SSO_LOG_FORMAT": "xml"})
    assert done.returncode == 1
    assert "SSO_LOG_FORMAT" in done.stderr
    assert "Traceback" not in done.stderr


@on_sqlite
def test_logins_succeed_while_the_log_cannot_be_written(
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
        service.wait(PATIENCE)
