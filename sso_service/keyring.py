"""Signing keys: which key signs, which keys verify, and how keys are stored as files in a directory.

There is one file `<id>.json` per key. The set of files and the clock determine everything else:

- The signing key is the one with the latest `signs_from` that has passed. If two are equal, the greater id signs.
- A key verifies until its successor's `signs_from` + the lifetime of what it signed + the clock allowance.
- A revoked key leaves a tombstone. It verifies nothing but still counts as a successor, so no older key becomes the
  signing key again.

`KeyRing` is pure. `load` reads a directory, and `rotate`, `revoke` and `prune` change it. The module `key_directory`
has a running service's view of it.
"""

import hmac
import json
import os
import re
import secrets
import stat
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sso_service.errors import KeyDirectoryUnreadable, KeyRingError, KeysBusy, NoSigningKey, UnknownKey
from sso_service.tokens import CLOCK_ALLOWANCE

ROTATION_LEAD = 60
"""Seconds between writing a key and its first use. Every node has read the key before any node signs with it."""

FILE_LIMIT = 4096
"""Maximum size of a key file in bytes. The files that this module writes have less than a tenth of it."""

_SECRET_SIZE = 32
_READ_ATTEMPTS = 5
_ID = re.compile(r"[A-Za-z0-9_-]{1,240}", re.ASCII)
_GENERATED_ID = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{12})", re.ASCII)
_LATEST_TIME = 2**32 - 1
# Windows has no O_NONBLOCK, and translates line ends without O_BINARY.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that may sign and verify. Times are Unix seconds, the secret has 32 bytes.

    One key is derived per purpose (after NIST SP 800-108), so a signature for one purpose is never valid for another.
    `repr` shows no secret, because it appears in tracebacks.
    """

    id: str
    secret: bytes = field(repr=False)
    created_at: int
    signs_from: int
    token_key: bytes = field(init=False, repr=False)
    session_key: bytes = field(init=False, repr=False)
    form_key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, purpose in (
            ("token_key", b"sso-token/v1"),
            ("session_key", b"sso-session/v1"),
            ("form_key", b"sso-form/v1"),
        ):
            object.__setattr__(self, name, hmac.digest(self.secret, purpose, "sha256"))


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A revoked key: it keeps its place in the order of succession but not its secret."""

    id: str
    signs_from: int
    revoked_at: int


Entry = SigningKey | Tombstone


class KeyRing:
    """An immutable set of keys and tombstones in their order of succession, oldest first."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(sorted(entries, key=lambda entry: (entry.signs_from, entry.id)))
        ends = [*(successor.signs_from for successor in self.entries[1:]), None]
        self._with_ends = tuple(zip(self.entries, ends, strict=False))[::-1]  # newest first, the last without an end

    def current_entry(self, now: int) -> Entry | None:
        """Return the latest entry whose `signs_from` has passed at `now`: a key, a tombstone, or None."""
        return next((entry for entry in reversed(self.entries) if entry.signs_from <= now), None)

    def signing_key(self, now: int) -> SigningKey:
        """Return the key that signs at `now`. Raises `NoSigningKey` if there is none, or if it was revoked."""
        entry = self.current_entry(now)
        if not isinstance(entry, SigningKey):
            raise NoSigningKey("no key may sign now; create one: sso-service keys rotate --lead 0")
        return entry

    def verifying_keys(self, now: int, lifetime: int) -> list[SigningKey]:
        """Return the keys, newest first, whose signatures may still be valid at `now`.

        `lifetime` is the lifetime in seconds of what they sign. A key whose `signs_from` is in the future verifies
        too: a node whose clock is ahead may already sign with it.
        """
        return [
            entry
            for entry, end in self._with_ends
            if isinstance(entry, SigningKey) and (end is None or now < end + lifetime + CLOCK_ALLOWANCE)
        ]

    def known_keys(self) -> list[SigningKey]:
        """Return every key that is not revoked, newest first, including those that no longer verify."""
        return [entry for entry in reversed(self.entries) if isinstance(entry, SigningKey)]

    def spent(self, now: int, lifetime: int) -> list[Entry]:
        """Return the entries before the oldest key that still verifies, oldest first. They can be deleted.

        A tombstone after that key is not among them: without the tombstone, the key could sign again.
        """
        verifying = {key.id for key in self.verifying_keys(now, lifetime)}
        spent: list[Entry] = []
        for entry in self.entries:
            if entry.id in verifying:
                break
            spent.append(entry)
        return spent


# --- files -----------------------------------------------------------------------------------------------------------


def load(directory: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries of a directory, and the problems of files that cannot be used, both by key id.

    Raises `KeyDirectoryUnreadable`.
    """
    # A listing from before a change does not match files from after it: a tombstone could appear without its successor.
    # So everything is read again if the directory changed in between.
    for _ in range(_READ_ATTEMPTS):
        before = modified_at(directory)
        found = _load_once(directory)
        if modified_at(directory) == before:
            break
    return found


def _load_once(directory: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json") and not name.startswith("."))
    except OSError as error:
        raise _unlistable(directory, error) from error
    for name in names:
        key_id = name.removesuffix(".json")
        try:
            entries[key_id] = _parse(key_id, _read(directory / name))
        except FileNotFoundError:
            if (directory / name).is_symlink():
                broken[key_id] = "is a broken link"
            continue  # otherwise it was pruned after the listing
        except OSError as error:
            broken[key_id] = f"cannot be read: {error.strerror}"
        except ValueError as error:
            broken[key_id] = str(error)
    return entries, broken


def _read(path: Path) -> bytes:
    """Return the content of a key file. Raises `ValueError` if the file must not be trusted, or `OSError`."""
    # Checked before opening, because opening a device can have an effect. Checked again after it, because another file
    # may have taken the name; opening a FIFO without O_NONBLOCK would then block the reading thread indefinitely.
    # Links are followed: Kubernetes mounts a Secret as links.
    _refuse_unsafe(os.stat(path))
    descriptor = os.open(path, _READ_FLAGS)
    try:
        _refuse_unsafe(os.fstat(descriptor))
        # The reported size is not used: it is 0 for files of /proc, and a file may grow.
        content = b""
        while len(content) <= FILE_LIMIT and (more := os.read(descriptor, FILE_LIMIT + 1 - len(content))):
            content += more
    finally:
        os.close(descriptor)
    if len(content) > FILE_LIMIT:
        raise ValueError("is larger than 4 KiB")
    return content


def _refuse_unsafe(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    # Any local user could have put a secret of their choice into it, and could then sign in as anyone. Write access of
    # the group is accepted, because an administrator chose its members. The mode of the directory is not judged: that
    # of a Secret mounted by Kubernetes is world-writable. Windows reports every writable file as world-writable.
    if os.name == "posix" and status.st_mode & stat.S_IWOTH:
        raise ValueError("can be written by every user")


def modified_at(directory: str | Path) -> int:
    """Return the directory's modification time in nanoseconds. Raises `KeyDirectoryUnreadable`."""
    try:
        # With "/.", this also fails if the directory can be listed, but none of its files can be opened.
        return os.stat(f"{directory}/.").st_mtime_ns
    except OSError as error:
        raise _unlistable(directory, error) from error


def _unlistable(directory: str | Path, error: OSError) -> KeyDirectoryUnreadable:
    return KeyDirectoryUnreadable(f"cannot list the key directory {directory}: {error.strerror}")


def rotate(directory: Path, *, now: int, lead: int = ROTATION_LEAD) -> SigningKey:
    """Write a new key to `directory` and return it. It signs from `now` + `lead` seconds.

    Raises `KeyDirectoryUnreadable`.
    """
    entries, _ = load(directory)
    return _write_new_key(directory, entries.values(), created_at=now, signs_from=now + lead)


def revoke(directory: Path, key_id: str, *, now: int) -> list[SigningKey]:
    """Replace the file of a key with a tombstone.

    Returns the keys that were created so that a key always signs. A key that is a tombstone already is not changed.
    Raises `UnknownKey` or `KeyDirectoryUnreadable`.
    """
    entries, broken = load(directory)
    if key_id not in entries.keys() | broken.keys():
        raise UnknownKey(f"there is no key {key_id} in {directory}")
    return _revoke(directory, entries, [key_id], now=now)


def revoke_all(directory: Path, *, now: int) -> list[SigningKey]:
    """Revoke every key, so that everything signed until now is refused. Return the new keys.

    Necessary when the ledger may have lost rows: a restored or empty database would accept a consumed token again.
    Raises `KeyDirectoryUnreadable`.
    """
    entries, broken = load(directory)
    return _revoke(directory, entries, [*entries, *filter(_ID.fullmatch, broken)], now=now)


def prune(directory: Path, *, now: int, lifetime: int, dry_run: bool = False) -> list[Entry]:
    """Delete the files of entries that no longer verify anything, oldest first. Return these entries.

    `lifetime` is the longest lifetime, in seconds, of anything that keys sign. With `dry_run`, nothing is deleted.
    Raises `KeyDirectoryUnreadable`, or `KeyRingError` if a file cannot be used: it may contain an old key that would
    sign again without a tombstone that is deleted here.
    """
    entries, broken = load(directory)
    if broken:
        raise KeyRingError(
            f"nothing pruned, because {min(broken)!r} {broken[min(broken)]}; repair, revoke or delete it first"
        )
    spent = KeyRing(entries.values()).spent(now, lifetime)
    for entry in spent if not dry_run else ():
        (directory / f"{entry.id}.json").unlink(missing_ok=True)
    return spent


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, so that one process at a time changes its keys. Raises `KeysBusy` without waiting.

    Two rotations at once are harmless but never intended. The kernel releases the lock when the process ends.
    """
    import fcntl  # noqa: PLC0415 - does not exist on Windows, where the rest of this module works

    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unlistable(directory, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise KeysBusy(f"another process is changing the keys in {directory}") from None
    finally:
        os.close(lock)


def _revoke(directory: Path, entries: dict[str, Entry], key_ids: list[str], *, now: int) -> list[SigningKey]:
    after: dict[str, Entry] = dict(entries)
    tombstones: list[Tombstone] = []
    for key_id in key_ids:
        entry = entries.get(key_id)  # None: its file is broken, but a running service may have read it earlier
        if not isinstance(entry, Tombstone):
            tombstones.append(Tombstone(key_id, entry.signs_from if entry else now, revoked_at=now))
            after[key_id] = tombstones[-1]
    # The new keys are written before the tombstones, so a key may sign at every moment. A new key is needed whenever a
    # tombstone would be the current entry: now, or later if a pending key was revoked.
    new_keys: list[SigningKey] = []
    for moment in sorted({now, *(entry.signs_from for entry in after.values() if entry.signs_from > now)}):
        if isinstance(tombstone := KeyRing(after.values()).current_entry(moment), Tombstone):
            # It signs from the tombstone's `signs_from`, not from `now`. Otherwise the tombstone would be the current
            # entry for a while on a node whose clock is behind.
            key = _write_new_key(directory, after.values(), created_at=now, signs_from=tombstone.signs_from)
            after[key.id] = key
            new_keys.append(key)
    for tombstone in tombstones:
        _write(directory, tombstone.id, asdict(tombstone))
    return new_keys


def _write_new_key(directory: Path, others: Iterable[Entry], *, created_at: int, signs_from: int) -> SigningKey:
    key_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(signs_from))}-{secrets.randbits(47):012x}"
    # Of keys that sign from the same second, the one with the greatest id signs. That must be the new one. The
    # increment is random because another node may create a key at the same moment.
    greatest = max((other.id for other in others if other.signs_from == signs_from), default="")
    if greatest >= key_id:
        parts = _GENERATED_ID.fullmatch(greatest)
        number = int(parts[2], 16) + 1 + secrets.randbits(40) if parts else 0
        key_id = f"{parts[1]}-{number:012x}" if parts and number < 2**48 else f"{greatest}-{secrets.token_hex(6)}"
    if not _ID.fullmatch(key_id):
        raise KeyRingError(f"the id of key {greatest} is too long: no valid id is greater; rename the key")
    key = SigningKey(key_id, secrets.token_bytes(_SECRET_SIZE), created_at=created_at, signs_from=signs_from)
    encoded = urlsafe_b64encode(key.secret).rstrip(b"=").decode("ascii")
    _write(directory, key_id, {"id": key_id, "secret": encoded, "created_at": created_at, "signs_from": signs_from})
    return key


def _write(directory: Path, key_id: str, content: dict[str, Any]) -> None:
    # Write and flush a temporary file, rename it, flush the directory. Even after a power cut, a reader finds the old
    # file or the new one, and either is complete. Readers ignore the temporary file because its name begins with a dot.
    temporary = directory / f".{key_id}.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                json.dump(content, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, directory / f"{key_id}.json")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        listing = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(listing)
        finally:
            os.close(listing)
    except OSError as error:
        raise KeyDirectoryUnreadable(f"cannot write to the key directory {directory}: {error.strerror}") from error


def _parse(key_id: str, content: bytes) -> Entry:
    """Return the entry in the content of a file. Raises `ValueError`; its message repeats nothing of the content."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(value, dict) or value.get("id") != key_id or not _ID.fullmatch(key_id):
        raise ValueError("does not contain an object whose id is the file name")
    signs_from = _seconds(value, "signs_from")
    if "revoked_at" in value:
        return Tombstone(key_id, signs_from, _seconds(value, "revoked_at"))
    encoded = value.get("secret")
    if not isinstance(encoded, str) or not re.fullmatch(r"[A-Za-z0-9_-]{43}", encoded, re.ASCII):
        raise ValueError("has no secret of 32 bytes in base64url without padding")
    return SigningKey(key_id, urlsafe_b64decode(encoded + "="), _seconds(value, "created_at"), signs_from)


def _seconds(value: dict[str, Any], name: str) -> int:
    seconds = value.get(name)
    if type(seconds) is not int or not 0 <= seconds <= _LATEST_TIME:
        raise ValueError(f"has no {name} in Unix seconds")
    return seconds
