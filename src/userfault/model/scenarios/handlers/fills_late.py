"""A handler that brings back from the dead what its program has thrown away.

Filling takes time: the bytes come from a disk or over a network. One thread of the handler reads the messages
and notes which pages were thrown away (REMOVE), another fills. It looks up that a page still has bytes to
come, and by the time it copies them the program has thrown the page away, the event has been read, and the
kernel refuses nothing any more. The program then reads old bytes where there must be zeros.

The mended handler reads a message and notes it under a lock, and looks up and copies under the same lock:
while an event is unread the kernel refuses the copy, and once it is read, what is looked up says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from userfault import abi
from userfault.model.errnos import EAGAIN, SystemCallError
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.explorer.invariant import always
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


@dataclass(slots=True)
class Books:
    """What the handler knows, and what the program found."""

    owed: bool = True  # the page has bytes to come
    faults: list[int] = field(default_factory=list)
    locked: bool = False
    found: bytes | None = None  # after the page was thrown away


@always("what was thrown away reads as zeros")
def nothing_comes_back(world: World) -> str | None:
    """The program threw the page away and then read it."""
    if world.books.found not in (None, b"\0"):
        return f"read {world.books.found!r}"
    return None


def lock(t: SystemCalls, books: Books, mend: bool) -> Op[None]:
    """Take the handler's lock, if it has one."""
    if mend:
        yield from t.wait_for("the handler's lock", lambda: not books.locked)
        books.locked = True


def reader(t: SystemCalls, fd: int, books: Books, mend: bool) -> Op[None]:
    """Reads messages, and notes what they say."""
    while True:
        yield from t.poll(fd)
        yield from lock(t, books, mend)
        try:
            for message in (yield from t.read_messages(fd, 16)):
                if isinstance(message, abi.Pagefault):
                    books.faults.append(message.address)
                elif isinstance(message, abi.Remove):
                    books.owed = False
        except SystemCallError as error:
            if error.errno != EAGAIN:  # a fault that was answered meanwhile has left no message
                raise
        books.locked = False


def filler(t: SystemCalls, fd: int, books: Books, mend: bool) -> Op[None]:
    """Looks up what belongs into the page, and puts it there."""
    while True:
        yield from t.wait_for("a fault", lambda: bool(books.faults))
        address = books.faults.pop(0)
        yield from lock(t, books, mend)
        if books.owed:
            done = yield from t.copy(fd, address, SOURCE, PAGE)
        else:
            done = yield from t.zeropage(fd, address, PAGE)
        books.locked = False
        if done.errno == 0:
            books.owed = False
        elif done.event_pending:
            books.faults.append(address)
        else:
            books.owed = False
            yield from t.wake(fd, address, PAGE)


def scenario(mend: bool) -> Scenario:
    """T1 touches page A while T2 throws it away, and then reads it."""

    def build() -> World:
        s = registered(MISSING, features=abi.UFFD_FEATURE_EVENT_REMOVE, pages=1)
        books = Books()

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def t2(t: SystemCalls) -> Op[None]:
            yield from t.madvise(A, PAGE, "DONTNEED")
            books.found = yield from t.load(A)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("reader", lambda t: reader(t, s.fd, books, mend))
        s.app.spawn("filler", lambda t: filler(t, s.fd, books, mend))
        return World(s.kernel, books, frozenset(("reader", "filler")), PLACES)

    about = "a page is thrown away while its bytes are on their way"
    return Scenario("fills_late", about, build, (nobody_dies, nobody_hangs, nothing_comes_back))
