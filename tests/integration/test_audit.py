"""Audit events: one for each issue, login, refusal and change, with IDs and never with a token."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from sso_service import cli
from sso_service.database.transactions import Database
from sso_service.observability import events, logs
from sso_service.observability.audit import Event, EventName
from sso_service.observability.limit import LINES, LineLimit
from sso_service.permissions import Role, Scope
from sso_service.services import installation
from sso_service.tokens import ref
from tests.support import administration
from tests.support.client import Client
from tests.support.clock import Clock
from tests.support.data import ACCOUNT, JANE, JOHN, PAGE, TEAM
from tests.support.databases import changing, on_sqlite
from tests.support.metrics import sample_of, samples_in

pytestmark = pytest.mark.anyio


FORGED = "A" * 43
FORGERIES = {"way": "browser", "outcome": "bad_signature"}


class Trail:
    """The events since the last call of `take`."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logs.AUDIT_LOGGER)
        self._caplog = caplog

    def take(self) -> list[dict[str, Any]]:
        events = [
            msgspec.to_builtins(record.msg)
            for record in self._caplog.records
            if record.name == logs.AUDIT_LOGGER and isinstance(record.msg, Event)
        ]
        self._caplog.clear()
        return events


@pytest.fixture
def trail(caplog: pytest.LogCaptureFixture) -> Trail:
    return Trail(caplog)


async def test_an_issue_and_a_login_record_user_account_and_token(
    client: Client, api_token: str, verifier: str, trail: Trail
) -> None:
    token = await client.issue(api_token)
    subject = {"user_id": 1, "account_id": ACCOUNT}
    issued = {"event": "token_issued", **subject, "api_token_id": 1, "ref": ref(token)}
    assert trail.take() == [{**issued, "user_created": True}]

    await client.get(f"{PAGE}?sso={token}")
    assert trail.take() == [{"event": "login", **subject, "ref": ref(token), "way": "browser"}]
    await client.get(f"{PAGE}?sso={token}")  # the back button: neither a login nor a refusal
    assert trail.take() == []

    token = await client.issue(api_token)
    assert trail.take() == [{**issued, "ref": ref(token)}]
    await client.post_json("/v1/sso_tokens/verify", {"token": token}, token=verifier)
    assert trail.take() == []
    await client.post_json("/v1/sso_tokens/consume", {"token": token}, token=verifier)
    assert trail.take() == [{"event": "login", **subject, "api_token_id": 2, "ref": ref(token), "way": "api"}]
    await client.post_json("/v1/sso_tokens/revoke", {"token": token}, token=api_token)
    assert trail.take() == []  # the token was consumed before, so nothing is revoked
    token = await client.issue(api_token)
    trail.take()
    await client.post_json("/v1/sso_tokens/revoke", {"token": token}, token=api_token)
    assert trail.take() == [{"event": "token_revoked", **subject, "ref": ref(token), "api_token_id": 1}]


async def test_a_refused_login_records_its_reason_and_a_genuine_tokens_user(
    client: Client, api_token: str, verifier: str, database: Database, clock: Clock, trail: Trail
) -> None:
    used, disabled, late = [await client.issue(api_token) for _ in range(3)]
    await client.another().get(f"{PAGE}?sso={used}")
    trail.take()
    subject = {"user_id": 1, "account_id": ACCOUNT}

    async def refused(token: str, reason: str, **subject: int) -> None:
        expected = {"event": "login_refused", **subject, "ref": ref(token), "reason": reason}
        await client.get(f"{PAGE}?sso={token}")
        assert trail.take() == [{**expected, "way": "browser"}]
        await client.post_json("/v1/sso_tokens/consume", {"token": token}, token=verifier)
        assert trail.take() == [{**expected, "api_token_id": 2, "way": "api"}]

    await refused("x", "malformed")
    await refused(FORGED, "bad_signature")
    await refused(used, "consumed", **subject)
    with changing(database) as connection:
        administration.disable_user(connection, JANE["email"], now=int(clock()))
    await refused(disabled, "no_access", **subject)
    clock.advance(300)
    await refused(late, "expired", **subject)


def standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time pass for the limits on log lines."""
    monkeypatch.setattr(events, "LineLimit", partial(LineLimit, clock=Clock(5.0)))
    monkeypatch.setattr(events, "_limit", events.RefusalLimit())


@on_sqlite
async def test_a_flood_of_forgeries_is_counted_and_logged_at_a_limited_rate(
    client: Client, api_token: str, verifier: str, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_still(monkeypatch)
    before = sample_of(samples_in((await client.get("/metrics")).text), "sso_logins_total", FORGERIES)
    for number in range(3 * LINES):
        await client.get(f"{PAGE}?sso={FORGED[:-1]}{'AEIM'[number % 4]}")
        await client.get(f"{PAGE}?sso=x")
        await client.post_json("/v1/sso_tokens", JANE, token="wf_live_unknown")
        # Any client can make a frontend send these.
        await client.post_json("/v1/sso_tokens/consume", {"token": FORGED}, token=verifier)
    assert len(trail.take()) == LINES
    assert (
        sample_of(samples_in((await client.get("/metrics")).text), "sso_logins_total", FORGERIES) == before + 3 * LINES
    )
    for _ in range(2 * LINES):
        await client.post_json("/v1/sso_tokens", JANE, token=verifier)
    assert [event["reason"] for event in trail.take()] == ["insufficient_scope"] * 2 * LINES


@on_sqlite
async def test_a_used_link_that_is_opened_again_and_again_is_logged_at_a_limited_rate(
    client: Client, api_token: str, verifier: str, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_still(monkeypatch)
    used = [await client.issue(api_token) for _ in range(2 * LINES)]
    for token in used:
        await client.another().get(f"{PAGE}?sso={token}")
    trail.take()
    for token in used:  # each for the first time
        await client.another().get(f"{PAGE}?sso={token}")
    assert [event["ref"] for event in trail.take()] == [ref(token) for token in used]
    for token in used:
        await client.another().get(f"{PAGE}?sso={token}")
        await client.post_json("/v1/sso_tokens/consume", {"token": token}, token=verifier)
    assert len(trail.take()) == LINES


def test_few_refused_login_tokens_are_remembered() -> None:
    limit = events.RefusalLimit()
    for number in range(5000):
        assert limit.admits(Event(event=EventName.LOGIN_REFUSED, user_id=1, ref=f"{number}", reason="consumed"))
    assert len(limit._refused) == 1024


@on_sqlite
async def test_a_login_during_a_database_error_is_recorded(
    client: Client, api_token: str, database: Database, trail: Trail
) -> None:
    token = await client.issue(api_token)
    trail.take()
    with changing(database) as connection:
        connection.exec_driver_sql("ALTER TABLE consumed_nonces RENAME TO elsewhere")
    assert (await client.get(f"{PAGE}?sso={token}")).status == 503
    assert trail.take() == [
        {"event": "login_refused", "ref": ref(token), "way": "browser", "reason": "unavailable"},
    ]


async def test_a_refused_request_records_the_api_token_if_it_is_known(
    client: Client, api_token: str, verifier: str, database: Database, trail: Trail
) -> None:
    issue = "/v1/sso_tokens"
    await client.post_json(issue, JANE, token="wf_live_unknown")
    assert trail.take() == [{"event": "api_refused", "reason": "not_authenticated"}]
    await client.post_json(issue, JANE, token=verifier)
    refused = {"event": "api_refused", "account_id": ACCOUNT, "api_token_id": 2}
    assert trail.take() == [{**refused, "reason": "insufficient_scope"}]

    await client.issue(api_token)
    await client.issue(api_token, JOHN)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
        administration.disable_user(connection, JOHN["email"], now=1)
        _, capped = administration.create_api_token(
            connection, account_id=ACCOUNT, name="c", scopes=frozenset(Scope), now=1, max_role=Role.EDITOR
        )
    trail.take()
    await client.post_json(issue, JOHN, token=api_token)
    await client.post_json(issue, JANE, token=capped)
    assert trail.take() == [
        {**refused, "api_token_id": 1, "user_id": 2, "reason": "user_disabled"},
        {**refused, "api_token_id": 3, "user_id": 1, "reason": "role_not_allowed"},
    ]


async def test_a_change_by_an_admin_records_the_admin(
    client: Client, api_token: str, database: Database, trail: Trail
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    await client.issue(api_token, JOHN)
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    trail.take()
    settings = f"/client/{ACCOUNT}/t/{TEAM}/settings"

    async def post(path: str, body: bytes = b"") -> None:
        answer = await client.request("POST", path, headers=[("sec-fetch-site", "same-origin")], body=body)
        assert answer.status in {200, 204, 303}, answer

    await post(f"{settings}/team/2/role", b"role=publisher")
    await post(f"{settings}/team/2/sign-out")
    await post(f"{settings}/team/2/remove")
    await post(f"{settings}/api-tokens", b"name=new&scope=write:sso")
    await post(f"{settings}/api-tokens/2/revoke")
    by = {"account_id": ACCOUNT, "by_user_id": 1}
    assert trail.take() == [
        {"event": "role_changed", "user_id": 2, **by, "role": "publisher"},
        {"event": "signed_out_everywhere", "user_id": 2, **by},
        {"event": "member_removed", "user_id": 2, **by},
        {"event": "api_token_created", **by, "api_token_id": 2},
        {"event": "api_token_revoked", **by, "api_token_id": 2},
    ]
    await post("/sso/sign-out-everywhere")
    assert trail.take() == [{"event": "signed_out_everywhere", "user_id": 1, "account_id": ACCOUNT}]


@on_sqlite
async def test_a_refused_change_is_not_recorded(
    client: Client, api_token: str, database: Database, trail: Trail
) -> None:
    await client.get(f"{PAGE}?sso={await client.issue(api_token)}")
    with changing(database) as connection:
        administration.set_role(connection, JANE["email"], ACCOUNT, Role.ADMIN)
    trail.take()
    path = f"/client/{ACCOUNT}/t/{TEAM}/settings/team/1/role"
    answer = await client.request("POST", path, headers=[("sec-fetch-site", "same-origin")], body=b"role=editor")
    assert answer.status == 409  # the last admin
    assert trail.take() == []


# --- the command line ------------------------------------------------------------------------------------------------


class SystemLog:
    """A socket that receives what programs send to the system log."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def take(self) -> list[dict[str, Any]]:
        lines = []
        while True:
            try:
                lines.append(self._socket.recv(65536).decode().rstrip("\0"))
            except BlockingIOError:
                break
        events = []
        for line in lines:
            prefix, _, content = line.partition("sso-service: ")
            assert prefix == "<14>"  # user, info
            event = json.loads(content)
            assert event.pop("time").endswith("Z")
            assert event.pop("level") == "info"
            assert event.pop("operator")
            events.append(event)
        return events

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def system_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SystemLog]:
    path = tmp_path / "log"
    log = SystemLog(path)
    config = logs.config_of_commands(str(path))
    monkeypatch.setattr(logs, "config_of_commands", lambda: config)
    yield log
    log.close()
    default = {logs.AUDIT_LOGGER: {"handlers": [], "level": "INFO", "propagate": True}}
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": default})


def test_changes_by_an_operator_go_to_the_system_log(tmp_path: Path, system_log: SystemLog) -> None:
    def run(*arguments: str, warnings: bool = False) -> None:
        umask = os.umask(0)
        done = CliRunner().invoke(cli.main, arguments, env={"SSO_HOME": str(tmp_path)}, catch_exceptions=False)
        os.umask(umask)  # a command changes it
        assert done.exit_code == 0, done.output
        assert bool(done.stderr) == warnings

    run("init", "--demo")
    installed = system_log.take()
    key = installed[0]["key_id"]
    assert [event["event"] for event in installed] == [
        "key_created",
        "account_added",
        "team_added",
        "role_changed",
        "api_token_created",
    ]
    demo = installation.DEMO_ADMIN.email
    expected = {
        ("account", "add", "New"): {"event": "account_added", "account_id": 124},
        ("team", "add", "124", "New"): {"event": "team_added", "account_id": 124},
        ("user", "set-role", demo, "--account", "123", "editor"): {
            "event": "role_changed",
            "user_id": 1,
            "account_id": 123,
            "role": "editor",
        },
        ("user", "disable", demo): {"event": "user_disabled", "user_id": 1},
        ("user", "enable", demo): {"event": "user_enabled", "user_id": 1},
        ("user", "sign-out", demo): {"event": "signed_out_everywhere", "user_id": 1},
        ("user", "remove", demo, "--account", "123"): {"event": "member_removed", "user_id": 1, "account_id": 123},
        ("api-token", "create", "--account", "123", "--name", "n", "--scope", "write:sso"): {
            "event": "api_token_created",
            "account_id": 123,
            "api_token_id": 2,
        },
        ("api-token", "revoke", "2"): {"event": "api_token_revoked", "account_id": 123, "api_token_id": 2},
    }
    for arguments, event in expected.items():
        run(*arguments)
        assert system_log.take() == [event], arguments
    for arguments in (("account", "list"), ("user", "show", demo), ("keys", "list"), ("keys", "rotate", "--dry-run")):
        run(*arguments)
        assert system_log.take() == []
    run("keys", "revoke", key)
    assert [event["event"] for event in system_log.take()] == ["key_revoked", "key_created"]
    run("keys", "rotate", "--prune")
    assert [event["event"] for event in system_log.take()] == ["key_created", "key_deleted"]
    run("init", "--demo")
    assert {"event": "api_token_revoked", "account_id": 123, "api_token_id": 1} in system_log.take()
    (tmp_path / "var" / "sso.db").unlink()  # a new database, beside two keys of the old one
    run("init", warnings=True)
    assert [event["event"] for event in system_log.take()] == ["key_revoked", "key_created", "key_created"]
