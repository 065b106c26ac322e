"""`python -m scripts.tools.fuzz [TARGET] [SECONDS]`: a search, guided by coverage, for bytes that fail a `check`.

Without a target, all one after the other. What is found interesting stays in `var/fuzz/TARGET`, for the next time.
"""

import hashlib
import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

TARGETS = ["tokens", "keys", "redirects"]
HOME = Path("var/fuzz")


def fuzz(target: str, seconds: int) -> None:
    """Does not return: ends the process, with status 0 if nothing was found."""
    with atheris.instrument_imports(include=["sso_service", "json"]):
        module = importlib.import_module(f"scripts.tools.fuzz.{target}")
    logging.disable()  # a broken key file is reported, each time
    corpus = HOME / target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in module.SEEDS:
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        "-max_len=1024",
        f"-artifact_prefix={HOME}/{target}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], module.check)
    atheris.Fuzz()


def main(target: str = "all", seconds: str = "60") -> None:
    """Each target in a process of its own, in which nothing is imported yet that is to be watched."""
    if "FUZZ" in os.environ:
        fuzz(target, int(seconds))
    for name in TARGETS if target == "all" else [target]:
        with TemporaryDirectory(dir="/dev/shm") as directory:  # that process is not given the time to clean up
            env = {**os.environ, "FUZZ": "1", "TMPDIR": directory}
            subprocess.run([sys.executable, "-m", "scripts.tools.fuzz", name, seconds], env=env, check=True)


main(*sys.argv[1:])
