"""How much memory all regions together may use, and what they have done with it."""

from __future__ import annotations

from typing import Literal

from userfault import _native
from userfault.sizes import Size, parse_size

__all__ = ["set_memory_limit", "stats"]


def set_memory_limit(limit: Size | Literal["auto"]) -> int:
    """Sets the memory limit of the process in bytes, and returns the old one.

    `limit` is a number of bytes, text such as "8GiB", or "auto": a share of what the machine or its control
    group had available when the first region was opened, so that a margin is left for the program itself;
    the kernel kills a program that passes its control group's limit. It covers the blocks of all regions in
    memory, buffers between stores and memory, and page tables. A smaller limit evicts at once. A limit of
    less than four blocks is raised to that, because one instruction can need so many; `stats().limit` says
    what holds.

    Raises ValueError for what is no size, and for 0; OSError with advice if this machine does not allow
    userfaultfd.
    """
    return _native.set_memory_limit(None if limit == "auto" else parse_size(limit, "limit"))


def stats() -> _native.Stats:
    """Figures of all regions of the process together, read without disturbing them."""
    return _native.stats()
