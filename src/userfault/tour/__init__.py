"""The tour: what userfault is for, shown on this machine in a minute.

Its first stop is memory larger than RAM. An ordinary NumPy program (hash, sum, random walk, sort) works on a
file several times larger than the memory it may use, once through userfault and once through numpy.memmap,
each within the same memory limit of the kernel's where the machine allows one. Every result is checked
against the file read plainly.

Its second stop is memory that keeps changing: points of an array under full-speed writing, beside fork() and
numpy.save, verified, incremental, and restored lazily.

``program`` is the NumPy program, which runs in a process of its own; ``stop`` prepares, runs and checks;
``screen`` shows it; ``points`` and ``second_stop`` are the same for the second. ``userfault tour`` and
``make tour`` start it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

__all__ = ["tour"]


def tour(file: Path | None = None, *, size: int = 512 << 20, limit: int = 128 << 20) -> int:
    """Show the tour on the terminal, and return 0 if everything that was checked was right, else 1.

    `file` is read and never written, and then the sort is left out; without it a file of `size` bytes is made
    and removed again. `limit` is the memory that the program may use, in bytes. Raises ValueError for a file
    that is not larger than the limit.
    """
    from userfault.tour import second_stop
    from userfault.tour.screen import show
    from userfault.tour.stop import Plan

    # A tour that is ended takes its program and its file with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = Plan.for_file(file, limit) if file else Plan.for_own_file(size, limit)
    right = show(plan)
    return 0 if second_stop.show() and right else 1
