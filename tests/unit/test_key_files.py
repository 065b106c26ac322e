"""Key files: rotation, complete files, and broken files."""

import json
import os
import re
import stat
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sso_service.errors import KeyDirectoryUnreadable
from sso_service.keyring import KeyRing, SigningKey, load, revoke, revoke_all, rotate
from tests.support.keyring import (
    BROKEN_FILES,
    CHANGES,
    GOOD,
    NOW,
    key,
    load_directory,
    put,
    ring_in,
    tombstone,
    verifying,
    watched,
    written,
)

# --- rotate ----------------------------------------------------------------------------------------------------------


def test_a_rotated_key_signs_after_a_minute(tmp_path: Path) -> None:
    put(tmp_path, key("old", 1000))
    new = rotate(tmp_path, now=NOW)
    assert (new.created_at, new.signs_from) == (NOW, NOW + 60)
    ring = ring_in(tmp_path)
    assert ring.signing_key(NOW + 59).id == "old"
    assert ring.signing_key(NOW + 60) == new
    assert verifying(ring, NOW) == [new.id, "old"]


def test_a_first_key_can_sign_immediately(tmp_path: Path) -> None:
    new = rotate(tmp_path, now=NOW, lead=0)
    assert ring_in(tmp_path).signing_key(NOW) == new


def test_a_key_file_has_a_random_secret_and_mode_0600(tmp_path: Path) -> None:
    previous_mask = os.umask(0)
    try:
        keys = [rotate(tmp_path, now=NOW + n) for n in range(3)]
    finally:
        os.umask(previous_mask)
    for made in keys:
        path = tmp_path / f"{made.id}.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = json.loads(path.read_text())
        assert content.keys() == {"id", "secret", "created_at", "signs_from"}
        assert content["id"] == made.id
        assert content["created_at"] == made.created_at
        assert content["signs_from"] == made.signs_from
        assert len(content["secret"]) == 43
        assert urlsafe_b64decode(content["secret"] + "=") == made.secret
    assert len({made.secret for made in keys}) == 3


@pytest.mark.parametrize(
    "other_id",
    ["z", "_", "-", "0", "key", "20991231T235959Z-ffffffffffff", "Z" * 40, "_" * 122, "_" * 128],
    ids=lambda other_id: other_id if len(other_id) < 30 else f"{len(other_id)} characters",
)
def test_a_new_key_outranks_keys_with_the_same_start(tmp_path: Path, other_id: str) -> None:
    put(tmp_path, key(other_id, NOW))
    rotated = rotate(tmp_path, now=NOW, lead=0)
    assert ring_in(tmp_path).signing_key(NOW) == rotated
    [replacement] = revoke(tmp_path, rotated.id, now=NOW)
    assert ring_in(tmp_path).signing_key(NOW) == replacement


@pytest.mark.slow
def test_the_last_of_many_rotations_in_one_second_signs(tmp_path: Path) -> None:
    for _ in range(200):
        last = rotate(tmp_path, now=NOW, lead=0)
        assert ring_in(tmp_path).signing_key(NOW) == last


# --- Files -----------------------------------------------------------------------------------------------------------


def test_only_complete_key_files_remain(tmp_path: Path) -> None:
    old = rotate(tmp_path, now=NOW - 1000, lead=0)
    [new] = revoke(tmp_path, old.id, now=NOW)
    assert sorted(os.listdir(tmp_path)) == sorted([f"{old.id}.json", f"{new.id}.json"])


def test_a_key_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    """A process that has the old file open reads its complete content."""
    made = rotate(tmp_path, now=NOW, lead=0)
    with (tmp_path / f"{made.id}.json").open() as file:
        revoke(tmp_path, made.id, now=NOW)
        assert json.load(file)["id"] == made.id


def test_a_key_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    before_each_step: list[list[str]] = []
    with watched(tmp_path, CHANGES, lambda: before_each_step.append([path.name for path in tmp_path.glob("[!.]*")])):
        rotate(tmp_path, now=NOW)
    assert before_each_step == [[]]


@pytest.mark.parametrize("name", [".hidden.json", "README", "a.json.bak", "a.JSON", ".a.3f2c", "json"])
def test_files_with_other_names_are_ignored(tmp_path: Path, name: str) -> None:
    put(tmp_path, key("a", 1000))
    (tmp_path / name).write_text(written(key(name.removesuffix(".json"), 2000)))
    assert load(tmp_path) == ({"a": key("a", 1000)}, {})


@pytest.mark.parametrize("operate", [load, lambda d: rotate(d, now=NOW), lambda d: revoke_all(d, now=NOW)])
def test_a_missing_directory_is_an_error_that_names_it(tmp_path: Path, operate: Callable[[Path], object]) -> None:
    with pytest.raises(KeyDirectoryUnreadable, match="nowhere"):
        operate(tmp_path / "nowhere")


@BROKEN_FILES
def test_a_broken_key_file_is_reported_and_skipped(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, key("z", 2000))
    (tmp_path / "a.json").write_bytes(content)
    entries, broken = load(tmp_path)
    assert entries == {"z": key("z", 2000)}
    assert broken.keys() == {"a"}
    assert "AAAA" not in broken["a"]


def test_a_truncated_key_file_is_broken(tmp_path: Path) -> None:
    """The file may have been cut off, or its copy may be incomplete."""
    made = rotate(tmp_path, now=NOW)
    whole = (tmp_path / f"{made.id}.json").read_bytes()
    for length in range(len(whole.rstrip())):
        (tmp_path / f"{made.id}.json").write_bytes(whole[:length])
        entries, broken = load(tmp_path)
        assert not entries
        assert broken.keys() == {made.id}


@given(name=st.binary(min_size=1, max_size=100).filter(lambda name: not set(name) & {0, ord("/")}))
@example(name=b"20300317T174640Z-5f0c9a3be21d")
def test_a_file_with_any_name_is_a_key_or_broken_or_ignored(name: bytes) -> None:
    with TemporaryDirectory() as directory:
        put(Path(directory), key("good", 1000))
        file_name = os.fsdecode(name) + ".json"
        key_id = file_name.removesuffix(".json")
        made = SigningKey(key_id, bytes(32), created_at=1900, signs_from=2000)
        (Path(directory) / file_name).write_text(written(made))
        keys = load_directory(Path(directory))
        entries, broken = load(Path(directory))
        assert keys.ring.entries == KeyRing(entries.values()).entries
        assert entries.pop("good") == (made if key_id == "good" else key("good", 1000))
        fit = re.fullmatch("[A-Za-z0-9_-]+", key_id, re.ASCII)
        assert entries == ({key_id: made} if fit and key_id != "good" else {})
        assert broken.keys() <= {key_id}
        assert (key_id in entries | broken) == (key_id != "good" and not file_name.startswith("."))


def test_a_file_that_cannot_be_read_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    entries, broken = load(tmp_path)
    assert not entries
    assert broken.keys() == {"a"}


def test_a_file_with_revoked_at_is_a_tombstone_even_with_a_secret(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD | {"revoked_at": 1001}))
    assert load(tmp_path) == ({"a": tombstone("a", 1000)}, {})
