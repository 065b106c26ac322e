"""The log of a running service: text or JSON, with request IDs and without tokens."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.tools.ports import free_port
from sso_service.observability.limit import LINES
from sso_service.tokens import ref
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import on_sqlite
from tests.support.processes import command, serving, wait_for_port
from tests.support.spelling import contains, headers_with, targets_with
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


CLAIMED = [
    "203.0.113.9\x85INFO login forged=yes",
    "203.0.113.9\u00c2\x85INFO login forged=yes",
    "203.0.113.9\x9b31mforged=yes",
    "203.0.113.9 user_id=1 forged=yes",
    "203.0.113.9\tforged=yes",
    "admin forged=yes",
    "admin",
    "[::1%forged=yes]",
    '","forged":"yes',
    "1.2.3.4\u00e2\u0080\u00ae",  # a bidi control in UTF-8
]


@on_sqlite
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_made_up_client_address_forges_neither_a_line_nor_a_field(
    log_format: str, database_url: str, tmp_path: Path, keys_dir: Path
) -> None:
    env = environment(database_url, tmp_path, keys_dir, SSO_ACCESS_LOG="1", SSO_LOG_FORMAT=log_format)
    with serving(env, tmp_path / "log") as running, httpx.Client(base_url=running.url) as client:
        for claimed in [*CLAIMED, "2001:DB8::1"]:
            client.get(f"{PAGE}?sso={'A' * 43}", headers=[(b"X-Forwarded-For", claimed.encode("latin-1"))])
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
            raw.sendall(b"FORGED user_id=1\x85\xe2\x80\xa8 forged=yes\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
    written = (tmp_path / "log").read_text("utf-8")
    assert written.isascii()
    assert written.replace("\n", "").isprintable()
    lines = written.splitlines()
    if log_format == "json":
        requests = [each for each in map(json.loads, lines) if each.get("event") == "request"]
        assert [each["client"] for each in requests] == ["invalid"] * len(CLAIMED) + ["2001:db8::1"]
        assert all("forged" not in json.loads(line) for line in lines)
    assert "forged" not in written
    # At least one refusal is logged; their number within a second is limited.
    assert [line for line in lines if "login_refused" in line and "client" in line]


@on_sqlite
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_login_token_is_not_logged_wherever_it_stands_in_a_request(
    log_format: str, database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = environment(database_url, tmp_path, keys_dir, SSO_ACCESS_LOG="1", SSO_LOG_FORMAT=log_format)
    with serving(env, tmp_path / "log") as running, httpx.Client(base_url=running.url) as client:
        bearer = {"Authorization": f"Bearer {api_token}"}
        token: str = client.post("/v1/sso_tokens", json=JANE, headers=bearer).json()["token"]
        address = (client.base_url.host, client.base_url.port or 0)
        for target in targets_with(token):
            with closing(HTTPConnection(*address)) as connection:
                connection.request("GET", target)
                assert connection.getresponse().status in {400, 401, 403, 404}, target
        for header in headers_with(token):
            assert "redacted" not in client.get("/x", headers=[header]).headers["X-Request-ID"]
        for raw in (f"{token} / HTTP/1.1\r\n\r\n", f"GET {token}\r\n\r\n", f"GET / HTTP/{token}\r\n{token}\r\n\r\n"):
            with socket.create_connection(address) as connection:
                connection.sendall(raw.encode())
                connection.recv(100)
        assert client.get(f"{PAGE}?sso={token}").status_code == 303  # the token was unused all the time
    written = (tmp_path / "log").read_text("utf-8")
    assert "/x" in written
    assert not contains(written, token)
    assert api_token not in written


@on_sqlite
def test_a_flood_of_data_that_is_not_http_is_logged_at_a_limited_rate(
    database_url: str, tmp_path: Path, keys_dir: Path
) -> None:
    with serving(environment(database_url, tmp_path, keys_dir), tmp_path / "log") as running:
        url = httpx.URL(running.url)
        started = time.monotonic()
        for _ in range(10 * LINES):
            with socket.create_connection((url.host, url.port or 0)) as raw:
                raw.sendall(b"\x00\r\n\r\n")
                assert raw.recv(100).startswith(b"HTTP/1.1 400")
        seconds = time.monotonic() - started
    lines = (tmp_path / "log").read_text().count("Invalid HTTP request received")
    assert 0 < lines <= LINES * (seconds + 2)


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
