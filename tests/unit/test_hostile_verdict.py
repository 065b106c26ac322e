"""The verdict on a soak with hostile clients, by planted numbers."""

import msgspec
import pytest
from msgspec.structs import replace

from scripts.tools.proof.hostile.kinds import KINDS
from scripts.tools.proof.hostile.verdict import (
    DOCUMENT,
    STORED,
    Attack,
    Phase,
    Result,
    Tally,
    growth,
    percentile,
    report,
    violations,
)

PHASE = Phase(
    seconds=450.0,
    logins=450_000,
    failed={},
    p50_ms=2.0,
    p99_ms=8.0,
    slowest_ms=90.0,
    memory_mb=[80.0] * 450,
    descriptors=[560] * 450,
    cpu=0.6,
    waited=0.01,
    load_cpu=0.4,
    log_bytes=1_000_000,
    tracebacks=0,
)
RESULT = Result(
    machine={"cpu": "2 x some"},
    database="SQLite",
    capacity=2000.0,
    rate=1000.0,
    connections=500,
    pace=1.0,
    calm=replace(PHASE, p99_ms=4.0),
    hostile=PHASE,
    attack=Attack(
        kinds={"slow head": Tally(500, 150_000, 500, {408: 400}), "never read": Tally(20, 600, 600, {})},
        seconds=450.0,
        open=495,
    ),
    open=[495] * 450,
)


def test_a_soak_without_a_violation_has_none() -> None:
    assert violations(RESULT) == {}
    assert "Violations: **none**." in report(RESULT)


def with_hostile(**changes: object) -> Result:
    return replace(RESULT, hostile=replace(PHASE, **changes))


def with_kind(tally: Tally) -> Result:
    return replace(RESULT, attack=replace(RESULT.attack, kinds={**RESULT.attack.kinds, "planted": tally}))


@pytest.mark.parametrize(
    ("rule", "result"),
    [
        ("logins", with_hostile(failed={"issuing: 503": 1})),
        ("logins", replace(RESULT, calm=replace(RESULT.calm, failed={"Lost": 1}))),
        ("logins", with_hostile(logins=0)),
        ("p99", with_hostile(p99_ms=12.1)),
        ("memory", with_hostile(memory_mb=[80.0] * 250 + [101.0] * 200)),
        ("memory", with_hostile(memory_mb=[80.0] * 200 + [181.0] + [80.0] * 249)),
        ("memory", with_hostile(memory_mb=[181.0] * 450)),
        ("traceback", with_hostile(tracebacks=1)),
        ("traceback", replace(RESULT, calm=replace(RESULT.calm, tracebacks=1))),
        ("kinds", with_kind(Tally())),
        ("kinds", with_kind(Tally(connections=5))),
        ("attack", replace(RESULT, open=[440] * 300 + [500] * 150)),
        ("attack", replace(RESULT, attack=replace(RESULT.attack, seconds=700.0))),
        ("attack", replace(RESULT, pace=0.5)),
        ("breach", with_kind(Tally(5, 5, 5, {303: 1}, breaches=1))),
    ],
)
def test_each_violation_is_found_and_only_it(rule: str, result: Result) -> None:
    assert list(violations(result)) == [rule]
    assert f"**{rule}**" in report(result)


@pytest.mark.parametrize(
    "result",
    [
        with_hostile(p99_ms=12.0),
        with_hostile(memory_mb=[80.0] * 250 + [100.0] * 200),
        with_hostile(memory_mb=[80.0] * 200 + [180.0] + [80.0] * 249),
        replace(RESULT, open=[440] * 100 + [450] * 350),
    ],
)
def test_values_at_the_limits_are_no_violation(result: Result) -> None:
    assert violations(result) == {}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([80.0], 0.0), ([80.0, 90.0], 10.0), ([80.0, 500.0, 81.0], 1.0), ([80.0, 80.0, 90.0, 95.0, 100.0, 100.0], 20.0)],
)
def test_growth_is_that_of_the_medians_of_two_thirds(samples: list[float], expected: float) -> None:
    assert growth(samples) == expected


def test_percentiles_are_those_of_the_sorted_times() -> None:
    times = [float(number) for number in reversed(range(1000))]
    assert (percentile(times, 50), percentile(times, 99), percentile(times, 100), percentile([], 99)) == (
        500.0,
        990.0,
        999.0,
        0.0,
    )


def test_each_kind_of_hostile_connection_has_its_own_name() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_the_documentation_shows_the_stored_soak() -> None:
    stored = msgspec.json.decode(STORED.read_bytes(), type=Result)
    assert report(stored) in DOCUMENT.read_text("utf-8")
