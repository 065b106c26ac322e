"""The layout of the tests: allowed imports of test modules, tools and unit tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT, TESTS

SHARED = ("tests.support", "scripts.tools")
"""The packages that tests share, apart from `sso_service` itself."""
NOT_IN_UNIT_TESTS = {"asyncpg", "httpx", "psycopg", "socket", "sqlalchemy", "sqlite3", "subprocess", "uvicorn"}
FIXTURES_WITH_IO = {"api_token", "client", "database", "database_url", "env", "postgresql", "service", "ledger"}

for_each_test_module = pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(TESTS))) for path in sorted(TESTS.rglob("test_*.py"))]
)


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@for_each_test_module
def test_test_modules_import_only_shared_packages(path: Path) -> None:
    own = [name for name in imports(path) if is_in(name, "tests", "scripts", "conftest")]
    assert [name for name in own if not is_in(name, *SHARED)] == []


def test_shared_packages_import_no_test_module() -> None:
    files = [*(TESTS / "support").rglob("*.py"), *TESTS.rglob("conftest.py")]
    names = [(path.name, name) for path in files for name in imports(path) if is_in(name, "tests", "scripts")]
    assert [each for each in names if not is_in(each[1], *SHARED)] == []


def test_tools_do_not_import_tests() -> None:
    files = (ROOT / "scripts" / "tools").rglob("*.py")
    assert [(path.name, name) for path in files for name in imports(path) if is_in(name, "tests")] == []


def test_every_test_is_a_unit_integration_or_system_test() -> None:
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == {"unit", "integration", "system"}


@pytest.mark.parametrize("path", sorted((TESTS / "unit").glob("test_*.py")), ids=lambda path: path.name)
def test_unit_tests_use_no_database_process_or_socket(path: Path) -> None:
    assert {name.partition(".")[0] for name in imports(path)} & NOT_IN_UNIT_TESTS == set()
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    tests = [node for node in functions if node.name.startswith("test_")]
    assert {argument.arg for test in tests for argument in test.args.args} & FIXTURES_WITH_IO == set()
