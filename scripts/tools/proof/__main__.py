"""`scripts/prove`: run the service under load and faults, record everything that happens, and check the records."""

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts.tools.proof.checker import check
from scripts.tools.proof.faults import KINDS
from scripts.tools.proof.history import Kind, read_history
from scripts.tools.proof.proven import BROKEN
from scripts.tools.proof.recovery import describe, recoveries
from scripts.tools.proof.trial import Options, run_trial

_FOREVER = 1e9


def main() -> None:
    """Run the command."""
    databases, options, keep = _read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all started processes are stopped
    with tempfile.TemporaryDirectory() as temporary:
        directory = keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        holds = [_prove(options(kind), directory / f"{kind}.jsonl", kept=keep is not None) for kind in databases]
    sys.exit(0 if all(holds) else 1)


def _prove(options: Options, history: Path, *, kept: bool) -> bool:
    """Run a trial and print its results. Return whether its history shows no violation."""
    print(f"\n{options.kind}, seed {options.seed}", flush=True)
    outcome = asyncio.run(run_trial(options, history))
    report = check(read_history(history))
    print(f"\nseed          {options.seed}, on {options.kind}" + (f", broken: {options.broken}" * bool(options.broken)))
    print(report)
    rate = report.counts.redemptions / outcome.load_seconds
    print(f"time          {outcome.load_seconds:.0f} s under load, {rate:.0f} redemptions a second")
    print(f"kill -9       {outcome.kills}")
    used = report.counts.successes.total()
    print(f"ledger        {outcome.rows} rows at the end, of {used} tokens that are certainly consumed")
    print(describe(recoveries(read_history(history))))
    for kind, why in outcome.left_out.items():
        print(f"left out      {kind}: {why}")
    if kept:
        print(f"history       {history}")
    print(f"result        {'VIOLATIONS FOUND' if report.violations else 'no violation'}", flush=True)
    return not report.violations


def _read_arguments() -> tuple[list[Kind], Callable[[Kind], Options], Path | None]:
    parser = argparse.ArgumentParser(
        prog="scripts/prove",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the service under load and faults, and check everything that happens.",
        epilog="faults:\n" + "\n".join(f"  {kind:15} {what}" for kind, what in KINDS.items()),
    )
    add = parser.add_argument
    add("--database", choices=("sqlite", "postgresql", "both"), default="both", help="default: both")
    add("--seed", type=int, default=secrets.randbits(32), help="determines faults and load; default: a random one")
    add("--tokens", type=int, default=100_000, help="least number of tokens to issue; default: 100000")
    add("--redemptions", type=int, default=1_000_000, help="least number of redemptions to attempt; default: 1000000")
    add("--seconds", type=float, default=_FOREVER, help="end after this time if that is earlier")
    add("--faults", default="all", help="all, none, or a list of kinds separated by commas (see below)")
    add("--nodes", type=int, default=3, help="nodes of two workers each; default: 3")
    add("--clients", type=int, default=512, help="concurrent requests; default: 512")
    add("--ttl", type=int, default=15, help="lifetime of a token in seconds; default: 15")
    add("--pace", type=float, default=1.0, help="factor for the time between faults; default: 1")
    add("--keep", type=Path, metavar="DIRECTORY", help="keep the histories in this directory")
    add(
        "--broken",
        nargs="?",
        const=BROKEN[0],
        choices=BROKEN,
        help="break a promise, to see that this is detected",
    )
    given = parser.parse_args()
    faults = {"all": tuple(KINDS), "none": ()}.get(given.faults, tuple(given.faults.split(",")))
    if unknown := set(faults) - set(KINDS):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")

    def options(kind: Kind) -> Options:
        return Options(
            kind=kind,
            seed=given.seed,
            tokens=given.tokens,
            redemptions=given.redemptions,
            seconds=given.seconds,
            faults=faults,
            nodes=given.nodes,
            ttl=given.ttl,
            clients=given.clients,
            pace=given.pace,
            broken=given.broken or "",
        )

    databases: list[Kind] = ["sqlite", "postgresql"] if given.database == "both" else [given.database]
    return databases, options, given.keep


if __name__ == "__main__":
    main()
