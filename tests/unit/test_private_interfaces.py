"""The undocumented parts of uvicorn, httptools, Starlette and itsdangerous that the package uses, by name.

An upgrade may rename or remove them without notice: then a test here fails and names the part. A test also fails if the
package uses a part that is not listed here, or no longer uses one that is.
"""

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import itsdangerous
import pytest

import sso_service

PACKAGE = Path(sso_service.__file__).parent
SERVER = PACKAGE / "server"

CONFIG = "uvicorn:Config"
CYCLE = "uvicorn.protocols.http.httptools_impl:RequestResponseCycle"
PARSER = "httptools:HttpRequestParser"
PROTOCOL = "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol"
FLOW = "uvicorn.protocols.http.flow_control:FlowControl"
RUNNING = "uvicorn:Server"
STATE = "uvicorn.server:ServerState"
WORKERS = "uvicorn.supervisors:Multiprocess"

SERVER_PARTS: dict[str, set[str]] = {
    "httptools:HttpParserError": set(),
    "httptools:HttpParserUpgrade": {"args"},
    PARSER: {"feed_data", "get_http_version", "get_method", "set_dangerous_leniencies", "should_upgrade"},
    "httptools:parse_url": set(),
    "uvicorn.config:STARTUP_FAILURE": set(),
    "uvicorn.config:Config": set(),
    CONFIG: {"workers"},
    RUNNING: {"run", "started"},
    STATE: {"default_headers"},
    WORKERS: {"run", "sockets", "terminate_all"},
    CYCLE: {"disconnected", "keep_alive", "message_event", "more_body", "response_complete", "response_started"},
    FLOW: {"read_paused", "write_paused"},
    PROTOCOL: {
        # Overridden: uvicorn, the parser and the event loop call these.
        *("_should_upgrade", "connection_lost", "connection_made", "data_received", "on_headers_complete"),
        *("eof_received", "on_message_complete", "on_response_complete", "pause_writing"),
        *("resume_writing", "shutdown"),
        # Called, read or set.
        *(
            "_unset_keepalive_if_required",
            "client",
            "connections",
            "cycle",
            "flow",
            "headers",
            "logger",
            "loop",
            "parser",
            "scope",
            "server_state",
        ),
        *("timeout_keep_alive_task", "transport", "url"),
    },
}
"""All that `sso_service/server/` uses of uvicorn and httptools: `module:name`, and the attributes of that class."""

OBJECTS = {
    "config": CONFIG,
    "server": RUNNING,
    "Supervisor(config, listeners)": WORKERS,
    "upgrade": "httptools:HttpParserUpgrade",
    "self.cycle": CYCLE,
    "self.flow": FLOW,
    "self.incomplete": CYCLE,
    "self.parser": PARSER,
    "self.server_state": STATE,
}
"""The expressions in `sso_service/server/` whose values are objects of these classes, besides `self` and `super()`."""

PARAMETERS: dict[str, set[str]] = {
    # uvicorn passes these to `Protocol`, which is a subclass.
    PROTOCOL: {"config", "server_state", "app_state", "_loop"},
    WORKERS: {"config", "sockets"},
}
"""All parameters of the classes that the package derives from."""

STARLETTE_PARTS: dict[str, set[str]] = {
    "starlette.responses:Response": {"background", "body", "raw_headers"},
}
"""Attributes that the package uses and Starlette's documentation does not mention."""

ITSDANGEROUS_PARTS: dict[str, set[str]] = {
    "itsdangerous.encoding:int_to_bytes": set(),
    "itsdangerous.signer:SigningAlgorithm": {"get_signature", "verify_signature"},
}
"""Names that the package imports and `itsdangerous` itself does not export."""

ALL_PARTS = SERVER_PARTS | STARLETTE_PARTS | ITSDANGEROUS_PARTS

Node = TypeVar("Node", bound=ast.AST)


def find(part: str) -> object:
    """Return the class or constant `module:name`."""
    module, _, name = part.partition(":")
    value: object = getattr(import_module(module), name)
    return value


def attributes(part: object) -> set[str]:
    """Return the names of all attributes of a class, including those that its methods set on `self`."""
    names = set(dir(part))
    for each in inspect.getmro(part) if inspect.isclass(part) else ():
        if is_from(each.__module__, "uvicorn", "starlette", "itsdangerous"):
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
            stored = (node for node in nodes(tree, ast.Attribute) if isinstance(node.ctx, ast.Store))
            names |= {node.attr for node in stored if ast.unparse(node.value) == "self"}
    return names


def nodes(tree: ast.AST, kind: type[Node]) -> Iterator[Node]:
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def is_from(module: str, *packages: str) -> bool:
    return module.partition(".")[0] in packages


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield module and name of every import. The name is empty for `import module`."""
    yield from ((alias.name, "") for node in nodes(tree, ast.Import) for alias in node.names)
    yield from ((node.module or "", alias.name) for node in nodes(tree, ast.ImportFrom) for alias in node.names)


def parsed(directory: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(directory.rglob("*.py"))}


def used_by_the_server() -> dict[str, set[str]]:
    """Return what `sso_service/server/` uses, in the form of `SERVER_PARTS`."""
    used: defaultdict[str, set[str]] = defaultdict(set)
    for path, tree in parsed(SERVER).items():
        for module, name in imported(tree):
            if name and is_from(module, "uvicorn", "httptools"):
                used[f"{module}:{name}"] |= set()
        for node in nodes(tree, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "uvicorn":
                used[f"uvicorn:{node.attr}"] |= set()
            elif owner in OBJECTS:
                used[OBJECTS[owner]].add(node.attr)
        for definition in nodes(tree, ast.ClassDef):
            own = find(f"sso_service.server.{path.stem}:{definition.name}")
            for part in (PROTOCOL, WORKERS):
                if issubclass(own, base := find(part)):  # type: ignore[arg-type]  # both are classes
                    names = {node.name for node in nodes(definition, ast.FunctionDef)}
                    owned = nodes(definition, ast.Attribute)
                    names |= {node.attr for node in owned if ast.unparse(node.value) in {"self", "super()"}}
                    used[part] |= {name for name in names & attributes(base) if not name.startswith("__")}
    return dict(used)


def flat(parts: dict[str, set[str]]) -> set[str]:
    return {*parts, *(f"{part}.{name}" for part, names in parts.items() for name in names)}


@pytest.mark.parametrize("part", ALL_PARTS)
def test_every_listed_part_still_exists(part: str) -> None:
    module, _, name = part.partition(":")
    assert hasattr(import_module(module), name), f"{module} has no {name} any more, but sso_service uses it"
    missing = ALL_PARTS[part] - attributes(find(part))
    assert not missing, f"{part} has no {', '.join(sorted(missing))} any more, but sso_service uses it"


@pytest.mark.parametrize("part", PARAMETERS)
def test_the_classes_that_we_derive_from_have_the_same_parameters(part: str) -> None:
    assert set(inspect.signature(find(part)).parameters) == PARAMETERS[part]  # type: ignore[arg-type]  # a class


def test_the_server_uses_exactly_the_listed_parts() -> None:
    assert flat(used_by_the_server()) == flat(SERVER_PARTS)


def test_only_the_server_imports_uvicorn_and_httptools() -> None:
    others = [path for path in parsed(PACKAGE) if not path.is_relative_to(SERVER)]
    found = {(path.name, module) for path in others for module, _ in imported(ast.parse(path.read_text()))}
    assert [each for each in found if is_from(each[1], "uvicorn", "httptools")] == []


def test_the_package_uses_exactly_the_listed_parts_of_itsdangerous() -> None:
    names = {each for tree in parsed(PACKAGE).values() for each in imported(tree) if is_from(each[0], "itsdangerous")}
    undocumented = {f"{module}:{name}" for module, name in names if name and not hasattr(itsdangerous, name)}
    assert undocumented == set(ITSDANGEROUS_PARTS)


def test_the_package_uses_the_listed_parts_of_starlette_and_no_private_name() -> None:
    """Other undocumented attributes of Starlette are not detected: their names do not differ from public ones."""
    trees = [tree for tree in parsed(PACKAGE).values() if any(is_from(each[0], "starlette") for each in imported(tree))]
    names = {each for tree in trees for each in imported(tree) if is_from(each[0], "starlette")}
    assert [each for each in names if "._" in ".".join(each)] == []
    accesses = [node for tree in trees for node in nodes(tree, ast.Attribute)]
    assert set().union(*STARLETTE_PARTS.values()) <= {node.attr for node in accesses}
    private = {ast.unparse(node) for node in accesses if node.attr.startswith("_") and not node.attr.startswith("__")}
    assert [each for each in private if not each.startswith(("self._", "cls._"))] == []
