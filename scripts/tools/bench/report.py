"""The results as tables in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from scripts.tools.bench.cases import CASES
from scripts.tools.bench.goals import goals
from scripts.tools.bench.growth import SMALL
from scripts.tools.bench.hostile import LIMIT
from scripts.tools.bench.measure import Series, ratio
from scripts.tools.bench.results import CEILING, LABELS, Results, conventional, ours
from scripts.tools.bench.stores import KINDS

_INVALID = "invalid"


def report(results: Results) -> str:
    """Return the whole report."""
    sections = [
        ("Requests per second, one core", _throughput(results)),
        ("At 64 connections", _details(results)),
        ("Signing and verifying in process", _libraries(results)),
        (f"Open loop, {results.plan.open_loop_rate} requests/s", _latencies(results)),
        ("Growth: requests per second at 64 connections", _growth(results)),
        (f"Hostile input: microseconds of the event loop per KiB, limit {LIMIT:.0f}", _hostile(results)),
        ("Goals", _goals(results)),
        ("Problems", _problems(results)),
    ]
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    rounds = f"{results.plan.name} run, medians of {results.plan.rounds} rounds"
    written = ["\n".join([f"### {title}", "", *lines]) for title, section in sections if (lines := list(section))]
    return "\n\n".join([*written, f"{machine}; {rounds}"]) + "\n"


def _throughput(results: Results) -> Iterator[str]:
    """Yield the main table. `x ceiling` and `x conventional` are medians of the ratios within the rounds."""
    if not results.throughput:
        return
    header = ["", "connections", CEILING]
    for kind in KINDS:
        header += [ours(kind), "x ceiling", conventional(kind), "x conventional"]
    rows = []
    for case in CASES:
        for connections in sorted(results.plan.connections):
            found = {label: results.throughput.get((case.name, connections, label)) for label in LABELS}
            if found[CEILING] is None:
                continue
            row = [case.title, str(connections), _rate(found[CEILING])]
            for kind in KINDS:
                row += [
                    _rate(found[ours(kind)]),
                    _number(results.ratio(case.name, connections, ours(kind), CEILING)),
                    _rate(found[conventional(kind)]),
                    _number(results.ratio(case.name, connections, ours(kind), conventional(kind))),
                ]
            rows.append(row)
    yield from _table(header, rows)


def _details(results: Results) -> Iterator[str]:
    """Yield CPU use by the processes' own accounting, and the highest memory use as PSS / RSS."""
    rows = []
    for case in CASES:
        ceiling = results.throughput.get((case.name, 64, CEILING))
        for label in LABELS:
            series = results.throughput.get((case.name, 64, label))
            if series:
                rows.append(
                    [
                        case.title,
                        label,
                        _number(series.cpu_us),
                        _number(series.cpu_us / ceiling.cpu_us if ceiling and ceiling.cpu_us else None),
                        _number(series.postgresql_cpu_us),
                        _number(series.p50_ms),
                        _number(series.p99_ms),
                        f"{series.memory.pss_mb:.0f} / {series.memory.rss_mb:.0f}",
                    ]
                )
    header = ["", "", "CPU µs/request", "x ceiling", "PostgreSQL µs", "p50 ms", "p99 ms", "memory MB"]
    yield from _table(header, rows)


def _libraries(results: Results) -> Iterator[str]:
    rows = []
    base = results.costs[0] if results.costs else None
    for cost in results.costs:
        assert base is not None
        rows.append(
            [
                cost.library,
                _number(sign := median(cost.sign_us)),
                _number(sign / median(base.sign_us)),
                _number(verify := median(cost.verify_us)),
                _number(verify / median(base.verify_us)),
                str(cost.length),
            ]
        )
    yield from _table(["", "sign µs", "x ours", "verify µs", "x ours", "characters"], rows)


def _latencies(results: Results) -> Iterator[str]:
    titles = {case.name: case.title for case in CASES}
    rows = [
        [titles[one.case], one.label, *(_number(value) for value in (one.p50_ms, one.p99_ms, one.p999_ms))]
        for one in results.latencies
    ]
    yield from _table(["", "", "p50 ms", "p99 ms", "p99.9 ms"], rows)


def _growth(results: Results) -> Iterator[str]:
    rows = []
    titles = {case.name: case.title for case in CASES}
    for growth in results.growth:
        small = growth.series[SMALL]
        rows.append([titles[growth.case], growth.kind, _rate(small)])
        for size, series in growth.series.items():
            if size != SMALL:
                rows[-1] += [_rate(series), _number(ratio(series, small))]
    sizes = results.plan.growth
    large = [f"{sizes.many_users:,} users", "x", f"{sizes.consumed:,} consumed", "x"]
    yield from _table(["", "", f"{sizes.few_users:,} users", *large], rows)


def _hostile(results: Results) -> Iterator[str]:
    """Yield the worst content of each place, worst place first."""
    worst = {cost.place: cost for cost in sorted(results.hostile, key=lambda cost: cost.per_kib)}
    rows = [
        [
            cost.place,
            f"`{cost.fill.replace('|', ' ')}`" if cost.fill else "",
            str(cost.status),
            f"{cost.size:,}",
            f"{cost.microseconds:,.0f}",
            f"{cost.empty_microseconds:,.0f}" if cost.empty_microseconds else "-",
            f"{cost.per_kib:.1f}",
            "yes" if cost.kept else "**no**",
        ]
        for cost in sorted(worst.values(), key=lambda cost: -cost.per_kib)
    ]
    yield from _table(["place", "filled with", "status", "bytes", "µs", "µs if empty", "µs/KiB", "kept"], rows)


def _goals(results: Results) -> Iterator[str]:
    rows = [
        [
            goal.title,
            f"{'>=' if goal.at_least else '<='} {goal.target:g}{_unit(goal.unit)}",
            "-" if goal.measured is None else _number(goal.measured) + _unit(goal.unit),
            {True: "yes", False: "**no**", None: "-"}[goal.met],
        ]
        for goal in goals(results)
    ]
    yield from _table(["", "goal", "measured", "met"], rows)


def _problems(results: Results) -> Iterator[str]:
    series = [
        (f"{case}, {connections}, {label}", one) for (case, connections, label), one in results.throughput.items()
    ]
    series += [(f"{g.case}, {g.kind}, {size}", one) for g in results.growth for size, one in g.series.items()]
    problems = [(title, one.problems) for title, one in series]
    problems += [(f"open loop: {one.case}, {one.label}", one.problems) for one in results.latencies]
    for title, found in problems:
        if found:
            yield f"- {title}: {'; '.join(found)}"


def _unit(unit: str) -> str:
    return unit if unit in {"", "x"} else f" {unit}"


def _rate(series: Series | None) -> str:
    if series is None:
        return "-"
    return f"{_INVALID} ({series.rate:,.0f})" if series.problems else f"{series.rate:,.0f}"


def _number(value: float | None) -> str:
    """Return the value with three significant digits, and with all digits before the decimal point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a Markdown table that is also readable in a terminal. Nothing if there are no rows."""
    lines = [header, *rows]
    if len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
