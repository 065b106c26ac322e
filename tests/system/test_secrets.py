"""What nobody may find: tokens, API tokens, cookies and keys in logs, files, tables, answers and messages.

One journey through all that the service does, on purpose and by mistake; then everything that it left behind is
searched for everything that was secret in it.
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
from tests.support.waiting import PATIENCE

PIECE = 12
"""Characters of a secret that nobody comes across by chance."""
TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"


@dataclass(slots=True)
class Journey:
    """What happened: every secret by a name for it, and all that was seen of the service meanwhile."""

    env: dict[str, str]
    tokens: dict[str, str] = field(default_factory=dict)
    api_tokens: dict[str, str] = field(default_factory=dict)
    cookies: dict[str, str] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    answers: list[bytes] = field(default_factory=list)
    messages: list[bytes] = field(default_factory=list)

    def run(self, *arguments: str) -> str:
        """A command, whose output goes to `messages`."""
        outcome = run(*arguments, env=self.env)
        self.messages.append((outcome.out + outcome.err).encode())
        return outcome.out

    def note_keys(self, directory: Path) -> None:
        """Remembers the keys that are there now."""
        entries, _ = keyring.load(directory)
        self.keys |= {key.id: key.secret for key in entries.values() if isinstance(key, SigningKey)}

    def spellings(self) -> Iterator[tuple[str, bytes]]:
        """Every form in which a secret, or a good piece of one, could show, with what it is."""
        for name, token in self.tokens.items():
            # The first 16 of its 32 bytes are claims, which are no secret; the tag is what makes it good.
            yield from spelled(f"login token {name}", token.encode(), urlsafe_b64decode(token + "=")[16:])
            yield from pieces(f"login token {name}", token[22:])
        for name, secret in self.api_tokens.items():
            yield from spelled(f"API token {name}", secret.encode())
            yield from pieces(f"API token {name}", secret.removeprefix("wf_live_"))
        for name, cookie in self.cookies.items():
            yield from spelled(f"cookie {name}", cookie.encode())
            yield from pieces(f"cookie {name}", cookie.rpartition(".")[2])
        for key_id, secret_of_key in self.keys.items():
            key = SigningKey(key_id, secret_of_key, created_at=0, signs_from=0)
            for raw in (key.secret, key.token_key, key.session_key, key.form_key):
                yield from spelled(f"key {key_id}", raw)
            yield from pieces(f"key {key_id}", urlsafe_b64encode(key.secret).rstrip(b"=").decode())


def spelled(name: str, *contents: bytes) -> Iterator[tuple[str, bytes]]:
    for content in contents:
        yield name, content
        yield f"{name} in hexadecimal", content.hex().encode()
        yield f"{name} in base64", b64encode(content).rstrip(b"=")
        yield f"{name} in base64url", urlsafe_b64encode(content).rstrip(b"=")
        yield f"{name} in a URL", quote(content).encode()


def pieces(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    for start in range(len(text) - PIECE + 1):
        yield f"a piece of {name}", text[start : start + PIECE].encode()


def found(spellings: Iterator[tuple[str, bytes]], places: Mapping[str, bytes]) -> list[str]:
    """Which secret is in which place."""
    wanted = list(spellings)
    assert all(len(secret) >= PIECE for _, secret in wanted)
    return [f"{name} in {place}" for place, content in places.items() for name, secret in wanted if secret in content]


def files_in(home: Path) -> dict[str, bytes]:
    """Every file below the service's home, the database and its companions among them."""
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def tables_of(url: str) -> dict[str, bytes]:
    """Every table of a PostgreSQL, each value in it as bytes."""
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
    """Nothing can be written to the database until the end of the block."""
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
    """The settings of somebody who begins with nothing."""
    emptied(database_url)
    url = "sqlite:///var/sso.db" if database_url.startswith("sqlite") else database_url
    return {"SSO_HOME": str(home), "SSO_DATABASE_URL": url}


class Traveller:
    """Goes through the service with a journey's secrets, and keeps what it is answered."""

    def __init__(self, journey: Journey, running: Running) -> None:
        self.journey = journey
        self.running = running
        self.client = httpx.Client(base_url=running.url)

    def ask(
        self, method: str, target: str, *, cookie: str = "", keep: bool = True, **options: object
    ) -> httpx.Response:
        """An answer; `keep` is False where showing a secret is its purpose."""
        self.client.cookies.clear()
        request = self.client.build_request(method, target, **options)  # type: ignore[arg-type]
        if cookie:
            request.headers["Cookie"] = cookie
        answer = self.client.send(request)
        if keep:
            shown = [f"{name}: {value}" for name, value in answer.headers.items() if name != "set-cookie"]
            self.journey.answers.append("\n".join(shown).encode() + b"\n\n" + answer.content)
        return answer

    def api(self, path: str, api_token: str, content: object) -> httpx.Response:
        return self.ask("POST", path, headers={"Authorization": f"Bearer {api_token}"}, json=content)

    def issue(self, name: str, person: Mapping[str, str] = JANE, api_token: str = "demo") -> str:
        headers = {"Authorization": f"Bearer {self.journey.api_tokens[api_token]}"}
        answer = self.ask("POST", "/v1/sso_tokens", keep=False, headers=headers, json=person)
        assert answer.status_code == 201, answer.text
        token: str = answer.json()["token"]
        self.journey.tokens[name] = token
        return token

    def sign_in(self, name: str, token: str) -> str:
        """The cookie, as a browser sends it back."""
        answer = self.ask("GET", f"{PAGE}?a=1&sso={token}&b=2")
        assert answer.status_code == 303, answer.text
        self.journey.cookies[name] = answer.cookies["studio_session"]
        return f"studio_session={answer.cookies['studio_session']}"


def travel(traveller: Traveller, url: str) -> None:
    """All that people and integrations do, and much that they should not."""
    journey, ask = traveller.journey, traveller.ask
    demo, platform = journey.api_tokens["demo"], journey.api_tokens["platform"]

    # As it should be.
    used = traveller.issue("used")
    jane = traveller.sign_in("jane", used)
    assert ask("GET", "/session", cookie=jane).status_code == 200
    ask("GET", "/auth", cookie=jane, headers={"X-Original-URI": PAGE})
    john = traveller.sign_in("john", traveller.issue("of john", JOHN))

    # Links that do not sign in.
    waiting = traveller.issue("waiting")
    forged = used[:-2] + ("AA" if used[-2:] != "AA" else "AE")
    for token in (used, forged, used[:-1], used + "A", quote(used + "=")):
        for language in ("de", "en"):
            assert ask("GET", f"/?sso={token}", headers={"Accept-Language": language}).status_code == 401
        assert ask("GET", f"/?sso={token}", headers={"Accept": "application/json"}).status_code == 401
    for target in (
        f"/a//b?sso={waiting}",
        f"/client/999/t/1?sso={waiting}",
        f"/?sso={waiting}&sso={used}",
        f"/{waiting}",
    ):
        assert ask("GET", target).status_code >= 400
    assert ask("HEAD", f"/?sso={waiting}").status_code == 200
    assert ask("OPTIONS", f"/?sso={waiting}").status_code == 204
    assert ask("GET", f"/?sso={waiting}", headers={"Sec-Purpose": "prefetch"}).status_code == 503
    assert ask("DELETE", f"/?sso={waiting}").status_code == 405
    for own in ("/session", "/readyz", "/healthz", "/metrics", "/openapi.json", "/docs"):
        ask("GET", f"{own}?sso={used}")

    # Somebody else is signed in: the question carries the token on purpose, the refusals of its answer do not.
    question = ask("GET", f"/?sso={waiting}", cookie=john, keep=False)
    assert waiting in question.text
    for origin in ("https://elsewhere.example", traveller.running.url):
        form = {"token": waiting, "target": "/", "form": "none"}
        assert ask("POST", "/sso/confirm", data=form, headers={"Origin": origin}, cookie=john).status_code == 403

    # Integrations and frontends.
    for path in ("verify", "consume", "revoke"):
        token = traveller.issue(path)
        for api_token in (platform, demo, demo):
            traveller.api(f"/v1/sso_tokens/{path}", api_token, {"token": token})
    for api_token in (demo, platform, demo[:-1] + "!", f"{demo} {platform}", jane, waiting):
        for content in ({}, [demo], JANE | {"email": demo}, JANE | {"email": f"{waiting}@"}, {"token": waiting}):
            assert traveller.api("/v1/sso_tokens", api_token, content).status_code >= 400
    headers = {"Authorization": f"Bearer {demo}"}
    assert ask("POST", "/v1/sso_tokens", headers=headers, content=f"{{{demo}".encode()).status_code == 400
    assert ask("POST", "/v1/sso_tokens", headers=headers, content=demo.encode() * 400).status_code == 413
    assert ask("GET", f"/v1/sso_tokens?token={demo}", headers=headers).status_code == 405

    # What is not HTTP at all.
    address = ("127.0.0.1", urlsplit(traveller.running.url).port or 0)
    for garbage in (f"GET /?sso={waiting}\x00 {demo}\r\n\r\n", f"{demo} {waiting}\r\nCookie {jane}\r\n\r\n"):
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            connection.sendall(garbage.encode())
            journey.answers.append(connection.recv(65536))

    # The database does not answer.
    with locked(url):
        assert ask("GET", f"/?sso={waiting}").status_code == 503
        assert traveller.api("/v1/sso_tokens", demo, JANE | {"email": "new@example.com"}).status_code == 503

    assert ask("POST", "/logout", cookie=jane, headers={"Origin": traveller.running.url}).status_code == 204


def operate(journey: Journey, keys: Path) -> None:
    """What operators do meanwhile."""
    say = journey.run
    journey.note_keys(keys)
    [first] = journey.keys
    say("keys", "rotate", "--lead", "0", "--prune")
    say("keys", "rotate")
    journey.note_keys(keys)
    for token in journey.tokens.values():
        assert "ref" in say("inspect", token)
    for arguments in (("api-token", "list"), ("keys", "list"), ("account", "list"), ("user", "show", JANE["email"])):
        assert say(*arguments)
    say("user", "sign-out", JANE["email"])
    say("user", "disable", JOHN["email"])
    say("keys", "revoke", first)
    say("api-token", "revoke", "1")
    say("user", "show", next(iter(journey.api_tokens.values())))
    say("init")


def test_a_whole_journey_leaves_no_secret_behind(env: dict[str, str], home: Path, tmp_path: Path) -> None:
    url = env["SSO_DATABASE_URL"].replace("sqlite:///var", f"sqlite:///{home / 'var'}")
    is_sqlite = url.startswith("sqlite")
    log = tmp_path / "log"  # outside of the home, since it is searched by itself
    journey = Journey(env)
    printed = run("init", "--demo", env=env).out
    journey.api_tokens["demo"] = API_TOKEN.findall(printed)[0]
    [journey.tokens["printed"]] = re.findall(r"\?sso=([A-Za-z0-9_-]{43})\s", printed)
    options = ("--platform", "--name", "studio", "--scope", "verify:sso")
    journey.api_tokens["platform"] = run("api-token", "create", *options, env=env).out.strip()

    with serving(env, log, workers=2) as running:
        traveller = Traveller(journey, running)
        with traveller.client:
            traveller.sign_in("admin", journey.tokens["printed"])
            travel(traveller, url)
            operate(journey, home / "keys")
            assert traveller.ask("GET", f"/?sso={journey.tokens['used']}").status_code == 401
        while_running = files_in(home)
    afterwards = files_in(home)
    written = log.read_bytes()
    journey.note_keys(home / "keys")
    assert len(journey.keys) >= 3
    assert len(journey.cookies) == 3

    # The search finds what is there: the digest of each API token, and the claims of a token that was used.
    databases = tables_of(url) if not is_sqlite else {n: c for n, c in while_running.items() if n.startswith("var/")}
    everything = b"".join(databases.values())
    assert (not is_sqlite) or "var/sso.db-wal" in databases
    for secret in journey.api_tokens.values():
        assert hashlib.sha256(secret.encode()).hexdigest()[1:].encode() in everything  # revoked, the first is a "-"
    assert urlsafe_b64decode(journey.tokens["used"] + "=")[:16] in everything
    assert b"unavailable" in written.lower()

    # The log, what the service answered and what commands said: nothing.
    assert found(journey.spellings(), {"the log": written}) == []
    assert found(journey.spellings(), {f"answer {n}": answer for n, answer in enumerate(journey.answers)}) == []
    assert found(journey.spellings(), {f"message {n}": text for n, text in enumerate(journey.messages)}) == []

    # The database: nothing. Files: a key's secret in its own file, for as long as it is good.
    assert found(journey.spellings(), databases) == []
    entries, _ = keyring.load(home / "keys")
    alive = {f"keys/{key.id}.json": key for key in entries.values() if isinstance(key, SigningKey)}
    assert 0 < len(alive) < len(journey.keys)
    for files in (while_running, afterwards):
        others = {name: content for name, content in files.items() if name not in alive}
        assert found(journey.spellings(), others) == []
        for name, key in alive.items():
            content = json.loads(files[name])
            assert urlsafe_b64decode(content.pop("secret") + "=") == key.secret
            assert found(journey.spellings(), {name: json.dumps(content).encode()}) == []

    assert stat.S_IMODE((home / "keys").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (home / "keys").iterdir()} == {0o600}


def test_the_search_finds_a_secret_in_each_spelling() -> None:
    token, key = secrets.token_urlsafe(32), secrets.token_bytes(32)
    tag = urlsafe_b64decode(token + "=")[16:]
    journey = Journey({}, tokens={"x": token}, keys={"k": key})
    session_key = SigningKey("k", key, created_at=0, signs_from=0).session_key
    hidden = [token.encode(), token[30:].encode(), tag, tag.hex().encode(), key, b64encode(key), session_key]
    for secret in hidden:
        assert found(journey.spellings(), {"place": b"..." + secret + b"..."}) != []
    for harmless in (token[:22].encode(), token[-11:].encode(), key[:31]):
        assert found(journey.spellings(), {"place": b"..." + harmless + b"..."}) == []
