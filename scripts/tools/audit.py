"""Secrets in the tree, and locked packages that are known to be vulnerable: the part of `scripts/audit` that is ours.

Secrets are found by detect-secrets, with two formats of our own. Those that examples and tests need are in
`.ci/secrets.baseline` by their digests; `scripts/audit --allow` writes it anew, and the difference is to be reviewed.

Known vulnerabilities are pip-audit's. It needs PyPI, which not everybody who runs this can reach.
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

    So many random characters have all three kinds among them but once in a thousand; names in code do not.
    """

    secret_type = "Login token, signing key or session of this service"
    denylist = (
        re.compile(
            r"(?<![\w-])(?=[\w-]*[A-Z])(?=[\w-]*[a-z])(?=[\w-]*[0-9])[\w-]{42}[AEIMQUYcgkosw048](?![\w-])", re.ASCII
        ),
    )


class Unreachable(Exception):
    """Who knows of vulnerabilities could not be asked."""


def tracked(root: Path) -> list[str]:
    """The files that are or would be committed, by their paths in the repository."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout
    return [name for name in found.split("\0") if name and (root / name).is_file()]


@contextmanager
def scanned(root: Path, known: Path) -> Iterator[tuple[SecretsCollection, SecretsCollection]]:
    """What looks like a secret, and what the baseline `known` takes for none."""
    content = baseline.load_from_file(str(known))
    # In the directory, since the paths of the files that are searched become part of what is found.
    with chdir(root), transient_settings(content):
        allowed = baseline.load(content)
        found = SecretsCollection()
        for name in tracked(root):
            if root / name != known:
                found.scan_file(name)
        yield found, allowed


def wrong_secrets(root: Path, known: Path) -> Iterator[str]:
    """What is wrong: secrets that are not in the baseline, and what is in the baseline without need."""
    with scanned(root, known) as (found, allowed):
        for name, secret in found - allowed:
            yield f"{name}:{secret.line_number}: {secret.type}"
        for name, secret in allowed - found:
            yield f"{known.name}: not in {name} any more: {secret.type}"


def allow(root: Path, known: Path) -> None:
    """Writes the baseline anew, with everything that is there now."""
    with scanned(root, known) as (found, _):
        baseline.save_to_file(baseline.format_for_output(found, is_slim_mode=True), str(known))


def vulnerabilities(locks: Sequence[Path], *options: str) -> list[str]:
    """What is known against the packages in `locks`. `options` are pip-audit's. Raises `Unreachable`."""
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
        raise Unreachable("it has none of our packages; a mirror that only serves downloads, perhaps")
    # A release that PyPI does not know was taken down, and that is what happens to malware.
    return unknown + [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", [])
    ]


def main() -> int:
    """0 if nothing is wrong, 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow", action="store_true", help="take what looks like a secret now for none")
    if parser.parse_args().allow:
        allow(ROOT, BASELINE)
    wrong = list(wrong_secrets(ROOT, BASELINE))
    try:
        wrong += vulnerabilities(LOCKS)
    except Unreachable as error:
        print(f"PyPI is not reachable, so that nothing is known of vulnerabilities: {error}", file=sys.stderr)
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
