"""Signing keys: which key signs, which keys verify, and that no operation revives a dead key."""

import hashlib
import hmac
import json
import logging
import os
import re
import stat
import sys
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sso_service.errors import ForgedToken, KeyDirectoryUnreadable, KeyRingError, NoSigningKey, TokenExpired, UnknownKey
from sso_service.keyring import (
    Entry,
    KeyDirectory,
    KeyRing,
    SigningKey,
    Tombstone,
    load,
    prune,
    revoke,
    revoke_all,
    rotate,
)
from sso_service.tokens import Claims, read, sign

NOW = 1_900_000_000
TOKENS = 300
SESSIONS = 43_200
LIFETIMES = pytest.mark.parametrize("lifetime", [TOKENS, SESSIONS])


def secret_of(key_id: str) -> bytes:
    return hashlib.sha256(key_id.encode()).digest()


def key(key_id: str, signs_from: int) -> SigningKey:
    return SigningKey(key_id, secret_of(key_id), created_at=signs_from - 60, signs_from=signs_from)


def tombstone(key_id: str, signs_from: int) -> Tombstone:
    return Tombstone(key_id, signs_from, revoked_at=signs_from + 1)


def written(entry: Entry) -> str:
    """The content of an entry's file in the documented format."""
    if isinstance(entry, Tombstone):
        return json.dumps({"id": entry.id, "signs_from": entry.signs_from, "revoked_at": entry.revoked_at})
    secret = urlsafe_b64encode(entry.secret).decode().rstrip("=")
    content = {"id": entry.id, "secret": secret, "created_at": entry.created_at, "signs_from": entry.signs_from}
    return json.dumps(content)


def put(directory: Path, *entries: Entry) -> None:
    for entry in entries:
        (directory / f"{entry.id}.json").write_text(written(entry))


def ring_in(directory: Path) -> KeyRing:
    entries, broken = load(directory)
    assert not broken
    return KeyRing(entries.values())


def ids(entries: list[SigningKey] | list[Entry]) -> list[str]:
    return [entry.id for entry in entries]


def verifying(ring: KeyRing, now: int, lifetime: int = TOKENS) -> list[str]:
    return ids(ring.verifying_keys(now, lifetime))


_watchers: list[Callable[[str, str], None]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    for watcher in tuple(_watchers):
        watcher(event, str(args[0]) if args else "")


sys.addaudithook(_audit)  # cannot be removed, so there is one hook for all tests

CHANGES = ("os.rename", "os.remove")
READS = ("os.listdir", "os.scandir", "open")


@contextmanager
def watched(directory: Path, events: tuple[str, ...], look: Callable[[], object]) -> Iterator[None]:
    """Call `look` just before each such event in a directory. It sees the files that a `kill -9` would leave here."""

    def watcher(event: str, path: str) -> None:
        if event in events and path.startswith(str(directory)):
            _watchers.remove(watcher)  # do not react to the operations of `look`
            look()
            _watchers.append(watcher)

    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


# --- The signing key -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "signing"), [(1000, "a"), (1999, "a"), (2000, "b"), (2999, "b"), (3000, "c"), (NOW, "c")]
)
def test_the_latest_key_whose_start_has_passed_signs(now: int, signing: str) -> None:
    for entries in permutations([key("a", 1000), key("b", 2000), key("c", 3000)]):
        assert KeyRing(entries).signing_key(now).id == signing


@pytest.mark.parametrize("ids_in_order", [("a", "b"), ("B", "a"), ("1", "A"), ("9", "91"), ("-", "_"), ("2030", "odd")])
def test_of_keys_with_equal_start_the_greater_id_signs(ids_in_order: tuple[str, str]) -> None:
    for entries in permutations([key(key_id, 1000) for key_id in ids_in_order]):
        assert KeyRing(entries).signing_key(1000).id == ids_in_order[1]


@pytest.mark.parametrize(
    "entries",
    [[], [key("pending", NOW + 1)], [tombstone("a", 1000)], [key("a", 1000), tombstone("b", 2000)]],
    ids=["no-key", "pending-key-only", "tombstone-only", "tombstone-latest"],
)
def test_without_a_signing_key_the_error_names_the_command_to_run(entries: list[Entry]) -> None:
    with pytest.raises(NoSigningKey, match="sso-service keys rotate"):
        KeyRing(entries).signing_key(NOW)


def test_each_purpose_has_its_own_derived_key() -> None:
    secret = bytes(range(32))
    made = SigningKey("a", secret, created_at=0, signs_from=0)
    for derived, purpose in (
        (made.token_key, b"sso-token/v1"),
        (made.session_key, b"sso-session/v1"),
        (made.form_key, b"sso-form/v1"),
    ):
        assert derived == hmac.digest(secret, purpose, "sha256")


# --- Verifying keys --------------------------------------------------------------------------------------------------


@LIFETIMES
def test_a_key_verifies_for_lifetime_plus_a_minute_after_its_successor(lifetime: int) -> None:
    ring = KeyRing([key("old", 1000), key("new", 2000)])
    end = 2000 + lifetime + 60
    assert verifying(ring, 1999, lifetime) == verifying(ring, end - 1, lifetime) == ["new", "old"]
    assert verifying(ring, end, lifetime) == verifying(ring, 10**9, lifetime) == ["new"]


def test_each_key_has_its_own_window_and_the_newest_is_tried_first() -> None:
    ring = KeyRing([key("b", 2000), key("a", 1000), key("c", 2100)])
    assert verifying(ring, 2359) == ["c", "b", "a"]
    assert verifying(ring, 2360) == ["c", "b"]
    assert verifying(ring, 2460) == ["c"]


def test_a_pending_key_verifies_already() -> None:
    """The clock of the node that signs may be ahead."""
    assert verifying(KeyRing([key("a", 1000), key("b", NOW + 60)]), NOW) == ["b", "a"]


def test_a_tombstone_does_not_verify_but_counts_as_a_successor() -> None:
    ring = KeyRing([key("a", 1000), tombstone("b", 2000), key("c", NOW)])
    assert verifying(ring, 2000 + TOKENS + 59) == ["c", "a"]
    assert verifying(ring, 2000 + TOKENS + 60) == ["c"]


def test_of_keys_with_equal_start_the_lesser_id_is_succeeded_immediately() -> None:
    ring = KeyRing([key("y", 1000), key("x", 1000)])
    assert verifying(ring, 1000 + TOKENS + 59) == ["y", "x"]
    assert verifying(ring, 1000 + TOKENS + 60) == ["y"]


def test_an_expired_token_of_a_retired_key_is_expired_not_forged() -> None:
    retired = key("retired", 1000)
    ring = KeyRing([retired, key("new", 2000)])
    token = sign(Claims(expires_at=1300, user_id=1, account_id=1, nonce=1), retired.token_key)
    with pytest.raises(ForgedToken):
        read(token, [k.token_key for k in ring.verifying_keys(NOW, TOKENS)], now=NOW, lifetime=TOKENS)
    with pytest.raises(TokenExpired):
        read(token, [k.token_key for k in ring.known_keys()], now=NOW, lifetime=TOKENS)


def test_a_revoked_key_is_not_a_known_key() -> None:
    assert ids(KeyRing([key("a", 1000), tombstone("b", 2000), key("c", NOW)]).known_keys()) == ["c", "a"]


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


GOOD = {"id": "a", "secret": "A" * 43, "created_at": 940, "signs_from": 1000}
BROKEN = {
    "empty": b"",
    "truncated": json.dumps(GOOD).encode()[:-1],
    "not JSON": b"-----BEGIN PRIVATE KEY-----",
    "not UTF-8": b"\xff\xfe\xfa",
    "nested too deeply": b"[" * 100_000,
    "not an object": b'["a"]',
    "id of another key": json.dumps(GOOD | {"id": "b"}).encode(),
    "no id": json.dumps({name: value for name, value in GOOD.items() if name != "id"}).encode(),
    "no secret": json.dumps({name: value for name, value in GOOD.items() if name != "secret"}).encode(),
    "secret is null": json.dumps(GOOD | {"secret": None}).encode(),
    "secret too short": json.dumps(GOOD | {"secret": "A" * 42}).encode(),
    "secret too long": json.dumps(GOOD | {"secret": "A" * 44}).encode(),
    "secret padded": json.dumps(GOOD | {"secret": "A" * 43 + "="}).encode(),
    "secret in standard base64": json.dumps(GOOD | {"secret": "A" * 42 + "+"}).encode(),
    "no signs_from": json.dumps({name: value for name, value in GOOD.items() if name != "signs_from"}).encode(),
    "signs_from is a text": json.dumps(GOOD | {"signs_from": "1000"}).encode(),
    "signs_from is a fraction": json.dumps(GOOD | {"signs_from": 1000.5}).encode(),
    "signs_from is true": json.dumps(GOOD | {"signs_from": True}).encode(),
    "signs_from is negative": json.dumps(GOOD | {"signs_from": -1}).encode(),
    "no created_at": json.dumps({name: value for name, value in GOOD.items() if name != "created_at"}).encode(),
}
BROKEN_FILES = pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)


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


# --- KeyDirectory ----------------------------------------------------------------------------------------------------


class Clock:
    """A monotonic clock that a test controls."""

    def __init__(self) -> None:
        self.seconds = 5000.0

    def __call__(self) -> float:
        return self.seconds


def load_directory(directory: Path) -> KeyDirectory:
    keys = KeyDirectory(directory, monotonic=Clock())
    keys.refresh()
    return keys


def touch(directory: Path) -> None:
    """Advance the directory's modification time, even if the file system's clock is coarse."""
    modified = directory.stat().st_mtime_ns
    os.utime(directory, ns=(modified, modified + 1_000_000_000))


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
