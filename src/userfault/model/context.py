"""A userfaultfd context (struct userfaultfd_ctx): its queues, and who sleeps in them.

    fault_pending   faults not read yet, oldest first          fault --read--> faults
    faults          faults that were read, not yet woken       either --wake--> the thread faults again
    events          non-cooperative events not read yet, each with the thread that caused it
    mmap_changing   number of events not yet acknowledged; while it is not 0 every fill answers EAGAIN [E4,
    E5]

A context serves the address space of the process that opened it, whoever holds the descriptor [E10].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.step import Lock, Sleep

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread


class FaultWait(Sleep):
    """A thread in fault_pending or faults (struct userfaultfd_wait_queue)."""

    __slots__ = ("message", "thread", "woken")
    interruptible = True

    def __init__(self, thread: Thread, message: abi.Pagefault) -> None:
        self.thread = thread
        self.message = message
        self.woken = False

    def ready(self) -> bool:
        return self.woken

    @property
    def what(self) -> str:
        return f"sleep until the fault at {self.message.address:#x} is resolved"


class EventWait(Sleep):
    """A thread that caused an event and sleeps until the event was read, or the context is closed.

    child: for a fork event, the context that its reader will get a descriptor for.
    """

    __slots__ = ("child", "ctx", "message", "read", "thread")
    state = "D"

    def __init__(self, ctx: Context, thread: Thread, message: abi.Message, child: Context | None) -> None:
        self.ctx = ctx
        self.thread = thread
        self.message = message
        self.child = child
        self.read = False

    def ready(self) -> bool:
        return self.read or self.ctx.released

    @property
    def what(self) -> str:
        return f"sleep until {self.message} is read"


class Context:
    """One userfaultfd."""

    __slots__ = (
        "calls",
        "closed",
        "events",
        "fault_pending",
        "faults",
        "features",
        "initialized",
        "kernel",
        "map_changing_lock",
        "mm",
        "mmap_changing",
        "name",
        "released",
        "user_mode_only",
    )

    def __init__(self, kernel: Kernel, mm: AddressSpace, *, user_mode_only: bool = False) -> None:
        self.kernel = kernel
        self.mm = mm
        self.name = f"uffd{kernel.number_contexts()}"
        self.features = 0
        self.initialized = False
        self.user_mode_only = user_mode_only
        self.released = False
        self.closed = False
        self.calls = 0
        self.mmap_changing = 0
        self.map_changing_lock = Lock(f"{self.name}'s map_changing_lock")
        self.fault_pending: list[FaultWait] = []
        self.faults: list[FaultWait] = []
        self.events: list[EventWait] = []

    def has(self, feature: int) -> bool:
        """The feature bit was asked for in UFFDIO_API."""
        return bool(self.features & feature)

    @property
    def wp_async(self) -> bool:
        """WP_ASYNC (6.7): write-protect faults are resolved in the kernel."""
        return bool(self.features & abi.UFFD_FEATURE_WP_ASYNC)

    @property
    def wp_unpopulated(self) -> bool:
        """WP_UNPOPULATED (6.4): protecting an empty anonymous page leaves a marker. Implied by WP_ASYNC."""
        return bool(self.features & (abi.UFFD_FEATURE_WP_UNPOPULATED | abi.UFFD_FEATURE_WP_ASYNC))

    # mmap_changing. A counter since 5.15 (a759a909d42d); before 4.17 there was none (df2cc96e77011).

    def begin_change(self) -> None:
        """An event is going to be queued: refuse fills until it was read."""
        if "mmap_changing_bool" in self.kernel.defects:  # history.md 1: one flag for all events
            self.mmap_changing = 1
        else:
            self.mmap_changing += 1
        self.kernel.note(f"{self.name}: mmap_changing = {self.mmap_changing}")

    def end_change(self) -> None:
        """The thread that caused the event goes on."""
        if "mmap_changing_bool" in self.kernel.defects:
            self.mmap_changing = 0
        else:
            self.mmap_changing -= 1
        assert self.mmap_changing >= 0, "userfaultfd_event_wait_completion: VM_WARN_ON_ONCE"
        self.kernel.note(f"{self.name}: mmap_changing = {self.mmap_changing}")

    @property
    def changing(self) -> bool:
        """Fills must be refused."""
        return self.mmap_changing > 0 and "no_mmap_changing" not in self.kernel.defects

    # The queues.

    def queue_fault(self, wait: FaultWait) -> None:
        """Make a fault visible to read and poll."""
        self.fault_pending.append(wait)
        self.kernel.note(f"{self.name}: queued {wait.message}")

    def forget_fault(self, wait: FaultWait) -> None:
        """The thread does not wait any more (woken, interrupted, or it need not have waited)."""
        for queue in (self.fault_pending, self.faults):
            if wait in queue:
                queue.remove(wait)

    def wake(self, start: int, length: int) -> None:
        """Wake the waiters whose address lies in the range; length 0: all of them (wake_userfault)."""
        for queue in (self.fault_pending, self.faults):
            for wait in list(queue):
                if length == 0 or start <= wait.message.address < start + length:
                    wait.woken = True
                    queue.remove(wait)
                    self.kernel.note(f"{self.name}: woke {wait.thread.name}")

    @property
    def readable(self) -> bool:
        """A message waits to be read (what poll reports)."""
        return bool(self.fault_pending or self.events)

    @property
    def pending(self) -> int:
        """Faults not read yet (fdinfo)."""
        return len(self.fault_pending)

    @property
    def total(self) -> int:
        """Faults not resolved yet, read or not (fdinfo)."""
        return len(self.fault_pending) + len(self.faults)

    def __repr__(self) -> str:
        return f"Context({self.name})"
