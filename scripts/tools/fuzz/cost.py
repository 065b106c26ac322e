"""`python -m scripts.tools.fuzz.cost [SECONDS] [PLACE]`: search for the input that costs the service most per byte.

For each place of a request whose name contains PLACE, for SECONDS each (20 by default), against a running service. The
search changes a pattern that fills the place: pieces are exchanged, added, removed and altered, and a change that costs
more is kept. Places where the limit is exceeded are marked. Add such a pattern to `scripts/tools/bench/places.py`.
"""

import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from scripts.tools.bench.hostile import HostileCost, Site, site
from scripts.tools.bench.places import Place

_BYTES = [bytes([byte]) for byte in range(0x21, 0x7F)] + [b" ", b"\t", b"\xa0", b"\xc3\xa4", b"\xff"]
_LONGEST = 12
"""Pieces of a pattern, at most."""


def mutated(random: Random, pattern: list[bytes], place: Place) -> list[bytes]:
    """Return the pattern with one to three changes. Chunks stay whole: the service would wait for the rest of one."""
    pieces, framed = place.pieces, b"chunked" in place.before
    changed = list(pattern)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(changed) + 1)
        piece = random.choice(pieces if framed or random.random() < 0.7 else _BYTES)
        match random.randrange(4):
            case 0 if len(changed) < _LONGEST:
                changed.insert(at, piece)
            case 1 if len(changed) > 1:
                del changed[at - 1]
            case 2:
                changed[at - 1] = piece
            case _ if piece in _BYTES:  # a piece without one of its ends, or several times
                old = changed[at - 1]
                changed[at - 1] = random.choice((old[1:], old[:-1], old * random.randint(2, 9))) or piece
    return changed


def climb(running: Site, place: Place, random: Random, seconds: float) -> tuple[HostileCost, list[bytes]]:
    """Return the cost of the worst pattern found for this place within `seconds`, and the pattern."""
    empty = running.cost(place, b"")

    def measured(pattern: list[bytes], rounds: int) -> HostileCost:
        return running.cost(place, place.repeated(b"".join(pattern)), empty=empty, rounds=rounds)

    begun = time.monotonic()
    found = [(measured([piece], 2), [piece]) for piece in place.pieces]
    worst, pattern = max(found, key=lambda each: each[0].per_kib)
    while time.monotonic() - begun < seconds:
        # Mostly from the worst so far, sometimes from another beginning, so as not to stay on the first hill.
        start = pattern if random.random() < 0.8 else random.choice(found)[1]
        candidate = mutated(random, start, place)
        # A cheap look first; what seems worse is measured again, because other processes disturb the first look.
        if measured(candidate, 1).per_kib > worst.per_kib and (cost := measured(candidate, 5)).per_kib > worst.per_kib:
            worst, pattern = cost, candidate
    return measured(pattern, 7), pattern


def main(seconds: str = "20", part: str = "", seed: str = "") -> None:
    """Search each place in turn, and list the places, worst first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped
    seed = seed or secrets.token_hex(4)
    print(f"seed {seed}", flush=True)
    random = Random(seed)
    worst = []
    with tempfile.TemporaryDirectory() as directory, site(Path(directory), max(os.sched_getaffinity(0))) as running:
        for place in running.places:
            if place.pieces and part in place.name:
                cost, pattern = climb(running, place, random, float(seconds))
                print(
                    f"{cost.per_kib:7.1f} µs/KiB {cost.status} {place.name}: {b'|'.join(pattern)[:150]!r}", flush=True
                )
                worst.append((cost, pattern))
    print("\nworst first:")
    for cost, pattern in sorted(worst, key=lambda each: -each[0].per_kib):
        mark = "" if cost.kept else "  EXCEEDS THE LIMIT"
        print(f"{cost.per_kib:7.1f} µs/KiB {cost.status} {cost.place}: {b''.join(pattern)[:100]!r}{mark}")


if __name__ == "__main__":
    main(*sys.argv[1:])
