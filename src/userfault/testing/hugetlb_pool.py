"""Huge pages for a while: some of the machine's memory as 2 MiB pages, put back at the end.

The pool is one number for the whole machine, so nobody may set it: everybody adds what they need and takes
the same off again, under one lock. The lock file also lists who holds how much, because a test that is killed
cannot give anything back: the next one who takes the lock does it for the dead.

Run as a program, ``python hugetlb_pool.py`` gives back what the dead hold and prints nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HUGE_PAGE", "PoolUnavailable", "free_pages", "reclaim", "reserved"]

HUGE_PAGE = 2 << 20
"""Bytes of one page of the pool."""

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_LOCK = Path(tempfile.gettempdir()) / "userfault-hugepages.lock"


class PoolUnavailable(OSError):
    """Huge pages cannot be had here; the message says why and what would mend it."""


def free_pages() -> int:
    """Pages of 2 MiB that are free now; 0 where the machine has no such pool."""
    try:
        return int((_POOL / "free_hugepages").read_text())
    except OSError:
        return 0


@contextlib.contextmanager
def reserved(pages: int) -> Iterator[None]:
    """Within the block the machine's pool has `pages` more pages of 2 MiB than before.

    Raises PoolUnavailable where the process may not change the pool, or the machine has not that much memory
    in one piece.
    """
    own = f"{os.getpid()} {_started(os.getpid())} {pages}"
    with _ledger() as entries:
        _grow(pages)
        entries.append(own)
    try:
        yield
    finally:
        with _ledger() as entries:
            # Somebody may have given it back already: then the line is gone.
            if own in entries:
                entries.remove(own)
                _shrink(pages)


def reclaim() -> None:
    """Give back the pages that processes reserved which have died since. Never raises."""
    if _LOCK.exists():
        with contextlib.suppress(OSError), _ledger():
            pass


@contextlib.contextmanager
def _ledger() -> Iterator[list[str]]:
    """The list of holders, locked. Entries of dead processes are taken off first, and their pages."""
    try:
        # Without O_CREAT first: the kernel refuses to create over another user's file in a sticky folder.
        fd = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        entries = []
        for line in file.read().splitlines():
            pid, started, pages = (int(word) for word in line.split())
            if _started(pid) == started:
                entries.append(line)
            else:
                _shrink(pages)
        try:
            yield entries
        finally:
            file.seek(0)
            file.truncate()
            file.writelines(f"{line}\n" for line in entries)


def _started(pid: int) -> int:
    """When a process began, in the kernel's ticks: a number that a later process of the same id has not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(stat.rpartition(")")[2].split()[19])


def _grow(pages: int) -> None:
    size = _POOL / "nr_hugepages"
    try:
        before = int(size.read_text())
        size.write_text(str(before + pages))
        if int(size.read_text()) < before + pages:
            # Free memory may be there, but in small pieces.
            Path("/proc/sys/vm/compact_memory").write_text("1")
            size.write_text(str(before + pages))
        grown = int(size.read_text()) - before
    except FileNotFoundError as error:
        raise PoolUnavailable(error.errno, "this kernel has no huge pages of 2 MiB") from error
    except PermissionError as error:
        raise PoolUnavailable(
            error.errno, f"only root may reserve huge pages: echo {pages} | sudo tee {size}"
        ) from error
    if grown < pages:
        _shrink(grown)
        raise PoolUnavailable(12, f"asked for {pages} huge pages of 2 MiB, the machine had {grown} to give")


def _shrink(pages: int) -> None:
    size = _POOL / "nr_hugepages"
    size.write_text(str(max(0, int(size.read_text()) - pages)))


if __name__ == "__main__":
    reclaim()
