"""Search the repository for secrets, and the locked packages for known vulnerabilities.

detect-secrets finds the secrets, with two additional formats of this service. `.ci/secrets.baseline` contains the
digests of those that examples and tests need. `scripts/audit --allow` rewrites it; review the difference before a
commit.

pip-audit finds the vulnerabilities. It needs PyPI, which is not reachable from every machine.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

from detect_secrets.core import baseline
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.plugins.base import RegexBasedDetector
from detect_secrets.settings import transient_settings

ROOT = Path(__file__).parents[2]
LOCKS = sorted(ROOT.glob("scripts/*.lock"))
BASELINE = ROOT / ".ci" / "secrets.baseline"


class ApiToken(RegexBasedDetector):
    """The secret of an API token."""

    secret_type = "API token of this service"
    denylist = (re.compile(r"wf_live_[A-Za-z0-9_-]{43}"),)


class ThirtyTwoBytes(RegexBasedDetector):
    """A login token, the secret of a signing key, or the signature of a session cookie: 32 bytes in base64url.

    All but one in a thousand of these contain upper case, lower case and digits. Names in code do not.
    """

    secret_type = "Login token, signing key or session of this service"
    denylist = (
        re.compile(
            r"(?<![\w-])(?=[\w-]*[A-Z])(?=[\w-]*[a-z])(?=[\w-]*[0-9])[\w-]{42}[AEIMQUYcgkosw048](?![\w-])", re.ASCII
        ),
    )


class Unreachable(Exception):
    """The database of vulnerabilities cannot be reached."""


def tracked(root: Path) -> list[str]:
    """Return the paths, relative to `root`, of all files that are committed or would be with `git add`."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    return [name for name in found.split("\0") if name and (root / name).is_file()]


@contextmanager
def scanned(root: Path, known: Path) -> Iterator[tuple[SecretsCollection, SecretsCollection]]:
    """Yield the possible secrets that were found, and those that the baseline file `known` allows."""
    content = baseline.load_from_file(str(known))
    # Inside the directory, because the paths of the searched files become part of the findings.
    with chdir(root), transient_settings(content):
        allowed = baseline.load(content)
        found = SecretsCollection()
        for name in tracked(root):
            if root / name != known:
                found.scan_file(name)
        yield found, allowed


def wrong_secrets(root: Path, known: Path) -> Iterator[str]:
    """Yield one line for each secret that is not in the baseline, and for each unnecessary entry of the baseline."""
    with scanned(root, known) as (found, allowed):
        for name, secret in found - allowed:
            yield f"{name}:{secret.line_number}: {secret.type}"
        for name, secret in allowed - found:
            yield f"{known.name}: no longer in {name}: {secret.type}"


def allow(root: Path, known: Path) -> None:
    """Rewrite the baseline, so that it allows everything that is found now."""
    with scanned(root, known) as (found, _):
        baseline.save_to_file(baseline.format_for_output(found, is_slim_mode=True), str(known))


def vulnerabilities(locks: Sequence[Path], *options: str) -> list[str]:
    """Return the known vulnerabilities of the packages in `locks`. Raises `Unreachable`.

    `options` are further options of pip-audit.
    """
    files = [argument for lock in locks for argument in ("--requirement", str(lock))]
    command = ["pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner=off", "--format=json", *options]
    asked = subprocess.run(
        [sys.executable, "-m", *command, *files], capture_output=True, text=True, timeout=600, check=False
    )
    try:
        packages = json.loads(asked.stdout)["dependencies"]
    except ValueError:
        reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        if re.search("Connect|Timeout", reason):
            raise Unreachable(reason) from None
        raise RuntimeError(asked.stderr) from None
    unknown = [f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        raise Unreachable("the index reports none of the packages; perhaps a mirror that only serves downloads")
    # A release that PyPI does not list was withdrawn, which is what happens to malware.
    return unknown + [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", [])
    ]


def main() -> int:
    """Run the audit. Return 0 if it found nothing, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow", action="store_true", help="allow everything that looks like a secret now")
    if parser.parse_args().allow:
        allow(ROOT, BASELINE)
    wrong = list(wrong_secrets(ROOT, BASELINE))
    try:
        wrong += vulnerabilities(LOCKS)
    except Unreachable as error:
        print(f"PyPI is not reachable, so vulnerabilities were not checked: {error}", file=sys.stderr)
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
