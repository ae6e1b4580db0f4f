"""Defects that the kernel had, or would have had, as switches: `Kernel(defects={"mmap_changing-bool"})`.

Each is one `in kernel.defects` beside the rule it breaks; the commit named here is the one that mended it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

DEFECTS: Final = {
    "mmap_changing_bool": "one pending-change flag, cleared by whoever finishes first (a759a909d42d)",
    "no_mmap_changing": "fills are accepted while an event is unread (df2cc96e77011)",
    "wp_vma_only": "every write to a read-only entry of a W range asks, protected or not (55adf4de3034)",
    "pmd_share_wp": "hugetlb mappings share page tables with a write-protected one (c1991e0705d1)",
    "pmd_unshare_skips": "tables stay shared at registration, protecting unshares and skips (c1991e0705d1)",
    "pmd_share_minor": "page tables stay shared with a MINOR range (0d9cadabd193)",
    "minor_leak": "a minor fault keeps the reference it took on the page (7677f7fd8be7)",
    "wp_ignores_changing": "WRITEPROTECT works while an event is unread (ffd05793963a)",
    "no_copy_mode_wp": "COPY cannot install its page protected: copy first, protect then (72981e0e7b60)",
    "account_early": "shmem is charged before the page is mapped, not given back on failure (7d64ae3ab648)",
}
"""Name and what goes wrong."""


def defect_names(names: Iterable[str]) -> frozenset[str]:
    """The names with underscores. Raises ValueError for an unknown one."""
    known = frozenset(name.replace("-", "_") for name in names)
    unknown = known - DEFECTS.keys()
    if unknown:
        raise ValueError(
            f"unknown defects: {', '.join(sorted(unknown))}; known: {', '.join(sorted(DEFECTS))}"
        )
    return known
