"""One measurement of a running system, and the summary of several."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from scripts.tools.bench.cases import Case
from scripts.tools.bench.load import closed_loop
from scripts.tools.bench.servers import Memory
from scripts.tools.bench.systems import System


@dataclass(frozen=True)
class Run:
    """One run of one case. CPU in microseconds per request, of the server and, if it is used, of PostgreSQL."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    postgresql_cpu_us: float | None
    memory: Memory
    problems: list[str]
    """Deviations from the expected result. A run with problems is not valid."""


def run(system: System, case: Case, *, connections: int, seconds: int, fastest: float) -> Run:
    """Measure one case. The number of prepared requests follows from `fastest`, the approximate rate of the ceiling."""
    most = int(fastest * system.share * seconds) + 2 * connections
    requests = case.requests(system, most)
    postgresql = system.store.server if system.store else None
    memory: list[Memory] = []
    cpu = system.server.cpu_seconds()
    postgresql_cpu = postgresql.cpu_seconds() if postgresql else 0.0
    load = closed_loop(
        system.server.port,
        requests,
        connections=connections,
        seconds=seconds,
        shortly_before_end=lambda: memory.append(system.server.memory()),
    )
    time.sleep(0.05)  # for the requests in flight when wrk stopped
    cpu = system.server.cpu_seconds() - cpu
    postgresql_cpu = postgresql.cpu_seconds() - postgresql_cpu if postgresql else 0.0

    expected = case.expected(system)
    problems = [f"{count} x {status}" for status, count in sorted(load.statuses.items()) if status != expected]
    if load.failures:
        problems.append(f"{load.failures} failures")
    if case.once and system.remembers and load.sent > len(requests):
        problems.append("ran out of fresh requests")
    if not load.answered:
        problems.append("no answers")
    answered = max(load.answered, 1)
    return Run(
        rate=load.answered / load.seconds,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        cpu_us=cpu / answered * 1e6,
        postgresql_cpu_us=postgresql_cpu / answered * 1e6 if postgresql else None,
        memory=memory[0],
        problems=problems,
    )


@dataclass
class Series:
    """The runs of one system in one setting, one per round."""

    runs: list[Run] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return median(run.rate for run in self.runs)

    @property
    def p50_ms(self) -> float:
        """Median latency in the closed loop."""
        return median(run.p50_ms for run in self.runs)

    @property
    def p99_ms(self) -> float:
        """99th percentile of the latency in the closed loop."""
        return median(run.p99_ms for run in self.runs)

    @property
    def cpu_us(self) -> float:
        """CPU microseconds of the server per request."""
        return median(run.cpu_us for run in self.runs)

    @property
    def postgresql_cpu_us(self) -> float | None:
        """CPU microseconds of PostgreSQL per request."""
        used = [run.postgresql_cpu_us for run in self.runs if run.postgresql_cpu_us is not None]
        return median(used) if used else None

    @property
    def memory(self) -> Memory:
        """The highest memory use of the worker."""
        return Memory(max(run.memory.pss_mb for run in self.runs), max(run.memory.rss_mb for run in self.runs))

    @property
    def problems(self) -> list[str]:
        """The problems of all runs."""
        return [problem for run in self.runs for problem in run.problems]


def ratio(these: Series, those: Series) -> float:
    """Return how many times as fast as `those` `these` are: the median of the ratios within the rounds."""
    return median(ratios(these, those))


def ratios(these: Series, those: Series) -> Sequence[float]:
    """Return the ratio of each round."""
    return [this.rate / that.rate for this, that in zip(these.runs, those.runs, strict=True) if that.rate]
