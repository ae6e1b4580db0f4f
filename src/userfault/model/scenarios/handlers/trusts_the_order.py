"""A handler that takes the order of events for the order of what happened.

munmap() and mremap() change the memory first and tell of it afterwards, when they hold no lock any more. One
thread unmaps a place, another is given that place by mremap() and tells of it first: REMAP is read before the
UNMAP of what was there before. A handler that believes the order puts the moved page there and then drops it,
and the program reads zeros. The mended handler knows that a place which is given away was free: what it still
has there has gone, and the next event that names the place is about that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.explorer.invariant import always
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


@dataclass(slots=True)
class Books:
    """Where the handler believes the store's bytes to belong, and what the program found."""

    places: set[int] = field(default_factory=lambda: {A, B})
    beneath: list[int] = field(default_factory=list)  # what has gone, and has not been told to
    found: bytes | None = None


@always("a page that was moved has the store's bytes")
def moved_is_not_lost(world: World) -> str | None:
    """The program moved page B to where page A was, and read it."""
    if world.books.found not in (None, b"d"):
        return f"read {world.books.found!r}"
    return None


def apply(books: Books, event: abi.Message, mend: bool) -> None:
    """Note what an event says."""
    if isinstance(event, abi.Remap):
        if event.to in books.places and mend:
            books.beneath.append(event.to)
        books.places.discard(event.from_)
        books.places.add(event.to)
    elif isinstance(event, abi.Unmap):
        if event.start in books.beneath:
            books.beneath.remove(event.start)
        else:
            books.places.discard(event.start)


def handler(t: SystemCalls, fd: int, books: Books, mend: bool) -> Op[None]:
    """Fills what belongs to the store from there, and everything else with zeros."""
    faults: list[int] = []
    while True:
        if faults and not t.context(fd).readable:
            yield from t.step("a moment passes")
        else:
            for message in (yield from messages(t, fd)):
                if isinstance(message, abi.Pagefault):
                    faults.append(message.address)
                else:
                    apply(books, message, mend)
        refused = []
        for address in faults:
            if address in books.places:
                done = yield from t.copy(fd, address, SOURCE, PAGE)
            else:
                done = yield from t.zeropage(fd, address, PAGE)
            if done.event_pending:
                refused.append(address)
        faults = refused


def scenario(mend: bool) -> Scenario:
    """T1 unmaps page A; T2 moves page B there as soon as the place is free, and reads it."""

    def build() -> World:
        features = abi.UFFD_FEATURE_EVENT_REMAP | abi.UFFD_FEATURE_EVENT_UNMAP
        s = registered(MISSING, features=features)
        books = Books()
        mm = s.app.mm

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.munmap(A, PAGE)

        def t2(t: SystemCalls) -> Op[None]:
            yield from t.wait_for("a free place", lambda: mm.find(A) is None)
            yield from t.mremap(B, PAGE, PAGE, A)
            books.found = yield from t.load(A)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("handler", lambda t: handler(t, s.fd, books, mend))
        return World(s.kernel, books, frozenset(("handler",)), PLACES)

    about = "one thread moves a page to where another has just unmapped one"
    return Scenario("trusts_the_order", about, build, (nobody_dies, nobody_hangs, moved_is_not_lost))
