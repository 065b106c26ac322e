"""The systemd units and the container's health check in `scripts/deploy`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tools.ports import free_port
from sso_service.settings import Settings
from tests.support.processes import serving
from tests.support.programs import program
from tests.support.repository import DEPLOY

UNITS = sorted(path.name for path in DEPLOY.glob("sso-service*"))
INSTALLED = "/opt/sso-service/bin/sso-service"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with the path of an existing program."""
    for name in UNITS:
        text = (DEPLOY / name).read_text()
        (tmp_path / name).write_text(text.replace(INSTALLED, sys.executable))
    return tmp_path


def systemd_analyze(*arguments: str, units: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"}
    return subprocess.run(
        [program("systemd-analyze"), *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", UNITS)
def test_systemd_units_are_valid(units: Path, name: str) -> None:
    done = systemd_analyze("verify", "--man=no", str(units / name), units=units)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_systemd_units_restrict_the_service(units: Path, name: str) -> None:
    done = systemd_analyze("security", "--offline=true", "--threshold=13", str(units / name), units=units)
    assert done.returncode == 0, done.stdout


def test_systemd_units_run_existing_commands() -> None:
    commands = [
        command.split()
        for name in UNITS
        for command in re.findall(rf"^ExecStart={INSTALLED} (.*)$", (DEPLOY / name).read_text(), re.MULTILINE)
    ]
    assert len(commands) == 2
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "sso_service", *command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_container_is_healthy_while_the_service_responds(
    settings: Settings, keys_dir: Path, tmp_path: Path
) -> None:
    found = re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert found is not None
    check = [sys.executable, *json.loads(found[1])[1:]]

    def healthy(port: str) -> bool:
        return (
            subprocess.run(check, env=os.environ | {"SSO_PORT": port}, capture_output=True, check=False).returncode == 0
        )

    env = {"SSO_HOME": settings.home, "SSO_DATABASE_URL": settings.database_url}
    with serving(env, tmp_path / "log") as running:
        port = running.url.rpartition(":")[2]
        assert healthy(port)
        assert not healthy(str(free_port()))
    assert not healthy(port)
