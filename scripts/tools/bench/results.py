"""All results of a run of the benchmark."""

from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.tools.bench.growth import Growth
from scripts.tools.bench.hostile import HostileCost
from scripts.tools.bench.libraries import Cost
from scripts.tools.bench.measure import Run, Series, ratio
from scripts.tools.bench.plan import Plan
from scripts.tools.bench.storage import PerLogin
from scripts.tools.bench.stores import KINDS

CEILING = "ceiling"
"""The label of the system that has no database."""


def ours(kind: str) -> str:
    """Return the label of the product on this kind of database."""
    return f"ours, {kind}"


def conventional(kind: str) -> str:
    """Return the label of the conventional service on this kind of database."""
    return f"conventional, {kind}"


LABELS = (CEILING, *(label(kind) for kind in KINDS for label in (ours, conventional)))


@dataclass(frozen=True)
class Latency:
    """The open loop of one system and case, in milliseconds."""

    case: str
    label: str
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    problems: list[str]


@dataclass
class Results:
    """The measurements. Parts that were left out are empty or None."""

    plan: Plan
    machine: dict[str, str]
    throughput: dict[tuple[str, int, str], Series] = field(default_factory=dict)
    """Keys: case, connections and label."""
    costs: list[Cost] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    bytes_when_issuing: int | None = None
    bytes_per_login: list[PerLogin] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    hostile: list[HostileCost] = field(default_factory=list)

    def add(self, case: str, connections: int, label: str, run: Run) -> None:
        """Store a run."""
        self.throughput.setdefault((case, connections, label), Series()).runs.append(run)

    def ratio(self, case: str, connections: int, label: str, other: str) -> float | None:
        """Return how many times as fast as `other` the system is.

        None if one of them was not measured or had problems.
        """
        these, those = (self.throughput.get((case, connections, name)) for name in (label, other))
        if these is None or those is None or these.problems or those.problems:
            return None
        return ratio(these, those)

    def cost(self, library: str) -> Cost | None:
        """Return the cost of a library, or None if it was not measured."""
        return next((cost for cost in self.costs if cost.library == library), None)

    def as_json(self) -> dict[str, Any]:
        """Return all results with their medians, so that other conclusions can be checked."""
        return {
            "machine": self.machine,
            "plan": asdict(self.plan),
            "throughput": [
                {"case": case, "connections": connections, "system": label, **_as_json(series)}
                for (case, connections, label), series in self.throughput.items()
            ],
            "libraries": [asdict(cost) for cost in self.costs],
            "open_loop": [asdict(latency) for latency in self.latencies],
            "bytes_written_by_1000_issues": self.bytes_when_issuing,
            "bytes_per_login": [asdict(size) for size in self.bytes_per_login],
            "growth": [
                {"database": growth.kind, "case": growth.case, "size": size, **_as_json(series)}
                for growth in self.growth
                for size, series in growth.series.items()
            ],
            "hostile": [asdict(cost) | {"us_per_kib": cost.per_kib} for cost in self.hostile],
        }


def _as_json(series: Series) -> dict[str, Any]:
    return {
        "requests_per_second": series.rate,
        "p50_ms": series.p50_ms,
        "p99_ms": series.p99_ms,
        "cpu_us": series.cpu_us,
        "postgresql_cpu_us": series.postgresql_cpu_us,
        "memory": asdict(series.memory),
        "problems": series.problems,
        "rounds": [run.rate for run in series.runs],
    }
