"""Settings of the whole machine that an item needs for a moment, put back afterwards.

One lock for all runs of the tests: two that changed the same setting at once would each put back the other's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from conformance.backend import Unavailable

LOCK = Path(tempfile.gettempdir()) / "userfault-kernel-settings.lock"
KSM = Path("/sys/kernel/mm/ksm")
THP = Path("/sys/kernel/mm/transparent_hugepage")


def value(text: str) -> str:
    """What a file says: the word in brackets where it lists all choices, else all of it."""
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else text.strip()


@contextlib.contextmanager
def changed(wanted: Mapping[Path, str]) -> Iterator[None]:
    """Within the block the files hold other values, written in this order and put back in the same."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd):
        fcntl.flock(fd, fcntl.LOCK_EX)
        before: dict[Path, str] = {}
        try:
            try:
                for path, new in wanted.items():
                    before[path] = value(path.read_text())
                    path.write_text(new)
            except OSError as error:
                raise Unavailable(f"{error.filename} cannot be set: {error.strerror}") from None
            yield
        finally:
            for path, old in before.items():
                with contextlib.suppress(OSError):
                    path.write_text(old)


MERGING = {KSM / "sleep_millisecs": "0", KSM / "pages_to_scan": "4000", KSM / "run": "1"}
"""The kernel merges equal pages, at once."""


def folio_setting(size: int, *, shared: bool) -> dict[Path, str]:
    """Folios of `size` bytes are given where MADV_HUGEPAGE asks."""
    folder = THP / f"hugepages-{size >> 10}kB"
    return {folder / "shmem_enabled": "advise"} if shared else {folder / "enabled": "madvise"}


def folio_sizes(*, shared: bool) -> list[int]:
    """The sizes in bytes between a page and 2 MiB in which this kernel can give memory."""
    name = "shmem_enabled" if shared else "enabled"
    sizes = [int(path.parent.name[10:-2]) << 10 for path in THP.glob(f"hugepages-*kB/{name}")]
    return sorted(size for size in sizes if size < 2 << 20)


SWAPS = Path(tempfile.gettempdir())
SWAP = re.compile(r"userfault-swap-(\d+)-")


@contextlib.contextmanager
def swap_file(megabytes: int = 64) -> Iterator[None]:
    """Within the block the machine may swap to a file. Unavailable where it may not.

    A process that is killed leaves its file behind, so the name says whose it is, and the next one to come
    takes away those of the dead.
    """
    for path in SWAPS.glob("userfault-swap-*"):
        owner = SWAP.match(path.name)
        if owner and not Path("/proc", owner[1]).exists():
            _take_away(path)
    fd, name = tempfile.mkstemp(prefix=f"userfault-swap-{os.getpid()}-", dir=SWAPS)
    path = Path(name)
    try:
        try:
            os.posix_fallocate(fd, 0, megabytes << 20)
        except OSError as error:
            raise Unavailable(f"no room for a swap file: {error.strerror}") from None
        finally:
            os.close(fd)
        _called("mkswap", path)
        _called("swapon", path)
        yield
    finally:
        _take_away(path)


def _take_away(path: Path) -> None:
    if str(path) in Path("/proc/swaps").read_text():
        with contextlib.suppress(Unavailable):
            _called("swapoff", path)
    path.unlink(missing_ok=True)


def _called(program: str, path: Path) -> None:
    try:
        done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Unavailable(f"there is no {program} (util-linux)") from None
    if done.returncode:
        raise Unavailable(f"{program} {path}: {done.stderr.strip()}")
