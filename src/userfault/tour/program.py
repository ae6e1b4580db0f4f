"""The program that the tour runs: ordinary NumPy, which knows nothing of paging.

It runs in a process of its own, so that the kernel can limit its memory: once its imports are done it joins
the control group it is given, and from then on everything it touches counts. It prints JSON, an object a
line: ticks while it works, and one at the end of each step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

import userfault

READS = 2_000
"""Words that the random walk visits."""

Bytes = npt.NDArray[np.uint8]


def words(data: Bytes) -> npt.NDArray[np.uint64]:
    """The whole words of a flat array of bytes; what is left at its end is left out."""
    return data[: data.size // 8 * 8].view(np.uint64)


def sha256(data: Bytes) -> str:
    """The SHA-256 of a flat array of bytes, in hexadecimal."""
    return hashlib.sha256(data.data).hexdigest()


def total(data: Bytes) -> str:
    """The sum of the words of a flat array, modulo 2**64."""
    return str(int(words(data).sum(dtype=np.uint64)))


def walk(data: Bytes) -> str:
    """The sum, modulo 2**64, of READS words of a flat array, at random places."""
    return str(int(words(data)[places(data.size // 8)].sum(dtype=np.uint64)))


def places(count: int) -> npt.NDArray[np.int64]:
    """Where the walk goes among `count` words: an array of shape (READS,), the same every time."""
    return np.random.default_rng(7).integers(0, count, READS)


def sort(data: Bytes) -> str:
    """Sort the words of a flat array in place. It says nothing: the file is looked at afterwards."""
    words(data).sort()
    return ""


STEPS: dict[str, Callable[[Bytes], str]] = {"hash": sha256, "sum": total, "walk": walk, "sort": sort}


Way = tuple[Callable[[], dict[str, float]], Callable[[], object], Bytes]
"""How to read the counters, how to make durable what was written, and the bytes of the file."""


def through_userfault(path: Path, mode: Literal["r", "r+"], limit: int, block: int = 0) -> Way:
    """Open a file as a region of at most `limit` bytes of memory, in blocks of `block` bytes, 0: auto."""
    region = userfault.open(path, mode, memory_limit=limit, block=block or "auto")

    def counters() -> dict[str, float]:
        stats = region.stats()
        return {
            "faults": stats.faults_missing + stats.faults_minor + stats.faults_write_protect,
            "hits": stats.hits,
            "read": stats.bytes_read,
            "written": stats.bytes_written,
            "memory": stats.used,
        }

    return counters, region.flush, region.ndarray(np.uint8)


def through_memmap(path: Path, mode: Literal["r", "r+"], limit: int) -> Way:
    """Map a file by numpy.memmap, which knows no `limit` in bytes: the control group sets one."""
    mapped = np.memmap(path, np.uint8, mode)

    def counters() -> dict[str, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return {
            "faults": used.ru_majflt + used.ru_minflt,
            "read": int(counts["read_bytes"]),
            "written": int(counts["write_bytes"]),
        }

    return counters, mapped.flush, mapped.view(np.ndarray)


def main() -> None:
    """Run the steps over a file; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m userfault.tour.program")
    parser.add_argument("way", choices=["userfault", "memmap"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--steps", nargs="+", choices=sorted(STEPS), required=True)
    options = parser.parse_args()

    mode: Literal["r", "r+"] = "r+" if "sort" in options.steps else "r"
    if options.way == "userfault":
        # What the first use loads is loaded before memory is counted.
        _ = userfault.open
    if options.cgroup:
        (options.cgroup / "cgroup.procs").write_text(str(os.getpid()))

    if options.way == "userfault":
        read, flush, data = through_userfault(options.path, mode, options.limit, options.block)
    else:
        read, flush, data = through_memmap(options.path, mode, options.limit)

    lock = threading.Lock()
    doing, since = "", time.monotonic()

    def say(**message: object) -> None:
        with lock:
            print(json.dumps(message), flush=True)

    def tick() -> None:
        while True:
            time.sleep(0.2)
            say(tick=doing, seconds=time.monotonic() - since, **read())

    threading.Thread(target=tick, daemon=True).start()
    for step in options.steps:
        before = read()
        doing, since = step, time.monotonic()
        result = STEPS[step](data)
        if step == "sort":
            flush()
        took = time.monotonic() - since
        after = read()
        grown = {name: after[name] - before[name] for name in after if name != "memory"}
        say(step=step, seconds=took, result=result, **grown)
    sys.stdout.flush()
    # The region dies with the process: everything that was to be kept has been flushed.
    os._exit(0)


if __name__ == "__main__":
    main()
