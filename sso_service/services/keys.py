"""Signing keys: listing them for operators, and changing them with an audit event for each change."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum

from sso_service import keyring
from sso_service.keyring import Entry, KeyRing, SigningKey, Tombstone
from sso_service.observability import audit
from sso_service.observability.audit import Event, EventName
from sso_service.services.accounts import Actor
from sso_service.settings import Settings


class KeyState(StrEnum):
    """The present use of a key."""

    SIGNS = "signs"
    SIGNS_LATER = "signs later"
    VERIFIES = "verifies"
    SPENT = "spent"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key as operators see it. `signs_from` is in Unix seconds."""

    id: str
    state: KeyState
    signs_from: int


class Keys:
    """The use cases of the signing keys of the settings' key directory.

    All raise `KeyDirectoryUnreadable`. Make changes inside a `locked` block, so that two operators, or an operator and
    a scheduled rotation, do not change the keys at the same time.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = settings.keys_path
        self._lifetime = max(settings.token_ttl, settings.session_ttl)
        self._clock = clock

    def locked(self) -> AbstractContextManager[None]:
        """Prevent other processes from changing the keys during the block. Raises `KeysBusy` at once if one does."""
        return keyring.locked(self._directory)

    def describe(self, ring: KeyRing) -> list[ListedKey]:
        """Return each key of `ring` with its present use, newest first."""
        now = self._now()
        signing = ring.in_charge(now)
        verifying = {key.id for key in ring.verifying_keys(now, self._lifetime)}

        def state(entry: Entry) -> KeyState:
            if isinstance(entry, Tombstone):
                return KeyState.REVOKED
            if entry is signing:
                return KeyState.SIGNS
            if entry.signs_from > now:
                return KeyState.SIGNS_LATER
            return KeyState.VERIFIES if entry.id in verifying else KeyState.SPENT

        return [ListedKey(entry.id, state(entry), entry.signs_from) for entry in reversed(ring.entries)]

    def create_first(self, actor: Actor) -> SigningKey | None:
        """Create a key that signs at once, unless a key signs already. Return the new key, if any.

        This needs no lock: two processes that both create a key do no harm.
        """
        entries, _ = keyring.load(self._directory)
        if isinstance(KeyRing(entries.values()).in_charge(self._now()), SigningKey):
            return None
        return self.rotate(actor, lead=0)

    def rotate(self, actor: Actor, *, lead: int) -> SigningKey:
        """Create a key that signs in `lead` seconds, and return it."""
        key = keyring.rotate(self._directory, now=self._now(), lead=lead)
        _record_created(actor, [key])
        return key

    def revoke(self, actor: Actor, key_id: str) -> list[SigningKey]:
        """Revoke a key. Return the keys that were created so that a key always signs. Raises `UnknownKey`."""
        created = keyring.revoke(self._directory, key_id, now=self._now())
        _record(EventName.KEY_REVOKED, actor, key_id)
        _record_created(actor, created)
        return created

    def revoke_all(self, actor: Actor) -> list[SigningKey]:
        """Revoke every key. Return the keys that were created so that a key always signs."""
        created = keyring.revoke_all(self._directory, now=self._now())
        _record(EventName.KEY_REVOKED, actor, "all")
        _record_created(actor, created)
        return created

    def prune(self, actor: Actor, *, dry_run: bool = False) -> list[Entry]:
        """Delete the keys and tombstones that can verify nothing any more, and return them.

        With `dry_run`, return them without deleting. Raises `KeyRingError` if a file in the directory is broken.
        """
        pruned = keyring.prune(self._directory, now=self._now(), lifetime=self._lifetime, dry_run=dry_run)
        if not dry_run:
            for entry in pruned:
                _record(EventName.KEY_DELETED, actor, entry.id)
        return pruned

    def _now(self) -> int:
        return int(self._clock())


def _record_created(actor: Actor, keys: list[SigningKey]) -> None:
    for key in keys:
        _record(EventName.KEY_CREATED, actor, key.id)


def _record(name: EventName, actor: Actor, key_id: str) -> None:
    audit.record(Event(event=name, operator=actor.operator, key_id=key_id))
