"""A short proof: it finds no violation under load and faults, and finds one in a broken service."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from scripts.tools.proof.history import Redeem, read_history, write_line
from scripts.tools.proof.hostile.kinds import KINDS
from scripts.tools.proof.hostile.verdict import Result, violations
from tests.support.proof_history import FIRST_DECISION, FIRST_LOGIN, HISTORY, KILL, drop, edited
from tests.support.repository import ROOT

SEED = 20261124


def prove(database: str, *arguments: str, history: Path) -> "subprocess.CompletedProcess[str]":
    """Run `scripts/prove` with a small installation, and return its result."""
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
        timeout=600,
        check=False,
    )
    print(proof.stdout, proof.stderr)  # shown when it fails
    return proof


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_run_under_load_and_faults_has_no_violations(database: str, tmp_path: Path) -> None:
    proof = prove(database, "--seconds", "15", history=tmp_path)
    assert proof.returncode == 0
    assert f"seed {SEED}" in proof.stdout
    [kills] = re.findall(r"^kill -9 +(\d+)$", proof.stdout, re.MULTILINE)
    assert int(kills) >= 3
    redeemed = [r for r in read_history(tmp_path / f"{database}.jsonl") if isinstance(r, Redeem)]
    assert len({r.token for r in redeemed if r.success}) >= 20
    assert {r.way for r in redeemed if r.success} == {"browser", "consume", "revoke"}


def test_a_service_that_accepts_a_token_twice_is_detected(tmp_path: Path) -> None:
    proof = prove("sqlite", "--seconds", "3", "--faults", "none", "--broken", "single-use", history=tmp_path)
    assert proof.returncode == 1
    assert re.search(r"^violations +\d+ single_use", proof.stdout, re.MULTILINE)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core for the service, one for the load")
def test_no_login_fails_beside_hostile_connections_of_every_kind(tmp_path: Path) -> None:
    proof = prove("sqlite", "--hostile", "--seconds", "12", "--connections", "60", history=tmp_path)
    assert "Violations: " in proof.stdout
    result = msgspec.json.decode((tmp_path / "hostile-sqlite" / "result.json").read_bytes(), type=Result)
    # These depend on the load of this machine, and so short a run shows nothing about them.
    assert set(violations(result)) <= {"p99", "memory", "attack"}
    assert result.hostile.logins > 100
    assert set(result.attack.kinds) == {kind.name for kind in KINDS}
    # Requests of these kinds reach the code that they are meant for.
    answers = {name: tally.answers for name, tally in result.attack.kinds.items()}
    assert 401 in answers["login tokens, forged"]
    assert 401 in answers["API tokens, unknown"]
    assert 422 in answers["login tokens, forged, by API"]
    assert answers["garbage"].keys() == answers["TLS to the plain port"].keys() == {400}
    assert 200 in answers["/metrics"]


def run_checker(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.tools.proof.checker", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_file_without_violations_exits_0(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"".join(map(write_line, HISTORY)) + write_line(KILL).rstrip())
    assert list(read_history(path)) == HISTORY
    checked = run_checker(path)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "violations    none" in checked.stdout


def test_a_file_with_a_violation_exits_1_and_shows_its_records(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"".join(map(write_line, edited(HISTORY, [drop(FIRST_DECISION)]))))
    checked = run_checker(path)
    assert checked.returncode == 1
    assert "violations    1 decided" in checked.stdout
    assert write_line(FIRST_LOGIN).decode() in checked.stdout


def test_the_checker_imports_nothing_from_the_service() -> None:
    program = "import sys, scripts.tools.proof.checker; print([name for name in sys.modules if name.startswith('sso')])"
    checked = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert checked.stdout == "[]\n"
