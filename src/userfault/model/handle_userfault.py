"""Asking user space about a fault: queue a message, look once more, sleep (handle_userfault).

resolve said MISSING / MINOR / WP
    |  queue the message             from here on read(2) sees it, and a wake finds it
    |  look at the page table again  a fill may have come in between: then do not sleep (must_wait)
    |  drop the mmap lock
    v  sleep                         until woken, a signal, or the descriptor is closed
fault again from the start           whatever woke us: the page table decides (K2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import FaultWait
from userfault.model.fault import Verdict
from userfault.model.layout import round_down
from userfault.model.pagetable import Marker, Present, PteTable
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


def handle_userfault(
    thread: Thread,
    mm: AddressSpace,
    vma: Vma,
    address: int,
    write: bool,
    reason: Verdict,
    *,
    user: bool,
    may_sleep: bool,
) -> Op[Verdict]:
    """Returns RETRY after the sleep, or SIGBUS if nobody may be asked. Drops the mmap lock in either case."""
    ctx = vma.uffd
    assert ctx is not None
    refused = (
        ctx.has(abi.UFFD_FEATURE_SIGBUS)  # 4.14
        or (ctx.user_mode_only and not user)  # 5.11
        or not may_sleep
    )
    if refused:
        mm.mmap_lock.unread()
        return Verdict.SIGBUS
    wait = FaultWait(thread, _message(thread, vma, address, write, reason))
    yield f"queue {wait.message}"
    ctx.queue_fault(wait)
    yield "look at the page table again"
    must_wait = _must_wait(mm, address, reason)
    mm.mmap_lock.unread()
    if must_wait and not ctx.released:
        yield wait
    ctx.forget_fault(wait)
    return Verdict.RETRY


def _message(thread: Thread, vma: Vma, address: int, write: bool, reason: Verdict) -> abi.Pagefault:
    """userfault_msg. WP always comes with WRITE [M2]."""
    ctx = vma.uffd
    assert ctx is not None
    flags = abi.UFFD_PAGEFAULT_FLAG_WRITE if write else 0
    if reason is Verdict.WP:
        flags |= abi.UFFD_PAGEFAULT_FLAG_WP
    elif reason is Verdict.MINOR:
        flags |= abi.UFFD_PAGEFAULT_FLAG_MINOR
    exact = ctx.has(abi.UFFD_FEATURE_EXACT_ADDRESS)  # 5.18
    return abi.Pagefault(
        flags,
        address if exact else round_down(address, vma.page_size),
        thread.tid if ctx.has(abi.UFFD_FEATURE_THREAD_ID) else 0,
    )


def _must_wait(mm: AddressSpace, address: int, reason: Verdict) -> bool:
    """userfaultfd_must_wait, userfaultfd_huge_must_wait: is the entry still one that needs an answer?"""
    pmd = mm.table.pmd(address)
    entry = pmd.entries.get((address // 4096) & 511) if type(pmd) is PteTable else pmd
    if entry is None or type(entry) is Marker:
        return True
    return type(entry) is Present and not entry.write and reason is Verdict.WP
