"""The service and its command line in separate processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.tools.ports import free_port
from tests.support.waiting import PATIENCE


@dataclass(frozen=True, slots=True)
class Running:
    """A service that runs in separate processes."""

    url: str
    process: "subprocess.Popen[str]"
    log: Path


def command(*arguments: str, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run `sso-service <arguments>` with additional environment variables, and return its result."""
    return subprocess.run(
        [sys.executable, "-m", "sso_service", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )


def wait_for_port(port: int) -> None:
    """Wait until a process listens on `port`. uvicorn logs its start slightly earlier."""
    _wait_for(socket.AF_INET, ("127.0.0.1", port))


def _wait_for(family: socket.AddressFamily, address: tuple[str, int] | str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(family) as probe:
            try:
                probe.connect(address)
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
        time.sleep(0.01)


def _stop(process: "subprocess.Popen[str]") -> None:
    """Stop the service and its workers; kill them if they do not stop within 20 s."""
    if process.poll() is not None:
        return
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for each in (process, *workers):
            each.kill()
        process.wait()


@contextmanager
def serving(
    env: Mapping[str, str],
    log: Path,
    workers: int = 1,
    port: int | None = None,
    uds: Path | None = None,
    fd: int | None = None,
) -> Iterator[Running]:
    """Run `sso-service serve` until the end of the block, on a free port by default, with its output in `log`."""
    port = port or free_port()
    arguments = ["--workers", str(workers)]
    arguments += [] if uds is None else ["--uds", str(uds)]
    arguments += [] if fd is None else ["--fd", str(fd)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sso_service", "serve", *arguments],
            env={**os.environ, **env, "SSO_PORT": str(port)},
            pass_fds=[] if fd is None else [fd],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            seen = 0
            for line in process.stdout:
                output.write(line)
                output.flush()
                seen += "Application startup complete" in line
                if seen == workers:
                    break
            else:
                raise AssertionError(f"the service did not start: {log.read_text()}")
            with subprocess.Popen(["cat"], stdin=process.stdout, stdout=output):
                try:
                    if uds is not None:
                        _wait_for(socket.AF_UNIX, str(uds))
                    elif fd is None:
                        wait_for_port(port)
                    yield Running(f"http://127.0.0.1:{port}", process, log)
                finally:
                    _stop(process)
        finally:
            _stop(process)
            process.stdout.close()
