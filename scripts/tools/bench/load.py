"""The closed loop: wrk keeps a number of connections busy and counts what comes back."""

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
    """What wrk saw. Times in seconds, except for the percentiles of the latency, in milliseconds."""

    sent: int
    answered: int
    seconds: float
    p50_ms: float
    p99_ms: float
    failures: int
    statuses: dict[int, int]


def check_wrk() -> None:
    """Raises `NotPossible` if wrk is not there."""
    if shutil.which("wrk") is None:
        raise NotPossible("wrk, the load generator, is missing. On Debian and Ubuntu: apt-get install wrk")


def closed_loop(
    port: int, requests: Sequence[bytes], *, connections: int, seconds: int, meanwhile: Callable[[], None]
) -> Load:
    """Sends `requests`, over and over, on that many connections. `meanwhile` is called shortly before the end."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\0".join(requests))
        file.flush()
        options = {"threads": 1, "connections": connections, "duration": f"{seconds}s", "timeout": "10s"}
        command = ["wrk", *(f"--{name}={value}" for name, value in options.items()), "--script", str(_SCRIPT)]
        with subprocess.Popen([*command, f"http://127.0.0.1:{port}", "--", file.name], stdout=subprocess.PIPE) as wrk:
            time.sleep(seconds * 0.8)
            meanwhile()
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
