"""Copy first, protect afterwards (the gap that 72981e0e7b60, COPY_MODE_WP, closes).

A manager fills a missing page and wants to hear of the first write to it. With a plain COPY the page is
there, writable, and the waiting thread is woken, before the second call can protect it: a write in between
is never reported. COPY with MODE_WP puts the page in place protected.
"""

from __future__ import annotations

from types import SimpleNamespace

from userfault import abi
from userfault.model.explorer import Scenario, World, at_the_end, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, WP, A, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "no_copy_mode_wp"


@at_the_end("the first write to a page is reported")
def reported(world: World) -> str | None:
    """The writer has written, so a write-protect message has come."""
    if world.thread("T1").done and not world.books.reported:
        return "the page was written, and no write-protect message came"
    return None


def scenario(defective: bool) -> Scenario:
    """T1 writes a missing page. The handler uses MODE_WP if the kernel has it, else two calls."""

    def build() -> World:
        s = registered(MISSING | WP, pages=1, defects=[DEFECT] if defective else [])
        books = SimpleNamespace(reported=False)

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.store(A, b"x")

        def fill(t: SystemCalls) -> Op[None]:
            done = yield from t.copy(s.fd, A, SOURCE, PAGE, abi.UFFDIO_COPY_MODE_WP)
            if not done.ok:
                yield from t.copy(s.fd, A, SOURCE, PAGE)
                yield from t.writeprotect(s.fd, A, PAGE, abi.UFFDIO_WRITEPROTECT_MODE_WP)

        def handler(t: SystemCalls) -> Op[None]:
            while True:
                for message in (yield from messages(t, s.fd)):
                    assert isinstance(message, abi.Pagefault)
                    if message.flags & abi.UFFD_PAGEFAULT_FLAG_WP:
                        books.reported = True
                        yield from t.writeprotect(s.fd, A, PAGE, 0)
                    else:
                        yield from fill(t)

        s.app.spawn("T1", t1)
        s.app.spawn("handler", handler)
        return World(s.kernel, books, frozenset(("handler",)), PLACES)

    about = "a thread writes a missing page whose first write must be reported"
    return Scenario(DEFECT, about, build, (reported, nobody_dies, nobody_hangs))
