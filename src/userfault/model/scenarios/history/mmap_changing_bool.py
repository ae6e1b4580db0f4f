"""One pending-change flag for everybody (mended by a759a909d42d, "change mmap_changing to atomic").

Two threads throw pages away; each queues a REMOVE event and sleeps until the monitor has read it. Meanwhile
fills must be refused, for the monitor does not know yet what it would fill. The kernel remembered that in one
boolean: set by each thread before its event, cleared by each when it goes on. So the first thread whose event
is read clears the flag although the other's event is still unread, and a COPY is accepted in the middle of a
change that the monitor has not heard of. Since the fix it is a counter: up by one for each event, down by one
when its thread goes on, and fills are refused until it is zero.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import (
    MISSING,
    PAGE,
    PLACES,
    SOURCE,
    A,
    B,
    messages,
    no_fill_inside_a_change,
    registered,
)
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "mmap_changing_bool"


def scenario(defective: bool) -> Scenario:
    """T1 throws A away, T2 throws B away; the monitor reads one event, then fills B."""

    def build() -> World:
        s = registered(MISSING, features=abi.UFFD_FEATURE_EVENT_REMOVE, defects=[DEFECT] if defective else [])

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.madvise(A, PAGE, "DONTNEED")

        def t2(t: SystemCalls) -> Op[None]:
            yield from t.madvise(B, PAGE, "DONTNEED")

        def monitor(t: SystemCalls) -> Op[None]:
            yield from messages(t, s.fd, 1)
            yield from t.copy(s.fd, B, SOURCE, PAGE)
            yield from messages(t, s.fd, 1)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("monitor", monitor)
        return World(s.kernel, places=PLACES)

    about = "two threads throw pages away while a monitor that has read one of the two events fills a page"
    return Scenario(DEFECT, about, build, (no_fill_inside_a_change, nobody_dies, nobody_hangs))
