"""hugetlb memory: pages of 2 MiB from a pool, faults, and page tables that mappings share.

Differences that show: no zero page, so ZEROPAGE does not exist; a MISSING or MINOR message per 2 MiB; a
poison that pagemap does not show (H2); page tables shared between mappings of one file (H1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import ZERO
from userfault.model.fault import DONE, MINOR, MISSING, RETRY, WP, Verdict, asynchronous, reusable
from userfault.model.layout import HUGE_PAGE, PUD_SPAN, round_down
from userfault.model.page import Page
from userfault.model.pagetable import Entry, Marker, PmdTable, Present, PteTable

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


def entry_of(mm: AddressSpace, address: int) -> Entry | None:
    """The entry of a hugetlb address (huge_ptep_get)."""
    entry = mm.table.pmd(address)
    assert type(entry) is not PteTable
    return entry


def fault(mm: AddressSpace, vma: Vma, address: int, write: bool) -> Verdict:
    """hugetlb_fault: the same order of checks as for small pages."""
    table_alloc(mm, vma, address)
    entry = entry_of(mm, address)
    if type(entry) is Marker and entry.poison:
        return Verdict.POISON
    if entry is None or type(entry) is Marker:
        return _no_page(mm, vma, address, write, entry)
    assert type(entry) is Present
    if not write or entry.write:
        return DONE
    if vma.modes.wp and entry.uffd_wp:
        if not asynchronous(vma):
            return WP
        entry = entry._replace(uffd_wp=False)
    elif entry.uffd_wp:
        # hugetlb_wp never copies a protected page and nobody is registered to lift the protection: the
        # writer faults for ever, without a message (R8).
        return Verdict.SPIN
    return _make_writable(mm, vma, address, entry)


def _no_page(mm: AddressSpace, vma: Vma, address: int, write: bool, marker: Entry | None) -> Verdict:
    """hugetlb_no_page. `marker`: a write-protect marker that the new page keeps, whoever is registered."""
    file = vma.file
    assert file is not None
    index = vma.index(address)
    protect = marker is not None
    if not file.cached(index):
        if vma.beyond_end_of_file(address):
            return Verdict.SIGBUS
        if vma.modes.missing:
            return MISSING
        if vma.shared:
            page = file.add(index)
        else:
            mm.prepare_anonymous(vma)
            page = new_private_page(mm)
        if page is None:
            return Verdict.SIGBUS
    else:
        page = file.page(index)
        assert page is not None
        if vma.modes.minor:
            if "minor_leak" in mm.kernel.defects:  # history.md 7
                page.held += 1
            return MINOR
    entry = Present(page, write=vma.shared and vma.write and not protect, uffd_wp=protect)
    mm.table.set_pmd(address, entry)
    if not write or entry.write:
        return DONE
    if protect:
        return RETRY  # the second fault finds a protected page
    return _make_writable(mm, vma, address, entry)


def new_private_page(mm: AddressSpace) -> Page | None:
    """A zeroed page of the pool that belongs to no file; None: the pool is empty."""
    return Page(ZERO, HUGE_PAGE, exclusive=True) if mm.kernel.hugetlb.take() else None


def _make_writable(mm: AddressSpace, vma: Vma, address: int, entry: Present) -> Verdict:
    """hugetlb_wp: reuse the page, or copy it if others have it."""
    page = entry.page
    if vma.shared or (page.anonymous and reusable(page)):
        page.exclusive = page.anonymous
        mm.table.set_pmd(address, entry._replace(write=True))
        return DONE
    copy = new_private_page(mm)
    if copy is None:
        return Verdict.SIGBUS
    copy.content = page.content
    mm.prepare_anonymous(vma)
    mm.table.set_pmd(address, Present(copy, write=True))
    return DONE


# Sharing of page tables (huge_pmd_share): one table for a whole aligned GiB of a shared file mapping.


def may_share(mm: AddressSpace, vma: Vma, address: int) -> bool:
    """want_pmd_share: a shared mapping that covers the whole aligned GiB and has no userfaultfd mode that
    needs entries of its own: W (since 5.13, c1991e0705d1) and MINOR (5.13, 0d9cadabd193). MISSING alone
    keeps sharing."""
    low = round_down(address, PUD_SPAN)
    if not vma.shared or low < vma.start or low + PUD_SPAN > vma.end:
        return False
    if (vma.offset + low - vma.start) % PUD_SPAN:
        return False
    return not _needs_its_own(mm, vma)


def _needs_its_own(mm: AddressSpace, vma: Vma) -> bool:
    """uffd_disable_huge_pmd_share."""
    defects = mm.kernel.defects
    by_wp = vma.modes.wp and "pmd_share_wp" not in defects and "pmd_unshare_skips" not in defects
    return by_wp or (vma.modes.minor and "pmd_share_minor" not in defects)


def table_alloc(mm: AddressSpace, vma: Vma, address: int) -> PmdTable:
    """huge_pte_alloc: the middle-level table of the address, shared with another mapping where that may
    be."""
    table = mm.table.pmd_table(address)
    if table is not None:
        return table
    if may_share(mm, vma, address):
        low = round_down(address, PUD_SPAN)
        at = vma.offset + low - vma.start
        for other, theirs in mm.kernel.mappings(vma.file):
            their_low = theirs.start + at - theirs.offset
            if (other is mm and theirs is vma) or not may_share(other, theirs, their_low):
                continue
            found = other.table.pmd_table(their_low)
            if found is not None:
                found.sharers += 1
                mm.table.pmds[address // PUD_SPAN] = found
                return found
    return mm.table.pmd_table_alloc(address)


def unshare(mm: AddressSpace, address: int) -> bool:
    """huge_pmd_unshare: leave a shared table. The range is empty afterwards; nothing of the others
    changes."""
    table = mm.table.pmd_table(address)
    if table is None or table.sharers == 1:
        return False
    table.sharers -= 1
    del mm.table.pmds[address // PUD_SPAN]
    return True


def unshare_all(mm: AddressSpace, vma: Vma) -> None:
    """hugetlb_unshare_all_pmds, at registration of W or MINOR."""
    if not _needs_its_own(mm, vma):
        return
    for at in range(round_down(vma.start, PUD_SPAN), vma.end, PUD_SPAN):
        unshare(mm, at)
