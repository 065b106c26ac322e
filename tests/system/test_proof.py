"""The proof in its short form: under load and faults no promise is broken, and one that is broken is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tools.proof.history import Redeem, read_history

SEED = 20261124


def prove(database: str, *arguments: str, history: Path) -> "subprocess.CompletedProcess[str]":
    """What `scripts/prove` says."""
    small = ("--nodes", "2", "--clients", "48", "--ttl", "4", "--seed", str(SEED))
    proof = subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.tools.proof",
            "--database",
            database,
            "--keep",
            str(history),
            *small,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(proof.stdout, proof.stderr)  # shown when it fails
    return proof


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_under_load_and_faults_no_promise_is_broken(database: str, tmp_path: Path) -> None:
    proof = prove(database, "--seconds", "15", history=tmp_path)
    assert proof.returncode == 0
    assert f"seed {SEED}" in proof.stdout
    [kills] = re.findall(r"^kill -9 +(\d+)$", proof.stdout, re.MULTILINE)
    assert int(kills) >= 3
    redeemed = [r for r in read_history(tmp_path / f"{database}.jsonl") if isinstance(r, Redeem)]
    assert len({r.token for r in redeemed if r.success}) >= 20
    assert {r.way for r in redeemed if r.success} == {"browser", "consume", "revoke"}


def test_a_service_that_lets_a_token_in_twice_is_found_out(tmp_path: Path) -> None:
    proof = prove("sqlite", "--seconds", "3", "--faults", "none", "--broken", "single-use", history=tmp_path)
    assert proof.returncode == 1
    assert re.search(r"^violations +\d+ single_use", proof.stdout, re.MULTILINE)
