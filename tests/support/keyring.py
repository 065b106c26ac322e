"""Key rings and key directories for the tests of signing keys."""

import hashlib
import json
import os
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from sso_service.key_directory import KeyDirectory
from sso_service.keyring import Entry, KeyRing, SigningKey, Tombstone, load

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


@contextmanager
def unprivileged() -> Iterator[Path]:
    """An empty directory of a user whom file modes bind, and this process as that user. Otherwise root reads it all."""
    with TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, _NOBODY, _NOBODY)
            os.seteuid(_NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


_NOBODY = 65534
