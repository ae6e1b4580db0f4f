"""A handler that reads its messages into memory which it serves.

read(2) takes a message out of the queue and copies it into the caller's buffer. If the buffer's page is
missing and the handler is the one who would fill it, the copy waits for the handler, which waits for the
copy. The mended handler has a buffer outside.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

INSIDE = B
OUTSIDE = SOURCE + 64


def handler_with_buffer_at(buffer: int, t: SystemCalls, fd: int) -> Op[None]:
    """Reads messages into memory."""
    while True:
        yield from t.poll(fd)
        for message in (yield from t.read_messages(fd, 1, into=buffer)):
            assert isinstance(message, abi.Pagefault)
            yield from t.copy(fd, message.address, SOURCE, PAGE)


def scenario(mend: bool) -> Scenario:
    """T1 touches page A; the handler's buffer lies in page B, or outside."""

    def build() -> World:
        s = registered(MISSING)

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def handler(t: SystemCalls) -> Op[None]:
            yield from handler_with_buffer_at(OUTSIDE if mend else INSIDE, t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("handler", handler)
        return World(s.kernel, daemons=frozenset(("handler",)), places=PLACES)

    about = "a handler's message buffer lies in the memory that it serves"
    return Scenario("reads_into_served_memory", about, build, (nobody_dies, nobody_hangs))
