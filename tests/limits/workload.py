"""Programs that page much more than they may keep: ``workload.py NAME LIMIT FOLDER``.

Each is watched from outside. It says that it is ready before it opens its first region, and waits to be told
to go on, so that what Python and NumPy take by themselves can be seen.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import userfault

MIB = 1 << 20
LENGTH = 160 * MIB


TOUCHES = 3000


def sparse(path: Path) -> Path:
    """A file of zeros that takes no disk: the page cache, which is no part of the promise, serves it."""
    with path.open("wb") as file:
        file.truncate(LENGTH)
    return path


def random_touches(region: userfault.Region, *, write: bool) -> None:
    """A sweep, and then touches here and there."""
    array = region.ndarray(np.uint8)
    places = np.random.default_rng(1).integers(0, len(array), TOUCHES)
    if write:
        array[::1999] += 1
        array[places] = 7
    else:
        assert int(array[::1999].sum()) + int(array[places].sum()) == 0


def reading(folder: Path, limit: int, block: str, pages: str) -> None:
    with userfault.open(sparse(folder / "file"), block=block, pages=pages) as region:  # type: ignore[arg-type]
        random_touches(region, write=False)


def writing(folder: Path, limit: int, block: str, pages: str) -> None:
    with userfault.open(sparse(folder / "file"), "r+", block=block, pages=pages) as region:  # type: ignore[arg-type]
        random_touches(region, write=True)


def private(folder: Path, limit: int) -> None:
    path = sparse(folder / "file")
    with userfault.open(path, "c", block="64KiB", scratch=folder) as region:
        random_touches(region, write=True)


def several(folder: Path, limit: int) -> None:
    """Regions of every kind at once, under one limit that changes."""
    path = sparse(folder / "file")
    regions = [
        userfault.open(path, block="4KiB"),
        userfault.open(sparse(folder / "other"), "r+", block="16KiB"),
        userfault.open(userfault.ZeroStore(LENGTH), block="2MiB", memory_limit=limit // 2),
        userfault.open(path, "c", block="64KiB", scratch=folder),
    ]
    for share in (1, 2, 1):
        userfault.set_memory_limit(limit // share)
        for region in regions:
            random_touches(region, write=region.writable)
    for region in regions:
        region.close()


WORKLOADS = {
    "reading 4KiB": lambda folder, limit: reading(folder, limit, "4KiB", "4KiB"),
    "reading 64KiB": lambda folder, limit: reading(folder, limit, "64KiB", "4KiB"),
    "writing 4KiB": lambda folder, limit: writing(folder, limit, "4KiB", "4KiB"),
    "writing 64KiB": lambda folder, limit: writing(folder, limit, "64KiB", "4KiB"),
    "writing 1MiB": lambda folder, limit: writing(folder, limit, "1MiB", "4KiB"),
    "reading 2MiB": lambda folder, limit: reading(folder, limit, "2MiB", "2MiB"),
    "writing 2MiB": lambda folder, limit: writing(folder, limit, "2MiB", "2MiB"),
    "private changes": private,
    "several regions": several,
}


def main(name: str, limit: str, folder: str) -> None:
    # What the first use of anything takes is taken before.
    with userfault.open(userfault.MemoryStore(MIB), "r+") as region:
        region.ndarray(np.uint8)[:] = 1
    Path(folder, "ready").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    userfault.set_memory_limit(int(limit))
    WORKLOADS[name](Path(folder), int(limit))
    stats = userfault.stats()
    assert stats.bytes_read > 3 * int(limit), stats
    assert stats.evictions > 10, stats
    print(stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
