"""The performance goals, and whether they are met."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from scripts.tools.bench.cases import AUTH, FORGED, ISSUE, LOGIN
from scripts.tools.bench.growth import MANY_CONSUMED, MANY_USERS, SMALL
from scripts.tools.bench.libraries import ITSDANGEROUS, OURS, PYJWT
from scripts.tools.bench.measure import ratio
from scripts.tools.bench.results import CEILING, Results, conventional, ours
from scripts.tools.bench.stores import KINDS, POSTGRESQL, SQLITE

_CONNECTIONS = 64


@dataclass(frozen=True)
class Goal:
    """A goal. `measured` is None if it was not measured or the measurement is not valid."""

    title: str
    at_least: bool
    target: float
    measured: float | None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, or None if that is unknown."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def goals(results: Results) -> list[Goal]:
    """Return every goal."""
    return [*_throughput(results), *_libraries(results), *_latency(results), *_storage(results), *_growth(results)]


def _throughput(results: Results) -> Iterator[Goal]:
    for case, target in ((ISSUE, 0.75), (LOGIN, 0.60), (FORGED, 0.80), (AUTH, 0.70)):
        for kind in KINDS:
            measured = results.ratio(case.name, _CONNECTIONS, ours(kind), CEILING)
            yield Goal(f"{case.title}, {kind}, against the ceiling", True, target, measured)
    for kind, targets in ((SQLITE, {ISSUE: 25, LOGIN: 12}), (POSTGRESQL, {ISSUE: 10, LOGIN: 8})):
        for case, times in targets.items():
            measured = results.ratio(case.name, _CONNECTIONS, ours(kind), conventional(kind))
            yield Goal(f"{case.title}, {kind}, against conventional", True, times, measured, "x")


def _libraries(results: Results) -> Iterator[Goal]:
    cost = results.cost(OURS)
    yield Goal("sign in process", False, 3, median(cost.sign_us) if cost else None, "µs")
    yield Goal("verify in process", False, 3, median(cost.verify_us) if cost else None, "µs")
    for name in (ITSDANGEROUS, PYJWT):
        other = results.cost(name)
        times = other.times(cost) if other and cost else None
        yield Goal(f"sign and verify, against {name}", True, 3, times, "x")


def _latency(results: Results) -> Iterator[Goal]:
    for case in (ISSUE, LOGIN):
        for kind in KINDS:
            found = [one for one in results.latencies if (one.case, one.label) == (case.name, ours(kind))]
            valid = found[0] if found and not found[0].problems else None
            title = f"{case.title}, {kind}, {results.plan.open_loop_rate} requests/s"
            yield Goal(f"{title}: p50", False, 2, valid.p50_ms if valid else None, "ms")
            yield Goal(f"{title}: p99", False, 8, valid.p99_ms if valid else None, "ms")


def _storage(results: Results) -> Iterator[Goal]:
    yield Goal("bytes written by 1000 issues for known users", False, 0, results.bytes_when_issuing)
    sizes = {size.kind: size.bytes for size in results.bytes_per_login}
    for kind, target in ((SQLITE, 48), (POSTGRESQL, 110)):
        yield Goal(f"bytes on disk per login, {kind}", False, target, sizes.get(kind))
    workers = [
        series.memory.pss_mb for (_, _, label), series in results.throughput.items() if label in map(ours, KINDS)
    ]
    yield Goal("memory per worker under load (PSS)", False, 120, max(workers, default=None), "MB")


def _growth(results: Results) -> Iterator[Goal]:
    sizes = results.plan.growth
    for size, title in (
        (MANY_USERS, f"{sizes.many_users:,} users against {sizes.few_users:,}"),
        (MANY_CONSUMED, f"{sizes.consumed:,} consumed rows against none"),
    ):
        for kind in KINDS:
            for case in (ISSUE, LOGIN):
                found = [one.series for one in results.growth if (one.kind, one.case) == (kind, case.name)]
                valid = found and not found[0][size].problems and not found[0][SMALL].problems
                measured = ratio(found[0][size], found[0][SMALL]) if valid else None
                yield Goal(f"{case.title}, {kind}, {title}", True, 0.9, measured)
