"""A small separate file system that can be full or read-only, or contain immutable files."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_NEEDED = ("mkfs.ext4", "mount", "chattr")
_UNMOUNT_ATTEMPTS = 300


class NoVolume(Exception):
    """A separate file system is not possible here. The message states why."""


class Volume:
    """An ext4 file system in a file, mounted at `path`. Needs root."""

    def __init__(self, image: Path, path: Path, *, megabytes: int) -> None:
        self.path = path
        self._image = image
        self._filler = path / "filler"
        if os.geteuid() != 0:
            raise NoVolume("only root can mount a file system")
        if missing := [name for name in _NEEDED if shutil.which(name) is None]:
            raise NoVolume(f"{missing[0]} is not installed")
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        path.mkdir()
        try:
            _run("mkfs.ext4", "-q", "-m", "0", image)
            _run("mount", "-o", "loop", image, path)
        except subprocess.CalledProcessError as error:
            raise NoVolume(error.stderr.decode().strip().splitlines()[0]) from error

    def fill(self) -> None:
        """Use up all free space."""
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))

    def free(self) -> None:
        """Free the space that `fill` used."""
        self._filler.unlink(missing_ok=True)

    def protect(self, files: Iterable[Path], *, protected: bool) -> None:
        """Make these files immutable, even for processes that have opened them, or mutable again."""
        if there := [file for file in files if file.exists()]:
            _run("chattr", "+i" if protected else "-i", *there)

    def remount(self, *, read_only: bool) -> None:
        """Make the file system read-only or writable. Fails while a file is open for writing."""
        _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", self.path)

    def unmount(self) -> None:
        """Unmount the file system. Killed processes keep it busy until they have exited, which can take seconds."""
        for attempt in range(_UNMOUNT_ATTEMPTS):
            try:
                _run("umount", self.path)
                break
            except subprocess.CalledProcessError:
                if attempt == _UNMOUNT_ATTEMPTS - 1:
                    raise
                time.sleep(0.1)
        self._image.unlink()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
