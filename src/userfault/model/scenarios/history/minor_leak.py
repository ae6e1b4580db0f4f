"""A reference leaked by every minor fault (the bracketed fix inside 7677f7fd8be7).

A fault on a cached page looks the page up, which takes a reference, and hands over to the handler. If it does
not give the reference back on that way out, the page can never be freed: not by unmapping it, not by
punching a hole into the file. A handler that answers with WAKE makes the thread fault again, and leaks once
more.
"""

from __future__ import annotations

from userfault.model.explorer import Scenario, World, at_the_end, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    HUGE_A,
    HUGE_PAGE,
    HUGE_PLACES,
    MINOR,
    hugetlb_file,
    messages,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "minor_leak"


@at_the_end("a page that nobody has any more is free")
def nothing_leaked(world: World) -> str | None:
    """The pool of huge pages has got everything back."""
    missing: int = world.books - world.kernel.hugetlb.free
    return f"{missing} huge page is lost to the machine" if missing else None


def scenario(defective: bool) -> Scenario:
    """A reader touches a cached page, is answered, then punches it out of the file."""

    def build() -> World:
        kernel, memfd, app = hugetlb_file([DEFECT] if defective else [])
        pool = kernel.hugetlb.free
        calls = app.calls
        app.run(calls.pwrite(memfd, b"cached", 0))
        app.run(calls.mmap(HUGE_A, HUGE_PAGE, shared=True, file=calls.file(memfd)))
        fd = app.run(calls.userfaultfd())
        app.run(calls.register(fd, HUGE_A, HUGE_PAGE, MINOR)).check()

        def handler(t: SystemCalls) -> Op[None]:
            yield from messages(t, fd)
            yield from t.continue_(fd, HUGE_A, HUGE_PAGE)

        def reader(t: SystemCalls) -> Op[None]:
            yield from t.load(HUGE_A)
            yield from t.munmap(HUGE_A, HUGE_PAGE)
            yield from t.punch_hole(memfd, 0, HUGE_PAGE)

        app.spawn("handler", handler)
        app.spawn("reader", reader)
        return World(kernel, pool, places=HUGE_PLACES)

    about = "a cached huge page is touched, mapped, unmapped and punched out"
    return Scenario(DEFECT, about, build, (nothing_leaked, nobody_dies, nobody_hangs))
