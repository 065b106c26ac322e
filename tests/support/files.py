"""Files and directories."""

from pathlib import Path


def contents(directory: Path) -> dict[str, bytes]:
    """Return the content of every file in a directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
