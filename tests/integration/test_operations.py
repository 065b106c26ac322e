"""Operations: health, readiness, unknown paths, wrong methods, caching and the error log."""

import logging
import time
from pathlib import Path

import pytest

from sso_service import keyring
from sso_service.database.transactions import Database
from sso_service.errors import InsufficientScope, MethodNotAllowed, RateLimited, ServiceError
from sso_service.http import Problem
from sso_service.key_directory import KeyDirectory
from sso_service.problems import ENTRIES
from sso_service.web.problems import problem_of
from tests.support.api import node
from tests.support.client import Answer, Client
from tests.support.clock import Clock
from tests.support.data import JANE, PAGE
from tests.support.databases import changing, on_sqlite
from tests.support.outages import a_database_that, renamed
from tests.support.waiting import Stopwatch, until

pytestmark = pytest.mark.anyio


DEADLINE = 2.5

OWN_PATHS = {
    "/v1/sso_tokens": {"POST"},
    "/session": {"GET", "HEAD"},
    "/logout": {"POST"},
    "/sso/confirm": {"POST"},
    "/healthz": {"GET", "HEAD"},
    "/readyz": {"GET", "HEAD"},
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW", "get")


def execute(database: Database, statement: str) -> None:
    with changing(database) as connection:
        connection.exec_driver_sql(statement)


def problems(answer: Answer) -> set[str]:
    """The subjects of the problems that `/readyz` reports. Empty if the node is ready."""
    content = answer.json()
    if answer.status == 200:
        assert answer.header("retry-after") is None
        assert "problems" not in content
        return set()
    assert answer.status == 503
    assert int(answer.header("retry-after") or 0) > 0
    assert content["problems"]
    assert all(isinstance(text, str) and text for text in content["problems"].values())
    return set(content["problems"])


# --- Health ----------------------------------------------------------------------------------------------------------


async def test_a_node_with_database_keys_and_clock_is_ready(client: Client) -> None:
    assert (await client.get("/healthz")).json()
    assert problems(await client.get("/readyz")) == set()
    for path in ("/healthz", "/readyz"):
        assert (await client.get(path)).status == 200
        assert (await client.request("HEAD", path)).status == 200


@pytest.mark.slow
@pytest.mark.parametrize("state", ["is a directory", "is not a database", "refuses to connect", "never answers"])
async def test_a_node_without_a_usable_database_is_alive_but_not_ready(
    state: str, tmp_path: Path, keys_dir: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with a_database_that(state, tmp_path) as url, node(url, keys_dir, clock) as client:
        started = Stopwatch()
        answer = await client.get("/readyz")
        assert started.own_seconds < DEADLINE + 0.5
        assert problems(answer) == {"database"}
        assert "hunter2" not in answer.text
        assert "hunter2" not in caplog.text
        assert (await client.request("HEAD", "/healthz")).status == 200


async def test_a_node_whose_clock_differs_by_over_30_seconds_is_not_ready(client: Client, clock: Clock) -> None:
    for difference in (-3000.0, -31.5, 31.5, 86_400.0):
        clock.now = time.time() + difference
        assert problems(await client.get("/readyz")) == {"clock"}, difference
        assert (await client.get("/healthz")).status == 200
    for difference in (-25.0, 25.0):
        clock.now = time.time() + difference
        assert problems(await client.get("/readyz")) == set(), difference


async def test_a_node_with_another_schema_version_is_not_ready(client: Client, database: Database) -> None:
    assert problems(await client.get("/readyz")) == set()
    for change in (
        "UPDATE alembic_version SET version_num = '0000'",
        "UPDATE alembic_version SET version_num = '9999'",
        "DELETE FROM alembic_version",
    ):
        execute(database, change)
        assert problems(await client.get("/readyz")) == {"database"}, change
        assert (await client.get("/healthz")).status == 200


async def test_a_node_with_an_empty_database_is_not_ready(client: Client, database: Database) -> None:
    execute(database, "DROP TABLE alembic_version")
    assert problems(await client.get("/readyz")) == {"database"}


@on_sqlite
async def test_a_node_without_a_signing_key_is_not_ready(database_url: str, tmp_path: Path, clock: Clock) -> None:
    keys_dir = tmp_path / "no-keys"
    keys_dir.mkdir()
    with node(database_url, keys_dir, clock) as client:
        assert problems(await client.get("/readyz")) == {"keys"}
        assert (await client.get("/healthz")).status == 200
    keyring.rotate(keys_dir, now=int(clock()), lead=60)
    with node(database_url, keys_dir, clock) as client:
        assert problems(await client.get("/readyz")) == {"keys"}
    keyring.rotate(keys_dir, now=int(clock()), lead=0)
    with node(database_url, keys_dir, clock) as client:
        assert problems(await client.get("/readyz")) == set()


@on_sqlite
async def test_a_node_that_cannot_list_its_keys_for_a_minute_is_not_ready(
    database_url: str, keys_dir: Path, clock: Clock
) -> None:
    monotonic = Clock(1000.0)
    keys = KeyDirectory(keys_dir, monotonic=monotonic)
    with node(database_url, keys, clock) as client:
        with renamed(keys_dir):
            for elapsed, found in ((0, set()), (59.9, set()), (60, {"keys"}), (3600, {"keys"})):
                monotonic.now = 1000.0 + elapsed
                keys.refresh()
                answer = await client.get("/readyz")
                assert problems(answer) == found, elapsed
            assert (await client.get("/healthz")).status == 200
        keys.refresh()
        assert problems(await client.get("/readyz")) == set()


async def test_readyz_reports_all_problems_at_once(
    database: Database, database_url: str, tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "no-keys").mkdir()
    execute(database, "UPDATE alembic_version SET version_num = '0000'")
    clock.advance(100)
    with node(database_url, tmp_path / "no-keys", clock) as client:
        assert problems(await client.get("/readyz")) == {"keys", "database", "clock"}


# --- Paths and methods -----------------------------------------------------------------------------------------------


@on_sqlite
async def test_a_wrong_method_gets_405_with_the_allowed_methods(client: Client) -> None:
    for path, allowed in OWN_PATHS.items():
        for method in METHODS:
            for query in ("", "?sso=x"):
                answer = await client.request(method, path + query)
                if method in allowed:
                    assert answer.status not in {404, 405, 500}, (method, path)
                    continue
                assert answer.status == 405, (method, path)
                assert answer.error == "method_not_allowed"
                assert set((answer.header("allow") or "").split(", ")) == allowed, path
                assert answer.header("set-cookie") is None


@on_sqlite
async def test_an_unknown_path_gets_404_in_json_for_every_method(client: Client, api_token: str) -> None:
    paths = [
        "/favicon.ico",
        "/robots.txt",
        "/v1",
        "/v1/",
        "/v1/sso_token",
        "/v1/sso_tokens/",
        "/v1/sso_tokens/x",
        "/V1/sso_tokens",
        "//v1/sso_tokens",
        "/sso_tokens",
        "/session/",
        "/sso",
        "/%ff",
        "/%00",
        "/..%2f..%2fetc/passwd",
        "/.git/config",
        "/" + "x" * 5000,
    ]
    for path in paths:
        for method in METHODS:
            answer = await client.request(method, path, headers=[("authorization", f"Bearer {api_token}")])
            assert answer.status == 404, (method, path)
            assert answer.error == "not_found"
            assert answer.json()["error"].keys() == {"code", "message"}
            assert answer.header("location") is None
            assert api_token not in answer.text


@on_sqlite
async def test_the_paths_of_the_service_ignore_login_tokens(
    client: Client, api_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    token = await client.issue(api_token)
    for path in OWN_PATHS:
        for method in METHODS:
            answer = await client.request(method, f"{path}?sso={token}")
            assert answer.header("set-cookie") is None, (method, path)
            assert answer.header("location") is None
            assert token not in answer.text
    assert token not in caplog.text
    assert client.cookies == {}
    assert (await client.get(f"{PAGE}?sso={token}")).status == 303


@on_sqlite
async def test_responses_of_the_service_are_not_cached(client: Client, api_token: str) -> None:
    answers = [
        await client.post_json("/v1/sso_tokens", {}, token=api_token),
        await client.get("/session"),
        await client.get("/healthz"),
        await client.get("/readyz"),
        await client.get("/nowhere"),
        await client.request("POST", "/logout"),
        await client.request("POST", "/logout", headers=[("sec-fetch-site", "same-origin")]),
    ]
    assert {answer.header("cache-control") for answer in answers} == {"no-store"}
    with_body = [answer for answer in answers if answer.body]
    assert len(with_body) == len(answers) - 1
    assert {answer.header("cross-origin-resource-policy") for answer in with_body} == {"same-origin"}


def subclasses(base: type[ServiceError]) -> set[type[ServiceError]]:
    return {base}.union(*map(subclasses, base.__subclasses__()))


def test_every_error_class_has_an_entry_in_the_table_of_problems() -> None:
    classes = subclasses(ServiceError)
    assert len(classes) > 40
    assert {error_class.code for error_class in classes} <= ENTRIES.keys()


def test_errors_with_details_are_reported_with_them() -> None:
    assert problem_of(InsufficientScope("write:sso")) == Problem(
        403, "insufficient_scope", "The API token lacks the scope write:sso.", {"required_scope": "write:sso"}
    )
    limited = problem_of(RateLimited(7))
    assert limited is not None
    assert limited.headers == {"Retry-After": "7"}
    not_allowed = problem_of(MethodNotAllowed("GET, HEAD"))
    assert not_allowed is not None
    assert not_allowed.headers == {"Allow": "GET, HEAD"}
    assert problem_of(ValueError()) is None, "bugs are not reported to clients"


# --- The log ---------------------------------------------------------------------------------------------------------


@on_sqlite
async def test_unavailability_is_logged_at_its_start_periodically_and_at_its_end(
    client: Client, database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sso_service.web.problems._LOG_INTERVAL", 0.2)
    caplog.set_level(logging.INFO, logger="sso_service.web.problems")

    def messages() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "sso_service.web.problems"]

    async def message_number(count: int) -> str:
        await until(lambda: len(messages()) == count)
        return messages()[-1]

    execute(database, "ALTER TABLE api_tokens RENAME TO lost")
    for _ in range(3):
        assert (await client.post_json("/v1/sso_tokens", JANE, token="unknown")).status == 503
    execute(database, "ALTER TABLE lost RENAME TO api_tokens")
    assert messages() == ["unavailable: no such table: api_tokens"]
    assert await message_number(2) == "2 more requests got 503 in 0 s; unavailable: no such table: api_tokens"
    assert (await message_number(3)).startswith("no request got 503")
