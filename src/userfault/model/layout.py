"""Sizes and limits of the machine that is modelled: x86-64 with 4-level page tables.

The page sizes live here and nowhere else; other machines have other ones.
"""

from typing import Final

PAGE: Final = 4096
"""A page of ordinary memory, in bytes."""

HUGE_PAGE: Final = 2 << 20
"""What one entry of the middle level maps: a hugetlb page, or a transparent huge page. Bytes."""

PUD_SPAN: Final = 1 << 30
"""What one whole middle-level table maps: the unit in which hugetlb mappings share page tables. Bytes."""

TASK_SIZE: Final = (1 << 47) - PAGE
"""The end of a process's address space (TASK_SIZE_MAX of x86-64)."""


def round_down(address: int, unit: int) -> int:
    """The largest multiple of `unit` (a power of two) that is not above `address`."""
    return address & -unit


def round_up(address: int, unit: int) -> int:
    """The smallest multiple of `unit` (a power of two) that is not below `address`."""
    return (address + unit - 1) & -unit
