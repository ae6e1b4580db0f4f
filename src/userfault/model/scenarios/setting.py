"""What most scenarios begin with: a process, a few pages under userfaultfd, a page to copy from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from userfault import abi
from userfault.model.context import Context
from userfault.model.errnos import EAGAIN, SystemCallError
from userfault.model.explorer import World
from userfault.model.explorer.invariant import always
from userfault.model.kernel import Kernel
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.process import Process
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls

MISSING: Final = abi.UFFDIO_REGISTER_MODE_MISSING
WP: Final = abi.UFFDIO_REGISTER_MODE_WP
MINOR: Final = abi.UFFDIO_REGISTER_MODE_MINOR

A: Final = 0x10000000
B: Final = A + PAGE
SOURCE: Final = 0x20000000
ELSEWHERE: Final = 0x30000000
PLACES: Final = {"A": A, "B": B, "the source": SOURCE, "C": ELSEWHERE}

GIB: Final = 1 << 30
HUGE_A: Final = 0x40000000  # one aligned GiB of hugetlb memory
HUGE_B: Final = 0x80000000  # another mapping of the same GiB
HUGE_PLACES: Final = {"A": HUGE_A, "B": HUGE_B}


@dataclass(slots=True)
class Setting:
    """A machine, its process `app`, and app's userfaultfd."""

    kernel: Kernel
    app: Process
    fd: int

    @property
    def context(self) -> Context:
        """The userfaultfd, to look at."""
        return self.app.calls.context(self.fd)


def registered(
    modes: int, *, features: int = 0, pages: int = 2, defects: Iterable[str] = (), version: str = "6.18"
) -> Setting:
    """A machine with `pages` anonymous pages from A on, registered, and a source page full of 'd'."""
    kernel = Kernel(version, defects=defects)
    app = kernel.process("app")
    calls = app.calls
    app.run(calls.mmap(A, pages * PAGE))
    app.run(calls.mmap(SOURCE, PAGE))
    app.run(calls.fill(SOURCE, PAGE, ord("d")))
    fd = app.run(calls.userfaultfd(features))
    app.run(calls.register(fd, A, pages * PAGE, modes)).check()
    return Setting(kernel, app, fd)


def hugetlb_file(defects: Iterable[str] = ()) -> tuple[Kernel, int, Process]:
    """A machine with a hugetlb file of one GiB, its descriptor, and the process that has it."""
    kernel = Kernel(defects=defects)
    app = kernel.process("app")
    memfd = app.run(app.calls.memfd_create(GIB, hugetlb=True))
    return kernel, memfd, app


def map_gib(app: Process, memfd: int, address: int) -> None:
    """Map the whole file there, shared: an aligned GiB, so its page table may be shared too."""
    calls = app.calls
    app.run(calls.mmap(address, GIB, shared=True, file=calls.file(memfd)))


def messages(t: SystemCalls, fd: int, most: int = 16) -> Op[list[abi.Message]]:
    """Wait until there is something to read, and read it.

    What poll promised may be gone when read comes: a fault that was resolved before it was read leaves no
    message [M8].
    """
    while True:
        yield from t.poll(fd)
        try:
            return (yield from t.read_messages(fd, most))
        except SystemCallError as error:
            if error.errno != EAGAIN:
                raise


def contexts(world: World) -> Iterator[Context]:
    """Every userfaultfd that some process has open."""
    met = []
    for process in world.kernel.processes:
        for file in process.descriptors.files.values():
            if isinstance(file.target, Context) and file.target not in met:
                met.append(file.target)
                yield file.target


@always("a page is filled only when every event has been read")
def no_fill_inside_a_change(world: World) -> str | None:
    """An accepted fill means that its caller knows the layout that it fills."""
    filled = [note for note in world.notes if ": filled " in note]
    if filled:
        for ctx in contexts(world):
            for event in ctx.events:
                return f"{filled[0]}, while {event.message} has not been read"
    return None


__all__ = [
    "ELSEWHERE",
    "GIB",
    "HUGE_A",
    "HUGE_B",
    "HUGE_PAGE",
    "HUGE_PLACES",
    "MINOR",
    "MISSING",
    "PAGE",
    "PLACES",
    "SOURCE",
    "WP",
    "A",
    "B",
    "Setting",
    "contexts",
    "hugetlb_file",
    "map_gib",
    "messages",
    "no_fill_inside_a_change",
    "registered",
]
