"""A handler that does not wake after EEXIST.

A fill that fails wakes nobody, and EEXIST is a failure: the page is there, but the thread that asked for it
does not know. Here somebody else writes the page into the file while the thread already waits. The mended
handler wakes the thread whatever the fill answered; it touches the page again and finds it.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.kernel import Kernel
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, messages
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


def forgetful(t: SystemCalls, fd: int) -> Op[None]:
    """Takes EEXIST for done."""
    while True:
        for message in (yield from messages(t, fd)):
            assert isinstance(message, abi.Pagefault)
            yield from t.copy(fd, message.address, SOURCE, PAGE)


def mended(t: SystemCalls, fd: int) -> Op[None]:
    """Wakes after EEXIST."""
    while True:
        for message in (yield from messages(t, fd)):
            assert isinstance(message, abi.Pagefault)
            done = yield from t.copy(fd, message.address, SOURCE, PAGE)
            if not done.ok:
                yield from t.wake(fd, message.address, PAGE)


def scenario(mend: bool) -> Scenario:
    """T1 touches a page of shared memory; T2 writes the same page through the file."""

    def build() -> World:
        kernel = Kernel()
        app = kernel.process("app")
        calls = app.calls
        memfd = app.run(calls.memfd_create(PAGE))
        app.run(calls.mmap(A, PAGE, shared=True, file=calls.file(memfd)))
        app.run(calls.mmap(SOURCE, PAGE))
        app.run(calls.fill(SOURCE, PAGE, ord("d")))
        fd = app.run(calls.userfaultfd())
        app.run(calls.register(fd, A, PAGE, MISSING)).check()

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def t2(t: SystemCalls) -> Op[int]:
            return (yield from t.pwrite(memfd, b"w" * PAGE, 0))

        def handler(t: SystemCalls) -> Op[None]:
            yield from mended(t, fd) if mend else forgetful(t, fd)

        app.spawn("T1", t1)
        app.spawn("T2", t2)
        app.spawn("handler", handler)
        return World(kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "somebody else fills the page that a thread waits for"
    return Scenario("forgets_to_wake", about, build, (nobody_dies, nobody_hangs))
