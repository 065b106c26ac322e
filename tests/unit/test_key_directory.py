"""The key directory of a running service: changes, broken files, staleness, and no secrets in texts."""

import hmac
import logging
import os
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from sso_service import key_directory
from sso_service.errors import KeyRingError, NoSigningKey
from sso_service.key_directory import UNLISTABLE_LIMIT, KeyDirectory
from sso_service.keyring import Tombstone, load, prune, revoke, revoke_all, rotate
from tests.support.keyring import (
    BROKEN_FILES,
    NOW,
    READS,
    TOKENS,
    Clock,
    ids,
    key,
    load_directory,
    put,
    ring_in,
    tombstone,
    touch,
    watched,
)

# --- KeyDirectory ----------------------------------------------------------------------------------------------------


def test_a_running_service_notices_new_revoked_and_deleted_keys(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    keys = load_directory(tmp_path)
    assert ids(keys.ring.known_keys()) == ["b", "a"]
    put(tmp_path, key("c", 3000))
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["c", "b", "a"]
    put(tmp_path, tombstone("b", 2000))
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["c", "a"]
    assert [entry.id for entry in keys.ring.entries] == ["a", "b", "c"]
    (tmp_path / "a.json").unlink()
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["c"]


def test_an_unknown_signature_makes_the_service_read_a_changed_directory(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000))
    keys = load_directory(tmp_path)
    assert not keys.refresh_if_changed()
    [new] = revoke(tmp_path, "a", now=NOW)
    touch(tmp_path)
    assert keys.refresh_if_changed()
    assert keys.ring.signing_key(NOW) == new
    assert not keys.refresh_if_changed()


def test_forged_signatures_cause_no_reads_of_an_unchanged_directory(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000))
    keys = load_directory(tmp_path)
    modified = tmp_path.stat().st_mtime_ns
    put(tmp_path, key("b", 2000))
    os.utime(tmp_path, ns=(modified, modified))
    reads: list[None] = []
    with watched(tmp_path, READS, lambda: reads.append(None)):
        for _ in range(100):
            assert not keys.refresh_if_changed()
    assert reads == []
    assert ids(keys.ring.known_keys()) == ["a"]


def test_a_directory_that_changes_during_a_read_is_read_again(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000))
    keys = KeyDirectory(tmp_path)

    def look() -> None:
        if not (tmp_path / "b.json").exists():
            put(tmp_path, key("b", 2000))
            touch(tmp_path)

    with watched(tmp_path, ("open",), look):
        keys.refresh()
    keys.refresh_if_changed()
    assert ids(keys.ring.known_keys()) == ["b", "a"]


def test_revoking_a_key_during_a_read_leaves_the_service_with_a_key(tmp_path: Path) -> None:
    """The listing is older than the tombstone that is read after it, so the successor must be found as well."""
    put(tmp_path, key("a", 1000))
    keys = load_directory(tmp_path)

    def look() -> None:
        if len(os.listdir(tmp_path)) == 1:
            revoke(tmp_path, "a", now=NOW)
            touch(tmp_path)

    with watched(tmp_path, ("open",), look):
        keys.refresh()
    assert keys.ring.signing_key(NOW).created_at == NOW


@BROKEN_FILES
def test_a_file_that_breaks_is_reported_once_and_its_key_stays_in_memory(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    keys = load_directory(tmp_path)
    (tmp_path / "a.json").write_bytes(content)
    for _ in range(3):
        keys.refresh()
    assert ids(keys.ring.known_keys()) == ["b", "a"]
    [record] = caplog.records
    assert record.levelno >= logging.WARNING
    assert "a.json" in record.getMessage()


def test_a_file_that_is_broken_from_the_start_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, key("b", 2000))
    (tmp_path / "a.json").write_bytes(b"{")
    keys = load_directory(tmp_path)
    keys.refresh()
    assert ids(keys.ring.known_keys()) == ["b"]
    assert len(caplog.records) == 1


def test_a_broken_file_that_is_repaired_or_deleted_takes_effect(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    keys = load_directory(tmp_path)
    (tmp_path / "a.json").write_bytes(b"{")
    (tmp_path / "b.json").write_bytes(b"{")
    keys.refresh()
    put(tmp_path, tombstone("a", 1000))
    (tmp_path / "b.json").unlink()
    keys.refresh()
    assert keys.ring.entries == (tombstone("a", 1000),)


def test_a_tombstone_whose_file_breaks_remains_a_tombstone(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), tombstone("b", 2000))
    keys = load_directory(tmp_path)
    (tmp_path / "b.json").write_bytes(b"{")
    keys.refresh()
    with pytest.raises(NoSigningKey):
        keys.ring.signing_key(NOW)


def test_keys_become_stale_after_a_minute_without_a_readable_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, elsewhere = tmp_path / "keys", tmp_path / "elsewhere"
    directory.mkdir()
    put(directory, key("a", 1000))
    clock = Clock()
    keys = KeyDirectory(directory, monotonic=clock)
    keys.refresh()
    directory.rename(elsewhere)
    directory.write_text("a file in place of the directory")

    for seconds, stale in ((0, False), (59.9, False), (60, True), (3600, True)):
        clock.seconds = 5000 + seconds
        keys.refresh()
        keys.refresh_if_changed()
        assert keys.stale is stale
        assert keys.ring.signing_key(NOW).id == "a"
    assert len(caplog.records) == 1
    assert str(directory) in caplog.text

    directory.unlink()
    elsewhere.rename(directory)
    put(directory, key("b", 2000))
    keys.refresh()
    assert not keys.stale
    assert keys.ring.signing_key(NOW).id == "b"


def test_without_a_key_directory_there_is_no_key_and_keys_are_stale(tmp_path: Path) -> None:
    clock = Clock()
    keys = KeyDirectory(tmp_path / "nowhere", monotonic=clock)
    keys.refresh()
    with pytest.raises(NoSigningKey):
        keys.ring.signing_key(NOW)
    assert keys.stale
    clock.seconds += 60
    assert keys.stale


def test_keys_become_stale_although_the_machine_was_suspended(tmp_path: Path) -> None:
    """The monotonic clock stands still while the machine is suspended, so it alone would trust old keys for longer."""
    put(tmp_path, key("a", 1000))
    monotonic, since_boot = Clock(), Clock()
    keys = KeyDirectory(tmp_path, monotonic=monotonic, since_boot=since_boot)
    assert keys.refresh()
    assert not keys.stale
    since_boot.seconds += UNLISTABLE_LIMIT
    assert keys.stale
    assert keys.refresh()
    assert not keys.stale
    monotonic.seconds += UNLISTABLE_LIMIT
    assert keys.stale


def test_a_listing_is_as_old_as_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    keys = KeyDirectory(tmp_path, monotonic=clock)

    def slow_load(directory: Path) -> object:
        clock.seconds += 50
        return load(directory)

    monkeypatch.setattr(key_directory, "load", slow_load)
    assert keys.refresh()
    assert not keys.stale
    clock.seconds += 10
    assert keys.stale


def test_keys_are_stale_until_the_ring_contains_what_was_listed(tmp_path: Path) -> None:
    """A request in another thread must not find the directory listed and the ring old."""
    put(tmp_path, key("a", 1000))
    clock = Clock()
    keys = KeyDirectory(tmp_path, monotonic=clock)
    keys.refresh()
    clock.seconds += 3600
    [new] = revoke(tmp_path, "a", now=NOW)
    seen: list[tuple[bool, bool]] = []

    class Watched(KeyDirectory):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            seen.append((self.stale, self.ring.known_keys() == [new]))

    keys.__class__ = Watched
    keys.refresh()
    assert (False, True) in seen
    assert (False, False) not in seen


# --- Secrets ---------------------------------------------------------------------------------------------------------


def traces(secret: bytes) -> list[str]:
    """The forms in which a secret, or a key derived from it, could appear in a text."""
    derived = [hmac.digest(secret, f"sso-{purpose}/v1".encode(), "sha256") for purpose in ("token", "session", "form")]
    return [
        trace
        for raw in (secret, *derived)
        for trace in (urlsafe_b64encode(raw).decode()[:40], raw.hex(), repr(raw), str(list(raw)))
    ]


def test_no_representation_of_a_key_contains_its_secret(tmp_path: Path) -> None:
    made = key("a", 1000)
    put(tmp_path, made)
    keys = load_directory(tmp_path)
    shown = " ".join(
        [repr(made), str(made), f"{[made]}", repr(keys.ring), repr(keys.ring.entries), repr(keys), repr(load(tmp_path))]
    )
    assert "'a'" in shown
    for trace in traces(made.secret):
        assert trace not in shown


def test_logs_and_errors_contain_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = rotate(tmp_path, now=NOW - 1000, lead=0)
    path = tmp_path / f"{made.id}.json"
    whole = path.read_text()
    texts: list[str] = []
    for broken_text in (whole[:-3], whole.replace('"id": "', '"id": "x'), whole.replace('"secret": "', '"secret": "A')):
        assert broken_text != whole
        path.write_text(broken_text)
        keys = load_directory(tmp_path)
        texts.extend(load(tmp_path)[1].values())
        with pytest.raises(KeyRingError) as caught:
            prune(tmp_path, now=NOW, lifetime=TOKENS)
        texts.append(f"{caught.value!r}")
    path.write_text(whole)
    keys.refresh()
    new = rotate(tmp_path, now=NOW)
    keys.refresh()
    revoke_all(tmp_path, now=NOW)
    keys.refresh()
    prune(tmp_path, now=NOW + 10_000, lifetime=TOKENS)
    keys.refresh()
    assert caplog.records
    for trace in traces(made.secret) + traces(new.secret):
        assert trace not in caplog.text
        assert all(trace not in text for text in texts)


def test_a_key_whose_file_is_broken_can_be_revoked(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000))
    (tmp_path / "broken.json").write_bytes(b"{")
    [made] = revoke(tmp_path, "broken", now=NOW)
    assert load(tmp_path)[0]["broken"] == Tombstone("broken", NOW, NOW)
    assert ring_in(tmp_path).signing_key(NOW) == made
