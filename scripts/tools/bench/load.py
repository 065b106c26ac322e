"""The closed loop: wrk keeps a number of connections busy and counts the answers."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.tools.bench.machine import NotPossible

_SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Load:
    """The measurements of wrk. Times are in seconds, percentiles of the latency in milliseconds."""

    sent: int
    answered: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failures: int
    statuses: dict[int, int]


def check_wrk() -> None:
    """Raise `NotPossible` if wrk is not installed."""
    if shutil.which("wrk") is None:
        raise NotPossible("wrk, the load generator, is missing. On Debian and Ubuntu: apt-get install wrk")


def closed_loop(
    port: int, requests: Sequence[bytes], *, connections: int, seconds: int, shortly_before_end: Callable[[], None]
) -> Load:
    """Send `requests` repeatedly on `connections` connections. Call `shortly_before_end` at 80 % of the time."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\0".join(requests))
        file.flush()
        options = {"threads": 1, "connections": connections, "duration": f"{seconds}s", "timeout": "10s"}
        command = ["wrk", *(f"--{name}={value}" for name, value in options.items()), "--script", str(_SCRIPT)]
        with subprocess.Popen([*command, f"http://127.0.0.1:{port}", "--", file.name], stdout=subprocess.PIPE) as wrk:
            time.sleep(seconds * 0.8)
            shortly_before_end()
            output, _ = wrk.communicate()
    if wrk.returncode != 0:
        raise RuntimeError(f"wrk failed: {output.decode()}")
    result = json.loads(output.splitlines()[-1])
    return Load(
        sent=result["sent"],
        answered=result["answered"],
        seconds=result["microseconds"] / 1e6,
        p50_ms=result["p50"] / 1000,
        p99_ms=result["p99"] / 1000,
        failures=result["failures"],
        statuses={int(status): count for status, count in result["statuses"].items()},
    )
