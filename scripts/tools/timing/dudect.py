"""A statistical test: can two kinds of input be distinguished by the time of a call?

This is the test of dudect (Reparaz, Balasch, Verbauwhede: Dude, is my code constant time?, DATE 2017). Both kinds are
measured in random order. Welch's t-test compares their times, over all measurements and over those below each of a
hundred quantiles, because slow measurements are mostly noise. The only assumption is that the noise of the machine does
not depend on the kind.
"""

import gc
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

THRESHOLD = 4.5
"""Value of |t| from which the kinds count as distinguishable, as is usual (ISO/IEC 17825, TVLA)."""

_QUANTILES = [1 - 0.5 ** ((number + 1) / 10) for number in range(100)]
_WARM_UP = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """The medians of both kinds, in nanoseconds, and the largest |t|."""

    medians: tuple[float, float]
    t: float


async def measure(
    call: Callable[[str], Awaitable[object]], kinds: tuple[Callable[[], str], Callable[[], str]], samples: int
) -> Measured:
    """Measure `call` with `samples` inputs of each kind, in random order."""
    order = [0, 1] * samples
    secrets.SystemRandom().shuffle(order)
    # Created in advance and in the order of use, so that neither kind has an advantage in memory.
    inputs = [kinds[kind]() for kind in order]
    for each in inputs[:_WARM_UP]:
        await call(each)
    times: list[tuple[int, int]] = []
    now = time.perf_counter_ns
    was_on = gc.isenabled()
    gc.disable()
    try:
        for kind, each in zip(order, inputs, strict=True):
            begin = now()
            await call(each)
            times.append((now() - begin, kind))
    finally:
        if was_on:
            gc.enable()
    medians = [median(taken for taken, kind in times if kind == wanted) for wanted in (0, 1)]
    return Measured((medians[0], medians[1]), largest_t(times))


def largest_t(times: Sequence[tuple[int, int]]) -> float:
    """Return the largest |t| of all tests, for pairs of a time (nanoseconds) and a kind (0 or 1)."""
    ordered = sorted(times)
    cuts = sorted({ordered[int(len(ordered) * quantile)][0] for quantile in _QUANTILES})
    return max(abs(t) for t in _t_below(ordered, [*cuts, math.inf]))


def _t_below(ordered: Sequence[tuple[int, int]], cuts: Sequence[float]) -> Iterator[float]:
    # Sums of integers are exact, so the variance has no rounding error.
    count, total, squares = [0, 0], [0, 0], [0, 0]
    enough = len(ordered) // 20  # of each kind; dudect demands 10,000, which 100,000 samples provide
    position = 0
    for cut in cuts:
        while position < len(ordered) and ordered[position][0] < cut:
            taken, kind = ordered[position]
            count[kind] += 1
            total[kind] += taken
            squares[kind] += taken * taken
            position += 1
        if min(count) >= max(enough, 2):
            means = [total[kind] / count[kind] for kind in (0, 1)]
            # The square of the standard error of each mean.
            errors = [
                (count[kind] * squares[kind] - total[kind] ** 2) / (count[kind] ** 2 * (count[kind] - 1))
                for kind in (0, 1)
            ]
            difference = means[0] - means[1]
            yield difference / math.sqrt(sum(errors)) if sum(errors) else difference * math.inf if difference else 0.0
