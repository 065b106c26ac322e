"""A running service's view of the key directory: the keys in memory, kept up to date, and how far they can be trusted.

The view fails closed:

- A directory that could not be listed for `UNLISTABLE_LIMIT` seconds makes the keys *stale*: a revocation may have been
  missed. A listing that does not return, as on a network file system that hangs, counts like one that fails.
- A key leaves memory only if its file is gone or is a tombstone. A file that cannot be used changes nothing.
- A revoked key stays revoked until the process ends, whatever file of its id appears: a restored backup, or an older
  copy from a synchronisation, must not revive a leaked key.
- A tombstone whose file is gone keeps its place in the order of succession as well. Without it, an older key could sign
  again. After `prune` this has no effect: `prune` deletes a tombstone only if every older key has ceased to verify. If
  a tombstone was deleted although it is the current entry, no key signs until there is a newer one, as before the
  deletion: `keys rotate --lead 0`.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sso_service.errors import KeyDirectoryUnreadable
from sso_service.keyring import Entry, KeyRing, Tombstone, load, modified_at

UNLISTABLE_LIMIT = 60
"""Seconds for which the keys in memory are trusted while the directory cannot be listed."""

REMEMBERED_TOMBSTONES = 10_000
"""Maximum number of tombstones that a process remembers: a few megabytes. The oldest are forgotten first, because their
keys have so many successors that they no longer verify."""

log = logging.getLogger(__name__)


# Seconds including suspensions of the machine, where the system has such a clock (Linux: clock_gettime(2)).
_since_boot = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


class KeyDirectory:
    """The keys of a directory in memory. Keep them up to date with `refresh` every few seconds.

    `refresh_if_changed` is for a signature that no known key made, as after a rotation. It costs one `stat` call unless
    the directory has changed, so forged tokens cannot cause reads.

    One thread at a time may refresh. Any thread may read the attributes: `ring` is replaced, never changed. A use case
    gets keys from `services.trust.Trust`, which checks `stale` first.
    """

    def __init__(
        self,
        path: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        since_boot: Callable[[], float] = _since_boot,
    ) -> None:
        self.path = path
        self._name = str(path)  # for `refresh_if_changed`: converting the path at each forged token would cost time
        self.ring = KeyRing()
        self.unusable: dict[str, str] = {}
        """The problems of files that cannot be used, by key id."""
        self.revived: frozenset[str] = frozenset()
        """The ids of revoked keys whose files contain a key again. They are not trusted before the next start."""
        self._monotonic = monotonic
        self._since_boot = since_boot
        self._entries: dict[str, Entry] = {}
        self._tombstones: dict[str, Tombstone] = {}
        self._problem = ""
        self._listed_at = (-math.inf, -math.inf)  # stale until the first successful listing
        self._modified_at = -1

    @property
    def stale(self) -> bool:
        """Whether the last listing is `UNLISTABLE_LIMIT` seconds old, so that a revocation may have been missed.

        The wall clock has no influence: it can be set back. Of the two clocks, one does not stop with the machine.
        """
        monotonic, since_boot = self._listed_at
        return self._monotonic() - monotonic >= UNLISTABLE_LIMIT or self._since_boot() - since_boot >= UNLISTABLE_LIMIT

    def refresh(self) -> bool:
        """Read the directory and return whether it could be listed.

        A file that cannot be used is logged once, and the key that it contained earlier is kept. A directory that
        cannot be listed is logged once, and all keys are kept.
        """
        # Taken before the listing: a slow one may have missed a revocation since it began.
        listed_at = self._monotonic(), self._since_boot()
        try:
            # Also taken before it, so `refresh_if_changed` notices a change during the listing.
            modified = modified_at(self.path)
            entries, unusable = load(self.path)
        except KeyDirectoryUnreadable as error:
            if str(error) != self._problem:
                log.error("keys: %s", error)
            self._problem = str(error)
            return False
        self._problem = ""
        self._modified_at = modified
        revived = self._keep_revoked(entries)
        for key_id in unusable.keys() - self.unusable.keys():
            log.warning("keys: %r %s; skipped", f"{key_id}.json", unusable[key_id])
        for key_id in revived - self.revived:
            log.warning("keys: %r contains a revoked key; not trusted, but revoke it again", f"{key_id}.json")
        # A file that became unusable, such as a copy that is not complete yet, does not remove its key. Only a missing
        # file or a tombstone does.
        for key_id in unusable.keys() & self._entries.keys():
            entries[key_id] = self._entries[key_id]
        self.unusable, self.revived = unusable, revived
        if entries != self._entries:
            self._entries = entries
            self.ring = KeyRing(entries.values())
        self._listed_at = listed_at  # last, because another thread may trust the ring from here on
        return True

    def refresh_if_changed(self) -> bool:
        """Read the directory if its modification time has changed. Return whether it was read."""
        try:
            changed = modified_at(self._name) != self._modified_at
        except KeyDirectoryUnreadable:
            return False
        return changed and self.refresh()

    def _keep_revoked(self, entries: dict[str, Entry]) -> frozenset[str]:
        """Remember the tombstones in `entries`, and add the earlier ones. Return the ids of keys that they replace."""
        present = {entry.id: entry for entry in entries.values() if isinstance(entry, Tombstone)}
        self._tombstones |= present
        if len(self._tombstones) > REMEMBERED_TOMBSTONES:
            newest = KeyRing(self._tombstones.values()).entries[-REMEMBERED_TOMBSTONES:]
            self._tombstones = {entry.id: entry for entry in newest if isinstance(entry, Tombstone)}
        revived = (entries.keys() - present.keys()) & self._tombstones.keys()
        entries.update(self._tombstones)
        return frozenset(revived)
