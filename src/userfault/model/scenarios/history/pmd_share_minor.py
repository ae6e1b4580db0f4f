"""A minor fault that never comes (mended by 0d9cadabd193, "disable huge PMD sharing for MINOR").

A manager keeps a second, plain mapping of a hugetlb file; through it it brings pages up to date before the
program may see them. The program's mapping is registered for minor faults, so that its first touch of a page
asks the manager. If both mappings share a page table, the page that the manager touched through its own
mapping is there in the program's mapping too. No fault is raised, nobody is asked, and the program reads
old data.
"""

from __future__ import annotations

from types import SimpleNamespace

from userfault.model.explorer import Scenario, World, at_the_end, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    GIB,
    HUGE_A,
    HUGE_B,
    HUGE_PAGE,
    HUGE_PLACES,
    MINOR,
    hugetlb_file,
    map_gib,
    messages,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "pmd_share_minor"


@at_the_end("the program reads only what the manager has corrected")
def corrected(world: World) -> str | None:
    """The reader got the new data."""
    got = world.thread("reader").result
    return None if got in (None, b"new") else f"the reader got {got!r}"


def scenario(defective: bool) -> Scenario:
    """The manager filled the file through B; a reader touches A."""

    def build() -> World:
        kernel, memfd, app = hugetlb_file([DEFECT] if defective else [])
        map_gib(app, memfd, HUGE_A)
        map_gib(app, memfd, HUGE_B)
        fd = app.run(app.calls.userfaultfd())
        app.run(app.calls.register(fd, HUGE_A, GIB, MINOR)).check()
        books = SimpleNamespace(filled=False)

        def manager(t: SystemCalls) -> Op[None]:
            yield from t.store(HUGE_B, b"old")
            books.filled = True
            yield from messages(t, fd)
            yield from t.store(HUGE_B, b"new")
            yield from t.continue_(fd, HUGE_A, HUGE_PAGE)

        def reader(t: SystemCalls) -> Op[bytes]:
            yield from t.wait_for("the file is filled", lambda: books.filled)
            return (yield from t.load(HUGE_A, 3))

        app.spawn("manager", manager)
        app.spawn("reader", reader)
        return World(kernel, books, frozenset(("manager",)), HUGE_PLACES)

    about = "a manager corrects pages through a second mapping before a reader may see them"
    return Scenario(DEFECT, about, build, (corrected, nobody_dies, nobody_hangs))
