"""Transparent huge pages: one middle-level entry that maps 2 MiB of anonymous memory or shmem.

A huge entry is split into 512 small ones whenever something treats its pages differently: a registration or a
protection of a part, an eviction of a part, a write under WP_ASYNC (S4, S6, W6, H4). Fill operations never
make huge entries, and only MOVE moves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import ZERO
from userfault.model.fault import DONE, MISSING, WP, Verdict, asynchronous, reusable
from userfault.model.layout import HUGE_PAGE, PAGE, round_down
from userfault.model.page import Page
from userfault.model.pagetable import Entry, Present, PteTable

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


def suitable(vma: Vma, address: int) -> bool:
    """The VMA wants huge pages and the whole one around the address lies in it (THP is on madvise here)."""
    base = round_down(address, HUGE_PAGE)
    return vma.hugepage is True and vma.start <= base and base + HUGE_PAGE <= vma.end


def fault(
    mm: AddressSpace, vma: Vma, address: int, write: bool, pmd: PteTable | Entry | None
) -> Verdict | None:
    """A fault where no page table of small pages is. None: go on with small pages."""
    if pmd is None:
        if vma.anonymous and suitable(vma, address):
            return _first_touch(mm, vma, address, write)
        if vma.shmem:
            return _map_huge_folio(mm, vma, address)
        return None
    assert type(pmd) is Present, "a huge entry of ordinary memory is present"
    if not write or pmd.write:
        return DONE
    return _write_protected(mm, vma, address, pmd)


def _first_touch(mm: AddressSpace, vma: Vma, address: int, write: bool) -> Verdict:
    """do_huge_pmd_anonymous_page: MISSING asks; otherwise the whole huge page, or the huge zero page."""
    if vma.modes.missing:
        return MISSING
    if write:
        mm.prepare_anonymous(vma)
        mm.table.set_pmd(address, Present(Page(ZERO, HUGE_PAGE, exclusive=True), write=True))
    else:
        mm.table.set_pmd(address, Present(mm.kernel.huge_zero_page, write=False))
    return DONE


def _map_huge_folio(mm: AddressSpace, vma: Vma, address: int) -> Verdict | None:
    """do_set_pmd: a huge folio of shmem is mapped whole where the VMA allows; it is one folio, so MINOR asks
    about it as about any cached page, and a W registration keeps it in small pages."""
    file = vma.file
    assert file is not None
    base = round_down(address, HUGE_PAGE)
    if base < vma.start or base + HUGE_PAGE > vma.end or vma.modes.wp or vma.modes.minor:
        return None
    if vma.index(base) not in file.huge_folios or not vma.shared:
        return None
    mm.table.set_pmd(address, Present(_folio(vma, base), write=vma.write))
    return DONE


def _folio(vma: Vma, base: int) -> Page:
    file = vma.file
    assert file is not None
    page = file.page(vma.index(base))
    assert page is not None
    return page


def _write_protected(mm: AddressSpace, vma: Vma, address: int, pmd: Present) -> Verdict | None:
    """wp_huge_pmd, do_huge_pmd_wp_page."""
    if vma.modes.wp and pmd.uffd_wp:
        if not asynchronous(vma):
            return WP
        split_pmd(mm, vma, address)
        return None
    page = pmd.page
    if page.zero:
        if mm.kernel.version < (6, 13):  # the huge zero page was split, and one small page made
            split_pmd(mm, vma, address)
            return None
        mm.prepare_anonymous(vma)
        mm.table.set_pmd(address, Present(Page(ZERO, HUGE_PAGE, exclusive=True), write=True))
        return DONE
    if vma.shared or reusable(page):
        page.exclusive = page.anonymous
        mm.table.set_pmd(address, pmd._replace(write=True))
        return DONE
    split_pmd(mm, vma, address)
    return None


def split_pmd(mm: AddressSpace, vma: Vma, address: int) -> None:
    """Replace the huge entry around the address, if there is one, by 512 small ones (__split_huge_pmd).

    Anonymous pages stay mapped. A huge entry of a file is simply dropped: its pages are in the cache and will
    fault again.
    """
    pmd = mm.table.pmd(address)
    if type(pmd) is not Present or vma.hugetlb:
        return
    base = round_down(address, HUGE_PAGE)
    mm.table.set_pmd(base, None)
    if pmd.page.file is not None:
        return
    table = mm.table.pte_table_alloc(base)
    if pmd.page.zero:
        small = mm.kernel.zero_page
        for i in range(HUGE_PAGE // PAGE):
            table.entries[i] = Present(small, write=False, uffd_wp=pmd.uffd_wp)
        return
    content = pmd.page.content
    for i in range(HUGE_PAGE // PAGE):
        page = Page(content.part(i * PAGE, PAGE), exclusive=pmd.page.exclusive)
        page.mapcount = pmd.page.mapcount + 1
        table.entries[i] = Present(page, pmd.write, pmd.uffd_wp)
