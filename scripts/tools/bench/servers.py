"""A server under test: a process on its own core, whose CPU and memory use is measured."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.tools.bench.machine import cpu_seconds
from scripts.tools.ports import free_port

ROOT = Path(__file__).parents[3]
_START_TIMEOUT = 30.0


@dataclass(frozen=True)
class Memory:
    """Megabytes (10^6 bytes): shared pages counted in proportion (PSS), and in full (RSS)."""

    pss_mb: float
    rss_mb: float


class Server:
    """A running server."""

    def __init__(self, process: psutil.Process, port: int) -> None:
        self._process = process
        self.pid = process.pid
        self.port = port

    def cpu_seconds(self) -> float:
        """Return the CPU seconds used since the start."""
        return cpu_seconds(self._process)

    def memory(self) -> Memory:
        """Return the current memory use of the only worker."""
        memory = self._process.memory_full_info()
        return Memory(memory.pss / 1e6, memory.rss / 1e6)

    def descriptors(self) -> int:
        """Return the number of open file descriptors of the only worker."""
        count: int = self._process.num_fds()
        return count

    def waited_seconds(self) -> float:
        """Return the seconds for which the event loop could not run since the start, because its core was busy."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[1]) / 1e9


@contextmanager
def serving(module: Sequence[str], environment: Mapping[str, str], log: Path, core: int) -> Iterator[Server]:
    """Run `python -m <module>` on `core` until the end of the block.

    It must listen on the port in `SSO_PORT`, which also replaces `{port}` in the arguments of `module`. Its output goes
    to `log`.
    """
    port = free_port()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SSO_", "UVICORN_", "WEB_"))}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *(argument.format(port=port) for argument in module)],
            cwd=ROOT,
            env={**inherited, **environment, "SSO_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            os.sched_setaffinity(process.pid, {core})  # before it starts other threads, which inherit the core
            _wait_until_it_listens(process, port, log)
            yield Server(psutil.Process(process.pid), port)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"a server did not start: {log.read_text()[-2000:]}")
