"""An address space (struct mm_struct): its VMAs, its page table, its lock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from userfault.model.layout import HUGE_PAGE
from userfault.model.pagetable import PageTable
from userfault.model.step import Lock
from userfault.model.vma import AnonVma, Vma

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel


class AddressSpace:
    """VMAs in address order, a page table, and mmap_lock.

    alive: some process still uses it (mm_users > 0). A userfaultfd outlives the address space it serves; its
    operations then answer ESRCH (D1).
    """

    __slots__ = ("alive", "kernel", "mmap_lock", "name", "table", "vmas")

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.vmas: list[Vma] = []
        self.table = PageTable()
        self.mmap_lock = Lock(f"{name}'s mmap_lock")
        self.alive = True
        kernel.address_spaces.append(self)

    def find(self, address: int) -> Vma | None:
        """The VMA that holds the address (vma_lookup)."""
        for vma in self.vmas:
            if address < vma.end:
                return vma if vma.start <= address else None
        return None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that hold part of [start, end), in address order."""
        return [vma for vma in self.vmas if vma.start < end and start < vma.end]

    def insert(self, vma: Vma) -> None:
        """Add a VMA where nothing is mapped."""
        at = next((i for i, other in enumerate(self.vmas) if other.start > vma.start), len(self.vmas))
        self.vmas.insert(at, vma)

    def split(self, address: int) -> None:
        """Make `address` a boundary between two VMAs (split_vma).

        A huge page that the boundary would cut is split first (vma_adjust_trans_huge); a hugetlb VMA is only
        ever cut at a huge page.
        """
        vma = self.find(address)
        if vma is None or vma.start == address:
            return
        if not vma.hugetlb and address % HUGE_PAGE:
            from userfault.model.thp import split_pmd

            split_pmd(self, vma, address)
        tail = vma.piece(address, vma.end)
        vma.end = address
        self.vmas.insert(self.vmas.index(vma) + 1, tail)

    def carve(self, start: int, end: int) -> list[Vma]:
        """The VMAs of [start, end), cut so that none reaches outside it."""
        self.split(start)
        self.split(end)
        return self.overlapping(start, end)

    def merge(self, start: int, end: int) -> None:
        """Join neighbours that became alike, inside [start, end] and at its edges (vma_merge)."""
        i = 0
        vmas = self.vmas
        while i + 1 < len(vmas):
            left, right = vmas[i], vmas[i + 1]
            if left.end == right.start and start <= left.end <= end and left.mergeable_with(right):
                left.end = right.end
                left.anon_vma = left.anon_vma or right.anon_vma
                del vmas[i + 1]
            else:
                i += 1

    def prepare_anonymous(self, vma: Vma) -> None:
        """Make ready for a private page (anon_vma_prepare): a neighbour's anon_vma is used if the two could
        once have been one VMA, the next one's before the previous one's (find_mergeable_anon_vma)."""
        if vma.anon_vma is not None:
            return
        i = self.vmas.index(vma)
        after = self.vmas[i + 1] if i + 1 < len(self.vmas) else None
        before = self.vmas[i - 1] if i else None
        if after is not None and vma.could_share_with(after) and _reusable(after):
            vma.anon_vma = after.anon_vma
        elif before is not None and before.could_share_with(vma) and _reusable(before):
            vma.anon_vma = before.anon_vma
        else:
            vma.anon_vma = AnonVma()

    def each(self, start: int, end: int) -> Iterator[tuple[Vma, int, int]]:
        """(VMA, from, to) for each part of [start, end) that is mapped."""
        for vma in self.overlapping(start, end):
            yield vma, max(start, vma.start), min(end, vma.end)

    def __repr__(self) -> str:
        return f"AddressSpace({self.name})"


def _reusable(vma: Vma) -> bool:
    return vma.anon_vma is not None and not vma.anon_vma.inherited
