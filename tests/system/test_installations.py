"""Installations without the server's dependencies, each in a separate process."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.repository import ROOT

SERVER = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server"]


def run(program: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python program in a new process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_the_client_imports_no_server_dependencies() -> None:
    done = run("import sys, sso_service.client.middleware; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert {"httpx", "itsdangerous", "msgspec", "tenacity"} <= {*loaded}
    distributions = packages_distributions()
    packages = {canonicalize_name(each) for name in loaded for each in distributions.get(name, [])}
    server = {canonicalize_name(Requirement(each).name) for each in SERVER}
    assert server & packages <= {"click"}  # httpx imports click for its own command, where it is installed
    own = {name.split(".")[1] for name in loaded if name.startswith("sso_service.")}
    assert own == {"client", "errors", "http", "paths", "problems", "sessions", "tokens"}


def test_the_command_without_the_server_names_the_missing_extra() -> None:
    # An import fails if the module is None in sys.modules, as if it were not installed.
    done = run("import sys; sys.modules['click'] = None; from sso_service.__main__ import main")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'PATH[server]'" in done.stderr
