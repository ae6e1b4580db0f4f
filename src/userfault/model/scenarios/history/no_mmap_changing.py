"""Fills while an event is unread (df2cc96e77011, the commit that a759a909d42d names as its origin).

The monitor of a process pushes a page into it and writes down that the page was delivered. Meanwhile the
process forks: the child's memory is copied, then a FORK event is queued. A monitor that reads FORK gives the
child the pages that are still owed to its parent. If the push is accepted after the child's memory was copied
but before FORK was read, the page is written down as delivered, and nobody ever gives it to the child: it
sleeps on its first touch for ever. With the check the push fails with EAGAIN, the monitor reads FORK, and
owes the page to both.
"""

from __future__ import annotations

from types import SimpleNamespace

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

DEFECT = "no_mmap_changing"


def scenario(defective: bool) -> Scenario:
    """T1 forks while the monitor pushes page A."""

    def build() -> World:
        s = registered(
            MISSING, features=abi.UFFD_FEATURE_EVENT_FORK, pages=1, defects=[DEFECT] if defective else []
        )
        books = SimpleNamespace(parent_owed=True, child_owed=False)

        def child(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def t1(t: SystemCalls) -> Op[None]:
            yield from t.fork(child)

        def monitor(t: SystemCalls) -> Op[None]:
            pushed = yield from t.copy(s.fd, A, SOURCE, PAGE)
            books.parent_owed = not pushed.ok
            (fork,) = yield from messages(t, s.fd, 1)
            assert isinstance(fork, abi.Fork)
            books.child_owed = books.parent_owed
            if books.child_owed:
                yield from t.copy(fork.ufd, A, SOURCE, PAGE)

        s.app.spawn("T1", t1)
        s.app.spawn("monitor", monitor)
        return World(s.kernel, books, places=PLACES)

    about = "a monitor pushes a page while the process forks"
    return Scenario(DEFECT, about, build, (nobody_dies, nobody_hangs))
