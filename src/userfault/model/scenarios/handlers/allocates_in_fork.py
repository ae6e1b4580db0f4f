"""A handler that allocates while another thread of its process forks.

glibc's fork() takes the allocator's lock, so that the child gets a heap in good order, and gives it back
when the system call has returned. With EVENT_FORK the system call sleeps until the event is read. A handler
thread of the same process that allocates before it reads needs the lock that fork() holds: each waits for
the other. The mended handler has its buffer before, and allocates nothing between poll and read.
"""

from __future__ import annotations

from types import SimpleNamespace

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PLACES, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


def lock_malloc(t: SystemCalls, heap: SimpleNamespace) -> Op[None]:
    """Take the allocator's lock."""
    yield from t.wait_for("malloc's lock", lambda: not heap.locked)
    heap.locked = True


def malloc(t: SystemCalls, heap: SimpleNamespace) -> Op[None]:
    """Allocate a little memory."""
    yield from lock_malloc(t, heap)
    yield from t.step("allocate, and give malloc's lock back")
    heap.locked = False


def glibc_fork(t: SystemCalls, heap: SimpleNamespace) -> Op[None]:
    """fork() of the C library: the system call inside the allocator's lock."""

    def child(t: SystemCalls) -> Op[None]:
        yield from t.exit()

    yield from lock_malloc(t, heap)
    yield from t.fork(child)
    heap.locked = False


def allocating(t: SystemCalls, fd: int, heap: SimpleNamespace) -> Op[None]:
    """A fresh buffer for each read."""
    while True:
        yield from t.poll(fd)
        yield from malloc(t, heap)
        yield from t.read_messages(fd)


def mended(t: SystemCalls, fd: int) -> Op[None]:
    """One buffer, allocated before the userfaultfd was opened: no event could come yet."""
    while True:
        yield from messages(t, fd)


def scenario(mend: bool) -> Scenario:
    """T1 forks; the handler is a thread of the same process."""

    def build() -> World:
        s = registered(MISSING, features=abi.UFFD_FEATURE_EVENT_FORK, pages=1)
        heap = SimpleNamespace(locked=False)

        def t1(t: SystemCalls) -> Op[None]:
            yield from glibc_fork(t, heap)

        def handler(t: SystemCalls) -> Op[None]:
            yield from mended(t, s.fd) if mend else allocating(t, s.fd, heap)

        s.app.spawn("T1", t1)
        s.app.spawn("handler", handler)
        return World(s.kernel, heap, frozenset(("handler",)), PLACES)

    about = "a process forks while its handler thread allocates"
    return Scenario("allocates_in_fork", about, build, (nobody_dies, nobody_hangs))
