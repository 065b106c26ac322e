"""A node of the service: start it, find its processes, and end them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from scripts.tools.ports import free_port
from scripts.tools.proof.proven import OFFSET

ROOT = Path(__file__).parents[3]


class Node:
    """A node: a supervisor and its workers, in their own process group, with their own key directory and clock."""

    def __init__(self, name: str, directory: Path, env: Mapping[str, str], *, workers: int) -> None:
        self.name = name
        self.port = free_port()
        self.log = directory / f"node-{name}.log"
        self.keys = directory / f"keys-{name}"  # a symbolic link, whose target can change
        self._clock = directory / f"clock-{name}"
        self.set_clock(0.0)
        self._env = {
            **os.environ,
            **env,
            "SSO_PORT": str(self.port),
            "SSO_KEYS_DIR": str(self.keys),
            "PROOF_NODE": name,
            "PROOF_CLOCK": str(self._clock),
            "PROOF_WORKERS": str(workers),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the node. It listens one or two seconds later."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scripts.tools.proof.proven"],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        """Whether the supervisor is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def supervisor(self) -> psutil.Process | None:
        """The process that starts the workers."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid) if self._process and self.runs else None
        return None

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes, including those that are still starting."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in self.supervisor.children() if self.supervisor else ():
                with suppress(psutil.NoSuchProcess):  # skips Python's resource tracker
                    if any("spawn_main" in argument for argument in process.cmdline()):
                        found.append(process)
        return found

    def kill(self) -> None:
        """Send SIGKILL to all processes at once."""
        if self._process is None:
            return
        workers = self.workers()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(workers, timeout=5)

    def stop(self) -> None:
        """Stop the node as an operator does. Kill it if that takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        self.kill()

    def read_keys_of(self, directory: Path) -> None:
        """Make the node read another key directory from now on."""
        link = self.keys.with_suffix(".new")
        link.symlink_to(directory)
        link.replace(self.keys)

    def set_clock(self, offset: float) -> None:
        """Set its clock `offset` seconds ahead of this machine's, immediately and in all its processes."""
        file = os.open(self._clock, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(file, OFFSET.pack(offset))
        os.close(file)

    def wait_until_it_answers(self, seconds: float = 30) -> None:
        """Wait until a worker responds. Raises `AssertionError` with the log if that does not happen in time."""
        deadline = time.monotonic() + seconds
        while True:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/healthz")
                if connection.getresponse().status == 200:
                    return
            except (OSError, HTTPException):
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)
            finally:
                connection.close()
