"""`scripts/prove`: run the service under load and faults, or beside hostile clients, and check everything."""

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
import psutil

from scripts.tools.bench.machine import NotPossible
from scripts.tools.bench.stores import POSTGRESQL, SQLITE
from scripts.tools.proof.checker import check
from scripts.tools.proof.faults import KINDS
from scripts.tools.proof.history import Kind, read_history
from scripts.tools.proof.hostile import soak, verdict
from scripts.tools.proof.proven import BROKEN
from scripts.tools.proof.recovery import describe, recoveries
from scripts.tools.proof.trial import Options, run_trial

_FOREVER = 1e9
_HOSTILE_PACE = 4.0
"""Seconds between two actions of a hostile connection, if not given."""
_SOAK = 600.0
"""Seconds of a soak with hostile clients."""


def main() -> None:
    """Run the command."""
    given = _read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all started processes are stopped
    databases: list[Kind] = ["sqlite", "postgresql"] if given.database == "both" else [given.database]
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        if given.hostile:
            holds = [_soak(kind, given, directory) for kind in databases]
        else:
            holds = [
                _prove(_options(kind, given), directory / f"{kind}.jsonl", kept=given.keep is not None)
                for kind in databases
            ]
    sys.exit(0 if all(holds) else 1)


def _soak(kind: Kind, given: argparse.Namespace, directory: Path) -> bool:
    """Run a soak with hostile clients and print its result. Return whether it shows no violation."""
    options = soak.Options(
        database=SQLITE if kind == "sqlite" else POSTGRESQL,
        seconds=given.seconds or _SOAK,
        connections=given.connections,
        pace=given.pace or _HOSTILE_PACE,
    )
    (place := directory / f"hostile-{kind}").mkdir(exist_ok=True)
    try:
        result = soak.soak(options, place)
    except NotPossible as error:
        sys.exit(str(error))
    except psutil.Error as error:
        sys.exit(f"VIOLATION: the service has ended: {error}")
    (place / "result.json").write_bytes(msgspec.json.encode(result))
    print(verdict.report(result), flush=True)
    if given.save:
        verdict.save(result)
    return not verdict.violations(result)


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


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/prove",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the service under load and faults, and check everything that happens.",
        epilog="faults:\n" + "\n".join(f"  {kind:15} {what}" for kind, what in KINDS.items()),
    )
    add = parser.add_argument
    add("--database", choices=("sqlite", "postgresql", "both"), help="default: both; with --hostile, sqlite")
    add("--seed", type=int, default=secrets.randbits(32), help="determines faults and load; default: a random one")
    add("--tokens", type=int, default=100_000, help="least number of tokens to issue; default: 100000")
    add("--redemptions", type=int, default=1_000_000, help="least number of redemptions to attempt; default: 1000000")
    add("--seconds", type=float, help="end after this time if that is earlier; with --hostile, the time (default: 600)")
    add("--faults", default="all", help="all, none, or a list of kinds separated by commas (see below)")
    add("--nodes", type=int, default=3, help="nodes of two workers each; default: 3")
    add("--clients", type=int, default=512, help="concurrent requests; default: 512")
    add("--ttl", type=int, default=15, help="lifetime of a token in seconds; default: 15")
    add(
        "--pace",
        type=float,
        help="factor for the time between faults; default: 1. With --hostile, seconds between actions of a connection; "
        "default: 4",
    )
    add("--keep", type=Path, metavar="DIRECTORY", help="keep the histories, or the results and logs, in this directory")
    add(
        "--broken",
        nargs="?",
        const=BROKEN[0],
        choices=BROKEN,
        help="break a promise, to see that this is detected",
    )
    add("--hostile", action="store_true", help="instead, log in at half load beside hostile connections of every kind")
    add("--connections", type=int, default=500, help="with --hostile, number of hostile connections; default: 500")
    add("--save", action="store_true", help="with --hostile, store the result and write it into the documentation")
    given = parser.parse_args()
    given.database = given.database or ("sqlite" if given.hostile else "both")
    given.faults = {"all": tuple(KINDS), "none": ()}.get(given.faults, tuple(given.faults.split(",")))
    if unknown := set(given.faults) - set(KINDS):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}")
    return given


def _options(kind: Kind, given: argparse.Namespace) -> Options:
    return Options(
        kind=kind,
        seed=given.seed,
        tokens=given.tokens,
        redemptions=given.redemptions,
        seconds=given.seconds or _FOREVER,
        faults=given.faults,
        nodes=given.nodes,
        ttl=given.ttl,
        clients=given.clients,
        pace=given.pace or 1.0,
        broken=given.broken or "",
    )


if __name__ == "__main__":
    main()
