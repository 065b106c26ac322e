"""Signing keys: which one signs, which ones verify, and how they live as files in a directory.

One file `<id>.json` per key. Nothing but the set of files and the clock decides:

- the key with the latest `signs_from` that has come signs (equal: the greater id);
- a key verifies until its successor's `signs_from` + what it signed may still live + the clock allowance;
- a revoked key leaves a tombstone, which verifies nothing but still counts as successor, so that no older key comes
  back to life.

`KeyRing` is pure. `rotate`, `revoke` and `prune` change a directory. `KeyDirectory` is a running service's view of one.
"""

import hmac
import json
import logging
import math
import os
import re
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sso_service.errors import KeyDirectoryUnreadable, KeyRingError, KeysBusy, NoSigningKey, UnknownKey
from sso_service.tokens import CLOCK_ALLOWANCE

ROTATION_LEAD = 60
"""Seconds between writing a new key and its first use, so that every node has read it before any signs with it."""

UNLISTABLE_LIMIT = 60
"""Seconds after which a key directory that cannot be listed makes the keys in memory unfit for use: one of them may
have been revoked meanwhile."""

_SECRET_SIZE = 32
_READ_ATTEMPTS = 5
_ID = re.compile(r"[A-Za-z0-9_-]{1,240}", re.ASCII)
_OUR_ID = re.compile(r"(\d{8}T\d{6}Z)-([0-9a-f]{12})", re.ASCII)
_LATEST = 2**32 - 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that may sign and verify. Times are Unix seconds. Secrets never show in `repr`, and so not in a traceback.

    One key is derived for each purpose (NIST SP 800-108 in spirit), so that what was signed for one can never be
    passed off as the other.
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
    """What is left of a revoked key: its place in the order, without its secret."""

    id: str
    signs_from: int
    revoked_at: int


Entry = SigningKey | Tombstone


class KeyRing:
    """An immutable set of keys and tombstones, in the order in which they take over from one another."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(sorted(entries, key=lambda entry: (entry.signs_from, entry.id)))
        successions = [*(successor.signs_from for successor in self.entries[1:]), None]
        self._reigns = tuple(zip(self.entries, successions, strict=bool(self.entries)))[::-1]

    def in_charge(self, now: int) -> Entry | None:
        """The entry whose turn to sign it is at `now`, be it a key or a tombstone."""
        return next((entry for entry in reversed(self.entries) if entry.signs_from <= now), None)

    def signing_key(self, now: int) -> SigningKey:
        """The key that signs at `now`. Raises `NoSigningKey`."""
        entry = self.in_charge(now)
        if not isinstance(entry, SigningKey):
            raise NoSigningKey("no key may sign now; make one with: sso-service keys rotate --lead 0")
        return entry

    def verifying_keys(self, now: int, lifetime: int) -> list[SigningKey]:
        """The keys, newest first, that may have signed something that still lives at `now`.

        `lifetime` is the number of seconds for which what they sign lives. A key that is yet to sign verifies already:
        a node whose clock is ahead may have begun with it.
        """
        return [
            entry
            for entry, succeeded_at in self._reigns
            if isinstance(entry, SigningKey)
            and (succeeded_at is None or now < succeeded_at + lifetime + CLOCK_ALLOWANCE)
        ]

    def known_keys(self) -> list[SigningKey]:
        """Every key that is not revoked, newest first, whether or not it may still verify."""
        return [entry for entry in reversed(self.entries) if isinstance(entry, SigningKey)]

    def spent(self, now: int, lifetime: int) -> list[Entry]:
        """The entries that can verify nothing any more and whose older entries are all spent too, oldest first."""
        verifying = {key.id for key in self.verifying_keys(now, lifetime)}
        spent: list[Entry] = []
        for entry in self.entries:
            if entry.id in verifying:
                break
            spent.append(entry)
        return spent


# --- files -----------------------------------------------------------------------------------------------------------


def load(directory: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of a directory by id, and what is wrong with the files that could not be used, by id.

    Raises `KeyDirectoryUnreadable`.
    """
    # A listing from before a change and a file from after it would not fit together (a tombstone without its
    # successor): read again if the directory changed meanwhile.
    for _ in range(_READ_ATTEMPTS):
        modified_at = _modified_at(directory)
        found = _load_once(directory)
        if _modified_at(directory) == modified_at:
            break
    return found


def _load_once(directory: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    entries: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json") and not name.startswith("."))
    except OSError as error:
        raise KeyDirectoryUnreadable(f"cannot list the key directory {directory}: {error.strerror}") from error
    for name in names:
        key_id = name.removesuffix(".json")
        try:
            entries[key_id] = _parse(key_id, (directory / name).read_bytes())
        except FileNotFoundError:
            if (directory / name).is_symlink():
                broken[key_id] = "is a link to nothing"
            continue  # else: pruned since it was listed
        except OSError as error:
            broken[key_id] = f"cannot be read: {error.strerror}"
        except ValueError as error:
            broken[key_id] = str(error)
    return entries, broken


def _modified_at(directory: str | Path) -> int:
    try:
        return os.stat(directory).st_mtime_ns
    except OSError as error:
        raise KeyDirectoryUnreadable(f"cannot list the key directory {directory}: {error.strerror}") from error


def rotate(directory: Path, *, now: int, lead: int = ROTATION_LEAD) -> SigningKey:
    """A new key, written to `directory`, that signs from `now` + `lead` seconds on. Raises `KeyDirectoryUnreadable`."""
    entries, _ = load(directory)
    return _write_new_key(directory, entries.values(), created_at=now, signs_from=now + lead)


def revoke(directory: Path, key_id: str, *, now: int) -> list[SigningKey]:
    """Replaces a key's file by a tombstone; returns the keys that had to be made so that a key is always in charge.

    Raises `UnknownKey` or `KeyDirectoryUnreadable`. Revoking a revoked key changes nothing about it.
    """
    entries, broken = load(directory)
    if key_id not in entries.keys() | broken.keys():
        raise UnknownKey(f"there is no key {key_id} in {directory}")
    return _revoke(directory, entries, [key_id], now=now)


def revoke_all(directory: Path, *, now: int) -> list[SigningKey]:
    """Revokes every key, so that nothing signed until now is good any more; returns the keys made instead.

    To be done whenever the record of consumed tokens may have been lost: a restored or an emptied database would accept
    a used token again. Raises `KeyDirectoryUnreadable`.
    """
    entries, broken = load(directory)
    return _revoke(directory, entries, [*entries, *filter(_ID.fullmatch, broken)], now=now)


def prune(directory: Path, *, now: int, lifetime: int, dry_run: bool = False) -> list[Entry]:
    """Deletes, oldest first, the files that can verify nothing any more; returns what they held.

    `lifetime` is that of the longest-living thing that keys sign, in seconds. Raises `KeyDirectoryUnreadable`, or
    `KeyRingError` if there is a file that cannot be used: it may hold an old key that a tombstone has to keep dead.
    """
    entries, broken = load(directory)
    if broken:
        raise KeyRingError(
            f"nothing pruned, since {min(broken)!r} {broken[min(broken)]}; mend, revoke or delete it first"
        )
    spent = KeyRing(entries.values()).spent(now, lifetime)
    for entry in spent if not dry_run else ():
        (directory / f"{entry.id}.json").unlink(missing_ok=True)
    return spent


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time change the directory's keys. Raises `KeysBusy` at once if another is at it.

    Rotating twice at once would do no harm, but is not what anybody wants. It ends with the process, however that ends.
    """
    import fcntl  # noqa: PLC0415 - not there on Windows, where the rest of this works

    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeyDirectoryUnreadable(f"cannot list the key directory {directory}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise KeysBusy(f"another process is changing the keys in {directory}") from None
    finally:
        os.close(lock)


def _revoke(directory: Path, entries: dict[str, Entry], key_ids: list[str], *, now: int) -> list[SigningKey]:
    after: dict[str, Entry] = dict(entries)
    buried: list[Tombstone] = []
    for key_id in key_ids:
        entry = entries.get(key_id)  # None: its file is broken, but a running service may have read it when it was not
        if not isinstance(entry, Tombstone):
            buried.append(Tombstone(key_id, entry.signs_from if entry else now, revoked_at=now))
            after[key_id] = buried[-1]
    # The successors are written before the tombstones, so that there is no moment without a key that may sign. A
    # tombstone is in charge now, or will be when its time comes: each such reign gets a key of its own.
    made: list[SigningKey] = []
    for moment in sorted({now, *(entry.signs_from for entry in after.values() if entry.signs_from > now)}):
        if isinstance(reigning := KeyRing(after.values()).in_charge(moment), Tombstone):
            # From the tombstone's own second on, not from ours: on a node whose clock is behind, the tombstone would
            # be in charge until then.
            key = _write_new_key(directory, after.values(), created_at=now, signs_from=reigning.signs_from)
            after[key.id] = key
            made.append(key)
    for tombstone in buried:
        content = {"id": tombstone.id, "signs_from": tombstone.signs_from, "revoked_at": tombstone.revoked_at}
        _write(directory, tombstone.id, content)
    return made


def _write_new_key(directory: Path, others: Iterable[Entry], *, created_at: int, signs_from: int) -> SigningKey:
    key_id = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(signs_from))}-{secrets.randbits(47):012x}"
    # Of two that sign from the same second on, the greater id is in charge, and that has to be the new one. By a random
    # step greater, since another node may do the same at the same moment.
    rival = max((other.id for other in others if other.signs_from == signs_from), default="")
    if rival >= key_id:
        ours = _OUR_ID.fullmatch(rival)
        number = int(ours[2], 16) + 1 + secrets.randbits(40) if ours else 0
        key_id = f"{ours[1]}-{number:012x}" if ours and number < 2**48 else f"{rival}-{secrets.token_hex(6)}"
    if not _ID.fullmatch(key_id):
        raise KeyRingError(f"the id of key {rival} is too long to be followed by another; rename it")
    key = SigningKey(key_id, secrets.token_bytes(_SECRET_SIZE), created_at=created_at, signs_from=signs_from)
    encoded = urlsafe_b64encode(key.secret).rstrip(b"=").decode("ascii")
    _write(directory, key_id, {"id": key_id, "secret": encoded, "created_at": created_at, "signs_from": signs_from})
    return key


def _write(directory: Path, key_id: str, content: dict[str, Any]) -> None:
    # Write, flush, rename, flush the directory: a reader sees the old file or the new one whole, also after a power
    # cut. The name begins with a dot until then, so that no reader and no synchronisation takes it for a key.
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
    """The entry in a file's content. Raises `ValueError` with a message that repeats nothing of the content."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(value, dict) or value.get("id") != key_id or not _ID.fullmatch(key_id):
        raise ValueError("does not hold an object whose id is the file's name")
    signs_from = _seconds(value, "signs_from")
    if "revoked_at" in value:
        return Tombstone(key_id, signs_from, _seconds(value, "revoked_at"))
    encoded = value.get("secret")
    if not isinstance(encoded, str) or not re.fullmatch(r"[A-Za-z0-9_-]{43}", encoded, re.ASCII):
        raise ValueError("has no secret of 32 bytes in base64url without padding")
    return SigningKey(key_id, urlsafe_b64decode(encoded + "="), _seconds(value, "created_at"), signs_from)


def _seconds(value: dict[str, Any], name: str) -> int:
    seconds = value.get(name)
    if type(seconds) is not int or not 0 <= seconds <= _LATEST:
        raise ValueError(f"has no {name} in Unix seconds")
    return seconds


# --- a running service's view ----------------------------------------------------------------------------------------


class KeyDirectory:
    """The keys of a directory, kept in memory and up to date.

    `refresh` re-reads everything; call it every few seconds. `refresh_if_changed` is for the moment when a signature is
    explained by no known key: it costs one `stat` unless the directory changed, so a flood of forgeries reads nothing.
    """

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._name = str(path)  # what is asked for at each forged token shall not be put together each time
        self.ring = KeyRing()
        self._monotonic = monotonic
        self._entries: dict[str, Entry] = {}
        self._broken: dict[str, str] = {}
        self._problem = ""
        self._listed_at = -math.inf  # not before it was listed once
        self._modified_at = -1

    @property
    def stale(self) -> bool:
        """True if the directory could not be listed for so long that a revocation may have been missed."""
        return self._monotonic() - self._listed_at >= UNLISTABLE_LIMIT

    def refresh(self) -> bool:
        """Reads the directory; True if it could be read.

        What cannot be read is reported once and changes nothing about the keys in memory.
        """
        try:
            # Taken before listing: a change during it then counts as one that was not seen yet.
            modified_at = _modified_at(self.path)
            entries, broken = load(self.path)
        except KeyDirectoryUnreadable as error:
            if str(error) != self._problem:
                log.error("keys: %s", error)
            self._problem = str(error)
            return False
        self._problem = ""
        self._listed_at = self._monotonic()
        self._modified_at = modified_at
        for key_id in broken.keys() - self._broken.keys():
            log.warning("keys: %r %s; skipped", f"{key_id}.json", broken[key_id])
        # A file that broke under our eyes (a half-synchronised copy) takes nothing away: only an absent file or a
        # tombstone does.
        for key_id in broken.keys() & self._entries.keys():
            entries[key_id] = self._entries[key_id]
        self._broken = broken
        if entries != self._entries:
            self._entries = entries
            self.ring = KeyRing(entries.values())
        return True

    def refresh_if_changed(self) -> bool:
        """Reads the directory if its modification time changed; True if it did."""
        try:
            changed = _modified_at(self._name) != self._modified_at
        except KeyDirectoryUnreadable:
            return False
        return changed and self.refresh()
