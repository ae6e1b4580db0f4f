"""The files that samples work on: on a disk or in tmpfs, random, and cold."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benches.native import BUILT, library

SEED = 11


def on_disk() -> Path:
    """Where files on a disk go: USERFAULT_BENCH_FOLDER, or the repository's target folder."""
    folder = Path(os.environ.get("USERFAULT_BENCH_FOLDER", BUILT / "data"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_tmpfs() -> Path:
    """Where files in memory go."""
    return Path("/dev/shm")


@contextlib.contextmanager
def fresh(folder: Path, length: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A new file of random words, removed afterwards."""
    fd, name = tempfile.mkstemp(prefix="userfault-bench-", dir=folder)
    path = Path(name)
    try:
        _write(fd, length)
        cool(fd)
        yield path, ()
    finally:
        os.close(fd)
        path.unlink()


@contextlib.contextmanager
def kept(folder: Path, length: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A file of random words that samples share and do not change much; cold each time. With its sum."""
    path = folder / f"userfault-bench-{length >> 20}MiB"
    if not (path.exists() and path.stat().st_size == length):
        with open(path, "wb") as file:
            _write(file.fileno(), length)
    with open(path, "rb") as file:
        cool(file.fileno())
    yield path, ("--sum", str(random_sum(length)))


@contextlib.contextmanager
def sparse(folder: Path, length: int) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A file of holes, removed afterwards: the disk is not what is measured."""
    fd, name = tempfile.mkstemp(prefix="userfault-bench-", dir=folder)
    try:
        os.ftruncate(fd, length)
        yield Path(name), ()
    finally:
        os.close(fd)
        os.unlink(name)


def remove_kept() -> None:
    """Remove the shared files."""
    for folder in (on_disk(), in_tmpfs()):
        for path in folder.glob("userfault-bench-*MiB"):
            path.unlink()


def cool(fd: int) -> None:
    """Write a file out and drop it from the page cache. In tmpfs it stays: there is nowhere to go."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def is_sorted(path: Path) -> None:
    """Raise AssertionError unless the file holds the words of a fresh one, in order."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        answer = library("sort").file_is_sorted(
            file.fileno(), ctypes.c_uint64(length // 8), ctypes.c_uint64(random_sum(length))
        )
    assert answer == 1, f"{path} is not sorted, or not of the same words"


@functools.cache
def random_sum(length: int) -> int:
    """Sum of the words of a random file of this length, modulo 2**64."""
    with open(os.devnull, "wb") as nowhere:
        return _write(nowhere.fileno(), length)


def _write(fd: int, length: int) -> int:
    total = ctypes.c_uint64()
    failed = library("sort").write_random_words(
        ctypes.c_int(fd), ctypes.c_uint64(length // 8), ctypes.c_uint64(SEED), ctypes.byref(total)
    )
    if failed:
        raise OSError(failed, os.strerror(failed))
    return total.value
