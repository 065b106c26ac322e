"""The machine: which core does what, and what it is."""

import os
import platform
import sqlite3
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil


class NotPossible(Exception):
    """The benchmark cannot run here; the message says why, and what to do."""


@dataclass(frozen=True)
class Cores:
    """The core of the server under test, and the one of the load generator, PostgreSQL and this process."""

    server: int
    load: int


def divide_cores() -> Cores:
    """Two cores of those that we may use; this process, and all that it starts from now on, goes to `load`."""
    if not hasattr(os, "sched_getaffinity"):
        raise NotPossible("only Linux can pin a process to a core")
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise NotPossible("it takes two cores: one for the server, one for the load")
    cores = Cores(server=allowed[-1], load=allowed[-2])
    os.sched_setaffinity(0, {cores.load})
    return cores


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process and of its children, by their own accounting, since they were started."""
    own = process.cpu_times()
    seconds: float = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue  # its parent has just taken its times over
        seconds += times.user + times.system
    return seconds


def describe() -> dict[str, str]:
    """What a reader has to know to judge the figures."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": f"{os.cpu_count()} x {models[0].partition(':')[2].strip() if models else platform.machine()}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in ("starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "fastapi")},
    }
