"""/proc/PID/pagemap and the ioctl PAGEMAP_SCAN (6.7): how page table entries look from outside [P1, S1-S8].

            pagemap                     PAGEMAP_SCAN (4 KiB)          PAGEMAP_SCAN (hugetlb)
none        0                           WRITTEN (6.12: nothing)       HUGE: never WRITTEN (S4, hazards C2)
wp marker   SWAP, UFFD_WP               SWAPPED                       SWAPPED|HUGE; pagemap UFFD_WP alone
poison      SWAP                        SWAPPED|WRITTEN               the same; pagemap shows nothing (H2)
present     PRESENT, UFFD_WP, FILE      PRESENT, WRITTEN iff not +wp  PRESENT, WRITTEN iff not +wp
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from userfault import abi
from userfault.model.errnos import EFAULT, EINVAL, ENOTTY, EPERM
from userfault.model.layout import HUGE_PAGE, PAGE, PUD_SPAN, TASK_SIZE, round_up
from userfault.model.pagetable import WP_MARKER, Entry, Marker, Present, PteTable
from userfault.model.thp import split_pmd
from userfault.model.writeprotect import protect, use_markers

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


class PagemapEntry(NamedTuple):
    """One entry of /proc/PID/pagemap, without the frame number; `marker` is what a swap type shows."""

    present: bool = False
    swap: bool = False
    uffd_wp: bool = False
    file: bool = False
    exclusive: bool = False
    marker: Marker | None = None


def pagemap_entry(mm: AddressSpace, address: int) -> PagemapEntry:
    """What pagemap says about the page at the address (pagemap_pmd_range, pagemap_hugetlb_range)."""
    vma = mm.find(address)
    if vma is None:
        return PagemapEntry()
    entry = mm.table.entry(address)
    if entry is None:
        return PagemapEntry()
    if type(entry) is Present:
        page = entry.page
        table = mm.table.pmd_table(address)
        shared_table = mm.kernel.version >= (6, 2) and table is not None and table.sharers > 1
        return PagemapEntry(
            present=True,
            uffd_wp=entry.uffd_wp,
            file=page.file is not None or (page.zero and page.size == HUGE_PAGE),
            exclusive=page.mapcount == 1 and not page.zero and not shared_table,
        )
    if vma.hugetlb:
        return PagemapEntry(uffd_wp=entry.uffd_wp)
    return PagemapEntry(swap=True, uffd_wp=entry.uffd_wp, marker=entry if type(entry) is Marker else None)


class Scan(NamedTuple):
    """The argument of PAGEMAP_SCAN. vec_len 0: no vector; max_pages 0: no limit."""

    start: int
    end: int
    flags: int = 0
    category_mask: int = 0
    category_anyof_mask: int = 0
    category_inverted: int = 0
    return_mask: int = 0
    max_pages: int = 0
    vec_len: int = 16


class ScanReply(NamedTuple):
    """errno, how far the walk came (bytes; 0 if the argument was refused), and the regions found."""

    errno: int
    walk_end: int
    regions: list[abi.PageRegion]


def pagemap_scan(mm: AddressSpace, scan: Scan) -> ScanReply:
    """PAGEMAP_SCAN (do_pagemap_scan). One step: the walk holds the mmap lock."""
    if mm.kernel.version < (6, 7):
        return ScanReply(ENOTTY, 0, [])
    known = 0x1FF if mm.kernel.version >= (6, 13) else 0xFF  # GUARD came later
    masks = scan.category_mask | scan.category_anyof_mask | scan.category_inverted | scan.return_mask
    if scan.flags & ~3 or masks & ~known or scan.start % PAGE:
        return ScanReply(EINVAL, 0, [])
    if not scan.end - scan.start >= 0 or scan.end > TASK_SIZE:
        return ScanReply(EFAULT, 0, [])
    walk = _Walk(mm, scan)
    errno = walk.run()
    return ScanReply(errno, walk.end_at or scan.end, walk.regions)


class _Full(Exception):
    """The vector or max_pages is used up (ENOSPC)."""


class _Walk:
    """One walk over the range."""

    def __init__(self, mm: AddressSpace, scan: Scan) -> None:
        self.mm = mm
        self.scan = scan
        self.regions: list[abi.PageRegion] = []
        self.found = 0
        self.end_at = 0
        self.protects = bool(scan.flags & abi.PM_SCAN_WP_MATCHING)
        self.limit = scan.max_pages or 1 << 62

    def run(self) -> int:
        end = round_up(self.scan.end, PAGE)
        try:
            for vma, low, high in self.mm.each(self.scan.start, end):
                base = self._vma_category(vma)
                if base is None:
                    return EPERM
                if base < 0 or vma.special or not self._interesting_vma(base):
                    continue
                if vma.hugetlb:
                    self._hugetlb(vma, low, high, base)
                else:
                    self._small(vma, low, high, base)
        except _Full:
            pass
        return 0

    def _vma_category(self, vma: Vma) -> int | None:
        """pagemap_scan_test_walk. None: EPERM; -1: a VMA that cannot be protected is skipped in silence."""
        if vma.uffd is not None and vma.uffd.wp_async and use_markers(vma):
            return abi.PAGE_IS_WPALLOWED
        if self.scan.flags & abi.PM_SCAN_CHECK_WPASYNC:
            return None
        return -1 if self.protects else 0

    def _interesting_vma(self, category: int) -> bool:
        required = self.scan.category_mask & abi.PAGE_IS_WPALLOWED
        category ^= self.scan.category_inverted
        return category & required == required

    def _interesting(self, categories: int) -> bool:
        categories ^= self.scan.category_inverted
        mask, anyof = self.scan.category_mask, self.scan.category_anyof_mask
        return categories & mask == mask and (not anyof or bool(categories & anyof))

    def _output(self, categories: int, start: int, end: int) -> tuple[int, bool]:
        """pagemap_scan_output: report a run. Returns where it was cut, and whether a limit is reached."""
        if not self.scan.vec_len:
            return end, False
        pages = (end - start) // PAGE
        full = self.found + pages > self.limit
        if full:
            pages = self.limit - self.found
            end = start + pages * PAGE
        if end > start:
            shown = categories & self.scan.return_mask
            last = self.regions[-1] if self.regions else None
            if last is not None and last.end == start and last.categories == shown:
                self.regions[-1] = abi.PageRegion(last.start, end, shown)
            elif len(self.regions) == self.scan.vec_len:
                end, pages, full = start, 0, True
            else:
                self.regions.append(abi.PageRegion(start, end, shown))
        self.found += pages
        if full:
            self.end_at = end
        return end, full

    def _take_back(self, start: int, end: int) -> None:
        """pagemap_scan_backout_range: the run that was reported last is not reported after all."""
        last = self.regions.pop()
        if last.start < start:
            self.regions.append(abi.PageRegion(last.start, start, last.categories))
        self.found -= (end - start) // PAGE

    def _small(self, vma: Vma, low: int, high: int, base: int) -> None:
        at = low
        while at < high:
            upto = min((at // HUGE_PAGE + 1) * HUGE_PAGE, high)
            pmd = self.mm.table.pmd(at)
            if pmd is None:
                self._hole(vma, at, upto, base)
            elif type(pmd) is PteTable:
                self._table(vma, at, upto, base, pmd)
            else:
                assert type(pmd) is Present
                self._huge_page(vma, at, upto, base, pmd)
            at = upto

    def _hole(self, vma: Vma, low: int, high: int, base: int) -> None:
        """pagemap_scan_pte_hole: no page table at all."""
        categories = base | self._none_category(vma)
        if not self._interesting(categories):
            return
        cut, full = self._output(categories, low, high)
        if self.protects and cut > low:
            protect(self.mm, vma, low, cut, True)
        if full:
            raise _Full

    def _none_category(self, vma: Vma) -> int:
        """What an entry without a table counts as: it was never protected, so a W range calls it written."""
        if self.mm.kernel.version < (6, 18) or not vma.modes.wp:
            return 0
        return abi.PAGE_IS_WRITTEN

    def _huge_page(self, vma: Vma, low: int, high: int, base: int, pmd: Present) -> None:
        """pagemap_scan_thp_entry: a whole huge page stays huge, a part is split before it is protected."""
        categories = base | _categories(pmd) | abi.PAGE_IS_HUGE
        if not self._interesting(categories):
            return
        cut, full = self._output(categories, low, high)
        if cut > low and self.protects and categories & abi.PAGE_IS_WRITTEN:
            if cut - low < HUGE_PAGE:
                split_pmd(self.mm, vma, low)
                if self.scan.vec_len:
                    self._take_back(low, cut)
                self.end_at = 0
                table = self.mm.table.pte_table(low)
                assert table is not None
                self._table(vma, low, high, base, table)
                return
            protect(self.mm, vma, low, cut, True)
        if full:
            raise _Full

    def _table(self, vma: Vma, low: int, high: int, base: int, table: PteTable) -> None:
        scan = self.scan
        only_written = (
            scan.category_mask == scan.return_mask == abi.PAGE_IS_WRITTEN
            and not scan.category_anyof_mask
            and not scan.category_inverted
        ) or (self.protects and not scan.vec_len)
        for at in range(low, high, PAGE):
            entry = table.entries.get((at // PAGE) & 511)
            if only_written:
                if entry is not None and entry.uffd_wp:
                    continue
                categories = base | abi.PAGE_IS_WRITTEN
            else:
                categories = base | self._entry_categories(entry)
                if not self._interesting(categories):
                    continue
            cut, _ = self._output(categories, at, at + PAGE)
            if cut == at:
                raise _Full
            if self.protects and categories & abi.PAGE_IS_WRITTEN:
                _protect_entry(self.mm, vma, at, entry)

    def _entry_categories(self, entry: Entry | None) -> int:
        if entry is None:
            return abi.PAGE_IS_WRITTEN if self.mm.kernel.version >= (6, 18) else 0
        return _categories(entry)

    def _hugetlb(self, vma: Vma, low: int, high: int, base: int) -> None:
        """pagemap_scan_hugetlb_entry: a hole gets no marker; a part of a page cannot be protected, and then
        the walk goes on without it [S5]."""
        at = low
        while at < high:
            if self.mm.table.pmd_table(at) is None:
                upto = min((at // PUD_SPAN + 1) * PUD_SPAN, high)
                self._hole_of_hugetlb(vma, at, upto, base)
                at = upto
                continue
            upto = min((at // HUGE_PAGE + 1) * HUGE_PAGE, high)
            entry = self.mm.table.pmd(at)
            assert type(entry) is not PteTable
            categories = base | abi.PAGE_IS_HUGE | (0 if entry is None else _categories(entry))
            if self._interesting(categories):
                cut, full = self._output(categories, at, upto)
                if cut > at and self.protects and categories & abi.PAGE_IS_WRITTEN:
                    if cut - at < HUGE_PAGE:
                        if self.scan.vec_len:
                            self._take_back(at, cut)
                        self.end_at, full = at, False
                    else:
                        protect(self.mm, vma, at, upto, True)
                if full:
                    raise _Full
            at = upto

    def _hole_of_hugetlb(self, vma: Vma, low: int, high: int, base: int) -> None:
        if not self._interesting(base):
            return
        cut, full = self._output(base, low, high)
        if self.protects and cut > low:
            protect(self.mm, vma, low, cut, True)
        if full:
            raise _Full


def _protect_entry(mm: AddressSpace, vma: Vma, at: int, entry: Entry | None) -> None:
    """make_uffd_wp_pte: holes get markers, poison is left alone."""
    if entry is None:
        if use_markers(vma):
            mm.table.set_pte(at, WP_MARKER)
    else:
        protect(mm, vma, at, at + PAGE, True)


def _categories(entry: Entry) -> int:
    """pagemap_page_category, pagemap_thp_category, pagemap_hugetlb_category."""
    written = 0 if entry.uffd_wp else abi.PAGE_IS_WRITTEN
    if type(entry) is Present:
        categories = written | abi.PAGE_IS_PRESENT
        if entry.page.zero:
            categories |= abi.PAGE_IS_PFNZERO
        elif entry.page.file is not None:
            categories |= abi.PAGE_IS_FILE
        return categories
    guard = abi.PAGE_IS_GUARD if type(entry) is Marker and entry.guard else 0
    return written | abi.PAGE_IS_SWAPPED | guard
