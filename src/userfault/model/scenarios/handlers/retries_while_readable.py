"""A handler that retries EAGAIN only when there is something to read (a published hang of a virtual machine).

It knows that EAGAIN means an unread event, so it puts the fault aside, reads on, and tries again after each
batch of messages. But the refusal does not end when the event is read. It ends when the thread that caused
the event has gone on, and nothing is queued then. If that thread is slow, the retry comes too early, the
queue is empty, and the handler sleeps in poll with a fault in its hand. The mended handler never sleeps
without a time limit while it owes a page.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs, nobody_spins
from userfault.model.scenarios.handlers.forgets_eagain import mended
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


def hopeful(t: SystemCalls, fd: int) -> Op[None]:
    """Tries again after each batch of messages, and only then."""
    owed: list[int] = []
    while True:
        for message in (yield from messages(t, fd)):
            if isinstance(message, abi.Pagefault):
                owed.append(message.address)
        refused = []
        for address in owed:
            done = yield from t.copy(fd, address, SOURCE, PAGE)
            if done.event_pending:
                refused.append(address)
        owed = refused


def scenario(mend: bool) -> Scenario:
    """T1 touches page A while T2 throws page B away."""

    def build() -> World:
        s = registered(MISSING, features=abi.UFFD_FEATURE_EVENT_REMOVE)

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def t2(t: SystemCalls) -> Op[None]:
            yield from t.madvise(B, PAGE, "DONTNEED")

        def handler(t: SystemCalls) -> Op[None]:
            yield from mended(t, s.fd) if mend else hopeful(t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("handler", handler)
        return World(s.kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "a refused fill is tried again when the next message comes, and none comes"
    return Scenario("retries_while_readable", about, build, (nobody_dies, nobody_hangs, nobody_spins))
