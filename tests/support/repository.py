"""Paths in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DEPLOY = ROOT / "scripts" / "deploy"
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
