"""Revoking and pruning keys: no operation revives a dead key, or leaves a gap without a signing key."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sso_service.errors import KeyRingError, UnknownKey
from sso_service.key_directory import KeyDirectory
from sso_service.keyring import Entry, KeyRing, load, prune, revoke, revoke_all, rotate
from tests.support.keyring import (
    CHANGES,
    LIFETIMES,
    NOW,
    SESSIONS,
    TOKENS,
    ids,
    key,
    put,
    ring_in,
    tombstone,
    verifying,
    watched,
    written,
)

# --- revoke ----------------------------------------------------------------------------------------------------------


def test_revoking_the_signing_key_creates_one_that_signs_immediately(tmp_path: Path) -> None:
    put(tmp_path, key("old", 1000), key("leaked", 2000))
    [new] = revoke(tmp_path, "leaked", now=NOW)
    # It signs from the start of the revoked key, so that a node whose clock is behind has a signing key, too.
    assert (new.created_at, new.signs_from) == (NOW, 2000)
    ring = ring_in(tmp_path)
    assert ring.signing_key(NOW) == ring.signing_key(NOW - 60) == new
    assert ids(ring.known_keys()) == [new.id, "old"]
    assert verifying(ring, NOW) == [new.id]


def test_a_tombstone_contains_no_secret(tmp_path: Path) -> None:
    leaked = rotate(tmp_path, now=NOW - 1000, lead=0)
    previous_mask = os.umask(0)
    try:
        revoke(tmp_path, leaked.id, now=NOW)
    finally:
        os.umask(previous_mask)
    path = tmp_path / f"{leaked.id}.json"
    assert json.loads(path.read_text()) == {"id": leaked.id, "signs_from": NOW - 1000, "revoked_at": NOW}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [file for file in tmp_path.iterdir() if json.loads(written(leaked))["secret"] in file.read_text()]


def test_revoking_a_retired_key_creates_no_new_key(tmp_path: Path) -> None:
    put(tmp_path, key("retired", NOW - 100), key("signing", NOW - 10))
    assert revoke(tmp_path, "retired", now=NOW) == []
    ring = ring_in(tmp_path)
    assert ring.signing_key(NOW).id == "signing"
    assert verifying(ring, NOW) == ["signing"]


def test_a_successor_exists_before_the_revoked_key_is_removed(tmp_path: Path) -> None:
    put(tmp_path, key("leaked", 1000), key("pending", NOW + 30))
    signing: list[str] = []

    def look() -> None:
        signing.extend(ring_in(tmp_path).signing_key(moment).id for moment in (NOW, NOW + 30))

    with watched(tmp_path, CHANGES, look):
        made = revoke_all(tmp_path, now=NOW)
    assert len(signing) == 8  # four steps: two new keys, two tombstones, each with a signing key present
    assert [ring_in(tmp_path).signing_key(moment) for moment in (NOW, NOW + 30)] == made


@pytest.mark.parametrize("lead", [1, 60, 600])
def test_revoking_a_pending_key_leaves_no_gap_without_a_signing_key(tmp_path: Path, lead: int) -> None:
    put(tmp_path, key("signing", 1000))
    pending = rotate(tmp_path, now=NOW, lead=lead)
    revoke(tmp_path, pending.id, now=NOW)
    ring = ring_in(tmp_path)
    for moment in range(NOW, NOW + lead):
        assert ring.signing_key(moment).id == "signing"
    for moment in range(NOW + lead, NOW + lead + 100):
        assert ring.signing_key(moment).id not in {"signing", pending.id}
    assert pending.id not in verifying(ring, NOW)


def test_revoking_the_signing_key_keeps_a_pending_key(tmp_path: Path) -> None:
    put(tmp_path, key("signing", 1000))
    pending = rotate(tmp_path, now=NOW)
    [new] = revoke(tmp_path, "signing", now=NOW + 10)
    ring = ring_in(tmp_path)
    assert ring.signing_key(NOW + 59) == new
    assert ring.signing_key(NOW + 60) == pending


def test_revoking_all_keys_includes_pending_keys_and_leaves_no_gap(tmp_path: Path) -> None:
    put(
        tmp_path,
        key("a", 1000),
        tombstone("b", 2000),
        key("c", NOW),
        key("d", NOW + 60),
        key("e", NOW + 60),
        key("f", NOW + 99),
    )
    made = revoke_all(tmp_path, now=NOW)
    ring = ring_in(tmp_path)
    assert ring.known_keys() == made[::-1]
    assert not {"a", "b", "c", "d", "e", "f"} & set(ids(made))
    for moment in range(NOW, NOW + 200):
        assert ring.signing_key(moment) in made


@pytest.mark.parametrize("other_id", ["zz", "_", "Z" * 40])
def test_a_key_that_starts_in_the_current_second_can_be_revoked(tmp_path: Path, other_id: str) -> None:
    put(tmp_path, key("a", NOW), key(other_id, NOW))
    [new] = revoke_all(tmp_path, now=NOW)
    assert ring_in(tmp_path).signing_key(NOW) == new
    assert verifying(ring_in(tmp_path), NOW) == [new.id]


def test_revoking_a_revoked_key_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, key("leaked", 1000))
    revoke(tmp_path, "leaked", now=NOW)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert revoke(tmp_path, "leaked", now=NOW + 500) == []
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("key_id", ["unknown", "", "../keys/a", "a.json"])
def test_revoking_an_unknown_key_is_an_error_and_changes_nothing(tmp_path: Path, key_id: str) -> None:
    put(tmp_path, key("a", 1000))
    (tmp_path / "broken.json").write_bytes(b"{")
    with pytest.raises(UnknownKey):
        revoke(tmp_path, key_id, now=NOW)
    assert sorted(os.listdir(tmp_path)) == ["a.json", "broken.json"]
    assert load(tmp_path)[0] == {"a": key("a", 1000)}


def test_revoking_all_keys_never_misses_a_key_with_an_unreadable_file(tmp_path: Path) -> None:
    """A running service still has the key in memory, and the file may be readable again later."""
    put(tmp_path, key("a", 1000), key("b", 2000))
    running = KeyDirectory(tmp_path)
    running.refresh()
    (tmp_path / "a.json").write_bytes(b"")
    (tmp_path / "b.json").write_bytes(b"")
    try:
        revoke_all(tmp_path, now=NOW)
    except KeyRingError:
        return  # an error is acceptable, a false success is not
    running.refresh()
    assert not {"a", "b"} & set(ids(running.ring.known_keys()))


# --- prune -----------------------------------------------------------------------------------------------------------


def test_prune_deletes_keys_that_verify_nothing_oldest_first(tmp_path: Path) -> None:
    put(
        tmp_path,
        key("a", 1000),
        tombstone("b", 2000),
        key("c", 3000),
        key("d", NOW - SESSIONS - 60),
        key("e", NOW + 60),
    )
    assert ids(prune(tmp_path, now=NOW, lifetime=SESSIONS)) == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path)) == ["d.json", "e.json"]


@LIFETIMES
def test_prune_keeps_a_key_until_its_window_has_closed(tmp_path: Path, lifetime: int) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    assert prune(tmp_path, now=2000 + lifetime + 59, lifetime=lifetime) == []
    assert ids(prune(tmp_path, now=2000 + lifetime + 60, lifetime=lifetime)) == ["a"]


def test_prune_keeps_a_tombstone_while_an_older_key_may_verify(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), tombstone("b", 2000), tombstone("c", 2100), key("d", 2200))
    assert prune(tmp_path, now=2000 + TOKENS + 59, lifetime=TOKENS) == []
    assert ids(prune(tmp_path, now=2000 + TOKENS + 60, lifetime=TOKENS)) == ["a", "b", "c"]


def test_a_dry_run_deletes_nothing(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    assert ids(prune(tmp_path, now=NOW, lifetime=TOKENS, dry_run=True)) == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_an_interrupted_prune_revives_no_key(tmp_path: Path) -> None:
    put(tmp_path, key("a", 1000), tombstone("b", 2000), key("c", 3000), tombstone("d", 4000), key("e", NOW - 10))
    left: list[list[str]] = []
    with watched(tmp_path, CHANGES, lambda: left.append(verifying(ring_in(tmp_path), NOW))):
        prune(tmp_path, now=NOW, lifetime=TOKENS)
    assert left == [["e"]] * 4


def test_prune_keeps_the_tombstone_after_a_key_with_an_unreadable_file(tmp_path: Path) -> None:
    """The older key still exists. Without its successor, it would verify again as soon as its file is readable."""
    put(tmp_path, tombstone("b", 2000), key("c", NOW))
    (tmp_path / "a.json").write_bytes(b"")
    with suppress(KeyRingError):
        prune(tmp_path, now=NOW, lifetime=TOKENS)
    put(tmp_path, key("a", 1000))
    assert verifying(ring_in(tmp_path), NOW) == ["c"]


some_entries = st.dictionaries(
    st.text("ABab01_-", min_size=1, max_size=3),
    st.tuples(st.integers(0, 2000), st.sampled_from([key, tombstone])),
    max_size=8,
).map(lambda made: [make(key_id, signs_from) for key_id, (signs_from, make) in made.items()])


@given(entries=some_entries, now=st.integers(0, 3000), lifetime=st.integers(1, 500))
def test_pruning_changes_no_signing_or_verifying_key_now_or_later(
    entries: list[Entry], now: int, lifetime: int
) -> None:
    whole = KeyRing(entries)
    spent = whole.spent(now, lifetime)
    for count in range(1, len(spent) + 1):
        pruned = KeyRing([entry for entry in entries if entry not in spent[:count]])
        for moment in (now, *range(now + 1, 3600, 97)):
            assert pruned.verifying_keys(moment, lifetime) == whole.verifying_keys(moment, lifetime)
    remaining = [entry for entry in whole.entries if entry not in spent]
    assert not remaining or remaining[0] in whole.verifying_keys(now, lifetime)


operations = st.one_of(
    st.tuples(st.just("rotate"), st.sampled_from([0, 0, 60, 60, 400])),
    st.tuples(st.just("revoke"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["revoke_all", "prune"]), st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([1, 59, 60, 359, 360, 361, 1000])),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(operations, max_size=14))
def test_after_any_operations_dead_keys_stay_dead_and_a_key_signs(steps: list[tuple[str, int]]) -> None:
    dead: set[str] = set()
    seen: set[str] = set()
    now = NOW
    with TemporaryDirectory() as name:
        directory = Path(name)
        rotate(directory, now=now, lead=0)
        for operation, number in steps:
            on_disk = ring_in(directory).entries
            match operation:
                case "rotate":
                    rotate(directory, now=now, lead=number)
                case "revoke":
                    revoked = on_disk[number % len(on_disk)]
                    revoke(directory, revoked.id, now=now)
                    dead.add(revoked.id)
                case "revoke_all":
                    revoke_all(directory, now=now)
                    dead.update(entry.id for entry in on_disk)
                case "prune":
                    prune(directory, now=now, lifetime=TOKENS)
                case "wait":
                    now += number
            ring = ring_in(directory)
            assert ring.signing_key(now).id not in dead
            for moment in range(now, now + 500, 20):
                assert ring.signing_key(moment)
            verifying_ids = set(verifying(ring, now))
            assert not verifying_ids & dead
            dead |= seen - verifying_ids
            seen |= verifying_ids
