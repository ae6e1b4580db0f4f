"""A handler that takes EAGAIN for success.

While an event is unread, or its thread has not gone on yet, every fill answers EAGAIN. A handler that does
not look at the answer has read the fault, filled nothing and woken nobody: the thread sleeps for ever. The
mended handler keeps the faults that it could not answer, and comes back to them after a moment, whether or
not there is anything to read by then.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs, nobody_spins
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


def forgetful(t: SystemCalls, fd: int) -> Op[None]:
    """Copies once."""
    while True:
        for message in (yield from messages(t, fd)):
            if isinstance(message, abi.Pagefault):
                yield from t.copy(fd, message.address, SOURCE, PAGE)


def mended(t: SystemCalls, fd: int) -> Op[None]:
    """Keeps what was refused, and tries again: after a moment, not only after a message."""
    owed: list[int] = []
    while True:
        if owed and not t.context(fd).readable:
            yield from t.step("a moment passes")
        else:
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
            yield from mended(t, s.fd) if mend else forgetful(t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("handler", handler)
        return World(s.kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "one thread waits for a page while another throws pages away"
    return Scenario("forgets_eagain", about, build, (nobody_dies, nobody_hangs, nobody_spins))
