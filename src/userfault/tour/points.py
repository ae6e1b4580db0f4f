"""The second stop's program: an array under full-speed writing, and points of it.

It runs in a process of its own, for it forks. It prints JSON, an object a line: what was done, the seconds
that the writing program stood still for it, and the seconds until it was finished.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

import userfault
from userfault.verifying import verify

LEAST = 1 << 20
"""Bytes of the smallest array."""

BURST = 2_000
"""Words that the writer writes at a time."""


class Writer(threading.Thread):
    """Writes random words as fast as it can, a burst at a time, each under the lock."""

    def __init__(self, words: np.ndarray) -> None:
        super().__init__(daemon=True)
        self.words = words
        self.lock = threading.Lock()
        self.stopping = False
        self.written = 0

    def run(self) -> None:
        """Writes until it is told to stop."""
        random = np.random.default_rng(2)
        while not self.stopping:
            places = random.integers(0, self.words.size, BURST)
            with self.lock:
                self.words[places] = self.written
                self.written += BURST
            time.sleep(0)


def forked(size: int) -> float:
    """Seconds that fork() stops a twin process of `size` bytes in small pages, before it could save them."""
    twin = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        twin.madvise(mmap.MADV_NOHUGEPAGE)
    np.frombuffer(twin, np.uint8)[::4096] = 1
    took = []
    for _ in range(3):
        begin = time.perf_counter()
        child = os.fork()
        if child == 0:
            os._exit(0)
        took.append(time.perf_counter() - begin)
        os.waitpid(child, 0)
    return sorted(took)[1]


def say(**message: object) -> None:
    """Prints one message."""
    print(json.dumps(message), flush=True)


def main() -> None:
    """Takes points of an array, and the rivals' way of it; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m userfault.tour.points")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, required=True)
    options = parser.parse_args()
    if options.size < LEAST:
        parser.error(f"the array has {options.size} bytes; a hundredth of it would be nothing below {LEAST}")
    folder: Path = options.folder
    # The twin forks before there are other threads.
    say(step="fork", stall=forked(options.size))
    words = userfault.zeros(options.size // 8, np.uint64, track=True)
    words[:] = np.random.default_rng(1).integers(0, 1 << 63, words.size, dtype=np.uint64)
    writer = Writer(words)
    writer.start()
    begin = time.perf_counter()
    with writer.lock:
        np.save(folder / "array.npy", words)
    say(step="numpy.save", stall=time.perf_counter() - begin, size=words.nbytes)
    (folder / "array.npy").unlink()
    copies = {}
    with userfault.Checkpointer(folder / "points", {"words": words}) as ck:

        def take(name: str, step: int, before: int) -> None:
            # What the drain had stored of it by now is a part of it.
            begin = time.perf_counter()
            with writer.lock:
                point = ck.save(step)
                copies[step] = words.copy()
            point.result()
            took = time.perf_counter() - begin
            size = _on_disk(folder) - before
            say(step=name, stall=point.stall, seconds=took, size=size, method=point.method["words"])

        take("full", 0, before=0)
        # From here on one part in a hundred is written. What was written elsewhere while the first point
        # was on its way goes into a point of its own, and is not counted as what changed.
        writer.stopping = True
        writer.join()
        writer = Writer(words[: words.size // 100])
        writer.start()
        ck.save(1).result()
        before = _on_disk(folder)
        enough = writer.written + 10 * BURST
        while writer.is_alive() and writer.written < enough:
            time.sleep(0.01)
        take("incremental", 2, before)
        writer.stopping = True
        writer.join()
    begin = time.perf_counter()
    damage = verify(folder / "points").damage
    say(step="verify", seconds=time.perf_counter() - begin, right=not damage)
    right = True
    begin = time.perf_counter()
    state = userfault.restore(folder / "points", 2)
    right = bool(state["words"][words.size // 2] == copies[2][words.size // 2])
    took = time.perf_counter() - begin
    right = right and bool(np.array_equal(state["words"], copies[2]))
    state.close()
    with userfault.restore(folder / "points", 0, lazy=False) as state:
        right = right and bool(np.array_equal(state["words"], copies[0]))
    say(step="restore", seconds=took, right=right)
    sys.stdout.flush()
    os._exit(0)


def _on_disk(folder: Path) -> int:
    """Bytes that the points take."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob("points/segment-*"))


if __name__ == "__main__":
    main()
