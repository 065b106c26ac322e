"""A revoked key stays revoked in a running service, whatever file of its id appears."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sso_service import key_directory
from sso_service.errors import NoSigningKey
from sso_service.key_directory import KeyDirectory
from sso_service.keyring import prune, revoke, revoke_all, rotate
from tests.support.files import contents
from tests.support.keyring import NOW, TOKENS, ids, key, load_directory, put, tombstone, verifying


def restore(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


def test_a_restored_file_of_a_revoked_key_revives_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, key("leaked", 1000))
    backup = contents(tmp_path)
    keys = load_directory(tmp_path)
    [new] = revoke(tmp_path, "leaked", now=NOW)
    keys.refresh()
    restore(tmp_path, backup)
    for _ in range(3):
        keys.refresh()
        assert keys.ring.known_keys() == [new]
        assert keys.ring.signing_key(NOW) == new
        assert keys.revived == {"leaked"}
        assert not keys.unusable
    [record] = caplog.records
    assert "'leaked.json' contains a revoked key" in record.getMessage()


def test_an_older_copy_of_the_whole_directory_revives_nothing(tmp_path: Path) -> None:
    """The successor is gone as well. No older key signs in its place: it would be the one that was replaced."""
    put(tmp_path, key("old", 1000), key("leaked", 2000))
    backup = contents(tmp_path)
    keys = load_directory(tmp_path)
    [new] = revoke(tmp_path, "leaked", now=NOW)
    keys.refresh()
    (tmp_path / f"{new.id}.json").unlink()
    restore(tmp_path, backup)
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["old"]
    with pytest.raises(NoSigningKey):
        keys.ring.signing_key(NOW)
    made = rotate(tmp_path, now=NOW, lead=0)
    keys.refresh()
    assert keys.ring.signing_key(NOW) == made


@pytest.mark.parametrize(
    "reappear",
    [
        lambda path: path.write_bytes(b"{"),
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: put(path.parent, key("leaked", 1000)),
        lambda path: put(path.parent, key("leaked", NOW)),
        lambda path: put(path.parent, tombstone("leaked", 1000)),
    ],
    ids=["broken", "directory", "FIFO", "broken link", "key", "key with a later start", "tombstone"],
)
def test_a_deleted_tombstone_stays_in_memory_whatever_appears(tmp_path: Path, reappear: Callable[[Path], None]) -> None:
    put(tmp_path, key("old", 500), tombstone("leaked", 1000))
    keys = load_directory(tmp_path)
    path = tmp_path / "leaked.json"
    path.unlink()
    keys.refresh()
    assert keys.ring.entries == (key("old", 500), tombstone("leaked", 1000))
    reappear(path)
    keys.refresh()
    assert keys.ring.entries == (key("old", 500), tombstone("leaked", 1000))
    with pytest.raises(NoSigningKey):
        keys.ring.signing_key(NOW)


def test_after_pruning_a_restored_key_stays_revoked_and_nothing_else_changes(tmp_path: Path) -> None:
    put(tmp_path, key("leaked", 1000))
    backup = contents(tmp_path)
    keys = load_directory(tmp_path)
    revoke(tmp_path, "leaked", now=NOW)
    keys.refresh()
    later = NOW + 10_000
    signing = rotate(tmp_path, now=later - 5000, lead=0)
    pruned = prune(tmp_path, now=later, lifetime=TOKENS)
    assert "leaked" in ids(pruned)
    keys.refresh()
    fresh = load_directory(tmp_path)
    for moment in (later, later + 60, later + 100_000):
        assert keys.ring.signing_key(moment) == fresh.ring.signing_key(moment) == signing
        assert verifying(keys.ring, moment) == verifying(fresh.ring, moment) == [signing.id]
    restore(tmp_path, backup)
    keys.refresh()
    assert keys.ring.known_keys() == [signing]
    assert keys.revived == {"leaked"}


def test_keys_rotate_be_revoked_and_be_pruned_under_a_running_service(tmp_path: Path) -> None:
    """Its view equals that of a service that starts now, so remembered tombstones never get in the way."""
    rotate(tmp_path, now=NOW, lead=0)
    keys = load_directory(tmp_path)
    for step in range(12):
        now = NOW + step * 1000
        if step % 3 == 1:
            revoke_all(tmp_path, now=now)
        elif step % 3 == 2:
            rotate(tmp_path, now=now, lead=60)
        else:
            prune(tmp_path, now=now, lifetime=TOKENS)
        keys.refresh()
        fresh = load_directory(tmp_path)
        for moment in range(now, now + 1000, 50):
            assert keys.ring.signing_key(moment) == fresh.ring.signing_key(moment)
            assert verifying(keys.ring, moment) == verifying(fresh.ring, moment)


def test_a_pending_key_that_was_revoked_and_pruned_by_hand_stays_revoked(tmp_path: Path) -> None:
    put(tmp_path, key("signing", 1000))
    pending = rotate(tmp_path, now=NOW)
    backup = contents(tmp_path)
    keys = load_directory(tmp_path)
    revoke(tmp_path, pending.id, now=NOW)
    keys.refresh()
    restore(tmp_path, backup)
    keys.refresh()
    assert keys.ring.signing_key(NOW).id == "signing"
    assert keys.ring.signing_key(NOW + 60).id not in {"signing", pending.id}
    assert pending.id not in ids(keys.ring.known_keys())


def test_a_revived_file_that_is_revoked_again_or_deleted_is_no_longer_reported(tmp_path: Path) -> None:
    put(tmp_path, tombstone("a", 1000), tombstone("b", 1000), key("c", 2000))
    keys = load_directory(tmp_path)
    put(tmp_path, key("a", 1000), key("b", 1000))
    keys.refresh()
    assert keys.revived == {"a", "b"}
    revoke(tmp_path, "a", now=NOW)
    (tmp_path / "b.json").unlink()
    keys.refresh()
    assert keys.revived == set()
    assert ids(keys.ring.known_keys()) == ["c"]


def test_a_key_whose_file_is_only_missing_returns_with_its_file(tmp_path: Path) -> None:
    """Only tombstones are remembered: a key that was never revoked is trusted again."""
    put(tmp_path, key("a", 1000), key("b", 2000))
    keys = load_directory(tmp_path)
    (tmp_path / "b.json").unlink()
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["a"]
    put(tmp_path, key("b", 2000))
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["b", "a"]


def test_the_number_of_remembered_tombstones_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_directory, "REMEMBERED_TOMBSTONES", 3)
    keys = KeyDirectory(tmp_path)
    put(tmp_path, key("signing", 100))
    for number in range(10):
        put(tmp_path, tombstone(f"t{number}", number))
        keys.refresh()
        (tmp_path / f"t{number}.json").unlink()
    keys.refresh()
    assert ids(list(keys.ring.entries)) == ["t7", "t8", "t9", "signing"]
