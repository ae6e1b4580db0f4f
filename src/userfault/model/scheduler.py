"""Which thread goes next. A schedule is the list of choices; the same schedule gives the same execution.

Nothing in the model draws random numbers or looks at a clock, so a machine that is set up the same way and
driven by the same schedule does the same things. That is how a state is kept and taken up again: not by
copying generators (Python cannot), but by running the schedule from the start (see the package's README).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel
    from userfault.model.thread import Thread

QUIET_AFTER = 3000
"""Steps after which `settle` says that threads spin."""


class TraceLine(NamedTuple):
    """One step: who did what, and what it changed."""

    thread: str
    what: str
    changed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.thread}: {self.what}" + (f"  -> {'; '.join(self.changed)}" if self.changed else "")


class Scheduler:
    """Drives the threads of a kernel and remembers what it did.

    schedule   thread ids in the order in which they took steps
    trace      one line a step, if asked for
    """

    def __init__(self, kernel: Kernel, *, trace: bool = False) -> None:
        self.kernel = kernel
        self.schedule: list[int] = []
        self.trace: list[TraceLine] | None = [] if trace else None

    def runnable(self) -> list[Thread]:
        """The threads that can take a step, in the order they were made."""
        return [thread for thread in self.kernel.threads if thread.runnable]

    def step(self, thread: Thread) -> None:
        """Let one thread take its next step."""
        self.schedule.append(thread.tid)
        if self.trace is None:
            thread.step()
            return
        what = thread.what
        self.kernel.notes = []
        thread.step()
        changed = [*self.kernel.notes, *ending(thread)]
        self.kernel.notes = None
        self.trace.append(TraceLine(thread.name, what, tuple(changed)))

    def run(self, choose: Callable[[list[Thread]], Thread], *, limit: int = QUIET_AFTER) -> bool:
        """Let `choose` pick among the runnable threads until none is left. False: `limit` steps were not
        enough."""
        for _ in range(limit):
            runnable = self.runnable()
            if not runnable:
                return True
            self.step(choose(runnable))
        return not self.runnable()

    def settle(self, *, limit: int = QUIET_AFTER) -> bool:
        """Run everybody in turn until all are done or asleep. False: somebody spins."""
        for turn in range(limit):
            runnable = self.runnable()
            if not runnable:
                return True
            self.step(runnable[turn % len(runnable)])
        return not self.runnable()

    def replay(self, schedule: Iterable[int]) -> None:
        """Take the steps of a recorded schedule. Raises ValueError if a thread cannot take its step."""
        for tid in schedule:
            thread = next((t for t in self.kernel.threads if t.tid == tid), None)
            if thread is None or not thread.runnable:
                raise ValueError(f"thread {tid} cannot take step {len(self.schedule)}")
            self.step(thread)


def ending(thread: Thread) -> list[str]:
    """How a thread ended, in words; nothing if it has not."""
    if not thread.done:
        return []
    if thread.fault is not None:
        return [f"died of {thread.fault}"]
    if thread.error is not None:
        return [f"failed: {thread.error}"]
    return [f"returned {thread.result!r}"]
