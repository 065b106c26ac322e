"""Prometheus metrics. All workers of a node count in shared files, so any worker can report for the whole node.

`prometheus_client` decides at its import whether it counts in `PROMETHEUS_MULTIPROC_DIR`. `server/supervisor.py` sets
this variable first, so no module that a command imports may import this one.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from sso_service.observability.audit import Event, EventName

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0)

REQUESTS = Counter("sso_requests", "Requests by route and status.", ["route", "status"])
REQUEST_SECONDS = Histogram("sso_request_seconds", "Duration of requests.", ["route"], buckets=_SECONDS)
ISSUED = Counter("sso_tokens_issued", "Login tokens issued.", ["user_created"])
REVOKED = Counter("sso_tokens_revoked", "Login tokens revoked.")
LOGINS = Counter("sso_logins", "Attempts to sign in with a login token.", ["way", "outcome"])
API_REFUSALS = Counter("sso_api_refusals", "Refused requests with an API token.", ["reason"])
CONNECTIONS_REFUSED = Counter("sso_connections_refused", "Connections refused because too many were open.")
CONNECTIONS_STALLED = Counter("sso_connections_stalled", "Connections cut off because the client did not read.")
BATCH_SIZE = Histogram(
    "sso_batch_size", "Operations in one transaction.", ["kind"], buckets=[2**power for power in range(10)]
)
BATCH_SECONDS = Histogram("sso_batch_seconds", "Duration of transactions.", ["kind"], buckets=_SECONDS)

GAUGES = {
    "sso_ready": "Whether this node should get requests.",
    "sso_signing_key_age_seconds": "Time since the signing key began to sign.",
    "sso_key_files_unusable": "Key files that cannot be read, are refused or invalid, or contain a revoked key again.",
    "sso_clock_difference_seconds": "How far this node's clock is ahead of the database's.",
    "sso_consumed_rows": "Rows in the table of consumed tokens.",
    "sso_api_tokens_expiring": "Active API tokens that expire within 14 days.",
    "sso_api_token_next_expiry_seconds": "Time until the next active API token expires.",  # nosec B105 - a text
}
"""Each gauge and its help text."""

# For the reference page, which is generated from this module.
LABELS = {
    "route": "one of the service's own paths, `login` (any path with `sso` in the query) or `page`",
    "status": "the HTTP status; 499 if the client closed the connection before the response",
    "user_created": "`yes` if the user was created for the login token, else `no`",
    "way": "`browser` or `api`",
    "outcome": "`signed_in`, `already_signed_in`, `asked`; refused: `malformed`, `bad_signature`, `expired`, "
    "`consumed`, `no_access`; answered with 503: `unavailable`, `overloaded`, `outcome_unknown`",
    "reason": "`not_authenticated` (unknown, revoked or expired API token), `insufficient_scope`, `rate_limited`, "
    "`user_disabled`, `role_not_allowed`",
    "kind": "`redeem` (logins), `lookup` (issuing), `standing` (access checks), `state` (the ledger, read only), "
    "`provision` (new users and members), `use` (last use of API tokens), `health`, `page` and `change` (pages)",
}
"""The values of each label."""
NOTES = {
    "sso_requests": "Counted when the response has been sent, or the client has gone.",
    "sso_request_seconds": "Observed together with `sso_requests_total`.",
    "sso_tokens_issued": "Counted with the log event `token_issued`.",
    "sso_tokens_revoked": "Counted with the log event `token_revoked`.",
    "sso_logins": "Counted with the log events `login` and `login_refused`, when a question is asked, and when the "
    "user is signed in already.",
    "sso_api_refusals": "Counted with the log event `api_refused`.",
    "sso_connections_refused": "Counted when a new connection is closed at once, above `SSO_MAX_CONNECTIONS` or four "
    "fifths of the file descriptors.",
    "sso_connections_stalled": "Counted when nothing of a response has left for 30 seconds.",
    "sso_batch_size": "Observed when a transaction has been committed.",
    "sso_batch_seconds": "Observed when a transaction has been committed.",
    "sso_ready": "1 or 0. Read at each scrape.",
    "sso_signing_key_age_seconds": "Read at each scrape. Absent while there is no signing key.",
    "sso_key_files_unusable": "Read at each scrape, as the answering worker read the key directory last.",
    "sso_clock_difference_seconds": "Read at each scrape. Absent while the database is unreachable.",
    "sso_consumed_rows": "Estimated at each purge round, about once a minute. Close to the logins of the last hour.",
    "sso_api_tokens_expiring": "Read about once a minute, for the whole installation: each node reports the same.",
    "sso_api_token_next_expiry_seconds": "Read about once a minute. Absent while no API token has an expiry.",  # nosec B105 - a text
}
"""When each metric is counted or read."""


# Looking up the child of some labels costs as much as counting, so each is looked up once. There are few.
_requests, _request_seconds = cache(REQUESTS.labels), cache(REQUEST_SECONDS.labels)
_issued, _logins, _api_refusals = cache(ISSUED.labels), cache(LOGINS.labels), cache(API_REFUSALS.labels)


def count_request(route: str, status: int, seconds: float) -> None:
    """Count a request that was answered with `status` after `seconds`.

    `route` must be one of a fixed set of names: clients must not be able to create time series.
    """
    _requests(route, status).inc()
    _request_seconds(route).observe(seconds)


def count_login(way: str, outcome: str) -> None:
    """Count an attempt to sign in. `way` is `browser` or `api`."""
    _logins(way, outcome).inc()


def batches(kind: str) -> Callable[[int, float], None]:
    """Return the function that records one batch of this kind: its operations, and its duration in seconds."""
    size, seconds = BATCH_SIZE.labels(kind), BATCH_SECONDS.labels(kind)

    def observe(operations: int, duration: float) -> None:
        size.observe(operations)
        seconds.observe(duration)

    return observe


def count(event: Event) -> None:
    """Count an audit event. Events of changes that admins and operators make have no metric."""
    match event.event:
        case EventName.TOKEN_ISSUED:
            _issued("yes" if event.user_created else "no").inc()
        case EventName.LOGIN:
            _logins(event.way, "signed_in").inc()
        case EventName.LOGIN_REFUSED:
            _logins(event.way, event.reason).inc()
        case EventName.TOKEN_REVOKED:
            REVOKED.inc()
        case EventName.API_REFUSED:
            _api_refusals(event.reason).inc()


class Gauges(Collector):
    """The state of the node at this moment, a value for each name in `GAUGES`. Unknown values are left out."""

    def __init__(self, values: dict[str, float | None]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        """Yield the known values."""
        for name, value in self._values.items():
            if value is not None:
                yield GaugeMetricFamily(name, GAUGES[name], value)


def exposition(gauges: Gauges) -> bytes:
    """Return all metrics of this node in Prometheus' text format."""
    registry = CollectorRegistry()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # the library has no types there
    else:  # a single process that was not started by `sso-service serve`
        registry.register(REGISTRY)
    registry.register(gauges)
    return generate_latest(registry)
