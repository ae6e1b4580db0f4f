"""UFFDIO_WRITEPROTECT (5.7): protect or unprotect what a range maps, without splitting VMAs.

Unlike the fills it walks over VMAs: it skips holes, spans VMAs and owners, and stops with ENOENT at the
first VMA that is not registered W, after the earlier ones were changed [W2]. `protect` here is
change_protection with MM_CP_UFFD_WP or MM_CP_UFFD_WP_RESOLVE; UNREGISTER and close use it too.

    entry        protect                                            unprotect
    present      uffd-wp set, not writable                          uffd-wp cleared; a fault makes it writable
    swap         uffd-wp set                                        uffd-wp cleared
    wp marker    stays                                              none
    poison       stays                                              stays [F14]
    none         file: wp marker; anonymous: only with              none
                 WP_UNPOPULATED (6.4) or WP_ASYNC, else nothing
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import Context
from userfault.model.errnos import EAGAIN, EFAULT, EINVAL, ENOENT, ESRCH
from userfault.model.layout import HUGE_PAGE, PAGE, PUD_SPAN
from userfault.model.pagetable import WP_MARKER, Entry, Marker, Present
from userfault.model.reply import Reply, range_is_valid, refused_before_handshake
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


def writeprotect(thread: Thread, ctx: Context, start: int, length: int, mode: int | None) -> Op[Reply]:
    """UFFDIO_WRITEPROTECT (userfaultfd_writeprotect). `mode` None: the argument cannot be read.

    It has no result field, so a pending event is EAGAIN before the argument is read [E4]. Unprotecting wakes
    the range unless DONTWAKE; protecting wakes nobody [W5].
    """
    refused = refused_before_handshake(ctx)
    if refused:
        return refused
    heeds_events = "wp_ignores_changing" not in ctx.kernel.defects
    yield "WRITEPROTECT: look at mmap_changing"
    if heeds_events and ctx.changing:
        return Reply(EAGAIN)
    if mode is None:
        return Reply(EFAULT)
    wp, dontwake = (
        bool(mode & abi.UFFDIO_WRITEPROTECT_MODE_WP),
        bool(mode & abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE),
    )
    if not range_is_valid(start, length) or mode & ~3 or (wp and dontwake):
        return Reply(EINVAL)
    mm = ctx.mm
    if not mm.alive:
        return Reply(ESRCH)
    yield from mm.mmap_lock.read("WRITEPROTECT")
    yield from ctx.map_changing_lock.read("WRITEPROTECT")
    yield f"WRITEPROTECT: {'protect' if wp else 'unprotect'} {start:#x} to {start + length:#x}"
    errno = EAGAIN if heeds_events and ctx.changing else _range(mm, start, length, wp)
    ctx.map_changing_lock.unread()
    mm.mmap_lock.unread()
    ctx.kernel.note(f"WRITEPROTECT of {length} bytes at {start:#x}: errno {errno}")
    if errno == 0 and not wp and not dontwake:
        yield f"WRITEPROTECT: wake {start:#x} to {start + length:#x}"
        ctx.wake(start, length)
    return Reply(errno)


def _range(mm: AddressSpace, start: int, length: int, wp: bool) -> int:
    """mwriteprotect_range: 0 or an errno."""
    end = start + length
    if mm.kernel.version < (6, 4):  # one VMA had to hold the whole range
        vma = mm.find(start)
        if vma is None or vma.uffd is None or end > vma.end or not vma.modes.wp:
            return ENOENT
    errno = ENOENT
    for vma, low, high in mm.each(start, end):
        if not vma.modes.wp:
            return ENOENT
        if vma.hugetlb and (start % HUGE_PAGE or length % HUGE_PAGE):
            return EINVAL
        protect(mm, vma, low, high, wp)
        errno = 0
    return errno


def protect(mm: AddressSpace, vma: Vma, start: int, end: int, wp: bool) -> None:
    """Set or clear the protection of a part of one VMA (uffd_wp_range)."""
    if vma.hugetlb:
        _protect_hugetlb(mm, vma, start, end, wp)
        return
    markers = wp and use_markers(vma)
    at = start
    while at < end:
        upto = min((at // HUGE_PAGE + 1) * HUGE_PAGE, end)
        pmd = mm.table.pmd(at)
        if type(pmd) is Present:
            if upto - at == HUGE_PAGE and not (wp and not vma.anonymous):
                mm.table.set_pmd(at, _changed(pmd, wp))
                at = upto
                continue
            from userfault.model.thp import split_pmd

            split_pmd(mm, vma, at)
        if markers:
            mm.table.pte_table_alloc(at)
        table = mm.table.pte_table(at)
        if table is not None and (markers or table.entries):
            for address in range(at, upto, PAGE):
                key = (address // PAGE) & 511
                entry = table.entries.get(key)
                changed = _changed_entry(entry, wp, markers)
                if changed is not entry:
                    if changed is None:
                        del table.entries[key]
                    else:
                        table.entries[key] = changed
        at = upto


def use_markers(vma: Vma) -> bool:
    """userfaultfd_wp_use_markers: an empty entry is worth a marker (5.19)."""
    if not vma.modes.wp or vma.uffd is None or vma.uffd.kernel.version < (5, 19):
        return False
    return not vma.anonymous or vma.uffd.wp_unpopulated


def _changed_entry(entry: Entry | None, wp: bool, markers: bool) -> Entry | None:
    if entry is None:
        return WP_MARKER if markers else None
    if type(entry) is Marker:
        return None if entry.uffd_wp and not wp else entry
    return _changed(entry, wp)


def _changed(entry: Entry, wp: bool) -> Entry:
    """An entry with a page: the page stays the same, so its count of mappings does too."""
    if type(entry) is Present:
        return Present(entry.page, entry.write and not wp, wp)
    return entry._replace(uffd_wp=wp)


def _protect_hugetlb(mm: AddressSpace, vma: Vma, start: int, end: int, wp: bool) -> None:
    """hugetlb_change_protection. A shared table is left first (defect pmd_unshare_skips: and then
    skipped)."""
    from userfault.model import hugetlb

    at = start
    while at < end:
        if hugetlb.unshare(mm, at):
            at = (at // PUD_SPAN + 1) * PUD_SPAN
            continue
        if mm.table.pmd_table(at) is None:
            if not wp:
                at = (at // PUD_SPAN + 1) * PUD_SPAN
                continue
            hugetlb.table_alloc(mm, vma, at)
        entry = hugetlb.entry_of(mm, at)
        markers = wp and mm.kernel.version >= (5, 19)
        changed = _changed_entry(entry, wp, markers)
        if changed is not entry:
            mm.table.set_pmd(at, changed)
        at += HUGE_PAGE
