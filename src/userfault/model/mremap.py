"""mremap(2): moving, growing and shrinking a mapping [E1, E6, E7].

moving      REMAP(from, to, length), then UNMAP of the old place: one after the other, each waits for its
reader entries     follow; without EVENT_REMAP they lose uffd-wp bits and wp markers (6.13), poison follows
new place   same modes with EVENT_REMAP, else not registered
DONTUNMAP   REMAP; the old range stays registered, and empty
shrinking   UNMAP of the tail; growing in place: the new part is registered too
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from userfault import abi
from userfault.model import events
from userfault.model.context import Context
from userfault.model.errnos import EFAULT, EINVAL, ENOMEM, SystemCallError
from userfault.model.events import UnmapEvents
from userfault.model.layout import HUGE_PAGE, PAGE, round_up
from userfault.model.mapping import remove_mapping
from userfault.model.mm import AddressSpace
from userfault.model.pagetable import Entry, Marker, Present, PteTable, Swap
from userfault.model.step import Op
from userfault.model.vma import NO_MODES, Vma

if TYPE_CHECKING:
    from userfault.model.thread import Thread


def mremap(
    thread: Thread,
    address: int,
    old: int,
    new: int,
    to: int | None = None,
    *,
    may_move: bool = True,
    dontunmap: bool = False,
) -> Op[int]:
    """mremap(2). old, new: lengths in bytes; to: where to (MREMAP_FIXED). Returns the new address.

    Raises SystemCallError.
    """
    mm = thread.process.mm
    old, new = round_up(old, PAGE), round_up(new, PAGE)
    if address % PAGE or not new or (to is not None and to % PAGE) or (dontunmap and old != new):
        raise SystemCallError(EINVAL)
    yield from mm.mmap_lock.write("mremap")
    vma = mm.find(address)
    errno = _refused(vma, address, old, new, dontunmap)
    if errno or vma is None:
        mm.mmap_lock.unwrite()
        raise SystemCallError(errno)
    if to is not None:
        return (yield from _move_to(thread, mm, address, old, new, to, dontunmap))
    if new <= old:
        tail = UnmapEvents(address + new, address + old)
        if new < old:
            yield from tail.prepare(mm)
            remove_mapping(mm, address + new, address + old)
        mm.mmap_lock.unwrite()
        yield from tail.complete(thread)
        return address
    grown = address + new
    if vma.end == address + old and not mm.overlapping(vma.end, grown):
        vma.end = grown
        mm.merge(vma.start, grown)
        mm.mmap_lock.unwrite()
        return address
    if not may_move:
        mm.mmap_lock.unwrite()
        raise SystemCallError(ENOMEM)
    free = max(vma.end for vma in mm.vmas) + PAGE
    return (yield from _move_to(thread, mm, address, old, new, round_up(free, vma.page_size), dontunmap))


def _refused(vma: Vma | None, address: int, old: int, new: int, dontunmap: bool) -> int:
    if vma is None:
        return EFAULT
    if vma.hugetlb and (dontunmap or new > old or any(x % HUGE_PAGE for x in (address, old, new))):
        return EINVAL
    return EFAULT if address + old > vma.end else 0


def _move_to(
    thread: Thread, mm: AddressSpace, address: int, old: int, new: int, to: int, dontunmap: bool
) -> Op[int]:
    """mremap_to, move_vma. The lock is held for writing."""
    kernel = mm.kernel
    target = UnmapEvents(to, to + new)
    if mm.overlapping(to, to + new):
        yield from target.prepare(mm)
        remove_mapping(mm, to, to + new)
    tail = UnmapEvents(address + new, address + old)
    if new < old:
        yield from tail.prepare(mm)
        remove_mapping(mm, address + new, address + old)
    moved = min(old, new)
    source = UnmapEvents(address, address + moved)
    vma = mm.carve(address, address + moved)[0]
    copy = replace(vma, start=to, end=to + new)
    ctx = vma.uffd
    remap: Context | None = None
    if ctx is not None:
        if ctx.has(abi.UFFD_FEATURE_EVENT_REMAP):
            yield from events.begin(ctx, "REMAP")
            remap = ctx
        else:
            copy.uffd, copy.modes = None, NO_MODES
    forget = ctx is not None and remap is None and kernel.version >= (6, 12)  # 6.13, and 6.12 by backport
    mm.insert(copy)
    _move_entries(mm, vma, address, to, moved, forget)
    if dontunmap:
        vma.anonymous_pages = False
        vma.locked = False
    else:
        yield from source.prepare(mm)
        remove_mapping(mm, address, address + moved)
    mm.merge(to, to + new)
    mm.mmap_lock.unwrite()
    yield from target.complete(thread)
    if remap is not None:
        length = moved if kernel.version >= (6, 17) else old
        yield from events.post(thread, remap, abi.Remap(address, to, length))
    yield from tail.complete(thread)
    yield from source.complete(thread)
    return to


def _move_entries(mm: AddressSpace, vma: Vma, address: int, to: int, length: int, forget: bool) -> None:
    """move_page_tables, move_hugetlb_page_tables."""
    if vma.hugetlb:
        from userfault.model.hugetlb import unshare

        for at in range(address, address + length, HUGE_PAGE):
            unshare(mm, at)
    for at, upto, pmd in list(mm.table.tables(address, address + length)):
        there = to + at - address
        if type(pmd) is PteTable:
            continue
        if not vma.hugetlb and (upto - at != HUGE_PAGE or there % HUGE_PAGE):
            from userfault.model.thp import split_pmd

            split_pmd(mm, vma, at)
            continue
        mm.table.set_pmd(at, None)
        kept = _moved(pmd, forget)
        if kept is not None:
            mm.table.set_pmd(there, kept)
    if not vma.hugetlb:
        for at, entry in list(mm.table.ptes(address, address + length)):
            mm.table.set_pte(at, None)
            mm.table.set_pte(to + at - address, _moved(entry, forget))


def _moved(entry: Entry, forget: bool) -> Entry | None:
    if not forget or not entry.uffd_wp:
        return entry
    if type(entry) is Present:
        return Present(entry.page, entry.write, False)
    if type(entry) is Swap:
        return Swap(entry.slot)
    assert type(entry) is Marker
    return None
