"""The amount to measure: everything, or enough to notice a change during development."""

from dataclasses import dataclass

from scripts.tools.bench.growth import Sizes


@dataclass(frozen=True)
class Plan:
    """The sizes and durations. `connections` maps numbers of connections to seconds, in the order of measurement."""

    name: str
    people: int
    rounds: int
    connections: dict[int, int]
    library_calls: int
    open_loop_rate: int
    open_loop_seconds: int
    logins_stored: int
    growth: Sizes
    growth_seconds: int


FULL = Plan(
    name="full",
    people=20_000,
    rounds=3,
    connections={64: 4, 1: 2, 16: 2, 256: 2},
    library_calls=20_000,
    open_loop_rate=1000,
    open_loop_seconds=20,
    logins_stored=200_000,
    growth=Sizes(few_users=10_000, many_users=10_000_000, consumed=3_000_000),
    growth_seconds=3,
)
QUICK = Plan(
    name="quick",
    people=20_000,
    rounds=1,
    connections={64: 2, 1: 2},
    library_calls=5_000,
    open_loop_rate=1000,
    open_loop_seconds=5,
    logins_stored=20_000,
    growth=Sizes(few_users=10_000, many_users=100_000, consumed=30_000),
    growth_seconds=2,
)
