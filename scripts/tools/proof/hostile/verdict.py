"""The result of a soak, its violations, and its table. Pure, apart from storing the result."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec

STORED = Path(__file__).parents[1] / "hostile.json"
"""The stored result, from which the documentation has its figures."""
DOCUMENT = Path(__file__).parents[4] / "sso_service" / "docs" / "explanation" / "proof.md"
BEGIN, END = "<!-- begin: scripts/prove --hostile -->\n", "<!-- end -->\n"
"""The lines around the tables in the documentation."""

SLOWER = 3.0
"""Factor by which hostile connections may increase the 99th percentile of a login's time."""
GROWTH_MB = 20.0
"""Megabytes by which memory may grow between the first and the last third of the time with hostile connections."""
MORE_MB = 100.0
"""Megabytes of memory that hostile connections may occupy at any time: 200 KB for each of 500. A leak is found by
`GROWTH_MB`, and a client that makes the service store what it sends, by this limit."""
OPEN = 0.9
"""Part of the hostile connections that are open at any time, in the median of the seconds. The others reconnect."""
ACTIVE = 0.5
"""Part of the intended actions of the hostile connections that must take place. Some wait for the service, which closes
or ignores them; if more do, this machine or the service is too slow for a valid result."""


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """The logins of a phase, and what the service used for them. A sample is taken every second.

    A login is one issued token and its redemption by a browser. Its time, in milliseconds, counts from the moment at
    which it was due. `cpu` values are seconds of processor time per second; `waited` are seconds per second in which
    the event loop waited for its core, which on a busy machine other programs use.
    """

    seconds: float
    logins: int
    failed: dict[str, int]
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    memory_mb: list[float]
    descriptors: list[int]
    cpu: float
    waited: float
    load_cpu: float
    log_bytes: int
    tracebacks: int


class Tally(msgspec.Struct):
    """Counts of the connections of one kind. An action sends a part of a request, or several requests.

    `answers` counts the responses by status, as far as any were read. `breaches` counts the responses that no such
    request may ever get; for all kinds, 500 is one.
    """

    connections: int = 0
    actions: int = 0
    requests: int = 0
    answers: dict[int, int] = {}
    breaches: int = 0


class Attack(msgspec.Struct, kw_only=True):
    """The actions of the hostile clients in their first `seconds`, for which they used `cpu` seconds of processor time.

    `open` is the number of connections at the end, `refused` that of the attempts to connect that failed.
    """

    kinds: dict[str, Tally]
    seconds: float = 0.0
    open: int = 0
    refused: int = 0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """The actions per second."""
        return sum(tally.actions for tally in self.kinds.values()) / max(self.seconds, 1.0)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a soak.

    `capacity` and `rate` are logins per second: as fast as possible, and due in both phases. Each hostile connection
    acts about every `pace` seconds. `open` has the number of hostile connections in each second.
    """

    machine: dict[str, str]
    database: str
    capacity: float
    rate: float
    connections: int
    pace: float
    calm: Phase
    hostile: Phase
    attack: Attack
    open: list[int]


def violations(result: Result) -> dict[str, str]:
    """Return the violated rules by name, each with the reason."""
    return dict(_violations(result))


def _violations(result: Result) -> Iterator[tuple[str, str]]:
    calm, hostile = result.calm, result.hostile
    for name, phase in (("without", calm), ("with", hostile)):
        if phase.failed or not phase.logins:
            yield "logins", f"{name} hostile connections, of {phase.logins} logins failed {phase.failed}"
    if hostile.p99_ms > SLOWER * calm.p99_ms:
        yield "p99", f"{hostile.p99_ms:.1f} ms, more than {SLOWER:g} times {calm.p99_ms:.1f} ms"
    grown, more = growth(hostile.memory_mb), max(hostile.memory_mb) - median(calm.memory_mb)
    if grown > GROWTH_MB or more > MORE_MB:
        yield "memory", f"grows by {grown:.0f} MB in the time, and is {more:.0f} MB more than before at most"
    if lines := calm.tracebacks + hostile.tracebacks:
        yield "traceback", f"{lines} in the log"
    if idle := [name for name, tally in result.attack.kinds.items() if not (tally.connections and tally.requests)]:
        yield "kinds", f"no connection or no request of: {', '.join(idle)}"
    intended = result.connections / result.pace
    if median(result.open) < OPEN * result.connections or result.attack.rate < ACTIVE * intended:
        yield (
            "attack",
            f"{median(result.open):.0f} of {result.connections} connections were open, with {result.attack.rate:.0f} "
            f"of {intended:.0f} actions a second",
        )
    if breaches := {name: tally.breaches for name, tally in result.attack.kinds.items() if tally.breaches}:
        yield "breach", f"responses with 500, or to requests that must be refused: {breaches}"


def growth(samples: Sequence[float]) -> float:
    """Return by how much the median of the last third of the samples exceeds that of the first third."""
    third = max(len(samples) // 3, 1)
    return median(samples[-third:]) - median(samples[:third])


def percentile(times: Sequence[float], percent: float) -> float:
    """Return a percentile of the times, or 0 if there are none."""
    ordered = sorted(times)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else 0.0


def report(result: Result) -> str:
    """Return the tables in Markdown."""
    calm, hostile, attack = result.calm, result.hostile, result.attack
    requests = sum(tally.requests for tally in attack.kinds.values())
    rows = [
        ("seconds", *(f"{phase.seconds:.0f}" for phase in (calm, hostile))),
        ("logins, each an issued and redeemed token", *(f"{phase.logins:,}" for phase in (calm, hostile))),
        ("failed logins", *(f"**{sum(phase.failed.values())}**" for phase in (calm, hostile))),
        ("time of a login, p50", *(f"{phase.p50_ms:.1f} ms" for phase in (calm, hostile))),
        ("time of a login, p99", *(f"**{phase.p99_ms:.1f} ms**" for phase in (calm, hostile))),
        ("slowest login", *(f"{phase.slowest_ms:.0f} ms" for phase in (calm, hostile))),
        ("memory (RSS), first third, last third, most", *(_memory(phase.memory_mb) for phase in (calm, hostile))),
        ("open descriptors, median, most", *(_most(phase.descriptors) for phase in (calm, hostile))),
        ("processor time of the service", *(f"{phase.cpu:.0%}" for phase in (calm, hostile))),
        ("waiting for a busy core", *(f"{phase.waited:.0%}" for phase in (calm, hostile))),
        ("processor time of the load generator", *(f"{phase.load_cpu:.0%}" for phase in (calm, hostile))),
        ("log, per second", *(f"{phase.log_bytes / phase.seconds / 1000:.0f} KB" for phase in (calm, hostile))),
        ("tracebacks in the log", *(f"{phase.tracebacks}" for phase in (calm, hostile))),
    ]
    seconds = max(attack.seconds, 1.0)
    lines = [
        f"{result.database}, one worker. {result.rate:.0f} logins a second are due, half of the {result.capacity:.0f} "
        f"that this machine reaches with this load. {result.connections} hostile connections of {len(attack.kinds)} "
        f"kinds, each of which acts about every {result.pace:g} s: {attack.rate:.0f} actions and "
        f"{requests / seconds:.0f} requests a second. Their process has a low priority and takes "
        f"{attack.cpu / seconds:.0%} of a core.",
        "",
        "| | without | with hostile connections |",
        "| --- | --- | --- |",
        *(f"| {title} | {first} | {second} |" for title, first, second in rows),
        "",
        "| kind | connections | requests | responses that were read, by status |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {tally.connections:,} | {tally.requests:,} | {_answers(tally.answers)} |"
            for name, tally in attack.kinds.items()
        ),
        "",
        ", ".join(f"{name} {value}" for name, value in result.machine.items()) + ".",
        "",
        "Violations: " + ("; ".join(f"**{name}**: {why}" for name, why in violations(result).items()) or "**none**."),
    ]
    return "\n".join(lines) + "\n"


def _memory(samples: Sequence[float]) -> str:
    third = max(len(samples) // 3, 1)
    return f"{median(samples[:third]):.0f}, {median(samples[-third:]):.0f}, {max(samples):.0f} MB"


def _most(samples: Sequence[int]) -> str:
    return f"{median(samples):.0f}, {max(samples)}"


def _answers(answers: Mapping[int, int]) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(answers.items())) or "-"


def save(result: Result) -> None:
    """Store the result, and write its tables into the documentation."""
    STORED.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{report(result)}\n{END}{after}")
