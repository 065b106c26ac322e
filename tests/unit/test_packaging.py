"""Packaging: the dependencies of the base and of each extra, and the imports of the client."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sso_service
from tests.support.repository import ROOT

PACKAGE = ROOT / "sso_service"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = {"itsdangerous", "msgspec"}
CLIENT = {"httpx", "tenacity"}
SHARED = [PACKAGE / f"{name}.py" for name in ("errors", "http", "problems", "paths", "sessions", "tokens")]
"""The modules of the package that the client imports."""


def names(requirements: list[str]) -> set[str]:
    return {Requirement(each).name for each in requirements}


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return absolute | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


def test_the_base_needs_two_packages_and_the_client_two_more() -> None:
    assert names(PROJECT["dependencies"]) == BASE
    assert names(PROJECT["optional-dependencies"]["client"]) == CLIENT


@pytest.mark.parametrize("extra", ["server", "client", "tracing"])
def test_every_dependency_has_an_upper_bound(extra: str) -> None:
    for requirement in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]):
        assert any(bound.operator == "<" for bound in requirement.specifier), requirement


@pytest.mark.parametrize("path", [*(PACKAGE / "client").rglob("*.py"), *SHARED], ids=lambda path: path.name)
def test_the_client_imports_nothing_of_the_server(path: Path) -> None:
    allowed = {f"sso_service.{shared.stem}" for shared in SHARED}
    in_client = path.is_relative_to(PACKAGE / "client")
    for name in imported(path):
        top = name.partition(".")[0]
        if top == "sso_service":
            assert name in allowed or (in_client and name.startswith("sso_service.client"))
        else:
            assert top in sys.stdlib_module_names | BASE | (CLIENT if in_client else set())


def test_the_version_is_in_one_place_and_the_package_is_typed() -> None:
    assert "version" in PROJECT["dynamic"]
    assert sso_service.__version__.count(".") == 2
    assert (PACKAGE / "py.typed").is_file()
