"""Signing keys and clock: what every use case that trusts a signature shares."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sso_service.errors import NoSigningKey, Unavailable
from sso_service.key_directory import KeyDirectory
from sso_service.keyring import KeyRing, SigningKey

KEY_REFRESH = 2.0
"""Seconds between two reads of the key directory: a revocation must take effect within five."""
KEY_CHECK_TIMEOUT = 0.5
"""Seconds that a request with an unexplained signature waits for a read of the key directory."""

log = logging.getLogger(__name__)


class Trust:
    """The keys of a directory and a clock (Unix seconds). For one event loop."""

    def __init__(self, keys: KeyDirectory, *, clock: Callable[[], float] = time.time) -> None:
        self.keys = keys
        self.clock = clock
        # Key directories are shared, so reading one can be slow or hang. One thread reads it, and nothing else waits
        # for that thread.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._reading = asyncio.Lock()
        self._next_check: asyncio.Task[bool] | None = None

    def now(self) -> int:
        """Return the time in Unix seconds."""
        return int(self.clock())

    def signing_key(self) -> SigningKey:
        """Return the key that signs now. Raises `Unavailable`."""
        try:
            return self._ring().signing_key(self.now())
        except NoSigningKey as error:
            raise Unavailable(str(error)) from error

    def verifying_keys(self, now: int, lifetime: int) -> list[SigningKey]:
        """Return the keys whose signatures may be valid at `now`, newest first, for what lives `lifetime` seconds.

        Raises `Unavailable`, also if there is no such key, as on an empty mount point: without keys, a genuine session
        cannot be distinguished from a forged one, and must not be answered like one.
        """
        if keys := self._ring().verifying_keys(now, lifetime):
            return keys
        raise Unavailable("no key may verify now; create one: sso-service keys rotate --lead 0")

    def known_keys(self) -> list[SigningKey]:
        """Return every key that is not revoked, including those that no longer verify. Raises `Unavailable`."""
        return self._ring().known_keys()

    def _ring(self) -> KeyRing:
        """Return the keys that were read last. Every use of a key begins here (`test_architecture.py`).

        Raises `Unavailable` if the directory could not be listed for so long that a revocation may be missing.
        """
        if self.keys.stale:
            raise Unavailable("the key directory cannot be listed, so a revocation may have been missed")
        return self.keys.ring

    async def keys_changed(self) -> bool:
        """Check the key directory because no known key explains a signature. Return whether it changed and was read.

        One check serves all requests that ask before it begins. A check that is already running does not serve later
        requests: it may be too early to find the key that signed theirs.
        """
        if self._next_check is None:
            self._next_check = asyncio.create_task(self._check())
        return await asyncio.shield(self._next_check)

    async def _check(self) -> bool:
        async with self._reading:
            self._next_check = None
            check = asyncio.get_running_loop().run_in_executor(self._reader, self.keys.refresh_if_changed)
            try:
                return await asyncio.wait_for(check, KEY_CHECK_TIMEOUT)
            except TimeoutError:
                return False

    async def keep_fresh(self) -> None:
        """Read the key directory every `KEY_REFRESH` seconds, until cancelled."""
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._reader, self.keys.refresh)
            except Exception:
                log.exception("keys: reading failed; the next attempt follows")
            await asyncio.sleep(KEY_REFRESH)

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)
