"""A protect request that is skipped without a word (the other half of c1991e0705d1).

If a mapping keeps its shared page table when it is registered, the first request to protect it has to leave
that table. What remains is empty, and the request walks on: it answers success, and nothing is protected. The
next touch brings a writable entry, the next write is not reported, and a snapshot or a dirty log misses it.
Since the fix the table is left at registration, and a protect request always walks entries of its own.
"""

from __future__ import annotations

from types import SimpleNamespace

from userfault import abi
from userfault.model.explorer import Scenario, World, at_the_end, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    GIB,
    HUGE_A,
    HUGE_B,
    HUGE_PAGE,
    HUGE_PLACES,
    WP,
    hugetlb_file,
    map_gib,
    messages,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "pmd_unshare_skips"


@at_the_end("a write to a page that was protected is reported")
def reported(world: World) -> str | None:
    """The writer began after the protect request had succeeded."""
    if world.thread("writer").done and world.books.protected and not world.books.reported:
        return "the page was protected, then written, and no message came"
    return None


def scenario(defective: bool) -> Scenario:
    """A and B share a table; A is registered and protected, then written."""

    def build() -> World:
        kernel, memfd, app = hugetlb_file([DEFECT] if defective else [])
        map_gib(app, memfd, HUGE_A)
        map_gib(app, memfd, HUGE_B)
        app.run(app.calls.store(HUGE_A, b"old"))
        app.run(app.calls.load(HUGE_B))
        fd = app.run(app.calls.userfaultfd())
        books = SimpleNamespace(protected=False, reported=False)

        def handler(t: SystemCalls) -> Op[None]:
            yield from t.register(fd, HUGE_A, GIB, WP)
            done = yield from t.writeprotect(fd, HUGE_A, HUGE_PAGE, abi.UFFDIO_WRITEPROTECT_MODE_WP)
            books.protected = done.ok
            while True:
                yield from messages(t, fd)
                books.reported = True
                yield from t.writeprotect(fd, HUGE_A, HUGE_PAGE, 0)

        def writer(t: SystemCalls) -> Op[None]:
            yield from t.wait_for("the page is protected", lambda: books.protected)
            yield from t.store(HUGE_A, b"new")

        app.spawn("handler", handler)
        app.spawn("writer", writer)
        return World(kernel, books, frozenset(("handler",)), HUGE_PLACES)

    about = "a page of a mapping that shares its page table is protected, then written"
    return Scenario(DEFECT, about, build, (reported, nobody_dies, nobody_hangs))
