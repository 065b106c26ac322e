"""The machine: its description, and the assignment of its cores."""

import os
import platform
import sqlite3
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil


class NotPossible(Exception):
    """The benchmark cannot run here. The message states why, and the remedy."""


@dataclass(frozen=True)
class Cores:
    """The core of the server under test, and the core of the load generator, PostgreSQL and this process."""

    server: int
    load: int


def divide_cores() -> Cores:
    """Choose two of the allowed cores. This process, and everything that it starts from now on, runs on `load`."""
    if not hasattr(os, "sched_getaffinity"):
        raise NotPossible("only Linux can pin a process to a core")
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise NotPossible("two cores are required: one for the server, one for the load")
    cores = Cores(server=allowed[-1], load=allowed[-2])
    os.sched_setaffinity(0, {cores.load})
    return cores


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and its children since they were started, from their own accounting."""
    own = process.cpu_times()
    seconds: float = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue  # it has ended, and its parent has added its times to its own
        seconds += times.user + times.system
    return seconds


def describe() -> dict[str, str]:
    """Return the facts that a reader needs to judge the figures."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": f"{os.cpu_count()} x {models[0].partition(':')[2].strip() if models else platform.machine()}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in ("starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "fastapi")},
    }
