"""The structure of the package: which part may import which, and where each library is used."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sso_service

PACKAGE = Path(sso_service.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "versions" not in path.parts)

PURE = {
    "characters",
    "errors",
    "http",
    "problems",
    "settings",
    "tokens",
    "keyring",
    "key_directory",
    "sessions",
    "permissions",
    "paths",
    "people",
}

# A part may import itself and the parts listed here. Nothing imports upwards.
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(PURE, PURE),
    "observability": PURE,
    "database": PURE,
    "services": PURE | {"observability", "database"},
    "server": PURE | {"observability"},
    "web": PURE | {"observability", "database", "services", "server"},
    "client": {"errors", "http", "problems", "paths", "sessions", "tokens"},
    "cli": PURE | {"observability", "database", "services", "server"},
    "__main__": {"cli"},
}

# The only part that imports the library.
LIBRARIES = {
    "sqlalchemy": "database",
    "psycopg": "database",
    "alembic": "database",
    "uvicorn": "server",
    "click": "cli",
}
LIBRARIES |= {
    "httpx": "client",
    "tenacity": "client",
    "prometheus_client": "observability",
    "opentelemetry": "observability",
}

CLIENT_LIBRARIES = {"httpx", "itsdangerous", "msgspec", "tenacity"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the full name of every imported module, and whether it belongs to the package."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from sso_service import tokens` imports a module, `from sso_service.tokens import read` a function.
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "sso_service" else [module]
        else:
            continue
        for name in names:
            yield name, name.split(".")[0] == "sso_service"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    found = {name.split(".")[1] for name, own in imports(path) if own and "." in name}
    assert found - {part, "__version__"} <= MAY_IMPORT.get(part, set())


@pytest.mark.parametrize(("library", "part"), LIBRARIES.items())
def test_each_library_is_imported_by_one_part(library: str, part: str) -> None:
    users = {part_of(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] == library}
    assert users - ({"web"} if library == "prometheus_client" else set()) == {part}


def test_the_client_needs_four_libraries_and_nothing_of_the_server() -> None:
    third_party = {
        name.split(".")[0]
        for path in MODULES
        if part_of(path) in MAY_IMPORT["client"] | {"client"}
        for name, own in imports(path)
        if not own
    }
    assert third_party & {"starlette", "jinja2", "babel", "markupsafe", "uvicorn", "sqlalchemy", "limits"} == set()
    assert third_party >= CLIENT_LIBRARIES


def test_keys_are_reached_only_through_the_check_that_they_are_fresh() -> None:
    """Otherwise a use case could trust a key that was revoked while the key directory could not be listed."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in {"ring", "_ring"}
    }
    assert users == {"key_directory.py", "services/trust.py"}


def test_no_module_has_more_than_450_lines() -> None:
    assert {path.name: lines for path in MODULES if (lines := len(path.read_text("utf-8").splitlines())) > 450} == {}
