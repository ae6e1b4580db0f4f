"""What a touch of memory does: the order of checks of [P2], for every kind of memory.

`resolve` is one step under the page-table lock. Either the kernel can finish the fault alone (and does), or
it says who must be asked. It ports handle_mm_fault and what hangs below it:

    entry              a read                               a write
    poison             POISON                               POISON
    guard              SIGSEGV                              SIGSEGV
    none, wp marker    cached, registered MINOR: ask MINOR
                       not cached, registered MISSING: ask MISSING
                       else the kernel fills it (zero page, zeroed page, the cached page), and a wp marker
                       becomes the page's uffd-wp bit; a write goes on as for present
    swap               bring it in, then as present         bring it in, then as present
    present            done                                 uffd-wp set and registered W: ask WP
                                                            (WP_ASYNC: clear the bit and go on)
                                                            else make it writable, or copy it if it is shared

In private memory a swapped page is a `swap` entry, and counts as present. Shmem swaps in the page cache: the
entry is none (or, if it was protected, a wp marker) and the page counts as cached. So a write to a protected
page of shared shmem that was swapped out asks WP under MISSING|WP, and MINOR first if that is registered too.

Asking is the business of `handle_userfault`, which puts the message in the queue and sleeps.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from userfault.model.content import ZERO, Content
from userfault.model.layout import HUGE_PAGE, PAGE, round_down
from userfault.model.page import Page
from userfault.model.pagetable import Entry, Marker, Present, PteTable, Swap

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


class Verdict(enum.Enum):
    """What came of a fault."""

    DONE = "done"
    RETRY = "the entry changed, fault again"
    MISSING = "ask for a missing page"
    MINOR = "ask about a cached page that is not mapped"
    WP = "ask about a write to a protected page"
    SIGBUS = "no page can be had"
    SIGSEGV = "a guard page"
    POISON = "a poisoned page"
    NOMEM = "out of memory"
    SPIN = "the kernel retries for ever"


DONE, RETRY, MISSING, MINOR, WP = Verdict.DONE, Verdict.RETRY, Verdict.MISSING, Verdict.MINOR, Verdict.WP

FAULT_AROUND = 16 * PAGE  # fault_around_bytes


def resolve(mm: AddressSpace, vma: Vma, address: int, write: bool) -> Verdict:
    """Take a fault as far as the kernel can alone (handle_mm_fault). One atomic step."""
    if vma.hugetlb:
        from userfault.model import hugetlb

        return hugetlb.fault(mm, vma, address, write)
    pmd = mm.table.pmd(address)
    if type(pmd) is not PteTable:
        from userfault.model import thp

        verdict = thp.fault(mm, vma, address, write, pmd)
        if verdict is not None:
            return verdict
    entry = mm.table.pte(address)
    if entry is None:
        return _missing_page(mm, vma, address, write, None)
    if type(entry) is Marker:
        return _marker(mm, vma, address, write, entry)
    if type(entry) is Swap:
        entry = _swap_in(mm, vma, address, entry, write)
    assert type(entry) is Present
    if not write or entry.write:
        return DONE
    return _write_protected(mm, vma, address, entry)


def _marker(mm: AddressSpace, vma: Vma, address: int, write: bool, marker: Marker) -> Verdict:
    """handle_pte_marker: poison outranks everything (6.6), then guards (6.13), then write-protection."""
    if marker.poison:
        return Verdict.POISON
    if marker.guard:
        return Verdict.SIGSEGV
    if not vma.modes.wp:  # left over from a registration that is gone: drop it and fault again
        mm.table.set_pte(address, None)
        return RETRY
    return _missing_page(mm, vma, address, write, marker)


def _missing_page(mm: AddressSpace, vma: Vma, address: int, write: bool, marker: Entry | None) -> Verdict:
    """do_pte_missing. `marker`: a write-protect marker that the new page must keep."""
    protect = marker is not None
    if vma.anonymous:
        return _anonymous_page(mm, vma, address, write, protect)
    if vma.special:
        return Verdict.SIGBUS
    return _file_page(mm, vma, address, write, protect)


def _anonymous_page(mm: AddressSpace, vma: Vma, address: int, write: bool, protect: bool) -> Verdict:
    """do_anonymous_page: the zero page for a read, a zeroed page for a write; MISSING asks first."""
    mm.table.pte_table_alloc(address)
    if write:
        mm.prepare_anonymous(vma)
    if vma.modes.missing:
        return MISSING
    if not write:
        mm.table.set_pte(address, Present(mm.kernel.zero_page, write=False, uffd_wp=protect))
        return DONE
    page = Page(ZERO, exclusive=True)
    mm.table.set_pte(address, Present(page, write=not protect, uffd_wp=protect))
    return RETRY if protect else DONE


def fill_anonymous(mm: AddressSpace, vma: Vma, start: int, end: int, content: Content) -> int:
    """Write whole small pages of anonymous memory, faulting in what is not there; returns where it stopped:
    at `end`, or at the first entry that a write would have to ask or copy for. Within one last-level
    table."""
    entries = mm.table.pte_table_alloc(start).entries
    mm.prepare_anonymous(vma)
    for at in range(start, end, PAGE):
        key = (at // PAGE) & 511
        entry = entries.get(key)
        if entry is None:
            page = Page(content, exclusive=True)
            page.mapcount = 1
            entries[key] = Present(page, True)
        elif type(entry) is Present and entry.write:
            entry.page.content = content
        else:
            while type(entry) is not Present or not entry.write:
                if resolve(mm, vma, at, True) not in (DONE, RETRY):
                    return at
                entry = entries.get(key)
            entry.page.content = content
    return end


def _file_page(mm: AddressSpace, vma: Vma, address: int, write: bool, protect: bool) -> Verdict:
    """do_fault: shmem_fault finds or makes the cached page, finish_fault maps it or a private copy of it."""
    file = vma.file
    assert file is not None
    if not write and not (vma.modes.wp or vma.modes.minor):  # uffd_disable_fault_around
        fault_around(mm, vma, address)
        if mm.table.pte(address) is not None:
            return DONE
    if vma.beyond_end_of_file(address):
        return Verdict.SIGBUS
    index = vma.index(address)
    if write and not vma.shared:
        mm.prepare_anonymous(vma)
    if file.cached(index):
        if vma.modes.minor:
            if "minor_leak" in mm.kernel.defects:  # history.md 7: the looked-up page was not given back
                page = file.page(index)
                assert page is not None
                page.held += 1
            return MINOR
    elif vma.modes.missing:
        return MISSING
    page = cached_page(vma, address) or file.add(index)
    if page is None:
        return Verdict.SIGBUS
    if write and not vma.shared:  # do_cow_fault: the cache gets its page, the writer a private copy
        page = Page(file.part(index), exclusive=True)
        writable = True
    else:
        writable = vma.write and vma.shared and (write or not vma.modes.wp)  # vma_wants_writenotify
    mm.table.set_pte(address, Present(page, write=writable and not protect, uffd_wp=protect))
    return RETRY if write and protect else DONE


def cached_page(vma: Vma, address: int) -> Page | None:
    """The page of the file at an address. A huge folio can be mapped in parts only where file and addresses
    agree modulo 2 MiB; elsewhere it is split first."""
    file = vma.file
    assert file is not None
    index = vma.index(address)
    page = file.page(index)
    if page is not None and page.size != file.page_size and (vma.start - vma.offset) % HUGE_PAGE:
        file.split_folio(index)
        page = file.page(index)
    return page


def fault_around(mm: AddressSpace, vma: Vma, address: int) -> None:
    """do_fault_around: a read fault maps the cached pages of its 64 KiB neighbourhood where nothing is."""
    file = vma.file
    assert file is not None
    low = max(round_down(address, FAULT_AROUND), vma.start, round_down(address, HUGE_PAGE))
    high = min(round_down(address, FAULT_AROUND) + FAULT_AROUND, vma.end)
    for at in range(low, high, PAGE):
        if vma.beyond_end_of_file(at):
            break
        found = file.pages.get(vma.index(at))
        if type(found) is Page and found.size == file.page_size and mm.table.pte(at) is None:
            mm.table.set_pte(at, Present(found, write=vma.write and vma.shared))


def _swap_in(mm: AddressSpace, vma: Vma, address: int, entry: Swap, write: bool) -> Present:
    """do_swap_page: the uffd-wp bit survives; a write may go on at once if nobody shares the page."""
    slot = entry.slot
    page = Page(slot.content, exclusive=slot.exclusive or slot.references == 1)
    slot.references -= 1
    present = Present(page, write=write and page.exclusive and not entry.uffd_wp, uffd_wp=entry.uffd_wp)
    mm.table.set_pte(address, present)
    return present


def _write_protected(mm: AddressSpace, vma: Vma, address: int, entry: Present) -> Verdict:
    """do_wp_page: a write to an entry that does not let writes through.

    Only the entry's own bit makes it userfaultfd's business, not the VMA's registration (since 5.7,
    userfaultfd_pte_wp; defect wp_vma_only is the rule without that).
    """
    if vma.modes.wp and (entry.uffd_wp or "wp_vma_only" in mm.kernel.defects):
        if not asynchronous(vma):
            return WP
        entry = entry._replace(uffd_wp=False)  # WP_ASYNC (6.7): no message, the bit is the whole story
    page = entry.page
    if vma.shared or (page.anonymous and reusable(page)):
        page.exclusive = page.anonymous
        mm.table.set_pte(address, entry._replace(write=True))
        return DONE
    mm.prepare_anonymous(vma)
    content = (
        page.content if page.size == PAGE else page.content.part(address // PAGE * PAGE % page.size, PAGE)
    )
    mm.table.set_pte(address, Present(Page(content, exclusive=True), write=True))  # wp_page_copy
    return DONE


def reusable(page: Page) -> bool:
    """wp_can_reuse_anon_folio: nobody else maps the page, so the writer may have it."""
    return page.exclusive or page.mapcount == 1


def asynchronous(vma: Vma) -> bool:
    """userfaultfd_wp_async: the context resolves write-protect faults in the kernel."""
    return vma.uffd is not None and vma.uffd.wp_async
