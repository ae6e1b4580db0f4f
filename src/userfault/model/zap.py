"""Taking pages out of a page table: what munmap, MADV_DONTNEED, punches and truncation leave behind [E6].

    drop_markers   the mapping itself goes (munmap), or hugetlb is truncated: nothing stays
    private_too    also a private mapping's own pages, and poison (MADV_DONTNEED, truncate; not a punch)

What stays without drop_markers: a uffd-wp page of a file becomes a write-protect marker, because the file's
page may come back and must come back protected; anonymous memory forgets its protection with its page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.layout import HUGE_PAGE, PUD_SPAN, round_up
from userfault.model.page import Page
from userfault.model.pagetable import WP_MARKER, Entry, Marker, Present, PteTable, Swap

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.pagecache import File
    from userfault.model.vma import Vma


def zap(
    mm: AddressSpace,
    vma: Vma,
    start: int,
    end: int,
    *,
    drop_markers: bool = False,
    private_too: bool = True,
    reclaim_tables: bool = False,
) -> None:
    """Empty the part [start, end) of a VMA (zap_page_range_single, unmap_page_range).

    reclaim_tables: give back last-level tables that are empty and wholly inside the range (6.14), so that the
    next touch may be huge again.
    """
    reclaim_tables = reclaim_tables and mm.kernel.version >= (6, 14)
    if vma.hugetlb:
        _zap_hugetlb(mm, start, end, drop_markers)
        return
    for low, high, table in list(mm.table.tables(start, end)):
        if type(table) is not PteTable:
            assert type(table) is Present
            if high - low == HUGE_PAGE:
                mm.table.set_pmd(low, None)
                continue
            from userfault.model.thp import split_pmd

            split_pmd(mm, vma, low)
        for at, entry in list(mm.table.ptes(low, high)):
            _zap_entry(mm, vma, at, entry, drop_markers, private_too)
        if high - low == HUGE_PAGE and (drop_markers or (reclaim_tables and not _entries(mm, low))):
            mm.table.set_pmd(low, None)  # free_pgtables, try_to_free_pte


def _entries(mm: AddressSpace, address: int) -> int:
    table = mm.table.pte_table(address)
    return 0 if table is None else len(table.entries)


def _zap_entry(
    mm: AddressSpace, vma: Vma, at: int, entry: Entry, drop_markers: bool, private_too: bool
) -> None:
    """zap_pte_range, one entry."""
    if type(entry) is Marker:
        if entry.uffd_wp and not vma.anonymous and not drop_markers:
            return
        if entry.guard and not drop_markers:
            return
        if entry.poison and not private_too:
            return
    elif not private_too and not (type(entry) is Present and not entry.page.anonymous):
        return  # should_zap_folio: the zero page counts as the file's
    protected = entry.uffd_wp and type(entry) is not Marker
    keep = protected and vma.modes.wp and not vma.anonymous and not drop_markers
    if type(entry) is Swap:
        entry.slot.references -= 1
    mm.table.set_pte(at, WP_MARKER if keep and mm.kernel.version >= (5, 19) else None)


def _zap_hugetlb(mm: AddressSpace, start: int, end: int, drop_markers: bool) -> None:
    """__unmap_hugepage_range: private pages and poison always go; protection stays as a marker."""
    from userfault.model.hugetlb import unshare

    at = start
    while at < end:
        table = mm.table.pmd_table(at)
        if table is None or unshare(mm, at):  # a shared table is left as a whole
            at = (at // PUD_SPAN + 1) * PUD_SPAN
            continue
        entry = table.entries.get((at // HUGE_PAGE) & 511)
        if entry is not None:
            assert type(entry) is not PteTable
            keep = entry.uffd_wp and not drop_markers and mm.kernel.version >= (5, 19)
            mm.table.set_pmd(at, WP_MARKER if keep else None)
            if type(entry) is Present:
                release_private(mm, entry.page)
        at += HUGE_PAGE


def release_private(mm: AddressSpace, page: Page) -> None:
    """Give a private hugetlb page back to the pool when nobody maps it any more."""
    if page.anonymous and page.mapcount == 0:
        mm.kernel.hugetlb.give_back()


def unmap_file(file: File, start: int, end: int, *, private_too: bool) -> None:
    """Take [start, end) of a file out of every page table (unmap_mapping_range, hugetlb_vmdelete_list)."""
    kernel = file.kernel
    for mm, vma in kernel.mappings(file):
        low = max(vma.start, vma.start + start - vma.offset)
        high = min(vma.end, vma.start + end - vma.offset)
        if low >= high:
            continue
        if vma.hugetlb:
            _zap_hugetlb(mm, low, high, drop_markers=private_too)
        else:
            zap(mm, vma, low, high, private_too=private_too)


def punch(file: File, offset: int, length: int) -> None:
    """fallocate(FALLOC_FL_PUNCH_HOLE): the pages leave the cache and every mapping. No event is sent (E2)."""
    size = file.page_size
    first, last = round_up(offset, size), (offset + length) // size * size
    for edge in (offset, offset + length):
        if edge % HUGE_PAGE:
            file.split_folio(edge // size)
    if first < last:
        unmap_file(file, first, last, private_too=False)
        for index in [i for i in file.pages if first <= i * size < last]:
            file.drop(index)
            file.huge_folios.discard(index // 512 * 512)
    edges = [(offset, min(first, offset + length)), (max(last, first, offset), offset + length)]
    for low, high in edges:
        if low < high and low // size in file.pages and (low, high) != (first, last):
            file.write(low, bytes(high - low))


def truncate(file: File, size: int) -> None:
    """ftruncate(2): what lies beyond the new end leaves the cache and every mapping, private copies too."""
    old = file.size
    file.size = size
    if size >= old:
        return
    unit = file.page_size
    if size % HUGE_PAGE:
        file.split_folio(size // unit)
    first = round_up(size, unit)
    unmap_file(file, first, round_up(max(old, first), unit) + unit, private_too=True)
    for index in [i for i in file.pages if i * unit >= first]:
        file.drop(index)
    if size % unit and size // unit in file.pages:
        page = file.page(size // unit)
        assert page is not None
        page.content = page.content.write(size % unit, bytes(unit - size % unit), unit)
