"""The limit of file descriptors of a process, and its division between connections and everything else."""

import sys

_RESERVED = 64
"""Descriptors for the database, key files, listeners and the log."""


def raise_limit() -> int:
    """Raise the soft limit of file descriptors to the hard one. Return it. Processes started afterwards inherit it."""
    try:
        import resource  # noqa: PLC0415 - does not exist on Windows, which has no such limit
    except ImportError:
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):  # macOS reports an infinite limit and does not allow it
        pass
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def backlog(descriptors: int) -> int:
    """Return how many connections may wait to be accepted. The event loop accepts them all at once.

    libuv then needs a descriptor for each, before the protocol can refuse the connection. Without a free one, uvloop
    may close the listener without a word in the log.
    """
    return min(2048, max(16, descriptors // 8))


def for_connections(descriptors: int) -> int:
    """Return how many of `descriptors` connections may take: four fifths, and fewer if there are very few."""
    return max(1, min(descriptors * 4 // 5, descriptors - backlog(descriptors) - _RESERVED))
