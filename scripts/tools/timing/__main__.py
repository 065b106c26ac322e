"""Run the timing test: `scripts/timing`, or `python -m scripts.tools.timing` if everything is installed."""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from scripts.tools.timing.cases import Case, cases
from scripts.tools.timing.dudect import THRESHOLD, Measured, measure


async def results(directory: Path, samples: int) -> AsyncGenerator[tuple[Case, Measured], None]:
    """Yield each case with its measurement, over `samples` inputs of each kind."""
    with cases(directory) as all_cases:
        for case in all_cases:
            yield case, await measure(case.call, case.kinds, samples)


def line(case: Case, measured: Measured) -> str:
    """Return the line of the report for a case."""
    one, other = measured.medians
    told_apart = measured.t >= THRESHOLD
    verdict = ("told apart" if told_apart else "not told apart") + ("" if told_apart is case.planted else ", WRONG")
    return f"{case.title:44}{one:10,.0f} ns{other - one:+8,.0f} ns{measured.t:9.2f}  {verdict}"


async def main() -> int:
    """Run the test. Return 0 if every result is as expected, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000, help="measurements of each kind; default: 100000")
    samples: int = parser.parse_args().samples
    print(f"{samples:,} of each kind in random order. Told apart: |t| >= {THRESHOLD}\n")
    print(f"{'':44}{'median':>13}{'difference':>11}{'|t|':>9}")
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        async with aclosing(results(Path(directory), samples)) as measured:
            async for case, each in measured:
                wrong += (each.t >= THRESHOLD) is not case.planted
                print(line(case, each), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
