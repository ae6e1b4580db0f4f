"""Steps: how an operation says where other threads may come in between.

An operation is a generator. What it does between two yields is atomic; what it yields is one of

    a str     the name of the step it will take next ("copy: take the mmap lock"). The scheduler may let other
              threads run first.
    a Sleep   it cannot go on until something happens; the thread is not runnable before `ready()`.

So the label of a step is known before the step is taken, and a schedule (which thread went when) replays an
execution exactly. The yields stand where the kernel can be interleaved in a way that matters: lock taken,
lock dropped, message queued, page table looked at, entry put in place, going to sleep.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


class Sleep:
    """A thread that sleeps. Subclasses say what ends it; `state` is the letter that /proc shows (S or D).

    A sleep ends early by a fatal signal if it is `killable`, by any signal if it is `interruptible`.
    """

    __slots__ = ()
    state = "S"
    killable = True
    interruptible = False

    def ready(self) -> bool:
        """What it waits for has happened."""
        raise NotImplementedError

    @property
    def what(self) -> str:
        """What it waits for, in words."""
        raise NotImplementedError


Op = Generator[str | Sleep, None, T]
"""An operation that yields at its steps and returns a T."""


class Lock:
    """A read-write semaphore (mmap_lock, map_changing_lock, the hugetlb vma lock)."""

    __slots__ = ("name", "readers", "writer")

    def __init__(self, name: str) -> None:
        self.name = name
        self.readers = 0
        self.writer = False

    def read(self, who: str) -> Op[None]:
        """Take it for reading; `who` names the step."""
        yield _LockWait(self, False, who)
        self.readers += 1

    def write(self, who: str) -> Op[None]:
        """Take it for writing."""
        yield _LockWait(self, True, who)
        self.writer = True

    def unread(self) -> None:
        """Give the read side back."""
        self.readers -= 1

    def unwrite(self) -> None:
        """Give the write side back."""
        self.writer = False


class _LockWait(Sleep):
    """Waiting for a lock: a step when the lock is free, a sleep while it is not."""

    __slots__ = ("lock", "who", "write")
    state = "D"
    killable = False

    def __init__(self, lock: Lock, write: bool, who: str) -> None:
        self.lock = lock
        self.write = write
        self.who = who

    def ready(self) -> bool:
        return not self.lock.writer and not (self.write and self.lock.readers)

    @property
    def what(self) -> str:
        return f"{self.who}: take {self.lock.name} for {'writing' if self.write else 'reading'}"


class Spin(Sleep):
    """The kernel retries without end and without sleeping (two known livelocks, E15 and R8).

    As a step it would make every exploration infinite, so it is a sleep that lasts while `still()` holds.
    """

    __slots__ = ("_what", "still")
    state = "R"

    def __init__(self, what: str, still: object) -> None:
        self._what = what
        self.still = still

    def ready(self) -> bool:
        assert callable(self.still)
        return not self.still()

    @property
    def what(self) -> str:
        return self._what
