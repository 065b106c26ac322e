"""What Prometheus is told. Counted in files that all workers of a node share, so that any of them can tell for all.

`prometheus_client` decides when it is imported whether it counts in `PROMETHEUS_MULTIPROC_DIR`; `web/server.py` sets
that before.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from sso_service.audit import Event, EventName

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0)

REQUESTS = Counter("sso_requests", "Requests answered.", ["route", "status"])
REQUEST_SECONDS = Histogram("sso_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS)
ISSUED = Counter("sso_tokens_issued", "Login tokens issued.", ["user_created"])
REVOKED = Counter("sso_tokens_revoked", "Login tokens taken back.")
LOGINS = Counter("sso_logins", "Attempts to sign in with a token.", ["way", "outcome"])
API_REFUSALS = Counter("sso_api_refusals", "Requests with an API token that were refused.", ["reason"])
BATCH_SIZE = Histogram(
    "sso_batch_size", "Operations in a transaction.", ["kind"], buckets=[2**power for power in range(10)]
)
BATCH_SECONDS = Histogram("sso_batch_seconds", "Time that a transaction took.", ["kind"], buckets=_SECONDS)


# To look up what belongs to some labels takes as long as to count there, so each is looked up once. There are few.
_requests, _request_seconds = cache(REQUESTS.labels), cache(REQUEST_SECONDS.labels)
_issued, _logins, _api_refusals = cache(ISSUED.labels), cache(LOGINS.labels), cache(API_REFUSALS.labels)


def count_request(route: str, status: int, seconds: float) -> None:
    """Counts a request that was answered with `status` after some `seconds`."""
    _requests(route, status).inc()
    _request_seconds(route).observe(seconds)


def count_login(way: str, outcome: str) -> None:
    """Counts an attempt to sign in."""
    _logins(way, outcome).inc()


def batches(kind: str) -> Callable[[int, float], None]:
    """What takes note of a batch of one kind of operation: its size, and the seconds that its transaction took."""
    size, seconds = BATCH_SIZE.labels(kind), BATCH_SECONDS.labels(kind)

    def observe(operations: int, duration: float) -> None:
        size.observe(operations)
        seconds.observe(duration)

    return observe


def count(event: Event) -> None:
    """Counts what was written down."""
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
    """What is true at this moment. What is not known is left out."""

    def __init__(self, values: dict[str, tuple[str, float | None]]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        """The values, each with its name and what it means."""
        for name, (meaning, value) in self._values.items():
            if value is not None:
                yield GaugeMetricFamily(name, meaning, value)


def exposition(gauges: Gauges) -> bytes:
    """All metrics of this node, in Prometheus' text format."""
    registry = CollectorRegistry()
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # the library has no types there
    else:  # whoever runs the application in another way, in one process
        registry.register(REGISTRY)
    registry.register(gauges)
    return generate_latest(registry)
