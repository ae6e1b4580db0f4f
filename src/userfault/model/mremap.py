"""mremap(2): moving, growing and shrinking a mapping [E1, E6, E7].

moving      REMAP(from, to, length), then UNMAP of the old place: each waits for its reader
entries     follow; without EVENT_REMAP they lose uffd-wp bits and wp markers (6.13), poison follows
many VMAs   are moved by one call (6.17), but a registered one only alone
new place   same modes with EVENT_REMAP, else not registered
DONTUNMAP   REMAP; the old range stays registered, and empty
shrinking   UNMAP of the tail; growing in place: the new part is registered too
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import Context
from userfault.model.errnos import EFAULT, EINVAL, ENOMEM, SystemCallError
from userfault.model.events import UnmapEvents, begin, post
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
    if address % PAGE or not new or (dontunmap and old != new):
        raise SystemCallError(EINVAL)
    if to is not None and (to % PAGE or (address < to + new and to < address + old)):
        raise SystemCallError(EINVAL)  # check_mremap_params: the places must not overlap
    yield from mm.mmap_lock.write("mremap")
    calls = _Events(mm)
    failed: SystemCallError | None = None
    try:
        if to is None:
            to, new = yield from _resize(calls, address, old, new, may_move, dontunmap)
        elif old == new and mm.kernel.version >= (6, 17):
            yield from _move_all(calls, address, old, to, dontunmap)
        else:
            yield from _move_to(calls, address, old, new, to, dontunmap)
    except SystemCallError as error:
        failed = error
    mm.mmap_lock.unwrite()
    yield from calls.notify(thread)  # also when it failed: what was unmapped before is gone
    if failed is not None:
        raise failed
    assert to is not None
    return to


class _Events:
    """What one call tells, in the order in which it tells it (notify_uffd)."""

    def __init__(self, mm: AddressSpace) -> None:
        self.mm = mm
        self.early: list[UnmapEvents] = []  # of what was in the way
        self.remap: tuple[Context, abi.Remap] | None = None
        self.unmaps: list[UnmapEvents] = []

    def unmap(self, start: int, end: int, *, early: bool = False) -> Op[None]:
        """Take a range away, and tell it afterwards."""
        if start < end:
            events = UnmapEvents(start, end)
            (self.early if early else self.unmaps).append(events)
            yield from events.prepare(self.mm)
            remove_mapping(self.mm, start, end)

    def notify(self, thread: Thread) -> Op[None]:
        """Post them, one after the other; the lock was dropped."""
        for events in self.early:
            yield from events.complete(thread)
        if self.remap is not None:
            yield from post(thread, *self.remap)
        for events in self.unmaps:
            yield from events.complete(thread)


def _resize(
    calls: _Events, address: int, old: int, new: int, may_move: bool, dontunmap: bool
) -> Op[tuple[int, int]]:
    """mremap_at: shrink or grow in place, or move where there is room. Returns (address, length)."""
    mm = calls.mm
    vma = _movable(mm, address, old, new, None, dontunmap)
    old, new = round_up(old, vma.page_size), round_up(new, vma.page_size)
    if not dontunmap and new <= old:
        yield from calls.unmap(address + new, address + old)
        return address, new
    grown = address + new
    if not dontunmap and vma.end == address + old and not mm.overlapping(vma.end, grown):
        vma.end = grown
        mm.merge(vma.start, grown)
        return address, new
    if not may_move:
        raise SystemCallError(ENOMEM)
    free = round_up(max(vma.end for vma in mm.vmas) + PAGE, vma.page_size)
    yield from _move_to(calls, address, old, new, free, dontunmap)
    return free, new


def _movable(mm: AddressSpace, address: int, old: int, new: int, to: int | None, dontunmap: bool) -> Vma:
    """check_prep_vma: the one VMA that holds what is moved. Raises SystemCallError."""
    vma = mm.find(address)
    if vma is None:
        raise SystemCallError(EFAULT)
    if vma.hugetlb:
        old, new = round_up(old, HUGE_PAGE), round_up(new, HUGE_PAGE)
        if dontunmap or new > old or address % HUGE_PAGE or (to is not None and to % HUGE_PAGE):
            raise SystemCallError(EINVAL)
    if address + min(old, new) > vma.end and (to is not None or new > old or dontunmap):
        raise SystemCallError(EFAULT)
    return vma


def _move_all(calls: _Events, address: int, length: int, to: int, dontunmap: bool) -> Op[None]:
    """remap_move (6.17): one VMA after the other, with the holes between them. A registered VMA moves alone.
    Raises SystemCallError; what was moved before stays moved."""
    mm, end, seen = calls.mm, address + length, False
    while True:
        rest = mm.overlapping(address, end)
        if not rest or (not seen and address < rest[0].start):
            if seen:
                return
            raise SystemCallError(EFAULT)  # a hole at the start
        vma = rest[0]
        low, high = max(vma.start, address), min(vma.end, end)
        if vma.uffd is not None and (seen or vma.end < end):
            raise SystemCallError(EFAULT)
        there = to + low - address
        yield from _move_to(calls, low, high - low, high - low, there, dontunmap)
        seen = True
        address, to = high, there + high - low


def _move_to(calls: _Events, address: int, old: int, new: int, to: int, dontunmap: bool) -> Op[None]:
    """mremap_to, move_vma. The lock is held for writing. Raises SystemCallError."""
    mm = calls.mm
    kernel = mm.kernel
    first = mm.find(address)
    if kernel.version < (6, 17) and first is not None and not first.hugetlb:
        # The target was unmapped, and the source shortened, before the source was looked at.
        yield from calls.unmap(to, to + new, early=True)
        yield from calls.unmap(address + new, address + old)
    vma = _movable(mm, address, old, new, to, dontunmap)
    old, new = round_up(old, vma.page_size), round_up(new, vma.page_size)
    if mm.overlapping(to, to + new):
        yield from calls.unmap(to, to + new, early=True)
    yield from calls.unmap(address + new, address + old)
    moved = min(old, new)
    # The source may have been cut, or a neighbour of what was in the way.
    vma = _movable(mm, address, moved, new, to, dontunmap)
    whole = vma.start == address and vma.end == address + moved
    _copy_vma(mm, vma, address, to, new)
    ctx = vma.uffd
    quiet = ctx is not None and not ctx.has(abi.UFFD_FEATURE_EVENT_REMAP)
    forget = quiet and kernel.version >= (6, 12)  # 6.13, and 6.12 by backport
    _move_entries(mm, vma, address, to, moved, forget)
    if ctx is not None and not quiet:
        yield from begin(ctx, "REMAP")
        length = moved if kernel.version >= (6, 17) else old
        calls.remap = ctx, abi.Remap(address, to, length)
    elif ctx is not None:
        # mremap_userfaultfd_prep takes the registration off the new VMA: off the whole of it, also off a
        # neighbour that it became one with.
        copy = mm.find(to)
        assert copy is not None
        copy.uffd, copy.modes = None, NO_MODES
    if dontunmap:
        vma.locked = False
        if whole:
            vma.anon_vma = None
    else:
        yield from calls.unmap(address, address + moved)


def _copy_vma(mm: AddressSpace, vma: Vma, address: int, to: int, length: int) -> None:
    """copy_vma: the new VMA, which merges with its neighbours. Anonymous memory that has no pages yet forgets
    where it was, so it can."""
    offset = vma.offset + address - vma.start
    if vma.anonymous and not vma.anonymous_pages:
        offset = to
    mm.insert(replace(vma, start=to, end=to + length, offset=offset))
    mm.merge(to, to + length)


def _move_entries(mm: AddressSpace, vma: Vma, address: int, to: int, length: int, forget: bool) -> None:
    """move_page_tables, move_hugetlb_page_tables."""
    if vma.hugetlb:
        from userfault.model.hugetlb import unshare

        for at in range(address, address + length, HUGE_PAGE):
            unshare(mm, at)
    for at, upto, pmd in list(mm.table.tables(address, address + length)):
        there = to + at - address
        if type(pmd) is PteTable:
            # The tables come to be also where nothing is in them; a whole one is moved as it is, unless each
            # of its entries has to forget something (move_normal_pmd).
            if upto - at == HUGE_PAGE and there % HUGE_PAGE == 0 and not forget:
                mm.table.set_pmd(there, pmd)
                mm.table.set_pmd(at, None)
            else:
                mm.table.pte_table_alloc(there)
                mm.table.pte_table_alloc(there + upto - at - PAGE)
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
