"""The files for Prometheus and Grafana in `scripts/deploy`: they are valid, and use existing metrics."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.tools.ports import free_port
from sso_service.database.accounts import Expiring
from sso_service.errors import (
    ForgedToken,
    InsufficientScope,
    MalformedToken,
    NoAccess,
    NotAuthenticated,
    OutcomeUnknown,
    Overloaded,
    RateLimited,
    RoleNotAllowed,
    TokenConsumed,
    TokenExpired,
    Unavailable,
    UserDisabled,
)
from sso_service.services.node import Node
from sso_service.settings import Settings
from tests.support.client import Client
from tests.support.data import JANE, PAGE
from tests.support.databases import on_sqlite
from tests.support.metrics import sample_of, samples_in
from tests.support.processes import serving, wait_for_port
from tests.support.programs import program
from tests.support.repository import DEPLOY, ROOT

pytestmark = pytest.mark.anyio


ALERTS = (DEPLOY / "alerts.yml").read_text()
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def promtool(*arguments: str | Path, text: str = "") -> None:
    """Run promtool, and assert that it reports no problem."""
    done = subprocess.run(
        [program("promtool"), *arguments],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# --- the files -------------------------------------------------------------------------------------------------------


def test_prometheus_accepts_its_configuration_and_rules(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_text((DEPLOY / name).read_text())
    (tmp_path / "sso-metrics-token").write_text("hunter2")
    promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", tmp_path / "alerts.yml")


def test_every_alert_has_a_severity_and_a_troubleshooting_entry() -> None:
    page = (ROOT / "sso_service" / "docs" / "how-to" / "troubleshoot.md").read_text()
    rows = set(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))
    for rule in ALERTS.split("- alert: ")[1:]:
        assert re.search(r"\n +severity: (page|warning)\n", rule), rule
        assert re.search(r"\n +for: \d+[mh]\n", rule), rule
        assert re.search(r"\n +summary: .{10}", rule), rule
        description = " ".join(rule.partition("description:")[2].partition("\n\n")[0].split())
        named = re.fullmatch(r".*Troubleshoot: (.*)\.'?", description)
        assert named, rule
        assert set(named[1].split("; ")) <= rows, rule


# --- queries ---------------------------------------------------------------------------------------------------------


def selectors(text: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each metric of the service in `text`, with its label matchers: label, and value or pattern."""
    for name, matchers in re.findall(r"\b(sso_\w+)(?:\{(.*?)\})?", text.replace("$node", ".+")):
        yield name, re.findall(r'(\w+)[=!~]+"(.*?)"', matchers)


def labels_to_group_by(text: str) -> set[str]:
    lists = re.findall(r"\b(?:by|on|ignoring|without|group_left)\s*\((.*?)\)", text)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


@pytest.fixture
async def metrics_text(client: Client, service: Node, api_token: str, verifier: str) -> str:
    """The content of `/metrics` after some requests."""
    used = await client.issue(api_token)
    await client.get(f"{PAGE}?sso={used}")
    await client.another().get(f"{PAGE}?sso={used}")
    await client.post_json("/v1/sso_tokens/revoke", {"token": await client.issue(api_token)}, token=api_token)
    await client.post_json("/v1/sso_tokens", JANE, token=verifier)
    service.consumed_rows = 2
    service.expiring = Expiring(1, int(time.time()) + 86400)
    return (await client.get("/metrics")).text


@on_sqlite
@pytest.mark.parametrize("text", [ALERTS, "\n".join(QUERIES)], ids=["alerts", "dashboard"])
async def test_alerts_and_dashboard_use_only_existing_metrics_and_labels(metrics_text: str, text: str) -> None:
    labels: dict[str, set[str]] = {}
    for name, pairs in samples_in(metrics_text):
        labels.setdefault(name, {"job", "instance"}).update(label for label, _ in pairs)
    reasons = {
        error.reason
        for error in (
            MalformedToken,
            ForgedToken,
            TokenExpired,
            TokenConsumed,
            NoAccess,
            NotAuthenticated,
            InsufficientScope,
            RateLimited,
            UserDisabled,
            RoleNotAllowed,
            Overloaded,
            Unavailable,
            OutcomeUnknown,
        )
    }
    values = {
        "job": {"sso"},
        "instance": {"node1.example:8000"},
        "outcome": {"signed_in", "already_signed_in", "asked"} | reasons,
        "reason": reasons,
        "route": {"login", "page", "/v1/sso_tokens", "/healthz", "/readyz", "/metrics"},
        "status": {str(int(status)) for status in HTTPStatus},
        "user_created": {"yes", "no"},
    }
    used = list(selectors(text))
    assert len(used) > 20
    for name, matchers in used:
        assert name in labels
        assert ("job", "sso") in matchers, name
        for label, value in matchers:
            assert label in labels[name], name
            for pattern in value.split("|"):
                assert any(re.fullmatch(pattern, known) for known in values[label]), f'{name}: {label}="{pattern}"'
    assert labels_to_group_by(text) <= set().union(*labels.values())


@on_sqlite
async def test_the_dashboard_shows_every_metric(metrics_text: str) -> None:
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name, _ in samples_in(metrics_text)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in selectors("\n".join(QUERIES))}
    assert {name for name in families if name.startswith("sso_") and f"{name}_total" not in families} == shown


@on_sqlite
async def test_metric_names_follow_prometheus_conventions(metrics_text: str) -> None:
    promtool("check", "metrics", text=metrics_text)


def test_dashboard_counters_are_rates_and_panels_do_not_overlap() -> None:
    for query in QUERIES:
        assert not re.search(r"_(total|bucket|sum|count)\b(?!\{[^}]*\}\[\$__rate_interval\]\))", query)
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


# --- a Prometheus that scrapes a service -----------------------------------------------------------------------------


@contextmanager
def prometheus(node: str, secret: str, directory: Path) -> Iterator[httpx.Client]:
    """Run a Prometheus with the shipped configuration, but other addresses and shorter intervals. Yields its API."""
    port = free_port()
    configuration = (DEPLOY / "prometheus.yml").read_text()
    for pattern, replacement in {
        r"_interval: 15s": "_interval: 200ms",
        r"alertmanager\.example:9093": f"127.0.0.1:{free_port()}",
        r"- node1\.example:8000": f"- {node}",
        r" +- node2\.example:8000\n": "",
    }.items():
        configuration, changed = re.subn(pattern, replacement, configuration)
        assert changed
    (directory / "prometheus.yml").write_text(configuration)
    (directory / "alerts.yml").write_text(ALERTS)
    (directory / "sso-metrics-token").write_text(secret)
    arguments = [
        program("prometheus"),
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            wait_for_port(port)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1") as api:
                yield api
        finally:
            process.terminate()
            process.wait(20)


@on_sqlite
def test_prometheus_scrapes_with_the_token_and_fills_every_panel(
    settings: Settings, keys_dir: Path, tmp_path: Path, api_token: str
) -> None:
    def traffic(url: str) -> None:
        authorization = {"Authorization": f"Bearer {api_token}"}
        token = httpx.post(f"{url}/v1/sso_tokens", json=JANE, headers=authorization).json()["token"]
        for _ in range(2):
            httpx.get(f"{url}{PAGE}?sso={token}")
        httpx.post(f"{url}/v1/sso_tokens", json=JANE, headers={"Authorization": "Bearer wf_live_unknown"})

    def result(query: str) -> Any:
        query = query.replace("$__rate_interval", "1m").replace("$node", ".*")
        answer = api.get("/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return answer["data"]["result"]

    env = {
        "SSO_HOME": settings.home,
        "SSO_DATABASE_URL": settings.database_url,
        "SSO_KEYS_DIR": str(keys_dir),
        "SSO_METRICS_TOKEN": "hunter2",
    }
    # The service counts the ledger's rows and the API tokens only after a minute.
    empty = [query for query in QUERIES if not re.search("sso_consumed_rows|sso_api_token", query)]
    deadline = time.monotonic() + 60
    with (
        serving(env, tmp_path / "log", workers=2) as running,
        prometheus(running.url.removeprefix("http://"), "hunter2", tmp_path) as api,
    ):
        while empty:
            assert time.monotonic() < deadline, empty
            traffic(running.url)
            empty = [query for query in empty if not result(query)]
        (up,) = result('up{job="sso"}')
        assert up["value"][1] == "1"
        (group,) = api.get("/rules").json()["data"]["groups"]
        assert {(rule["health"], rule.get("lastError")) for rule in group["rules"]} == {("ok", None)}
        assert {rule["state"] for rule in group["rules"]} == {"inactive"}


# --- alerts ----------------------------------------------------------------------------------------------------------

MINUTES = 50


def every_minute(growth: float, start: float = 0) -> str:
    return f"{start:g}{growth:+g}x{MINUTES}"


def constant(value: float) -> str:
    return every_minute(0, value)


def recently(minutes: int, value: float, before: float = 0) -> str:
    """Return a series with the value `before`, and `value` during the last minutes."""
    return f"{before:g}x{MINUTES - minutes - 1} {value:g}x{minutes + 20}"


def healthy() -> dict[str, str]:
    """Return the series of two nodes, a and b, each with thirty issued tokens and thirty logins a minute."""
    series = {}
    for node in "ab":
        for name, labels, values in (
            ("up", "", constant(1)),
            ("sso_ready", "", constant(1)),
            ("sso_signing_key_age_seconds", "", every_minute(60, 86400)),
            ("sso_key_files_unusable", "", constant(0)),
            ("sso_clock_difference_seconds", "", constant(0.2)),
            ("sso_consumed_rows", "", constant(60 * 66)),
            ("sso_api_tokens_expiring", "", constant(0)),
            ("sso_api_token_next_expiry_seconds", "", every_minute(-60, 90 * 86400)),
            ("sso_tokens_issued_total", 'user_created="no"', every_minute(30)),
            ("sso_tokens_revoked_total", "", every_minute(0)),
            ("sso_logins_total", 'way="browser", outcome="signed_in"', every_minute(30)),
            ("sso_requests_total", 'route="login", status="303"', every_minute(30)),
            ("sso_requests_total", 'route="/v1/sso_tokens", status="201"', every_minute(30)),
            ("sso_request_seconds_bucket", 'route="login", le="0.5"', every_minute(30)),
            ("sso_request_seconds_bucket", 'route="login", le="1.0"', every_minute(30)),
            ("sso_request_seconds_bucket", 'route="login", le="+Inf"', every_minute(30)),
            ("sso_request_seconds_count", 'route="login"', every_minute(30)),
        ):
            series[on(node, name, labels)] = values
    return series


def on(node: str, name: str, labels: str = "") -> str:
    """Return the name of a series of a node."""
    return f'{name}{{job="sso", instance="{node}"{", " if labels else ""}{labels}}}'


def login(outcome: str, node: str = "a") -> str:
    return on(node, "sso_logins_total", f'way="browser", outcome="{outcome}"')


def request(route: str, status: int, node: str = "a") -> str:
    return on(node, "sso_requests_total", f'route="{route}", status="{status}"')


def refusal(reason: str) -> str:
    return on("a", "sso_api_refusals_total", f'reason="{reason}"')


def age(node: str) -> str:
    return on(node, "sso_signing_key_age_seconds")


NO_TRAFFIC = {
    on(node, name, labels): constant(0)
    for node in "ab"
    for name, labels in (
        ("sso_logins_total", 'way="browser", outcome="signed_in"'),
        ("sso_tokens_issued_total", 'user_created="no"'),
        ("sso_consumed_rows", ""),
    )
}
"""Series of a night without logins."""
ABSENT = "_"
"""Values of a series that does not exist."""
NO_LOGINS = {series: ABSENT for series in NO_TRAFFIC if "logins" in series or "rows" in series}
SLOW = 'route="login", le="0.5"'

SITUATIONS: dict[str, tuple[dict[str, str], set[str]]] = {
    "everything works": ({}, set()),
    "there is no traffic at night": (NO_TRAFFIC, set()),
    "nothing is scraped at all": (dict.fromkeys(healthy(), ABSENT), {"SSONoNodeReady"}),
    "all nodes are down": (
        {on(node, "up"): constant(0) for node in "ab"} | {on(node, "sso_ready"): ABSENT for node in "ab"},
        {"SSONoNodeReady", "SSONodeDown"},
    ),
    "no node is ready": (
        {on(node, "sso_ready"): constant(0) for node in "ab"},
        {"SSONoNodeReady", "SSONodeNotReady"},
    ),
    "one of two nodes is down": ({on("a", "up"): constant(0), on("a", "sso_ready"): ABSENT}, {"SSONodeDown"}),
    "a node restarts": ({on("a", "up"): recently(3, 0, before=1)}, set()),
    "one of two nodes is not ready": ({on("a", "sso_ready"): constant(0)}, {"SSONodeNotReady"}),
    "a node is briefly not ready": ({on("a", "sso_ready"): recently(3, 0, before=1)}, set()),
    "the database is unavailable": ({login("unavailable"): every_minute(10)}, {"SSOLoginsFailing"}),
    "the database fails during commits": ({login("outcome_unknown"): every_minute(10)}, {"SSOLoginsFailing"}),
    "one login fails at night": (NO_TRAFFIC | {login("unavailable"): recently(8, 1)}, set()),
    "one login in a hundred fails": ({login("unavailable"): every_minute(0.6)}, set()),
    "there are too many logins": ({login("overloaded"): every_minute(10)}, {"SSOOverloaded"}),
    "there are briefly too many logins": ({login("overloaded"): recently(8, 15)}, set()),
    "issuing is answered 503": ({request("/v1/sso_tokens", 503): every_minute(10)}, {"SSORequestsFailing"}),
    "browsers prefetch login links": ({request("login", 503): every_minute(30)}, set()),
    "the balancer polls a node that is not ready": ({request("/readyz", 503): every_minute(60)}, set()),
    "a bug affects every third login": (
        {request("login", 500): every_minute(15)},
        {"SSORequestsFailing", "SSOInternalErrors"},
    ),
    "a bug occurs occasionally": ({request("login", 500): every_minute(0.2)}, {"SSOInternalErrors"}),
    "a bug occurs once": ({request("login", 500): recently(20, 1)}, set()),
    "the clock of a node is ahead": ({login("expired"): every_minute(20)}, {"SSOLoginsExpired"}),
    "the clock of a node is ahead, and malformed tokens arrive": (
        {login("expired"): every_minute(20), login("malformed"): every_minute(1000)},
        {"SSOLoginsExpired"},
    ),
    "some users open expired links": ({login("expired"): every_minute(3)}, set()),
    "one user opens an expired link at night": (NO_TRAFFIC | {login("expired"): recently(8, 5)}, set()),
    "nodes have different keys": (
        {login("bad_signature"): every_minute(20), login("signed_in"): every_minute(10)},
        {"SSOLoginsNotValid"},
    ),
    "nodes have different keys, and every login fails": (
        NO_LOGINS | {login("bad_signature"): every_minute(30)},
        {"SSOLoginsNotValid"},
    ),
    "forged tokens arrive": ({login("bad_signature"): every_minute(1000)}, set()),
    "forged tokens arrive at night": (NO_TRAFFIC | {login("bad_signature"): every_minute(1000)}, set()),
    "a scanner opens links first": ({login("consumed"): every_minute(30)}, {"SSOLoginsConsumedBefore"}),
    "some users open used links": ({login("consumed"): every_minute(5)}, set()),
    "one of several integrations has a revoked API token": (
        {refusal("not_authenticated"): every_minute(3), request("/v1/sso_tokens", 401): every_minute(3)},
        {"SSOIntegrationRefused"},
    ),
    "the only integration has a revoked API token": (
        {refusal("not_authenticated"): every_minute(90), request("/v1/sso_tokens", 401): every_minute(90)},
        {"SSOIntegrationRefused", "SSOIssuingRefused"},
    ),
    "a few unknown API tokens arrive": (
        {refusal("not_authenticated"): recently(10, 12), request("/v1/sso_tokens", 401): recently(10, 12)},
        set(),
    ),
    "an API token expires soon": (
        {on(node, "sso_api_tokens_expiring"): constant(1) for node in "ab"},
        {"SSOApiTokenExpiring"},
    ),
    "the API token that expired is not counted any more": (
        {on(node, "sso_api_tokens_expiring"): recently(10, 0, before=1) for node in "ab"},
        set(),
    ),
    "an integration requests roles that are not allowed": ({refusal("role_not_allowed"): every_minute(30)}, set()),
    "clients occupy all connections of a node": (
        {on("a", "sso_connections_refused_total"): every_minute(30)},
        {"SSOConnectionsRefused"},
    ),
    "a burst of connections is too large": ({on("a", "sso_connections_refused_total"): recently(8, 90)}, set()),
    "logins are slow": (
        {on(node, "sso_request_seconds_bucket", SLOW): every_minute(28) for node in "ab"},
        {"SSOSlow"},
    ),
    "a few logins are slow at night": (
        {series: every_minute(0) for series in healthy() if "sso_request_seconds" in series}
        | {
            on("a", "sso_request_seconds_bucket", f'route="login", le="{le}"'): every_minute(1)
            for le in ("1.0", "+Inf")
        }
        | {on("a", "sso_request_seconds_count", 'route="login"'): every_minute(1)},
        set(),
    ),
    "the keys are not rotated": ({age(node): every_minute(60, 100 * 86400) for node in "ab"}, {"SSOSigningKeyOld"}),
    "the keys are rotated every quarter": ({age(node): every_minute(60, 92 * 86400) for node in "ab"}, set()),
    "a node has no keys": (
        {age("a"): ABSENT, on("a", "sso_ready"): constant(0)},
        {"SSOSigningKeyMissing", "SSONodeNotReady"},
    ),
    "the signing key is from the future": ({age("a"): constant(-600)}, {"SSOSigningKeyMissing"}),
    "a key file cannot be used": (
        {on("a", "sso_key_files_unusable"): constant(2), on("a", "sso_ready"): constant(0)},
        {"SSOKeyFileUnusable", "SSONodeNotReady"},
    ),
    "a revoked key is put back": ({on("a", "sso_key_files_unusable"): constant(1)}, {"SSOKeyFileUnusable"}),
    "a clock drifts": ({on("a", "sso_clock_difference_seconds"): constant(-15)}, {"SSOClockDrifting"}),
    "a clock is five seconds ahead": ({on("a", "sso_clock_difference_seconds"): constant(5)}, set()),
    "a clock is wrong": (
        {on("a", "sso_clock_difference_seconds"): constant(-40), on("a", "sso_ready"): constant(0)},
        {"SSOClockDrifting", "SSOClockWrong", "SSONodeNotReady"},
    ),
    "nothing is purged": (
        {on(node, "sso_consumed_rows"): every_minute(60, 20000) for node in "ab"},
        {"SSOPurgeStandsStill"},
    ),
    "nothing is purged, and there is no traffic": (
        NO_TRAFFIC | {on(node, "sso_consumed_rows"): constant(5000) for node in "ab"},
        {"SSOPurgeStandsStill"},
    ),
    "many tokens are revoked": (
        {on("a", "sso_tokens_revoked_total"): every_minute(300), on("a", "sso_consumed_rows"): constant(360 * 66)},
        set(),
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_exactly_the_expected_alerts_fire_when(situation: str, tmp_path: Path) -> None:
    changes, alerts = SITUATIONS[situation]
    series = {name: values for name, values in {**healthy(), **changes}.items() if values != ABSENT}
    firing = {
        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": f"{MINUTES - 1}m",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)],
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [firing],
    }
    file = tmp_path / "test.yml"  # JSON is also YAML
    file.write_text(
        json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")], "evaluation_interval": "1m", "tests": [test]})
    )
    promtool("test", "rules", file)


def test_every_alert_fires_in_some_situation() -> None:
    assert set(re.findall(r"- alert: (\w+)", ALERTS)) == set().union(*(alerts for _, alerts in SITUATIONS.values()))


@on_sqlite
def test_every_worker_reports_the_metrics_of_all_workers(
    database_url: str, tmp_path: Path, keys_dir: Path, api_token: str
) -> None:
    env = {"SSO_HOME": str(tmp_path), "SSO_DATABASE_URL": database_url, "SSO_KEYS_DIR": str(keys_dir)}
    with serving(env, tmp_path / "log", workers=2) as running:
        totals = set()
        # Each request has a new connection, so that both workers probably answer some of them.
        for _ in range(40):
            answer = httpx.post(
                f"{running.url}/v1/sso_tokens", json=JANE, headers={"Authorization": f"Bearer {api_token}"}
            )
            assert answer.status_code == 201
        for _ in range(20):
            samples = samples_in(httpx.get(f"{running.url}/metrics").text)
            totals.add(
                sample_of(samples, "sso_tokens_issued_total", {"user_created": "yes"})
                + sample_of(samples, "sso_tokens_issued_total", {"user_created": "no"})
            )
    assert totals == {40}
