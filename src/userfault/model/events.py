"""Non-cooperative events: telling the reader that fork, mremap, munmap or madvise changed its memory.

    begin    mmap_changing goes up, under the lock: from here on fills answer EAGAIN [E4]
    post     the message is queued, the caller sleeps in D until it was read, or the context is closed [E3]
    end      mmap_changing goes down, by the caller, when it runs again: it is a counter [E5]

A context that did not ask for the event's feature sees nothing, and the call does not sleep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import Context, EventWait
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


def begin(ctx: Context, why: str) -> Op[None]:
    """Announce a change: waits for the fills that are under way (map_changing_lock, 6.8)."""
    yield from ctx.map_changing_lock.write(f"{why}: announce the change")
    ctx.begin_change()
    ctx.map_changing_lock.unwrite()


def post(thread: Thread, ctx: Context, message: abi.Message, child: Context | None = None) -> Op[bool]:
    """userfaultfd_event_wait_completion: queue, sleep, acknowledge. False: nobody read it."""
    wait = EventWait(ctx, thread, message, child)
    yield f"post {message}"
    ctx.events.append(wait)
    ctx.kernel.note(f"{ctx.name}: queued {message}")
    while not (wait.read or ctx.released or thread.killed):
        yield wait
    if wait in ctx.events:
        ctx.events.remove(wait)
    yield "acknowledge the event"
    ctx.end_change()
    return wait.read


def remove(thread: Thread, mm: AddressSpace, vma: Vma, start: int, end: int) -> Op[bool]:
    """userfaultfd_remove (4.11): REMOVE before the pages go. The mmap lock is held for reading; True: it was
    dropped while the event waited, and the caller must look at everything again."""
    ctx = vma.uffd
    if ctx is None or not ctx.has(abi.UFFD_FEATURE_EVENT_REMOVE):
        return False
    yield from begin(ctx, "REMOVE")
    mm.mmap_lock.unread()
    yield from post(thread, ctx, abi.Remove(start, end))
    return True


class UnmapEvents:
    """The UNMAP events of one call, one for each context (userfaultfd_unmap_prep, 4.11)."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.contexts: list[Context] = []

    def prepare(self, mm: AddressSpace) -> Op[None]:
        """Announce the change to every context that is concerned; the mmap lock is held for writing."""
        for vma in mm.overlapping(self.start, self.end):
            ctx = vma.uffd
            if ctx is None or ctx in self.contexts or not ctx.has(abi.UFFD_FEATURE_EVENT_UNMAP):
                continue
            yield from begin(ctx, "UNMAP")
            self.contexts.append(ctx)

    def complete(self, thread: Thread) -> Op[None]:
        """Post them, one after the other, after the lock was dropped (userfaultfd_unmap_complete)."""
        for ctx in self.contexts:
            yield from post(thread, ctx, abi.Unmap(self.start, self.end))
