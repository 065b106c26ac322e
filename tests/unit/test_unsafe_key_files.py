"""Key files that must not be read: FIFOs, devices, large and world-writable files; and those that must."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sso_service.errors import KeyDirectoryUnreadable, KeyRingError
from sso_service.keyring import FILE_LIMIT, Entry, Tombstone, load, prune, revoke_all, rotate
from tests.support.keyring import (
    NOW,
    TOKENS,
    ids,
    key,
    load_directory,
    put,
    ring_in,
    tombstone,
    unprivileged,
    watched,
    written,
)
from tests.support.waiting import PATIENCE

Loaded = tuple[dict[str, Entry], dict[str, str]]


def load_promptly(directory: Path) -> Loaded:
    """Load the directory in a thread, so that a read that blocks fails the test instead of stopping it."""
    loaded: list[Loaded] = []
    thread = threading.Thread(target=lambda: loaded.append(load(directory)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert loaded, "reading the directory does not return"
    return loaded[0]


def fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def link_to_fifo(path: Path) -> None:
    fifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def unix_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def large_file(path: Path) -> None:
    path.write_text(written(key("a", 2000)).ljust(FILE_LIMIT + 1))


def sparse_file(path: Path) -> None:
    path.write_text(written(key("a", 2000)))
    os.truncate(path, 2**40)


def world_writable(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_text(written(key("a", 2000)))
        path.chmod(mode)

    return make


def link_to_world_writable_file(path: Path) -> None:
    world_writable(0o606)(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


UNSAFE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (fifo, "is not a regular file"),
    "a link to a FIFO": (link_to_fifo, "is not a regular file"),
    "a socket": (unix_socket, "is not a regular file"),
    "a directory": (Path.mkdir, "is not a regular file"),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "an empty device": (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
    "a terminal": (lambda path: path.symlink_to("/dev/ptmx"), "is not a regular file"),
    "a link to itself": (link_in_a_circle, "cannot be read: "),
    "a broken link": (broken_link, "is a broken link"),
    "a file of 4097 bytes": (large_file, "is larger than 4 KiB"),
    "a file of a tebibyte": (sparse_file, "is larger than 4 KiB"),
    "a file with mode 666": (world_writable(0o666), "can be written by every user"),
    "a file with mode 602": (world_writable(0o602), "can be written by every user"),
    "a file with mode 1777": (world_writable(0o1777), "can be written by every user"),
    "a link to a world-writable file": (link_to_world_writable_file, "can be written by every user"),
}
UNSAFE_FILES = pytest.mark.parametrize(("make", "problem"), UNSAFE.values(), ids=UNSAFE)


@UNSAFE_FILES
def test_an_unsafe_key_file_is_refused_with_a_reason(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    put(tmp_path, key("b", 1000))
    make(tmp_path / "a.json")
    entries, broken = load_promptly(tmp_path)
    assert entries == {"b": key("b", 1000)}
    assert broken.keys() == {"a"}
    assert broken["a"].startswith(problem)


@UNSAFE_FILES
def test_a_key_file_that_becomes_unsafe_is_reported_once_and_its_key_stays(
    tmp_path: Path, make: Callable[[Path], None], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, key("a", 1000), key("b", 2000))
    keys = load_directory(tmp_path)
    (tmp_path / "a.json").unlink()
    make(tmp_path / "a.json")
    for _ in range(3):
        assert keys.refresh()
    assert ids(keys.ring.known_keys()) == ["b", "a"]
    assert keys.ring.known_keys()[1] == key("a", 1000)
    assert keys.unusable.keys() == {"a"}
    [record] = caplog.records
    assert problem in record.getMessage()


@pytest.mark.parametrize("name", ["a FIFO", "a socket", "an endless device", "a file with mode 666"])
def test_an_unsafe_key_file_can_be_revoked_and_blocks_pruning(tmp_path: Path, name: str) -> None:
    put(tmp_path, key("b", 1000), key("c", 2000))
    UNSAFE[name][0](tmp_path / "a.json")
    with pytest.raises(KeyRingError, match=r"'a' .*; repair, revoke or delete it first"):
        prune(tmp_path, now=NOW, lifetime=TOKENS)
    [made] = revoke_all(tmp_path, now=NOW)
    assert load(tmp_path)[0]["a"] == Tombstone("a", NOW, NOW)
    assert ring_in(tmp_path).known_keys() == [made]


@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600, 0o640, 0o644, 0o660, 0o664])
def test_owner_and_group_may_write_a_key_file_and_others_may_read_it(tmp_path: Path, mode: int) -> None:
    put(tmp_path, key("a", 1000))
    (tmp_path / "a.json").chmod(mode)
    assert load(tmp_path) == ({"a": key("a", 1000)}, {})


def test_a_key_file_of_4096_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(written(key("a", 1000)).ljust(FILE_LIMIT))
    assert load(tmp_path) == ({"a": key("a", 1000)}, {})


def test_a_mounted_secret_of_kubernetes_is_read_and_updated(tmp_path: Path) -> None:
    """The files are links over a link to a directory, which the kubelet replaces. The directory is world-writable."""
    tmp_path.chmod(0o3777)
    first, second = tmp_path / "..2026_11_28_1", tmp_path / "..2026_11_28_2"
    for directory, entry in ((first, key("a", 1000)), (second, tombstone("a", 1000))):
        directory.mkdir()
        put(directory, entry)
        (directory / "a.json").chmod(0o440)
    (tmp_path / "..data").symlink_to(first.name)
    (tmp_path / "a.json").symlink_to("..data/a.json")
    keys = load_directory(tmp_path)
    assert keys.ring.known_keys() == [key("a", 1000)]
    (tmp_path / "..data_tmp").symlink_to(second.name)
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    keys.refresh()
    assert keys.ring.entries == (tombstone("a", 1000),)
    assert not keys.unusable


@pytest.mark.parametrize("name", ["a FIFO", "an endless device", "a file with mode 666"])
def test_an_unsafe_file_that_takes_the_name_while_it_is_opened_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, key("a", 1000))

    def replace() -> None:
        modified = tmp_path.stat().st_mtime_ns
        (tmp_path / "a.json").unlink()
        UNSAFE[name][0](tmp_path / "a.json")
        os.utime(tmp_path, ns=(modified, modified))  # otherwise the directory is read again

    with watched(tmp_path, ("open",), replace):
        entries, broken = load_promptly(tmp_path)
    assert not entries
    assert broken == {"a": UNSAFE[name][1]}


# --- permissions -----------------------------------------------------------------------------------------------------


@contextmanager
def a_running_service() -> Iterator[Path]:
    with unprivileged() as directory:
        put(directory, key("a", 1000), key("b", 2000))
        yield directory
        directory.chmod(0o700)


def test_a_key_file_without_read_permission_is_reported_and_its_key_stays() -> None:
    with a_running_service() as directory:
        keys = load_directory(directory)
        (directory / "a.json").chmod(0)
        assert keys.refresh()
        assert keys.unusable == {"a": "cannot be read: Permission denied"}
        assert ids(keys.ring.known_keys()) == ["b", "a"]
        (directory / "a.json").chmod(0o600)
        assert keys.refresh()
        assert not keys.unusable


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100], ids=["no access", "cannot be searched", "cannot be listed"])
def test_a_directory_without_permission_counts_as_unlistable(mode: int) -> None:
    """A directory that can be listed but not searched would hide the content of a tombstone."""
    with a_running_service() as directory:
        keys = load_directory(directory)
        directory.chmod(mode)
        assert not keys.refresh()
        with pytest.raises(KeyDirectoryUnreadable):
            load(directory)
        assert ids(keys.ring.known_keys()) == ["b", "a"]
        directory.chmod(0o700)
        assert keys.refresh()


def test_a_rotation_writes_files_that_the_service_reads(tmp_path: Path) -> None:
    previous_mask = os.umask(0)
    try:
        made = rotate(tmp_path, now=NOW, lead=0)
    finally:
        os.umask(previous_mask)
    assert load(tmp_path) == ({made.id: made}, {})
