"""The command `keys`."""

import json
import os
import stat
import time
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import Any

import pytest

from sso_service import keyring
from tests.support.command_line import assert_refused, run, states, succeed, table
from tests.support.files import contents


def test_keys_list_prints_the_state_of_each_key_newest_first(sqlite_env: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    directory.mkdir()
    now = int(time.time())
    spent, gone, previous, signing, future = (
        keyring.rotate(directory, now=now + offset, lead=0).id
        for offset in (-200_000, -150_000, -100_000, -10_000, 1000)
    )
    keyring.revoke(directory, gone, now=now)
    assert states(sqlite_env) == {
        future: "signs later",
        signing: "signs",
        previous: "verifies",
        gone: "revoked",
        spent: "spent",
    }
    assert list(states(sqlite_env)) == [future, signing, previous, gone, spent]


def test_keys_list_prints_json(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [old] = states(sqlite_env)
    new = keyring.rotate(keys_dir, now=int(time.time()))
    assert json.loads(succeed("keys", "list", "--json", env=sqlite_env)) == [
        {"id": new.id, "state": "signs later", "signs_from": new.signs_from},
        {"id": old, "state": "signs", "signs_from": read_key(keys_dir, old)["signs_from"]},
    ]


def test_a_new_key_signs_after_a_minute(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [old] = states(sqlite_env)
    before = time.time()
    printed = succeed("keys", "rotate", env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert new in printed
    assert states(sqlite_env) == {new: "signs later", old: "signs"}
    assert before + 59 <= read_key(keys_dir, new)["signs_from"] <= time.time() + 60
    assert len(urlsafe_b64decode(read_key(keys_dir, new)["secret"] + "=")) == 32


@pytest.mark.parametrize(("lead", "state"), [(0, "signs"), (3600, "signs later")])
def test_the_lead_of_a_rotation_can_be_set(sqlite_env: dict[str, str], keys_dir: Path, lead: int, state: str) -> None:
    [old] = states(sqlite_env)
    before = int(time.time())
    succeed("keys", "rotate", "--lead", str(lead), env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert states(sqlite_env)[new] == state
    assert states(sqlite_env)[old] == ("verifies" if lead == 0 else "signs")
    assert before + lead <= read_key(keys_dir, new)["signs_from"] <= time.time() + lead


def test_a_dry_run_changes_no_key(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    spent = keyring.rotate(keys_dir, now=int(time.time()) - 200_000, lead=0).id
    keyring.rotate(keys_dir, now=int(time.time()) - 100_000, lead=0)
    before = contents(keys_dir)
    assert "would" in succeed("keys", "rotate", "--dry-run", env=sqlite_env)
    assert spent in succeed("keys", "rotate", "--prune", "--dry-run", env=sqlite_env)
    assert spent in succeed("keys", "prune", "--dry-run", env=sqlite_env)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [("rotate", "--prune"), ("prune",)])
def test_pruning_deletes_the_keys_that_verify_nothing(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    [signing] = states(sqlite_env)
    now = int(time.time())
    spent = keyring.rotate(keys_dir, now=now - 200_000, lead=0).id
    gone = keyring.rotate(keys_dir, now=now - 150_000, lead=0).id
    keyring.revoke(keys_dir, gone, now=now)
    verifies = keyring.rotate(keys_dir, now=now - 100_000, lead=0).id
    printed = succeed("keys", *arguments, env=sqlite_env)
    assert spent in printed
    assert gone in printed
    assert verifies not in printed
    left = states(sqlite_env)
    assert {spent, gone}.isdisjoint(left)
    assert (left[verifies], left[signing]) == ("verifies", "signs")
    assert len(left) == (3 if arguments[0] == "rotate" else 2)
    assert not any(key_id in succeed("keys", "prune", env=sqlite_env) for key_id in (spent, gone, verifies, signing))


def test_changes_to_keys_are_reported_as_one_line_of_json(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    line = succeed("keys", "rotate", "--prune", "--json", env=sqlite_env)
    report = json.loads(line)
    (made,) = report.pop("made")
    assert report == {"event": "keys.rotate", "dry_run": False, "pruned": []}
    assert line.count("\n") == 1
    assert json.loads((keys_dir / f"{made['id']}.json").read_text())["signs_from"] == made["signs_from"]
    revoked = json.loads(succeed("keys", "revoke", made["id"], "--json", env=sqlite_env))
    assert (revoked["event"], revoked["revoked"]) == ("keys.revoke", made["id"])
    dry_run = json.loads(succeed("keys", "prune", "--dry-run", "--json", env=sqlite_env))
    assert dry_run == {"event": "keys.prune", "dry_run": True, "pruned": []}


@pytest.mark.parametrize("shorter", ["SSO_SESSION_TTL", "SSO_TOKEN_TTL"])
def test_a_key_is_kept_for_the_longer_of_both_lifetimes(
    sqlite_env: dict[str, str], keys_dir: Path, shorter: str
) -> None:
    [old] = states(sqlite_env)
    keyring.rotate(keys_dir, now=int(time.time()) - 1000, lead=0)
    ttl = {"SSO_SESSION_TTL": "3600", "SSO_TOKEN_TTL": "3600"}
    succeed("keys", "prune", env=sqlite_env | ttl | {shorter: "60"})
    assert old in states(sqlite_env)
    succeed("keys", "prune", env=sqlite_env | {"SSO_SESSION_TTL": "60", "SSO_TOKEN_TTL": "60"})
    assert old not in states(sqlite_env)


def test_revoking_a_key_deletes_its_secret_and_creates_a_new_key(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [old] = states(sqlite_env)
    secret = read_key(keys_dir, old)["secret"]
    printed = succeed("keys", "revoke", old, env=sqlite_env)
    [new] = states(sqlite_env).keys() - {old}
    assert states(sqlite_env) == {new: "signs", old: "revoked"}
    assert old in printed
    assert new in printed
    assert set(read_key(keys_dir, old)) == {"id", "signs_from", "revoked_at"}
    assert not any(secret.encode() in content for content in contents(keys_dir).values())


def test_revoking_all_keys_creates_one_new_key(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    keyring.rotate(keys_dir, now=int(time.time()), lead=0)
    old = set(states(sqlite_env))
    printed = succeed("keys", "revoke", "--all", env=sqlite_env)
    after = states(sqlite_env)
    [new] = after.keys() - old
    assert after == {new: "signs"} | dict.fromkeys(old, "revoked")
    assert new in printed


def test_revoking_all_keys_includes_or_reports_broken_files(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [old] = states(sqlite_env)
    whole = (keys_dir / f"{old}.json").read_bytes()
    (keys_dir / f"{old}.json").write_bytes(whole[:20])
    outcome = run("keys", "revoke", "--all", env=sqlite_env)
    if "revoked_at" not in read_key(keys_dir, old, default={}):  # a synchronisation may restore the whole file
        assert old in outcome.err


@pytest.mark.parametrize("key_id", ["20200101T000000Z-abcdef", "../keys", "", "."])
def test_an_unknown_key_cannot_be_revoked(sqlite_env: dict[str, str], keys_dir: Path, key_id: str) -> None:
    before = contents(keys_dir)
    assert_refused(run("keys", "revoke", key_id, env=sqlite_env), key_id)
    assert contents(keys_dir) == before


@pytest.mark.parametrize("arguments", [(), ("20200101T000000Z-abcdef", "--all")])
def test_keys_revoke_requires_either_an_id_or_all(
    sqlite_env: dict[str, str], keys_dir: Path, arguments: tuple[str, ...]
) -> None:
    before = contents(keys_dir)
    assert_refused(run("keys", "revoke", *arguments, env=sqlite_env), "--all")
    assert contents(keys_dir) == before


def test_keys_list_warns_about_a_broken_file(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [good] = states(sqlite_env)
    (keys_dir / "broken.json").write_text('{"secret": "sensitive"')
    outcome = run("keys", "list", env=sqlite_env)
    assert outcome.code == 0
    assert [row[0] for row in table(outcome.out)] == [good]
    assert "broken" in outcome.err
    assert "sensitive" not in outcome.err


def test_keys_list_warns_about_files_that_it_does_not_read(sqlite_env: dict[str, str], keys_dir: Path) -> None:
    [good] = states(sqlite_env)
    os.mkfifo(keys_dir / "fifo.json")
    (keys_dir / "endless.json").symlink_to("/dev/zero")
    (keys_dir / "open.json").write_text("{}")
    (keys_dir / "open.json").chmod(0o666)
    (keys_dir / "\x1b[2J.json").write_text("{")
    outcome = run("keys", "list", env=sqlite_env)
    assert outcome.code == 0
    assert [row[0] for row in table(outcome.out)] == [good]
    assert outcome.err.splitlines() == [
        r"Warning: '\x1b[2J.json' is not JSON; skipped.",
        "Warning: 'endless.json' is not a regular file; skipped.",
        "Warning: 'fifo.json' is not a regular file; skipped.",
        "Warning: 'open.json' can be written by every user; skipped.",
    ]


@pytest.mark.parametrize("arguments", [("init",), ("keys", "rotate")])
def test_key_files_are_private_whatever_the_umask(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"SSO_HOME": str(tmp_path)}
    umask = os.umask(0)
    try:
        succeed("init", env=env)
        run(*arguments, env=env)
        succeed("keys", "revoke", next(iter(states(env))), env=env)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert len(modes) >= 2
    assert set(modes.values()) == {0o600}


def read_key(directory: Path, key_id: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of a key file, or `default` if it is not JSON."""
    try:
        content: dict[str, Any] = json.loads((directory / f"{key_id}.json").read_text())
    except ValueError:
        if default is None:
            raise
        return default
    return content
