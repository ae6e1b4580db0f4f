"""mmap, munmap, mprotect, mlock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.errnos import EEXIST, EINVAL, ENOMEM, EPERM, SystemCallError
from userfault.model.events import UnmapEvents
from userfault.model.layout import HUGE_PAGE, PAGE, PUD_SPAN, TASK_SIZE, round_down, round_up
from userfault.model.mm import AddressSpace
from userfault.model.pagecache import File
from userfault.model.pagetable import Present
from userfault.model.step import Op
from userfault.model.vma import Vma
from userfault.model.zap import zap

if TYPE_CHECKING:
    from userfault.model.thread import Thread

READ, WRITE, EXEC = 1, 2, 4


def mmap(
    thread: Thread,
    address: int,
    length: int,
    protection: int = READ | WRITE,
    *,
    shared: bool = False,
    file: File | None = None,
    offset: int = 0,
    may_write: bool = True,
    replace: bool = False,
    hugetlb: bool = False,
    growsdown: bool = False,
    droppable: bool = False,
    special: bool = False,
) -> Op[int]:
    """Map [address, address + length) and return the address.

    file None: anonymous memory; shared makes it shmem, hugetlb takes it from the pool. may_write False: a
    shared mapping of a descriptor that may not be written. replace: MAP_FIXED, else an overlap is EEXIST.
    Raises SystemCallError.
    """
    process = thread.process
    kernel, mm = process.kernel, process.mm
    unit = HUGE_PAGE if hugetlb or (file is not None and file.kind == "hugetlb") else PAGE
    length = round_up(length, unit)
    if length == 0 or address % unit or offset % unit or address + length > TASK_SIZE:
        raise SystemCallError(EINVAL)
    if hugetlb and file is None:
        file = File(kernel, "hugetlb", length, "anonymous hugetlb")
    elif shared and file is None:
        file = File(kernel, "shmem", length, "shared anonymous")
    if shared and file is not None and file.seals:
        if protection & WRITE:
            raise SystemCallError(EPERM)
        may_write = False
    yield from mm.mmap_lock.write("mmap")
    events = UnmapEvents(address, address + length)
    if mm.overlapping(address, address + length):
        if not replace:
            mm.mmap_lock.unwrite()
            raise SystemCallError(EEXIST)
        yield from events.prepare(mm)
        remove_mapping(mm, address, address + length)
    mm.insert(
        Vma(
            address,
            address + length,
            bool(protection & READ),
            bool(protection & WRITE),
            bool(protection & EXEC),
            shared=shared,
            may_write=may_write,
            file=file,
            offset=address if file is None else offset,
            growsdown=growsdown,
            droppable=droppable,
            wipeonfork=droppable,
            special=special,
        )
    )
    mm.merge(address, address + length)
    mm.mmap_lock.unwrite()
    yield from events.complete(thread)
    return address


def remove_mapping(mm: AddressSpace, start: int, end: int) -> None:
    """do_vmi_align_munmap: pages, VMAs and page tables go. The lock is held for writing."""
    for vma in mm.carve(start, end):
        zap(mm, vma, vma.start, vma.end, drop_markers=True)
        mm.vmas.remove(vma)
        _free_tables(mm, vma.start, vma.end)


def _free_tables(mm: AddressSpace, start: int, end: int) -> None:
    """free_pgtables: a table goes with the last mapping that had a part of it."""
    for base in range(round_down(start, HUGE_PAGE), end, HUGE_PAGE):
        if mm.table.pmd(base) is not None and not mm.overlapping(base, base + HUGE_PAGE):
            mm.table.set_pmd(base, None)
    for base in range(round_down(start, PUD_SPAN), end, PUD_SPAN):
        if base // PUD_SPAN in mm.table.pmds and not mm.overlapping(base, base + PUD_SPAN):
            del mm.table.pmds[base // PUD_SPAN]


def munmap(thread: Thread, address: int, length: int) -> Op[None]:
    """munmap(2). UNMAP is posted after the pages went; nobody is woken [K3]. Raises SystemCallError."""
    mm = thread.process.mm
    end = address + round_up(length, PAGE)
    if address % PAGE or end == address or end > TASK_SIZE:
        raise SystemCallError(EINVAL)
    yield from mm.mmap_lock.write("munmap")
    for vma in mm.overlapping(address, end):
        if vma.hugetlb and any(vma.start < edge < vma.end and edge % HUGE_PAGE for edge in (address, end)):
            mm.mmap_lock.unwrite()
            raise SystemCallError(EINVAL)
    events = UnmapEvents(address, end)
    yield from events.prepare(mm)
    remove_mapping(mm, address, end)
    mm.kernel.note(f"unmapped {address:#x} to {end:#x}")
    mm.mmap_lock.unwrite()
    yield from events.complete(thread)


def mprotect(thread: Thread, address: int, length: int, protection: int) -> Op[None]:
    """mprotect(2): no event, nobody is woken, entries keep their uffd-wp bits and markers."""
    mm = thread.process.mm
    end = address + round_up(length, PAGE)
    if address % PAGE:
        raise SystemCallError(EINVAL)
    yield from mm.mmap_lock.write("mprotect")
    at = address
    for vma, low, high in list(mm.each(address, end)):
        if low != at:
            break
        at = high
        wanted = bool(protection & READ), bool(protection & WRITE), bool(protection & EXEC)
        if wanted == (vma.read, vma.write, vma.execute):
            continue  # mprotect_fixup: nothing to do, and nothing is cut
        for piece in mm.carve(low, high):
            piece.read, piece.write, piece.execute = wanted
            if not piece.write:
                _take_write_access(mm, piece)
    mm.merge(address, end)
    mm.mmap_lock.unwrite()
    if at != end:
        raise SystemCallError(ENOMEM)


def _take_write_access(mm: AddressSpace, vma: Vma) -> None:
    for at, _, pmd in list(mm.table.tables(vma.start, vma.end)):
        if type(pmd) is Present and pmd.write:
            mm.table.set_pmd(at, pmd._replace(write=False))
    if not vma.hugetlb:
        for at, entry in list(mm.table.ptes(vma.start, vma.end)):
            if type(entry) is Present and entry.write:
                mm.table.set_pte(at, entry._replace(write=False))
