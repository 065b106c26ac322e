"""The attack: a process that keeps hostile connections of every kind open.

    python -m scripts.tools.proof.hostile.attack PLAN

PLAN is a `Plan` in JSON. Each second, the process prints an `Attack` in JSON, until it is terminated.
"""

import asyncio
import os
import random
import sys
import time
from itertools import cycle, islice

import msgspec

from scripts.tools.proof.hostile.kinds import KINDS, Insider, Kind
from scripts.tools.proof.hostile.peer import Cut, Peer
from scripts.tools.proof.hostile.verdict import Attack, Tally

_NICENESS = 10
"""The load generator on the same core goes first. At 19, hardly any time would be left on a busy machine."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters: the number of connections, and the seconds between two actions of one connection."""

    port: int
    connections: int
    pace: float
    insider: Insider


async def _run(plan: Plan) -> None:
    attack = Attack(kinds={kind.name: Tally() for kind in KINDS})
    begin = time.monotonic()
    weighted = [kind for kind in KINDS for _ in range(kind.weight)]
    async with asyncio.TaskGroup() as group:
        for kind in islice(cycle(weighted), plan.connections):
            group.create_task(_keep_connected(kind, plan, attack))
        while True:
            await asyncio.sleep(1)
            attack.seconds, attack.cpu = time.monotonic() - begin, time.process_time()
            print(msgspec.json.encode(attack).decode(), flush=True)


async def _keep_connected(kind: Kind, plan: Plan, attack: Attack) -> None:
    """Connect again whenever the connection has ended. The pause is while it is open, so that nearly all are open."""
    await asyncio.sleep(random.uniform(0, plan.pace))
    while True:
        peer = Peer(attack.kinds[kind.name], plan.pace, kind.breach, reads=kind.reads)
        try:
            await peer.connect(plan.port)
        except OSError:
            attack.refused += 1
            peer.close()
            await asyncio.sleep(plan.pace)
            continue
        attack.open += 1
        try:
            await peer.pause()
            await kind.behave(peer, plan.insider)
        except (OSError, Cut):
            pass  # cut off, as it deserves
        finally:
            attack.open -= 1
            peer.close()


def main() -> None:
    """Attack as the first argument states."""
    os.nice(_NICENESS)  # this process must not delay the logins by its own use of the processor
    asyncio.run(_run(msgspec.json.decode(sys.argv[1], type=Plan)))


if __name__ == "__main__":
    main()
