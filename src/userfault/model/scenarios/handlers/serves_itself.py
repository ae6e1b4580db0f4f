"""A single-threaded handler that touches memory which it serves.

It counts the faults it has answered, and the counter lies in the memory that it serves: an object of a
library, a log, anything that an allocator put there. Its own touch raises a fault, and the only thread that
could answer it is the one that sleeps in it. The mended handler keeps everything it needs outside.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

INSIDE = B
OUTSIDE = SOURCE + 64  # in memory that is not registered


def handler_that_counts_at(counter: int, t: SystemCalls, fd: int) -> Op[None]:
    """Answers faults, and counts them in memory."""
    count = 0
    while True:
        for message in (yield from messages(t, fd)):
            assert isinstance(message, abi.Pagefault)
            count += 1
            yield from t.store(counter, bytes((count,)))
            yield from t.copy(fd, message.address, SOURCE, PAGE)


def scenario(mend: bool) -> Scenario:
    """T1 touches page A; the handler's counter lies in page B, or outside."""

    def build() -> World:
        s = registered(MISSING)

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def handler(t: SystemCalls) -> Op[None]:
            yield from handler_that_counts_at(OUTSIDE if mend else INSIDE, t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("handler", handler)
        return World(s.kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "a handler keeps a counter in the memory that it serves"
    return Scenario("serves_itself", about, build, (nobody_dies, nobody_hangs))
