"""Waiting for events, and measuring time on a machine that is busy with other work."""

import asyncio
import os
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

PATIENCE = 60.0
"""Seconds that a test waits for an event. It is only reached if the event never occurs."""
_SAMPLING = 0.1


async def until(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    """Poll until `condition` holds, for at most `seconds`, while the event loop runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {seconds:.0f} s"
        await asyncio.sleep(0.02)


def wait_until(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    """Poll until `condition` holds, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not become true within {seconds:.0f} s"
        time.sleep(0.01)


class Stopwatch:
    """The time since its creation, with and without the time that the machine took for other work."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._started = time.monotonic()
        self._delayed = _delay(pids)

    @property
    def seconds(self) -> float:
        """Return all seconds since the start. A lower limit is compared with these."""
        return time.monotonic() - self._started

    @property
    def own_seconds(self) -> float:
        """Return the seconds since the start, without those in which a thread waited for a processor.

        An upper limit is compared with these: it holds the code to the time that the code itself causes. The threads
        are those of this process, and of the processes `pids` and their children.
        """
        return self.seconds - max(_delay(self._pids) - self._delayed, 0.0)


class Delays:
    """A record of how long threads have waited for a processor, from which any interval can be looked up."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []  # monotonic seconds, and the delay of all threads until then

    def record(self, pids: Iterable[int]) -> None:
        total = _delay(pids)
        self._samples.append((time.monotonic(), total))  # one append, because another thread reads

    def between(self, start: float, end: float) -> float:
        """Return the seconds of delay between two times (monotonic seconds), and up to the samples around them."""
        samples = self._samples.copy()
        if not samples:
            return 0.0
        times = [at for at, _ in samples]
        first = max(bisect(times, start) - 1, 0)
        last = min(bisect(times, end), len(times) - 1)
        return max(samples[last][1] - samples[first][1], 0.0)


@contextmanager
def recording_delays(*pids: int) -> Iterator[Delays]:
    """Record the delays of this process, and of the processes `pids` and their children, during the block."""
    delays, over = Delays(), threading.Event()

    def record() -> None:
        while not over.wait(_SAMPLING):
            delays.record(pids)

    delays.record(pids)
    thread = threading.Thread(target=record)
    thread.start()
    try:
        yield delays
    finally:
        over.set()
        thread.join()
        delays.record(pids)


def _delay(pids: Iterable[int]) -> float:
    """Return the seconds that all threads together were ready to run and had no processor (Linux; otherwise 0).

    Source: Documentation/scheduler/sched-stats in Linux, /proc/<pid>/schedstat, second field, in nanoseconds.
    """
    total = 0
    for pid in (os.getpid(), *chain.from_iterable(map(_family, pids))):
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError, IndexError):  # the thread has ended
                total += int(path.read_text().split()[1])
    return total / 1e9


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in path.read_text().split():
                yield from _family(int(child))
