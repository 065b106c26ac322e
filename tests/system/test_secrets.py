"""Secrets do not leak: no token, API token, cookie or key occurs in logs, files, tables, responses or messages.

One test uses every part of the service, correctly and incorrectly. It then searches everything that the service wrote
for every secret that occurred.
"""

import hashlib
import json
import re
import secrets
import socket
import sqlite3
import stat
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from sso_service import keyring
from sso_service.keyring import SigningKey
from tests.support.command_line import API_TOKEN, run
from tests.support.data import JANE, JOHN, PAGE
from tests.support.databases import emptied
from tests.support.processes import Running, serving
from tests.support.spelling import contains, headers_with, targets_with
from tests.support.waiting import PATIENCE

PART_LENGTH = 12
"""Length of the parts of secrets that are searched for. A random match of this length is practically impossible."""
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"


@dataclass(slots=True)
class Recording:
    """The secrets that occurred, by name, and the responses and messages of the service."""

    env: dict[str, str]
    tokens: dict[str, str] = field(default_factory=dict)
    api_tokens: dict[str, str] = field(default_factory=dict)
    cookies: dict[str, str] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    answers: list[bytes] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)

    def run(self, *arguments: str) -> str:
        """Run a command, and add its output to `messages`."""
        outcome = run(*arguments, env=self.env)
        self.messages.append((outcome.out + outcome.err).encode())
        return outcome.out

    def add_keys(self, directory: Path) -> None:
        """Add the current keys of a directory."""
        entries, _ = keyring.load(directory)
        self.keys |= {key.id: key.secret for key in entries.values() if isinstance(key, SigningKey)}

    def encodings(self) -> Iterator[tuple[str, bytes]]:
        """Yield every form in which a secret, or a part of one, could occur, with a description."""
        for name, token in self.tokens.items():
            # Of its 32 bytes, the first 16 are claims, which are not secret. The tag is the secret part.
            yield from encoded(f"login token {name}", token.encode(), urlsafe_b64decode(token + "=")[16:])
            yield from parts_of(f"login token {name}", token[22:])
        for name, secret in self.api_tokens.items():
            yield from encoded(f"API token {name}", secret.encode())
            yield from parts_of(f"API token {name}", secret.removeprefix("wf_live_"))
        for name, cookie in self.cookies.items():
            yield from encoded(f"cookie {name}", cookie.encode())
            yield from parts_of(f"cookie {name}", cookie.rpartition(".")[2])
        for key_id, secret_of_key in self.keys.items():
            key = SigningKey(key_id, secret_of_key, created_at=0, signs_from=0)
            for raw in (key.secret, key.token_key, key.session_key, key.form_key):
                yield from encoded(f"key {key_id}", raw)
            yield from parts_of(f"key {key_id}", urlsafe_b64encode(key.secret).rstrip(b"=").decode())


def encoded(name: str, *contents: bytes) -> Iterator[tuple[str, bytes]]:
    for content in contents:
        yield name, content
        yield f"{name} in hexadecimal", content.hex().encode()
        yield f"{name} in base64", b64encode(content).rstrip(b"=")
        yield f"{name} in base64url", urlsafe_b64encode(content).rstrip(b"=")
        yield f"{name} in a URL", quote(content).encode()


def parts_of(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    for start in range(len(text) - PART_LENGTH + 1):
        yield f"a part of {name}", text[start : start + PART_LENGTH].encode()


def found(encodings: Iterator[tuple[str, bytes]], places: Mapping[str, bytes]) -> list[str]:
    """Return a description of each secret that one of `places` contains."""
    wanted = list(encodings)
    assert all(len(secret) >= PART_LENGTH for _, secret in wanted)
    return [f"{name} in {place}" for place, content in places.items() for name, secret in wanted if secret in content]


def files_in(home: Path) -> dict[str, bytes]:
    """Return every file below the service's home, including the database's files."""
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def tables_of(url: str) -> dict[str, bytes]:
    """Return every table of a PostgreSQL database, as the bytes of its values."""
    tables: dict[str, bytes] = {}
    with psycopg.connect(url) as connection:
        for (name,) in connection.execute(TABLES).fetchall():
            rows = connection.execute(f'SELECT * FROM "{name}"'.encode()).fetchall()
            values = (value for row in rows for value in row)
            tables[f"table {name}"] = b"\n".join(
                value if isinstance(value, bytes) else str(value).encode() for value in values
            )
    return tables


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Lock the database against writes until the end of the block."""
    if make_url(url).get_backend_name() == "sqlite":
        with closing(sqlite3.connect(str(make_url(url).database), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("ROLLBACK")
        return
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE users, memberships, consumed_nonces IN EXCLUSIVE MODE")
        yield


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def env(database_url: str, home: Path) -> dict[str, str]:
    """The settings of a new installation with an empty database."""
    emptied(database_url)
    url = "sqlite:///var/sso.db" if database_url.startswith("sqlite") else database_url
    return {"SSO_HOME": str(home), "SSO_DATABASE_URL": url}


class RecordingClient:
    """An HTTP client that adds responses and new secrets to a recording."""

    def __init__(self, recording: Recording, running: Running) -> None:
        self.recording = recording
        self.running = running
        self.client = httpx.Client(base_url=running.url)

    def request(
        self, method: str, target: str, *, cookie: str = "", keep: bool = True, **options: object
    ) -> httpx.Response:
        """Send a request. `keep` is False if a secret is expected in the response, which is then not recorded."""
        self.client.cookies.clear()
        message = self.client.build_request(method, target, **options)  # type: ignore[arg-type]
        if cookie:
            message.headers["Cookie"] = cookie
        answer = self.client.send(message)
        if keep:
            shown = [f"{name}: {value}" for name, value in answer.headers.items() if name != "set-cookie"]
            self.recording.answers.append("\n".join(shown).encode() + b"\n\n" + answer.content)
        return answer

    def api(self, path: str, api_token: str, content: object) -> httpx.Response:
        return self.request("POST", path, headers={"Authorization": f"Bearer {api_token}"}, json=content)

    def issue(self, name: str, person: Mapping[str, str] = JANE, api_token: str = "demo") -> str:
        headers = {"Authorization": f"Bearer {self.recording.api_tokens[api_token]}"}
        answer = self.request("POST", "/v1/sso_tokens", keep=False, headers=headers, json=person)
        assert answer.status_code == 201, answer.text
        token: str = answer.json()["token"]
        self.recording.tokens[name] = token
        return token

    def sign_in(self, name: str, token: str) -> str:
        """Sign in, and return the cookie as a browser sends it."""
        answer = self.request("GET", f"{PAGE}?a=1&sso={token}&b=2")
        assert answer.status_code == 303, answer.text
        self.recording.cookies[name] = answer.cookies["studio_session"]
        return f"studio_session={answer.cookies['studio_session']}"


def use_service(recorder: RecordingClient, url: str) -> None:
    """Send the requests of users and integrations, including many invalid ones."""
    recording, request = recorder.recording, recorder.request
    demo, platform = recording.api_tokens["demo"], recording.api_tokens["platform"]

    # Valid requests.
    used = recorder.issue("used")
    jane = recorder.sign_in("jane", used)
    assert request("GET", "/session", cookie=jane).status_code == 200
    request("GET", "/auth", cookie=jane, headers={"X-Original-URI": PAGE})
    john = recorder.sign_in("john", recorder.issue("of john", JOHN))

    # Login links that do not sign in.
    unused = recorder.issue("unused")
    forged = used[:-2] + ("AA" if used[-2:] != "AA" else "AE")
    for token in (used, forged, used[:-1], used + "A", quote(used + "=")):
        for language in ("de", "en"):
            assert request("GET", f"/?sso={token}", headers={"Accept-Language": language}).status_code == 401
        assert request("GET", f"/?sso={token}", headers={"Accept": "application/json"}).status_code == 401
    for target in (
        f"/a//b?sso={unused}",
        f"/client/999/t/1?sso={unused}",
        f"/?sso={unused}&sso={used}",
        f"/{unused}",
    ):
        assert request("GET", target).status_code >= 400
    assert request("HEAD", f"/?sso={unused}").status_code == 200
    assert request("OPTIONS", f"/?sso={unused}").status_code == 204
    assert request("GET", f"/?sso={unused}", headers={"Sec-Purpose": "prefetch"}).status_code == 503
    assert request("DELETE", f"/?sso={unused}").status_code == 405
    for own in ("/session", "/readyz", "/healthz", "/metrics", "/openapi.json", "/docs"):
        request("GET", f"{own}?sso={used}")

    # A token in any other place.
    for target in targets_with(unused):
        request("GET", target, headers={"Accept": "application/json"})
    for header in headers_with(unused):
        request("GET", "/x", headers=[header])

    # Another user is signed in. The confirmation page contains the token on purpose; the refusals of its form do not.
    question = request("GET", f"/?sso={unused}", cookie=john, keep=False)
    assert unused in question.text
    for origin in ("https://elsewhere.example", recorder.running.url):
        form = {"token": unused, "target": "/", "form": "none"}
        assert request("POST", "/sso/confirm", data=form, headers={"Origin": origin}, cookie=john).status_code == 403

    # Integrations and frontends.
    for path in ("verify", "consume", "revoke"):
        token = recorder.issue(path)
        for api_token in (platform, demo, demo):
            recorder.api(f"/v1/sso_tokens/{path}", api_token, {"token": token})
    for api_token in (demo, platform, demo[:-1] + "!", f"{demo} {platform}", jane, unused):
        for content in ({}, [demo], JANE | {"email": demo}, JANE | {"email": f"{unused}@"}, {"token": unused}):
            assert recorder.api("/v1/sso_tokens", api_token, content).status_code >= 400
    headers = {"Authorization": f"Bearer {demo}"}
    assert request("POST", "/v1/sso_tokens", headers=headers, content=f"{{{demo}".encode()).status_code == 400
    assert request("POST", "/v1/sso_tokens", headers=headers, content=demo.encode() * 400).status_code == 413
    assert request("GET", f"/v1/sso_tokens?token={demo}", headers=headers).status_code == 405

    # Data that is not HTTP.
    address = ("127.0.0.1", urlsplit(recorder.running.url).port or 0)
    for garbage in (f"GET /?sso={unused}\x00 {demo}\r\n\r\n", f"{demo} {unused}\r\nCookie {jane}\r\n\r\n"):
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            connection.sendall(garbage.encode())
            recording.answers.append(connection.recv(65536))

    # The database is unavailable.
    with locked(url):
        assert request("GET", f"/?sso={unused}").status_code == 503
        assert recorder.api("/v1/sso_tokens", demo, JANE | {"email": "new@example.com"}).status_code == 503

    assert request("POST", "/logout", cookie=jane, headers={"Origin": recorder.running.url}).status_code == 204


def administer(recording: Recording, keys: Path) -> None:
    """Run the commands of an operator."""
    command = recording.run
    recording.add_keys(keys)
    [first] = recording.keys
    command("keys", "rotate", "--lead", "0", "--prune")
    command("keys", "rotate")
    recording.add_keys(keys)
    for token in recording.tokens.values():
        assert "ref" in command("inspect", token)
    for arguments in (("api-token", "list"), ("keys", "list"), ("account", "list"), ("user", "show", JANE["email"])):
        assert command(*arguments)
    command("user", "sign-out", JANE["email"])
    command("user", "disable", JOHN["email"])
    command("keys", "revoke", first)
    command("api-token", "revoke", "1")
    for secret in (*recording.api_tokens.values(), *recording.tokens.values()):
        for misplaced in ("user show", "inspect x", "account add x --id", ""):
            command(*misplaced.split(), secret)
            command(*misplaced.split(), f"--{secret}")
    command("init")


def test_logs_files_responses_and_messages_contain_no_secret(env: dict[str, str], home: Path, tmp_path: Path) -> None:
    url = env["SSO_DATABASE_URL"].replace("sqlite:///var", f"sqlite:///{home / 'var'}")
    is_sqlite = url.startswith("sqlite")
    env["SSO_ACCESS_LOG"] = "1"
    log = tmp_path / "log"  # outside the home, since it is searched separately
    recording = Recording(env)
    printed = run("init", "--demo", env=env).out
    recording.api_tokens["demo"] = API_TOKEN.findall(printed)[0]
    [recording.tokens["printed"]] = re.findall(r"\?sso=([A-Za-z0-9_-]{43})\s", printed)
    options = ("--platform", "--name", "studio", "--scope", "verify:sso")
    recording.api_tokens["platform"] = run("api-token", "create", *options, env=env).out.strip()

    with serving(env, log, workers=2) as running:
        recorder = RecordingClient(recording, running)
        with recorder.client:
            recorder.sign_in("admin", recording.tokens["printed"])
            use_service(recorder, url)
            administer(recording, home / "keys")
            assert recorder.request("GET", f"/?sso={recording.tokens['used']}").status_code == 401
        while_running = files_in(home)
    afterwards = files_in(home)
    written = log.read_bytes()
    recording.add_keys(home / "keys")
    assert len(recording.keys) >= 3
    assert len(recording.cookies) == 3

    # The search works: it finds the digest of each API token, and the claims of a used token.
    databases = tables_of(url) if not is_sqlite else {n: c for n, c in while_running.items() if n.startswith("var/")}
    everything = b"".join(databases.values())
    assert (not is_sqlite) or "var/sso.db-wal" in databases
    for secret in recording.api_tokens.values():
        # Revoking an API token replaces the first digit of its digest by "-".
        assert hashlib.sha256(secret.encode()).hexdigest()[1:].encode() in everything
    assert urlsafe_b64decode(recording.tokens["used"] + "=")[:16] in everything
    assert b"unavailable" in written.lower()

    # The log, the responses and the messages of commands contain no secret.
    assert found(recording.encodings(), {"the log": written}) == []
    assert not [token for token in recording.tokens.values() if contains(written.decode(), token)]
    assert found(recording.encodings(), {f"answer {n}": answer for n, answer in enumerate(recording.answers)}) == []
    assert found(recording.encodings(), {f"message {n}": text for n, text in enumerate(recording.messages)}) == []

    # The database contains no secret. Of the files, only a key's own file contains its secret, until it is revoked.
    assert found(recording.encodings(), databases) == []
    entries, _ = keyring.load(home / "keys")
    key_files = {f"keys/{key.id}.json": key for key in entries.values() if isinstance(key, SigningKey)}
    assert 0 < len(key_files) < len(recording.keys)
    for files in (while_running, afterwards):
        others = {name: content for name, content in files.items() if name not in key_files}
        assert found(recording.encodings(), others) == []
        for name, key in key_files.items():
            content = json.loads(files[name])
            assert urlsafe_b64decode(content.pop("secret") + "=") == key.secret
            assert found(recording.encodings(), {name: json.dumps(content).encode()}) == []

    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (home / "keys").iterdir()} == {0o600}


def test_the_search_finds_a_secret_in_each_encoding() -> None:
    token, key = secrets.token_urlsafe(32), secrets.token_bytes(32)
    tag = urlsafe_b64decode(token + "=")[16:]
    recording = Recording({}, tokens={"x": token}, keys={"k": key})
    session_key = SigningKey("k", key, created_at=0, signs_from=0).session_key
    hidden = [token.encode(), token[30:].encode(), tag, tag.hex().encode(), key, b64encode(key), session_key]
    for secret in hidden:
        assert found(recording.encodings(), {"place": b"..." + secret + b"..."}) != []
    for harmless in (token[:22].encode(), token[-11:].encode(), key[:31]):
        assert found(recording.encodings(), {"place": b"..." + harmless + b"..."}) == []
