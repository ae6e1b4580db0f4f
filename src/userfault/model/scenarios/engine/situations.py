"""Situations in which the engine's protocol is explored: a handful of threads over one or two blocks.

Each takes the wrong rules that are switched on; with none, the explorer exhausts it. At the end of most a
thread called `finish` lets everything leave memory, so that a write that was lost is missing from the
store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from userfault.model.content import Content
from userfault.model.explorer import (
    Invariant,
    Scenario,
    World,
    always,
    at_the_end,
    nobody_dies,
    nobody_hangs,
    nobody_spins,
)
from userfault.model.layout import HUGE_PAGE
from userfault.model.scenarios.engine.block import State
from userfault.model.scenarios.engine.protocol import CHECKPOINT, STORE, Books, Engine
from userfault.model.scenarios.engine.synchronous import Synchronous
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

Wrong = tuple[str, ...]


@always("a reader reads what was written last")
def reads_are_right(world: World) -> str | None:
    """What `program_loads` compared."""
    books: Books = world.books
    return "; ".join(books.misread) or None


@at_the_end("every write reaches the store and the checkpoint")
def nothing_is_lost(world: World) -> str | None:
    """Holds once `finish` has let everything leave memory."""
    books: Books = world.books
    if not world.thread("finish").done:
        return None
    for page, value in books.written.items():
        for name, copy in ((STORE, books.store), (CHECKPOINT, books.point)):
            if copy[page] != value:
                return f"page {page} was written as {value!r}, the {name} has {copy[page]!r}"
    return None


@always("only pages that the program wrote are called dirty")
def nothing_is_dirty_for_nothing(world: World) -> str | None:
    """Holds where nobody unmaps behind the engine's back."""
    books: Books = world.books
    for pages in books.dirty.values():
        if pages - books.by_program:
            return f"nobody wrote page {min(pages - books.by_program)}"
    return None


@always("a poisoned page is never read")
def poison_holds(world: World) -> str | None:
    """The thread that touches it dies of SIGBUS."""
    thread = world.thread("R2")
    if thread.done and thread.fault is None:
        return "R2 read a poisoned page"
    return None


_KEEPS: Final = (reads_are_right, nothing_is_lost, nobody_dies, nobody_hangs, nobody_spins)


def _run(engine: Engine, *, finish: bool = True, **programs: Callable[[SystemCalls], Op[None]]) -> World:
    """The threads by name, the handler, and the last one."""
    for name, program in programs.items():
        engine.app.spawn(name, program)
    engine.app.spawn("handler", engine.handler)
    if finish:
        engine.app.spawn("finish", lambda t: engine.finish(t, programs))
    return engine.world()


def evict(wrong: Wrong) -> World:
    """A mapped block is written twice while it leaves memory."""
    e = Engine(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 0, b"2")

    def evictor(t: SystemCalls) -> Op[None]:
        yield from e.evict(t, 0)
        yield from e.give_back(t, 0)

    return _run(e, writer=writer, evictor=evictor)


def evict_huge(wrong: Wrong) -> World:
    """The same on a huge page, filled through the view."""
    e = Engine(wrong, page=HUGE_PAGE, view_fill=True)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 0, b"2")

    def evictor(t: SystemCalls) -> Op[None]:
        yield from e.evict(t, 0)
        yield from e.give_back(t, 0)

    return _run(e, writer=writer, evictor=evictor)


def stranger_unmaps(wrong: Wrong) -> World:
    """The program throws its mapping of a block away (MADV_DONTNEED) and goes on using it."""
    e = Engine(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_loads(t, 0)

    def stranger(t: SystemCalls) -> Op[None]:
        yield from t.madvise(e.address(0), e.page, "DONTNEED")

    return _run(e, writer=writer, stranger=stranger)


def flush_and_evict(wrong: Wrong) -> World:
    """A block that was written is flushed while it leaves memory."""
    e = Engine(wrong)
    e.begin_resident(0)
    e.app.run(e.program_stores(e.app.calls, 0, b"1"))

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)

    def evictor(t: SystemCalls) -> Op[None]:
        yield from e.evict(t, 0)
        yield from e.give_back(t, 0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"2")

    return _run(e, flusher=flusher, evictor=evictor, writer=writer)


def flush_and_cut(wrong: Wrong) -> World:
    """A block is written, flushed and checkpointed."""
    e = Engine(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 0, b"2")

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)

    def checkpointer(t: SystemCalls) -> Op[None]:
        yield from e.cut(t, 0)

    return _run(e, writer=writer, flusher=flusher, checkpointer=checkpointer)


def pwrite_and_flush(wrong: Wrong) -> World:
    """A block is written through the view, and by the program, while it is flushed."""
    e = Engine(wrong)
    e.begin_resident(0)

    def pwriter(t: SystemCalls) -> Op[None]:
        yield from e.pwrite(t, 0, b"1")
        yield from e.pwrite(t, 0, b"2")

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)
        yield from e.flush(t, 0)

    return _run(e, pwriter=pwriter, flusher=flusher)


def store_fails_once(wrong: Wrong) -> World:
    """A block of two pages: one is written, the flush fails, the other is written, and flushed again."""
    e = Engine(wrong, pages=2)
    e.begin_resident(0)
    e.books.store_fails = 1

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 1, b"2")

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)
        yield from e.flush(t, 0)

    return _run(e, writer=writer, flusher=flusher)


def view_fill(wrong: Wrong) -> World:
    """Two readers touch an absent huge block, which is filled through the view."""
    e = Engine(wrong, page=HUGE_PAGE, view_fill=True)

    def reader(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 0)

    return _run(e, finish=False, R1=reader, R2=reader)


def two_readers(wrong: Wrong) -> World:
    """Two readers touch a resting block."""
    e = Engine(wrong)
    e.begin_resting(0)

    def reader(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 0)

    return _run(e, finish=False, R1=reader, R2=reader)


def poisoned_neighbour(wrong: Wrong) -> World:
    """One block rests, its neighbour is poisoned; each is touched."""
    e = Engine(wrong, blocks=2)
    e.begin_resting(0)
    e.begin_poisoned(1)

    def first(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 0)

    def second(t: SystemCalls) -> Op[None]:
        yield from t.load(e.address(1))

    return _run(e, finish=False, R1=first, R2=second)


def page_there_already(wrong: Wrong) -> World:
    """Two readers touch the two pages of an absent block; somebody has written one through the file."""
    e = Engine(wrong, pages=2)

    def first(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 0)

    def second(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 1)

    def stranger(t: SystemCalls) -> Op[None]:
        yield from t.wait_for("a fault on the block", lambda: e.books.states[0] is not State.ABSENT)
        file = t.file(e.memfd)
        if e.books.states[0] is State.FILLING and not file.cached(1):
            file.add(1, Content(ord("x")))

    return _run(e, finish=False, R1=first, R2=second, stranger=stranger)


def straddling_load(wrong: Wrong) -> World:
    """One load touches two blocks at once."""
    e = Engine(wrong, blocks=2)

    def reader(t: SystemCalls) -> Op[None]:
        yield from e.program_loads_both(t, 0, 1)

    return _run(e, finish=False, R1=reader)


def everything(wrong: Wrong) -> World:
    """A block is written and read while it is evicted, flushed, checkpointed, and unmapped by a stranger."""
    e = Engine(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_loads(t, 0)
        yield from e.program_stores(t, 0, b"2")

    def evictor(t: SystemCalls) -> Op[None]:
        yield from e.evict(t, 0)
        yield from e.give_back(t, 0)

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)

    def checkpointer(t: SystemCalls) -> Op[None]:
        yield from e.cut(t, 0)

    def stranger(t: SystemCalls) -> Op[None]:
        yield from t.madvise(e.address(0), e.page, "DONTNEED")

    return _run(
        e, writer=writer, evictor=evictor, flusher=flusher, checkpointer=checkpointer, stranger=stranger
    )


def first_write_and_flush(wrong: Wrong) -> World:
    """The first writes to a page are messages; the block is flushed meanwhile, and flushed again."""
    e = Synchronous(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 0, b"2")

    def flusher(t: SystemCalls) -> Op[None]:
        yield from e.flush(t, 0)

    return _run(e, writer=writer, flusher=flusher)


def first_write_and_evict(wrong: Wrong) -> World:
    """The first write to a page is a message, and its block leaves memory meanwhile."""
    e = Synchronous(wrong)
    e.begin_resident(0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")
        yield from e.program_stores(t, 0, b"2")

    def evictor(t: SystemCalls) -> Op[None]:
        yield from e.evict(t, 0)
        yield from e.give_back(t, 0)

    return _run(e, writer=writer, evictor=evictor)


def mapped_writable(wrong: Wrong) -> World:
    """A reader brings a resting block back, which is mapped writable for a moment, and a writer uses it."""
    e = Synchronous(wrong)
    e.begin_resting(0)

    def reader(t: SystemCalls) -> Op[None]:
        yield from e.program_loads(t, 0)

    def writer(t: SystemCalls) -> Op[None]:
        yield from e.program_stores(t, 0, b"1")

    return _run(e, reader=reader, writer=writer)


_NO_END: Final[tuple[Invariant, ...]] = (reads_are_right, nobody_dies, nobody_hangs, nobody_spins)

SITUATIONS: Final[dict[str, tuple[Callable[[Wrong], World], tuple[Invariant, ...]]]] = {
    "evict": (evict, _KEEPS),
    "evict_huge": (evict_huge, _KEEPS),
    "stranger_unmaps": (stranger_unmaps, _KEEPS),
    "flush_and_evict": (flush_and_evict, _KEEPS),
    "flush_and_cut": (flush_and_cut, _KEEPS),
    "pwrite_and_flush": (pwrite_and_flush, _KEEPS),
    "store_fails_once": (store_fails_once, _KEEPS),
    "everything": (everything, _KEEPS),
    "first_write_and_flush": (first_write_and_flush, _KEEPS),
    "first_write_and_evict": (first_write_and_evict, _KEEPS),
    "mapped_writable": (mapped_writable, _KEEPS),
    "view_fill": (view_fill, _NO_END),
    "two_readers": (two_readers, (nothing_is_dirty_for_nothing, *_NO_END)),
    "poisoned_neighbour": (poisoned_neighbour, (poison_holds, reads_are_right, nobody_hangs, nobody_spins)),
    "page_there_already": (page_there_already, _NO_END),
    "straddling_load": (straddling_load, _NO_END),
}


def scenario(name: str, wrong: Wrong = ()) -> Scenario:
    """A situation, with wrong rules switched on. Raises ValueError for an unknown name."""
    if name not in SITUATIONS:
        raise ValueError(f"no situation {name!r}; there are {', '.join(SITUATIONS)}")
    build, invariants = SITUATIONS[name]
    about = (build.__doc__ or "").strip().rstrip(".")
    title = name if not wrong else f"{name} with {', '.join(wrong)}"
    return Scenario(title, about, lambda: build(wrong), invariants)
