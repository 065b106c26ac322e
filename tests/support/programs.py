"""Programs that tests start and that may be missing on a machine."""

import os
import shutil

import pytest


def program(*names: str) -> str:
    """The path of a program that a test needs. Without it the test is skipped, and in CI fails."""
    for name in names:
        if path := shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin"):
            return path
    if os.environ.get("CI"):
        pytest.fail(f"{names[0]} is not installed")
    pytest.skip(f"{names[0]} is not installed")
