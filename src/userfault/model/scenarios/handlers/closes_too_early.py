"""A handler that closes its descriptor while pages are still owed.

When the last descriptor of a userfaultfd is closed, the kernel unregisters the memory and lets every
sleeper go. A page that was not delivered then reads as zeros: no error, no signal, wrong data. The same
happens when the handler dies. The mended handler closes only when every page has been delivered, asked for
or not.
"""

from __future__ import annotations

from userfault import abi
from userfault.model.explorer import Scenario, World, always, nobody_dies, nobody_hangs
from userfault.model.scenarios.setting import MISSING, PAGE, PLACES, SOURCE, A, B, messages, registered
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls


@always("a reader reads what the handler has, never zeros")
def right_data(world: World) -> str | None:
    """The results of T1 and T2."""
    for name in ("T1", "T2"):
        got = world.thread(name).result
        if got not in (None, b"d"):
            return f"{name} read {got!r}"
    return None


def hasty(t: SystemCalls, fd: int) -> Op[None]:
    """Serves what it finds in its queue, and goes when a page has been delivered."""
    for message in (yield from messages(t, fd)):
        assert isinstance(message, abi.Pagefault)
        yield from t.copy(fd, message.address, SOURCE, PAGE)
    yield from t.close(fd)


def mended(t: SystemCalls, fd: int) -> Op[None]:
    """Delivers what nobody has asked for too; EEXIST: it is there already, but a thread may wait."""
    for message in (yield from messages(t, fd)):
        assert isinstance(message, abi.Pagefault)
        yield from t.copy(fd, message.address, SOURCE, PAGE)
    for page in (A, B):
        done = yield from t.copy(fd, page, SOURCE, PAGE)
        if not done.ok:
            yield from t.wake(fd, page, PAGE)
    yield from t.close(fd)


def scenario(mend: bool) -> Scenario:
    """T1 reads page A, T2 reads page B."""

    def build() -> World:
        s = registered(MISSING)

        def t1(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(A))

        def t2(t: SystemCalls) -> Op[bytes]:
            return (yield from t.load(B))

        def handler(t: SystemCalls) -> Op[None]:
            yield from mended(t, s.fd) if mend else hasty(t, s.fd)

        s.app.spawn("T1", t1)
        s.app.spawn("T2", t2)
        s.app.spawn("handler", handler)
        return World(s.kernel, places=PLACES)

    about = "two threads read two pages, and the handler closes when it is done"
    return Scenario("closes_too_early", about, build, (right_data, nobody_dies, nobody_hangs))
