"""Does the service slow down as it grows? Measured with many users, and with many rows in the ledger."""

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from scripts.tools.bench.cases import ISSUE, LOGIN
from scripts.tools.bench.machine import Cores, NotPossible
from scripts.tools.bench.measure import Series, run
from scripts.tools.bench.stores import PostgreSQL, store
from scripts.tools.bench.systems import ours

SMALL, MANY_USERS, MANY_CONSUMED = "small", "many users", "many consumed"
_BYTES_PER_USER = 1000
"""Upper estimate of the disk space of a user in PostgreSQL: rows, indexes, and write-ahead log while filling."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the databases: users of the small and of the large one, consumed tokens of the third."""

    few_users: int
    many_users: int
    consumed: int


@dataclass
class Growth:
    """The results of issuing or login with each of the three databases."""

    kind: str
    case: str
    series: dict[str, Series]


def measure_growth(
    kind: str, postgresql: PostgreSQL, sizes: Sizes, *, cores: Cores, rounds: int, seconds: int, fastest: float
) -> list[Growth]:
    """Measure issuing and login at 64 connections, in turns with small and large databases of this kind."""
    needed = sizes.many_users * _BYTES_PER_USER
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise NotPossible(
            f"growth needs {needed / 1e9:.0f} GB in {tempfile.gettempdir()}; set TMPDIR to a larger file system"
        )
    cases = (ISSUE, LOGIN)
    results = [Growth(kind, case.name, {}) for case in cases]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        systems = {}
        for name, people, consumed in (
            (SMALL, sizes.few_users, 0),
            (MANY_USERS, sizes.many_users, 0),
            (MANY_CONSUMED, sizes.few_users, sizes.consumed),
        ):
            made = stack.enter_context(store(kind, directory, postgresql, people=people, consumed=consumed))
            systems[name] = stack.enter_context(ours(made, directory, cores.server))
        for case, growth in zip(cases, results, strict=True):
            for system in systems.values():
                run(system, case, connections=64, seconds=1, fastest=fastest)
            for _ in range(rounds):
                for name, system in systems.items():
                    measured = run(system, case, connections=64, seconds=seconds, fastest=fastest)
                    growth.series.setdefault(name, Series()).runs.append(measured)
    return results
