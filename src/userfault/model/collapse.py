"""MADV_COLLAPSE (6.1): make small pages into a huge one, where userfaultfd allows [H5].

anonymous    a hole in a registered VMA EBUSY; a uffd-wp page or marker EINVAL
shmem        collapses in the cache; a hole under MISSING EBUSY, any W registration EINVAL, both only
             after the range was unmapped, so a MINOR registration faults again
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import ZERO, Content, join
from userfault.model.errnos import EBUSY, EINVAL
from userfault.model.layout import HUGE_PAGE, PAGE, round_down, round_up
from userfault.model.page import Page
from userfault.model.pagetable import Present, Swap
from userfault.model.zap import zap

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


def collapse(mm: AddressSpace, vma: Vma, start: int, end: int) -> int:
    """Collapse each whole huge page of the range: 0, or the errno of the last refusal."""
    if not (vma.anonymous or vma.shmem) or vma.hugepage is False or vma.special:
        return EINVAL
    if round_up(vma.start, HUGE_PAGE) + HUGE_PAGE > vma.end:
        return EINVAL
    errno = 0
    for base in range(round_up(start, HUGE_PAGE), round_down(end, HUGE_PAGE), HUGE_PAGE):
        if type(mm.table.pmd(base)) is Present:
            continue
        errno = _anonymous(mm, vma, base) if vma.anonymous else _shmem(mm, vma, base)
    return errno


def _anonymous(mm: AddressSpace, vma: Vma, base: int) -> int:
    """hpage_collapse_scan_pmd, collapse_huge_page. Without a page table there is nothing to collapse."""
    if mm.table.pmd(base) is None:
        return EINVAL
    parts: list[Content] = []
    for at in range(base, base + HUGE_PAGE, PAGE):
        entry = mm.table.pte(at)
        if entry is None or (type(entry) is Present and entry.page.zero and not entry.uffd_wp):
            if vma.uffd is not None:
                return EBUSY  # a hole may be filled later; a zero page counts as one
            parts.append(ZERO)
            continue
        if entry.uffd_wp or not isinstance(entry, Present | Swap):
            return EINVAL
        parts.append(entry.page.content if isinstance(entry, Present) else entry.slot.content)
    for at in range(base, base + HUGE_PAGE, PAGE):
        mm.table.set_pte(at, None)
    mm.table.set_pmd(base, Present(Page(join(parts, PAGE), HUGE_PAGE, exclusive=True), write=vma.write))
    return 0


def _shmem(mm: AddressSpace, vma: Vma, base: int) -> int:
    """collapse_file, then collapse_pte_mapped_thp for the mapping that asked."""
    file = vma.file
    assert file is not None
    first = vma.index(base)
    if first % 512 or (first + 512) * PAGE > round_up(file.size, PAGE):
        return EINVAL
    if first not in file.huge_folios:
        for other, theirs in mm.kernel.mappings(file):
            low = theirs.start + first * PAGE - theirs.offset
            if theirs.start <= low and low + HUGE_PAGE <= theirs.end:
                zap(other, theirs, low, low + HUGE_PAGE, private_too=False)
        holes = [index for index in range(first, first + 512) if not file.cached(index)]
        if holes and any(theirs.modes.missing for _, theirs in mm.kernel.mappings(file)):
            return EBUSY
        parts = []
        for index in range(first, first + 512):
            page = file.page(index) or file.add(index)
            assert page is not None
            parts.append(page.content)
        folio = Page(join(parts, PAGE), HUGE_PAGE, file)
        for index in range(first, first + 512):
            file.pages[index] = folio
        file.huge_folios.add(first)
    if vma.modes.wp:
        return EINVAL
    folio_page = file.page(first)
    assert folio_page is not None
    if vma.shared:
        mm.table.set_pmd(base, Present(folio_page, write=vma.write))
    return 0
