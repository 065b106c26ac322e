"""Run the benchmark: `scripts/bench`, or `python -m scripts.tools.bench` if everything is installed."""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from scripts.tools.bench import growth, machine, storage, systems
from scripts.tools.bench.cases import CASES, ISSUE, LOGIN, Case
from scripts.tools.bench.chart import chart
from scripts.tools.bench.goals import goals
from scripts.tools.bench.hostile import measure_hostile, site
from scripts.tools.bench.libraries import measure_libraries
from scripts.tools.bench.load import check_wrk
from scripts.tools.bench.machine import Cores, NotPossible
from scripts.tools.bench.measure import run
from scripts.tools.bench.open_loop import open_loop
from scripts.tools.bench.plan import FULL, QUICK, Plan
from scripts.tools.bench.report import report
from scripts.tools.bench.results import Latency, Results
from scripts.tools.bench.servers import ROOT
from scripts.tools.bench.stores import KINDS, SQLITE, PostgreSQL, postgresql_server, store
from scripts.tools.bench.systems import Ours, System

LATENCY, LIBRARIES, STORAGE, GROWTH, HOSTILE = "latency", "libraries", "storage", "growth", "hostile"
PARTS = (*(case.name for case in CASES), LATENCY, LIBRARIES, STORAGE, GROWTH, HOSTILE)


class Benchmark:
    """One run of the benchmark by a plan, in a temporary directory."""

    def __init__(self, plan: Plan, parts: Sequence[str], cores: Cores, directory: Path, server: PostgreSQL) -> None:
        self._plan = plan
        self._parts = parts
        self._cores = cores
        self._directory = directory
        self._postgresql = server
        self._begin = time.monotonic()
        self._fastest = 0.0
        self.results = Results(plan, {**machine.describe(), "postgresql": server.version})

    def run(self) -> None:
        """Measure all parts."""
        if LIBRARIES in self._parts:
            self._log(LIBRARIES)
            self.results.costs = measure_libraries(rounds=5, calls=self._plan.library_calls)
        if HOSTILE in self._parts:
            with site(self._directory, self._cores.server) as running:
                self.results.hostile = measure_hostile(running, self._log)
        if not set(self._parts) - {LIBRARIES, HOSTILE}:
            return
        with systems.ceiling(self._directory, self._cores.server) as ceiling:
            self._fastest = run(ceiling, ISSUE, connections=64, seconds=1, fastest=10_000).rate
            if set(self._parts) - {LIBRARIES, GROWTH, HOSTILE}:
                self._measure_beside(ceiling)
        if GROWTH in self._parts:
            for kind in KINDS:
                self._log(f"{GROWTH}, {kind}")
                self.results.growth += growth.measure_growth(
                    kind,
                    self._postgresql,
                    self._plan.growth,
                    cores=self._cores,
                    rounds=self._plan.rounds,
                    seconds=self._plan.growth_seconds,
                    fastest=self._fastest,
                )

    def _measure_beside(self, ceiling: System) -> None:
        """Measure the parts that need the three systems side by side."""
        with ExitStack() as stack:
            all_systems: list[System] = [ceiling]
            for kind in KINDS:
                for serve in (systems.ours, systems.conventional):
                    self._log(f"filling {kind}")
                    made = stack.enter_context(store(kind, self._directory, self._postgresql, people=self._plan.people))
                    all_systems.append(stack.enter_context(serve(made, self._directory, self._cores.server)))
            for number in range(self._plan.rounds):
                for case in CASES:
                    if case.name in self._parts:
                        self._log(f"round {number + 1} of {self._plan.rounds}: {case.title}")
                        self._measure_case(case, all_systems)
            if LATENCY in self._parts:
                self._measure_latency(
                    [system for system in all_systems if not isinstance(system, systems.Conventional)]
                )
            if STORAGE in self._parts:
                self._measure_storage([system for system in all_systems if isinstance(system, Ours)])

    def _measure_case(self, case: Case, all_systems: Sequence[System]) -> None:
        for system in all_systems:
            run(system, case, connections=64, seconds=1, fastest=self._fastest)  # to warm up
        for connections, seconds in self._plan.connections.items():
            for system in all_systems:
                measured = run(system, case, connections=connections, seconds=seconds, fastest=self._fastest)
                self.results.add(case.name, connections, system.label, measured)

    def _measure_latency(self, some_systems: Sequence[System]) -> None:
        rate, seconds = self._plan.open_loop_rate, self._plan.open_loop_seconds
        for case in (ISSUE, LOGIN):
            for system in some_systems:
                self._log(f"open loop: {case.title}, {system.label}")
                open_loop(system.server.port, case.make(system, rate), rate=rate)  # to warm up
                answers = open_loop(system.server.port, case.make(system, rate * seconds), rate=rate)
                expected = case.expected(system)
                problems = [f"{count} x {status}" for status, count in answers.statuses.items() if status != expected]
                if missing := answers.sent - len(answers.latencies):
                    problems.append(f"{missing} without an answer")
                p50, p99, p999 = (answers.percentile(percent) for percent in (50, 99, 99.9))
                self.results.latencies.append(Latency(case.name, system.label, p50, p99, p999, problems))

    def _measure_storage(self, ours: Sequence[Ours]) -> None:
        self._log(STORAGE)
        for system in ours:
            if system.store and system.store.kind == SQLITE:
                self.results.bytes_when_issuing = storage.bytes_written_when_issuing(system)
        for kind in KINDS:
            with store(kind, self._directory, self._postgresql, people=self._plan.people) as made:
                self.results.bytes_per_login.append(storage.bytes_per_login(made, self._plan.logins_stored))

    def _log(self, step: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.0f} s] {step}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure the service and its alternatives.")
    parser.add_argument("--quick", action="store_true", help="about three minutes, for development")
    parser.add_argument("--only", metavar="PART,...", help=f"only these parts: {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=ROOT / "var" / "bench.json", help="default: var/bench.json")
    parser.add_argument("--save", action="store_true", help="also write scripts/tools/bench/bench.json and bench.svg")
    arguments = parser.parse_args()
    parts = arguments.only.split(",") if arguments.only else [p for p in PARTS if p != GROWTH or not arguments.quick]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    plan = QUICK if arguments.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    try:
        check_wrk()
        cores = machine.divide_cores()
        with tempfile.TemporaryDirectory() as directory, postgresql_server() as server:
            benchmark = Benchmark(plan, parts, cores, Path(directory), server)
            benchmark.run()
    except NotPossible as error:
        sys.exit(str(error))
    _write(benchmark.results, arguments.output, save=arguments.save)


def _write(results: Results, output: Path, *, save: bool) -> None:
    content = results.as_json()
    content["goals"] = [
        {"goal": goal.title, "target": goal.target, "measured": goal.measured, "met": goal.met}
        for goal in goals(results)
    ]
    written = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(written)
    if save:
        (Path(__file__).parent / "bench.json").write_text(written)
        if drawn := chart(results):
            (Path(__file__).parent / "bench.svg").write_text(drawn)
    print(report(results), end="")


if __name__ == "__main__":
    main()
