"""`python -m scripts.tools.fuzz [TARGET] [SECONDS]`: search, guided by coverage, for bytes that fail a `check`.

Without a target, all of them run one after the other. Interesting inputs are kept in `var/fuzz/TARGET` for the next
run.
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
    """Fuzz one target. Does not return: ends the process, with status 0 if nothing was found."""
    with atheris.instrument_imports(include=["sso_service", "json"]):
        module = importlib.import_module(f"scripts.tools.fuzz.{target}")
    logging.disable()  # each broken key file is logged
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
    """Run each target in its own process, where the modules to be instrumented are not yet imported."""
    if "FUZZ" in os.environ:
        fuzz(target, int(seconds))
    for name in TARGETS if target == "all" else [target]:
        with TemporaryDirectory(dir="/dev/shm") as directory:  # the process ends without cleaning up
            env = {**os.environ, "FUZZ": "1", "TMPDIR": directory}
            subprocess.run([sys.executable, "-m", "scripts.tools.fuzz", name, seconds], env=env, check=True)


main(*sys.argv[1:])
