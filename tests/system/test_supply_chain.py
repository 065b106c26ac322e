"""The supply chain: locked dependencies, known vulnerabilities, and a repository without secrets."""

import json
import re
import secrets
import subprocess
import sys
import tomllib
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.tools.audit import BASELINE, LOCKS, ROOT, Unreachable, allow, vulnerabilities, wrong_secrets
from scripts.tools.ports import free_port
from sso_service import keyring
from sso_service.sessions import Session, dump_session
from tests.support.waiting import PATIENCE

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: Mapping[str, list[str]] = PROJECT["optional-dependencies"]
SERVER = [*PROJECT["dependencies"], *EXTRAS["server"]]
TESTS = [*SERVER, *EXTRAS["client"], *EXTRAS["tracing"], *EXTRAS["test"]]
LOCKED_FOR = {
    "requirements.lock": [*SERVER, "hatchling", "editables"],
    "requirements-test.lock": TESTS,
    "requirements-bench.lock": [*TESTS, *EXTRAS["bench"]],
    "requirements-fuzz.lock": [*TESTS, *EXTRAS["fuzz"]],
    "requirements-docs.lock": EXTRAS["docs"],  # on its own: the site is built without the service
}


def locked(lock: Path) -> dict[str, tuple[str, int]]:
    """Return the version of each package in a lock file, and the number of its hashes."""
    content = re.sub(r"\\\n\s*", "", lock.read_text())
    entries = [
        re.match(r"([a-z0-9-]+)==(\S+?)( ; [^-]+?)?((?:\s*--hash=sha256:[0-9a-f]{64})*)$", line)
        for line in content.splitlines()
    ]
    assert all(entries), f"{lock.name} has a line of another form"
    return {entry[1]: (entry[2], entry[4].count("--hash=")) for entry in entries if entry}


# --- dependencies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOCKED_FOR)
def test_a_lock_has_all_dependencies_in_allowed_versions_with_hashes(name: str) -> None:
    packages = locked(ROOT / "scripts" / name)
    for wanted in map(Requirement, LOCKED_FOR[name]):
        if wanted.name != "sso-service":
            version, _ = packages[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(version), f"{wanted}, locked is {version}: run scripts/lock"
    assert [package for package, (_, hashes) in packages.items() if not hashes] == []


def test_every_lock_file_is_checked_and_versions_agree() -> None:
    assert {lock.name for lock in LOCKS} == LOCKED_FOR.keys()
    service, test, *others = (locked(ROOT / "scripts" / name) for name in LOCKED_FOR if "docs" not in name)
    assert service.items() <= test.items()
    assert all(test.items() <= each.items() for each in others)


def test_a_package_that_does_not_match_its_hash_is_not_installed(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    wheel.write_bytes(b"other content")
    for pinned in (f"thing @ {wheel.as_uri()}", f"thing @ {wheel.as_uri()} --hash=sha256:{'0' * 64}"):
        lock.write_text(f"{pinned}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--require-hashes",
            "--no-index",
            "--target",
            str(tmp_path / "x"),
        ]
        done = subprocess.run([*pip, "-r", str(lock)], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert re.search("MATCH THE HASHES|[Hh]ashes are required", done.stderr)


# --- vulnerabilities -------------------------------------------------------------------------------------------------


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock file with two packages."""
    path = tmp_path / "two.lock"
    hashed = f" --hash=sha256:{'0' * 64}"
    path.write_text(f"good==1.0{hashed}\nbad==2.0{hashed}\n")
    return path


@contextmanager
def vulnerability_service(answers: Mapping[str, object]) -> Iterator[list[str]]:
    """Run a vulnerability service like osv.dev with these answers, by package. Yields the options for pip-audit."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(answers.get(asked["package"]["name"], {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield ["--vulnerability-service=osv", f"--osv-url=http://127.0.0.1:{server.server_port}/"]
        server.shutdown()
        thread.join()


def test_a_known_vulnerability_is_reported(lock: Path) -> None:
    known = {
        "id": "CVE-2026-1",
        "modified": "2026-01-01T00:00:00Z",
        "affected": [
            {
                "package": {"name": "bad", "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.1"}]}],
                "versions": ["2.0"],
            }
        ],
    }
    with vulnerability_service({"bad": {"vulns": [known]}}) as options:
        assert vulnerabilities([lock], *options) == ["bad 2.0: CVE-2026-1, fixed in 2.1"]
    with vulnerability_service({}) as options:
        assert vulnerabilities([lock], *options) == []


def test_an_unreachable_vulnerability_service_is_an_error(lock: Path) -> None:
    unreachable = f"--osv-url=http://127.0.0.1:{free_port()}/"
    with pytest.raises(Unreachable):
        vulnerabilities([lock], "--vulnerability-service=osv", unreachable)


def test_an_invalid_lock_file_is_not_reported_as_a_network_failure(lock: Path) -> None:
    lock.write_text("good==1.0\n")
    with pytest.raises(RuntimeError, match="hash"):
        vulnerabilities([lock])


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that contains only the settings of the secret scan."""
    root = tmp_path / "repository"
    (root / ".ci").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / ".gitignore").write_text("var/\n")
    content = json.loads(BASELINE.read_text()) | {"results": {}}
    for plugin in content["plugins_used"]:
        if "path" in plugin:
            plugin["path"] = f"file://{ROOT / plugin['path'].removeprefix('file://')}"
    (root / ".ci" / "secrets.baseline").write_text(json.dumps(content))
    return root


def secret_samples(tmp_path: Path) -> dict[str, str]:
    """Return a text that contains a secret, for each kind of secret."""
    key = keyring.rotate(tmp_path, now=0, lead=0)
    cookie = dump_session(Session(1, 123, 1_900_000_000), key.session_key)
    return {
        "API token": f"the token is wf_live_{secrets.token_urlsafe(32)}, keep it",
        "login token": f"GET /client/123?a=1&sso={secrets.token_urlsafe(32)} HTTP/1.1",
        "key file": (tmp_path / f"{key.id}.json").read_text(),
        "session": f"Cookie: studio_session={cookie}",
        "private key": "-----BEGIN PRIVATE KEY-----",
        "database": "SSO_DATABASE_URL=postgresql://sso:" + "Vh7Qw2Lx9p@db.example/sso",
        "AWS": "aws_access_key_id = AKIA" + "Q3EGUQVSZB4KXW7D",
        "GitHub": "ghp_" + b64encode(secrets.token_bytes(27), b"ab").decode(),
    }


def test_a_secret_of_each_kind_is_found_in_every_file_type(repository: Path, tmp_path: Path) -> None:
    known = repository / ".ci" / "secrets.baseline"
    (repository / "README.md").write_text("Nothing. test_that_a_long_name_is_not_taken_for_a_token1A is a name.\n")
    (repository / "var").mkdir()
    (repository / "var" / "ignored.txt").write_text(f"wf_live_{secrets.token_urlsafe(32)}\n")
    assert list(wrong_secrets(repository, known)) == []
    for number, (kind, text) in enumerate(secret_samples(tmp_path).items()):
        for name in (f"sample{number}.md", f"sample{number}.py", f"sample{number}"):
            (repository / name).write_text(f"\n{text}\n")
            assert list(wrong_secrets(repository, known)), f"{kind} in {name}"
            (repository / name).unlink()


def test_an_allowed_example_is_accepted_only_in_its_file(repository: Path, tmp_path: Path) -> None:
    known = repository / ".ci" / "secrets.baseline"
    example = f"wf_live_{secrets.token_urlsafe(32)}\n"
    (repository / "README.md").write_text(example)
    allow(repository, known)
    (repository / "README.md").write_text(f"A line more.\n{example}")
    repository = repository.rename(tmp_path / "elsewhere")
    known = repository / ".ci" / "secrets.baseline"
    assert list(wrong_secrets(repository, known)) == []
    assert example[8:-1] not in known.read_text()
    (repository / "NOTES.md").write_text(example)
    assert list(wrong_secrets(repository, known)) == ["NOTES.md:1: API token of this service"]
    (repository / "NOTES.md").unlink()
    (repository / "README.md").unlink()
    assert list(wrong_secrets(repository, known)) == [
        "secrets.baseline: no longer in README.md: API token of this service"
    ]
