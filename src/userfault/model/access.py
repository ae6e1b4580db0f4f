"""Touching memory: loads and stores of the processor, and copies that the kernel makes for a system call.

The protection of the VMA is checked first [P9], then `resolve` decides, and user space is asked if it says
so. What a refusal means depends on who touched: a user access is a signal, a system call EFAULT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from userfault.model.fault import Verdict, fill_anonymous, resolve
from userfault.model.handle_userfault import handle_userfault
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.page import Page
from userfault.model.pagetable import Present, PteTable
from userfault.model.step import Op, Spin

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma

_ASK = (Verdict.MISSING, Verdict.MINOR, Verdict.WP)


class MemoryFault(Exception):
    """An access could not be made. `code` is the signal's si_code, `signal` its name."""

    def __init__(self, address: int, signal: str, code: str, verdict: Verdict | None = None) -> None:
        super().__init__(f"{signal} {code} at {address:#x}")
        self.address = address
        self.signal = signal
        self.code = code
        self.verdict = verdict


class Killed(Exception):
    """A fatal signal ended the thread inside the kernel."""


def translate(mm: AddressSpace, address: int, write: bool) -> tuple[Page, int] | None:
    """The page and the offset in it, if the page table lets the access through; None: it faults."""
    pmd = mm.table.pmd(address)
    entry = pmd.entries.get((address // PAGE) & 511) if type(pmd) is PteTable else pmd
    if type(entry) is not Present or (write and not entry.write):
        return None
    return entry.page, address % entry.page.size  # a small entry may map a part of a huge folio


def touch(
    thread: Thread,
    mm: AddressSpace,
    address: int,
    *,
    write: bool,
    user: bool = True,
    execute: bool = False,
    may_sleep: bool = True,
) -> Op[tuple[Page, int]]:
    """The page that the access gets, and the offset in it: use it before the next yield.

    Raises MemoryFault where the access cannot be made.
    """
    while True:
        vma = mm.find(address)
        if vma is not None and _allowed(vma, write, execute):
            place = translate(mm, address, write)
            if place is not None:
                return place
        yield from fault(thread, mm, address, write=write, user=user, execute=execute, may_sleep=may_sleep)


def _allowed(vma: Vma, write: bool, execute: bool) -> bool:
    if write:
        return vma.write
    return vma.execute if execute else vma.read or vma.write or vma.execute


def fault(
    thread: Thread,
    mm: AddressSpace,
    address: int,
    *,
    write: bool,
    user: bool = True,
    execute: bool = False,
    may_sleep: bool = True,
) -> Op[None]:
    """Fault until the entry allows the access (do_user_addr_fault, faultin_page). Raises MemoryFault."""
    while True:
        yield from mm.mmap_lock.read(f"{'write' if write else 'read'} fault at {address:#x}")
        vma = mm.find(address)
        if vma is None:
            mm.mmap_lock.unread()
            raise MemoryFault(address, "SIGSEGV", "SEGV_MAPERR")
        if not _allowed(vma, write, execute):
            mm.mmap_lock.unread()
            raise MemoryFault(address, "SIGSEGV", "SEGV_ACCERR")
        verdict = resolve(mm, vma, address, write)
        mm.kernel.note(f"fault at {address:#x}: {verdict.value}")
        if verdict in _ASK:
            verdict = yield from handle_userfault(
                thread, mm, vma, address, write, verdict, user=user, may_sleep=may_sleep
            )
            if verdict is Verdict.RETRY:
                if thread.killed:
                    raise Killed
                if user:
                    thread.handle_signals()  # the handler runs, then the access is made again [M9]
        else:
            mm.mmap_lock.unread()
        if verdict is Verdict.DONE:
            return
        if verdict is Verdict.SPIN:
            yield _endless_write_fault(mm, vma, address)
            if thread.killed:
                raise Killed
        elif verdict is not Verdict.RETRY:
            raise _refusal(mm, address, verdict)


def _endless_write_fault(mm: AddressSpace, vma: Vma, address: int) -> Spin:
    entry = mm.table.pmd(address)

    def still() -> bool:
        return mm.table.pmd(address) is entry and mm.find(address) is vma and not vma.modes.wp

    return Spin(f"the write fault at {address:#x} repeats for ever", still)


def _refusal(mm: AddressSpace, address: int, verdict: Verdict) -> MemoryFault:
    if verdict is Verdict.SIGSEGV:
        return MemoryFault(address, "SIGSEGV", "SEGV_ACCERR", verdict)
    if verdict is Verdict.POISON and mm.kernel.memory_failure:
        return MemoryFault(address, "SIGBUS", "BUS_MCEERR_AR", verdict)
    return MemoryFault(address, "SIGBUS", "BUS_ADRERR", verdict)


# Runs of bytes, page by page in address order.


def load(thread: Thread, mm: AddressSpace, address: int, length: int, *, user: bool = True) -> Op[bytes]:
    """Read bytes. Raises MemoryFault at the first page that cannot be read."""
    data = b""
    while len(data) < length:
        at = address + len(data)
        piece = min(length - len(data), PAGE - at % PAGE)
        yield f"load {at:#x}"
        page, offset = yield from touch(thread, mm, at, write=False, user=user)
        data += page.content.read(offset, piece)
        mm.kernel.note(f"loaded {data[-piece:]!r} from {at:#x}")
    return data


def store(thread: Thread, mm: AddressSpace, address: int, data: bytes, *, user: bool = True) -> Op[None]:
    """Write bytes. Raises MemoryFault at the first page that cannot be written; earlier ones are."""
    done = 0
    while done < len(data):
        at = address + done
        piece = data[done : done + PAGE - at % PAGE]
        yield f"store {at:#x}"
        page, offset = yield from touch(thread, mm, at, write=True, user=user)
        page.content = page.content.write(offset, piece, page.size)
        mm.kernel.note(f"stored {len(piece)} bytes at {at:#x}")
        done += len(piece)


def atomic(
    thread: Thread, mm: AddressSpace, address: int, length: int, change: Callable[[bytes], bytes]
) -> Op[bytes]:
    """Read, change and write bytes of one page in one step, as a locked instruction does; returns what was
    there.

    It faults as a write does, also if it then leaves the bytes as they are (a failed compare-and-exchange).
    Raises MemoryFault.
    """
    yield f"atomic {address:#x}"
    page, offset = yield from touch(thread, mm, address, write=True)
    before = page.content.read(offset, length)
    page.content = page.content.write(offset, change(before), page.size)
    mm.kernel.note(f"changed {before!r} at {address:#x}")
    return before


def fill(thread: Thread, mm: AddressSpace, address: int, length: int, value: int) -> Op[None]:
    """memset: write one byte value all over a range.

    Where no userfaultfd can notice, a whole VMA is written in one step: nobody could tell the difference.
    """
    at, end = address, address + length
    while at < end:
        vma = mm.find(at)
        if vma is not None and vma.uffd is None and vma.write:
            yield f"fill {at:#x}"
            upto = min(end, vma.end)
            at = _fill_quietly(mm, vma, at, upto, value)
            if at == upto:
                continue
        piece = min(end - at, PAGE - at % PAGE)
        if vma is not None and vma.hugetlb:
            piece = min(end - at, HUGE_PAGE - at % HUGE_PAGE)
        yield f"store {at:#x}"
        page, offset = yield from touch(thread, mm, at, write=True)
        page.content = page.content.write(offset, bytes((value,)) * piece, page.size)
        at += piece


def _fill_quietly(mm: AddressSpace, vma: Vma, at: int, end: int, value: int) -> int:
    from userfault.model.content import Content

    whole = Content(value)
    while at < end:
        upto = min((at // HUGE_PAGE + 1) * HUGE_PAGE, end)
        if vma.anonymous and at % PAGE == upto % PAGE == 0 and type(mm.table.pmd(at)) is PteTable:
            at = fill_anonymous(mm, vma, at, upto, whole)
            if at < upto:
                return at
            continue
        place = translate(mm, at, True)
        while place is None:
            if resolve(mm, vma, at, True) not in (Verdict.DONE, Verdict.RETRY):
                return at
            place = translate(mm, at, True)
        page, offset = place
        whole_page = page.size == PAGE or type(mm.table.pmd(at)) is Present
        piece = min(end - at, page.size - offset if whole_page else PAGE - at % PAGE)
        if piece == page.size:
            page.content = whole
        else:
            page.content = page.content.write(offset, bytes((value,)) * piece, page.size)
        at += piece
    return at
