"""A small file system of its own, which can be full, read-only, or have files that nothing may change."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_NEEDED = ("mkfs.ext4", "mount", "chattr")


class NoVolume(Exception):
    """There can be none here, and why."""


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
        """Leaves not a byte."""
        with self._filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(512))

    def free(self) -> None:
        """Gives back what `fill` took."""
        self._filler.unlink(missing_ok=True)

    def protect(self, files: Iterable[Path], *, protected: bool) -> None:
        """Lets nobody change these files, also who has them open (or lets everybody again)."""
        if there := [file for file in files if file.exists()]:
            _run("chattr", "+i" if protected else "-i", *there)

    def remount(self, *, read_only: bool) -> None:
        """Makes all of it read-only, or writable again. Fails while a file is open for writing."""
        _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", self.path)

    def unmount(self) -> None:
        """Ends it. Who used it may still be about to go."""
        for attempt in range(50):
            try:
                _run("umount", self.path)
                break
            except subprocess.CalledProcessError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        self._image.unlink()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
