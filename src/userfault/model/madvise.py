"""madvise(2): advice that takes pages away, brings them, or changes a mapping's flags.

    DONTNEED, DONTNEED_LOCKED, FREE   REMOVE event first, then the pages go [E1, E6]
    REMOVE                            REMOVE event, then a hole in the file
    PAGEOUT, COLD, COLLAPSE, GUARD_*  no event, even where pages leave the page table [E2]
    POPULATE_READ, POPULATE_WRITE     faults, page by page [P12]

The event is read before the pages go: a fill that is accepted after the read can still be thrown away by the
zap, which is why fills are refused until the caller has gone on (mmap_changing is counted down by the
caller).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from userfault.model import events
from userfault.model.access import MemoryFault, fault, translate
from userfault.model.errnos import EACCES, EFAULT, EHWPOISON, EINVAL, ENOMEM, SystemCallError
from userfault.model.fault import Verdict
from userfault.model.layout import HUGE_PAGE, PAGE, round_down, round_up
from userfault.model.mm import AddressSpace
from userfault.model.page import SwapSlot
from userfault.model.pagetable import GUARD_MARKER, WP_MARKER, Marker, Present, Swap
from userfault.model.step import Op, Spin
from userfault.model.thp import split_pmd
from userfault.model.vma import Vma
from userfault.model.zap import punch, zap

if TYPE_CHECKING:
    from userfault.model.thread import Thread

_Advise = Callable[["Thread", AddressSpace, Vma, int, int], Op[None]]


def madvise(thread: Thread, address: int, length: int, advice: str) -> Op[None]:
    """madvise(2). `advice`: the constant's name without MADV_. Raises SystemCallError.

    Walks over the VMAs; holes make the result ENOMEM after the rest was done.
    """
    mm = thread.process.mm
    end = address + round_up(length, PAGE)
    if address % PAGE or not _known(mm, advice):
        raise SystemCallError(EINVAL)
    if end == address:
        return
    if advice in ("POPULATE_READ", "POPULATE_WRITE"):
        yield from _populate_advice(thread, mm, address, end, advice == "POPULATE_WRITE")
        return
    at, hole = address, False
    while at < end:
        yield from mm.mmap_lock.read(f"madvise {advice}")
        vma = next((vma for vma in mm.vmas if vma.end > at), None)
        if vma is None or vma.start >= end:
            mm.mmap_lock.unread()
            hole = True
            break
        hole |= vma.start > at
        low, high = max(at, vma.start), min(end, vma.end)
        advise = _ADVICE.get(advice)
        if advise is not None:
            yield from advise(thread, mm, vma, low, high)
        else:
            _set_flag(mm, vma, low, high, advice)
            mm.mmap_lock.unread()
        at = high
    if advice in _FLAGS:
        mm.merge(address, end)
    if hole:
        raise SystemCallError(ENOMEM)


def _known(mm: AddressSpace, advice: str) -> bool:
    version = mm.kernel.version
    since = {
        "POPULATE_READ": (5, 14),
        "POPULATE_WRITE": (5, 14),
        "DONTNEED_LOCKED": (5, 18),
        "COLLAPSE": (6, 1),
        "GUARD_INSTALL": (6, 13),
        "GUARD_REMOVE": (6, 13),
    }
    return (advice in _ADVICE or advice in _FLAGS or advice in since) and version >= since.get(advice, (0, 0))


def _fail(mm: AddressSpace, errno: int) -> None:
    mm.mmap_lock.unread()
    raise SystemCallError(errno)


# Advice that takes pages away.


def _dontneed(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    yield from _zap_advice(thread, mm, vma, start, end, free=False, locked=False)


def _dontneed_locked(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    yield from _zap_advice(thread, mm, vma, start, end, free=False, locked=True)


def _free(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    yield from _zap_advice(thread, mm, vma, start, end, free=True, locked=False)


def _zap_advice(
    thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int, *, free: bool, locked: bool
) -> Op[None]:
    """madvise_dontneed_free. Everything is looked at again after the event, for the lock was dropped."""
    if not _may_zap(mm, vma, start, free=free, locked=locked):
        _fail(mm, EINVAL)
    if vma.hugetlb:
        end = round_down(end, HUGE_PAGE)
    dropped = start < end and (yield from events.remove(thread, mm, vma, start, end))
    if dropped:
        yield from mm.mmap_lock.read("madvise: after the event")
        again = mm.find(start)
        if again is None:
            _fail(mm, ENOMEM)
            return
        vma = again
        if not _may_zap(mm, vma, start, free=free, locked=locked):
            _fail(mm, EINVAL)
        end = min(end, vma.end)
    if free:
        if not vma.anonymous:  # too late: the event was sent [E2]
            _fail(mm, EINVAL)
        _mark_free(mm, vma, start, end)
    else:
        zap(mm, vma, start, end, reclaim_tables=True)
    mm.kernel.note(f"took the pages of {start:#x} to {end:#x}")
    mm.mmap_lock.unread()


def _may_zap(mm: AddressSpace, vma: Vma, start: int, *, free: bool, locked: bool) -> bool:
    """madvise_dontneed_free_valid_vma."""
    if vma.hugetlb:  # DONTNEED of hugetlb: 5.18
        return not free and start % HUGE_PAGE == 0 and mm.kernel.version >= (5, 18)
    return not vma.special and (locked or not vma.locked)


def _mark_free(mm: AddressSpace, vma: Vma, start: int, end: int) -> None:
    """madvise_free_single_vma: pages may be dropped under pressure, swap and poison go now."""
    for at, upto, pmd in list(mm.table.tables(start, end)):
        if type(pmd) is Present:
            if pmd.page.zero or pmd.page.mapcount > 1:
                continue  # madvise_free_huge_pmd: the huge zero page and a shared one stay as they are
            if upto - at == HUGE_PAGE:
                pmd.page.lazyfree = True
                continue
            split_pmd(mm, vma, at)
    for at, entry in list(mm.table.ptes(start, end)):
        if type(entry) is Present:
            entry.page.lazyfree = not entry.page.zero
        elif type(entry) is Swap or (type(entry) is Marker and entry.poison):
            mm.table.set_pte(at, None)


def _remove(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    """madvise_remove: a hole in the file behind a shared writable mapping."""
    if vma.locked or vma.file is None:
        _fail(mm, EINVAL)
    if not (vma.shared and vma.may_write):
        _fail(mm, EACCES)
    file, offset = vma.file, start - vma.start + vma.offset
    assert file is not None
    dropped = yield from events.remove(thread, mm, vma, start, end)
    if not dropped:
        mm.mmap_lock.unread()
    yield "punch the hole"
    punch(file, offset, end - start)


def _cold(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    """Only moves pages on the kernel's lists."""
    yield "COLD"
    if vma.locked or vma.hugetlb or vma.special:
        _fail(mm, EINVAL)
    mm.mmap_lock.unread()


def _pageout(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    """Reclaim pages that only this mapping has. No event; protection survives: in the swap entry for private
    pages, as a marker for pages of a file [P5, E6]."""
    yield "PAGEOUT"
    if vma.locked or vma.hugetlb or vma.special:
        _fail(mm, EINVAL)
    for at, _, pmd in list(mm.table.tables(start, end)):
        # A huge page is reclaimed as a whole, and comes back in small pages: as if it were split first.
        if type(pmd) is Present and not pmd.page.zero and pmd.page.mapcount == 1 and mm.kernel.swap:
            split_pmd(mm, vma, round_down(at, HUGE_PAGE))
    for at, entry in list(mm.table.ptes(start, end)):
        if type(entry) is not Present or entry.page.zero or entry.page.mapcount != 1:
            continue
        if entry.page.size != PAGE:
            continue  # a huge folio stays
        page, swap = entry.page, mm.kernel.swap
        if page.file is None:
            if swap:
                slot = SwapSlot(page.content, exclusive=page.exclusive)
                mm.table.set_pte(at, Swap(slot, entry.uffd_wp))
            continue
        mm.table.set_pte(at, WP_MARKER if entry.uffd_wp and vma.modes.wp else None)
        if swap and page.file.kind == "shmem":
            page.file.pages[vma.index(at)] = SwapSlot(page.content)
    mm.mmap_lock.unread()


# Guards (6.13, files 6.15).


def _guard_install(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    """Install guards where nothing is; where something is, zap and try again. A zap leaves a write-protect
    marker of a file page behind, and then it never ends (E15)."""
    if vma.locked or vma.hugetlb or vma.special:
        _fail(mm, EINVAL)
    mm.prepare_anonymous(vma)

    def install() -> bool:
        for at in range(start, end, PAGE):
            if type(mm.table.pmd(at)) is Present or mm.table.pte(at) not in (None, GUARD_MARKER):
                return False
            mm.table.pte_table_alloc(at)
            mm.table.set_pte(at, GUARD_MARKER)
        return True

    def protected() -> bool:
        return any(type(entry) is Marker and entry.uffd_wp for _, entry in mm.table.ptes(start, end))

    while not install():
        yield "GUARD_INSTALL: zap what is in the way"
        zap(mm, vma, start, end)
        if protected():
            install()
            yield Spin("GUARD_INSTALL repeats for ever: a wp marker survives every zap", protected)
    vma.guarded = True
    mm.mmap_lock.unread()


def _guard_remove(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    yield "GUARD_REMOVE"
    if vma.hugetlb or vma.special:
        _fail(mm, EINVAL)
    for at, entry in list(mm.table.ptes(start, end)):
        if type(entry) is Marker and entry.guard:
            mm.table.set_pte(at, None)
    mm.mmap_lock.unread()


def _collapse(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[None]:
    from userfault.model.collapse import collapse

    yield "COLLAPSE"
    errno = collapse(mm, vma, start, end)
    mm.mmap_lock.unread()
    if errno:
        raise SystemCallError(errno)


# Advice that brings pages.


def _populate_advice(thread: Thread, mm: AddressSpace, start: int, end: int, write: bool) -> Op[None]:
    """MADV_POPULATE_* (madvise_populate): stops at EHWPOISON at poison, EFAULT where nobody may be asked,
    ENOMEM at a hole."""
    at = start
    while at < end:
        vma = mm.find(at)
        if vma is None:
            raise SystemCallError(ENOMEM)
        if write and not vma.write:
            raise SystemCallError(EINVAL)
        upto = min(vma.end, end)
        try:
            yield from populate(thread, mm, vma, at, upto, write)
        except MemoryFault as refused:
            raise SystemCallError(EHWPOISON if refused.verdict is Verdict.POISON else EFAULT) from refused
        at = upto


def populate(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int, write: bool) -> Op[None]:
    """populate_vma_page_range: fault in page by page, in address order, as the kernel does for a system call.
    Raises MemoryFault at the first page that cannot be had."""
    at = start
    while at < end:
        yield f"populate {at:#x}"
        if translate(mm, at, write) is None:
            yield from fault(thread, mm, at, write=write, user=False)
            continue
        at = round_down(at, vma.page_size) + vma.page_size


def mlock(thread: Thread, address: int, length: int, *, on_fault: bool = False) -> Op[None]:
    """mlock(2), mlock2(MLOCK_ONFAULT): private writable memory is faulted in by writes, shared by reads; what
    cannot be had is ENOMEM [P12]. Raises SystemCallError."""
    mm = thread.process.mm
    start, end = round_down(address, PAGE), round_up(address + length, PAGE)
    yield from mm.mmap_lock.write("mlock")
    vmas = mm.carve(start, end)
    for vma in vmas:
        if not vma.hugetlb:
            vma.locked = True
            vma.lock_on_fault = on_fault
    mm.merge(start, end)
    mm.mmap_lock.unwrite()
    if on_fault:
        return
    for vma, low, high in list(mm.each(start, end)):
        try:
            yield from populate(thread, mm, vma, low, high, vma.write and not vma.shared)
        except MemoryFault as refused:
            raise SystemCallError(ENOMEM) from refused


# Advice that changes flags.

_FLAGS: dict[str, tuple[str, bool]] = {
    "DONTFORK": ("dontfork", True),
    "DOFORK": ("dontfork", False),
    "WIPEONFORK": ("wipeonfork", True),
    "KEEPONFORK": ("wipeonfork", False),
    "HUGEPAGE": ("hugepage", True),
    "NOHUGEPAGE": ("hugepage", False),
    "MERGEABLE": ("mergeable", True),
    "UNMERGEABLE": ("mergeable", False),
}


def _set_flag(mm: AddressSpace, vma: Vma, start: int, end: int, advice: str) -> None:
    """madvise_vma_behavior for flags."""
    if advice == "WIPEONFORK" and (vma.file is not None or vma.shared):
        _fail(mm, EINVAL)
    if advice == "MERGEABLE" and (vma.shared or vma.hugetlb or vma.special):
        return  # ignored
    flag, value = _FLAGS[advice]
    if getattr(vma, flag) is value:
        return  # nothing to do, and nothing is cut: a huge page over the edge of the range stays whole
    for piece in mm.carve(start, end):
        setattr(piece, flag, value)


_ADVICE: dict[str, _Advise] = {
    "DONTNEED": _dontneed,
    "DONTNEED_LOCKED": _dontneed_locked,
    "FREE": _free,
    "REMOVE": _remove,
    "COLD": _cold,
    "PAGEOUT": _pageout,
    "GUARD_INSTALL": _guard_install,
    "GUARD_REMOVE": _guard_remove,
    "COLLAPSE": _collapse,
}
