"""The executable model as a conformance backend: the same list of behaviours, without a kernel.

Nothing waits here. Whoever wants to see what comes of an operation lets all threads run until they sleep; an
operation that must finish and does not fails the test at once.
"""

from __future__ import annotations

import ctypes
import errno
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from conformance.backend import HUGE, Access, Area, Cure, Entry, Kind, Unavailable
from userfault import abi
from userfault.abi import Message, PageRegion
from userfault.model import Kernel, MemoryFault, Op, Scheduler, SystemCallError, SystemCalls, Userfaultfd
from userfault.model import Process as ModelProcess
from userfault.model import Thread as ModelThread
from userfault.model.access import touch
from userfault.model.fill import Fill
from userfault.model.fill_continue import continue_
from userfault.model.fill_copy import copy
from userfault.model.fill_poison import poison
from userfault.model.fill_zeropage import zeropage
from userfault.model.handshake import O_CLOEXEC, O_NONBLOCK, api, new_userfaultfd
from userfault.model.move import move
from userfault.model.pagecache import File
from userfault.model.pagemap import Scan, pagemap_entry, pagemap_scan
from userfault.model.userfaultfd import run_alone

T = TypeVar("T")

ADVICE = {
    4: "DONTNEED",
    8: "FREE",
    9: "REMOVE",
    10: "DONTFORK",
    11: "DOFORK",
    14: "HUGEPAGE",
    15: "NOHUGEPAGE",
    18: "WIPEONFORK",
    19: "KEEPONFORK",
    20: "COLD",
    21: "PAGEOUT",
    22: "POPULATE_READ",
    23: "POPULATE_WRITE",
    24: "DONTNEED_LOCKED",
    25: "COLLAPSE",
    102: "GUARD_INSTALL",
    103: "GUARD_REMOVE",
}
STEPS = 3_000_000
ROOMS, ROOM = 1 << 38, 1 << 30
"""Where the memory of tests begins, and what one middle-level page table maps, in bytes."""


class Running(Generic[T]):
    """An operation of a thread."""

    def __init__(self, backend: ModelBackend, thread: ModelThread) -> None:
        self.backend = backend
        self.thread = thread
        self.value: list[T] = []

    def finished(self) -> bool:
        self.backend.settle()
        return self._take()

    def _take(self) -> bool:
        if not self.value and self.thread.done:
            error = self.thread.error or self.thread.fault
            if error is not None:
                raise AssertionError(f"{self.thread.name}: {error}")
            self.value.append(self.thread.result)
        return bool(self.value)

    def result(self) -> T:
        if not self.finished():
            raise AssertionError(f"the operation does not end: {self.thread.what}")
        return self.value[0]


class Thread:
    """A thread of a simulated process."""

    def __init__(self, process: Process, thread: ModelThread) -> None:
        self.process = process
        self.thread = thread
        self.calls = SystemCalls(thread)

    def _do(self, operation: Op[T]) -> Running[T]:
        if not self.thread.done:
            raise AssertionError(f"{self.thread.name} is busy: {self.thread.what}")
        self.thread.start(operation)
        return Running(self.process.backend, self.thread)

    def load(self, address: int, cure: Cure | None = None) -> Running[Access]:
        return self._do(self._access(lambda: self.calls.load(address), cure))

    def store(self, address: int, value: int, cure: Cure | None = None) -> Running[Access]:
        return self._do(self._access(lambda: self.calls.store(address, bytes((value,))), cure))

    def _access(self, operation: Callable[[], Op[Any]], cure: Cure | None) -> Op[Access]:
        cures = 0
        while True:
            try:
                got = yield from operation()
                return Access(None, got[0] if got else 0, cures)
            except MemoryFault as fault:
                if cure is None or fault.signal != "SIGBUS":
                    return Access(fault.signal, 0, cures)
                cures += 1
                yield from self._cure(cure)

    def _cure(self, cure: Cure) -> Op[None]:
        assert isinstance(cure.uffd, Userfaultfd)
        fd = cure.uffd.fileno()
        if cure.content is None:
            yield from self.calls.writeprotect(fd, cure.start, cure.length, cure.mode)
        else:
            address = self.process.staging(cure.content)
            yield from self.calls.copy(fd, cure.start, address, cure.length, cure.mode)

    def read(self, address: int, length: int) -> Running[bytes]:
        return self._do(self.calls.load(address, length))

    def write(self, address: int, content: bytes) -> Running[None]:
        return self._do(self.calls.store(address, content))

    def madvise(self, start: int, length: int, advice: int) -> Running[int]:
        return self._do(_errno(self.calls.madvise(start, length, ADVICE[advice])))

    def mprotect(self, start: int, length: int, protection: int) -> Running[int]:
        return self._do(_errno(self.calls.mprotect(start, length, protection)))

    def mremap(self, start: int, length: int, to: int) -> Running[int]:
        return self._do(_errno(self.calls.mremap(start, length, length, to)))

    def fork(self) -> Running[Process]:
        def idle(t: SystemCalls) -> Op[None]:
            yield from t.step("the child begins")

        def fork() -> Op[Process]:
            child = yield from self.calls.fork(idle)
            return Process(self.process.backend, child, self.process)

        return self._do(fork())

    def bump(self, area: Area, seed: int, count: int) -> Running[int]:
        return self._do(self._bump(area, random.Random(seed), count))

    def _bump(self, area: Area, draw: random.Random, count: int) -> Op[int]:
        for _ in range(count):
            page = draw.choice(area.pages)
            while not (yield from self._lock(page)):
                yield from self.calls.step("spin")
            first = yield from self.calls.load(page + 8, 8)
            last = yield from self.calls.load(page + area.page - 8, 8)
            if first != last or not any(first):
                return -1
            more = (int.from_bytes(first, "little") + 1).to_bytes(8, "little")
            yield from self.calls.store(page + 8, more)
            yield from self.calls.store(page + area.page - 8, more)
            yield from self.calls.store(page, bytes(4))
        return count

    def _lock(self, page: int) -> Op[bool]:
        """Read the lock, then set it by one atomic instruction if it was free."""
        if any((yield from self.calls.load(page, 4))):
            return False
        thread = self.thread
        place, offset = yield from touch(thread, thread.process.mm, page, write=True)
        if any(place.content.read(offset, 4)):
            return False
        place.content = place.content.write(offset, b"\1\0\0\0", place.size)
        return True

    def sleeps_uninterruptibly(self) -> bool:
        self.process.backend.settle()
        return self.thread.asleep and self.thread.state == "D"


def _errno(operation: Op[Any]) -> Op[int]:
    try:
        yield from operation
    except SystemCallError as error:
        return error.errno
    return 0


class Process:
    """A simulated process."""

    def __init__(self, backend: ModelBackend, process: ModelProcess, parent: Process | None = None) -> None:
        self.backend = backend
        self.process = process
        self.parent = parent
        self._main = Thread(self, process.main)
        self._free: int = ROOMS if parent is None else parent._free
        self._staged: int = 0x7D0000000000 if parent is None else parent._staged

    @property
    def main(self) -> Thread:
        return self._main

    def thread(self) -> Thread:
        return Thread(self, self.process.thread(f"{self.process.name} {len(self.process.threads)}"))

    def room(self, length: int, align: int) -> int:
        assert ROOM % align == 0
        address = self._free
        self._free += (-(-length // ROOM) + 1) * ROOM
        return address

    def area(self, kind: Kind, pages: int) -> Area:
        page = HUGE if kind.hugetlb else 4096
        length = pages * page
        names = {
            Kind.FILE: "ordinary",
            Kind.FILE_PRIVATE: "ordinary",
            Kind.HUGETLB: "hugetlb",
            Kind.HUGETLB_PRIVATE: "hugetlb",
        }
        file = None
        if kind not in (Kind.ANON, Kind.THP):
            file = File(self.backend.kernel, names.get(kind, "shmem"), length, kind.value)
        places = []
        for _ in range(2 if kind.shared else 1):
            at = self.room(length, HUGE)
            self.process.run(self.process.calls.mmap(at, length, shared=kind.shared, file=file))
            places.append(at)
        if file is not None:
            self.backend.files[places[0]] = file
        return Area(kind, places[0], length, page, places[1] if kind.shared else None)

    def staging(self, content: bytes) -> int:
        """Bytes in ordinary memory of the process."""
        address: int = self._staged
        self._staged += len(content) + HUGE
        self.process.run(self.process.calls.mmap(address, len(content)))
        self.process.run(self.process.calls.store(address, content))
        return address

    def _caller(self) -> ModelThread:
        """Whoever calls for the test: a thread of its own."""
        return self.thread().thread

    def userfaultfd(self, features: int = 0, *, nonblocking: bool = True) -> Userfaultfd:
        uffd = Userfaultfd(features, nonblocking=nonblocking, process=self.process, caller=self._caller())
        self.backend.owners[uffd] = self
        return uffd

    def adopt(self, ufd: int, features: int) -> Userfaultfd:
        # A thread of the parent read the fork message, so the descriptor is in the parent's table.
        assert self.parent is not None
        theirs = self.parent.process.descriptors
        number = self.process.descriptors.install(theirs.get(ufd))
        theirs.remove(ufd)
        uffd = Userfaultfd.from_fd(number, features, process=self.process, caller=self._caller())
        self.backend.owners[uffd] = self
        return uffd

    def entry(self, address: int) -> Entry:
        seen = pagemap_entry(self.process.mm, address)
        return Entry(seen.present, seen.swap, seen.uffd_wp)

    def scan(self, start: int, end: int, *, flags: int = 0, any_of: int, report: int) -> list[PageRegion]:
        reply = pagemap_scan(
            self.process.mm,
            Scan(start, end, flags, category_anyof_mask=any_of, return_mask=report, vec_len=1 << 20),
        )
        assert (reply.errno, reply.walk_end) == (0, end)
        return reply.regions


class Virgin:
    """A userfaultfd before its handshake."""

    def __init__(self, process: ModelProcess) -> None:
        self.process = process
        self.fd = new_userfaultfd(process, O_CLOEXEC | O_NONBLOCK | abi.UFFD_USER_MODE_ONLY)

    def handshake(self, api_number: int, features: int) -> tuple[int, int, int]:
        reply = api(self.process, self.process.calls.context(self.fd), api_number, features)
        return reply.errno, reply.features or 0, reply.ioctls or 0


FILLS: dict[int, tuple[Any, str]] = {
    abi.UFFDIO_COPY: (copy, "copy"),
    abi.UFFDIO_MOVE: (move, "move"),
    abi.UFFDIO_ZEROPAGE: (zeropage, "zeropage"),
    abi.UFFDIO_CONTINUE: (continue_, "mapped"),
    abi.UFFDIO_POISON: (poison, "updated"),
}


class ModelBackend:
    """The model of one kernel version. `seed`: the order of the threads' steps is drawn from it; without one
    they take them in turn."""

    def __init__(
        self,
        version: str = "6.18",
        defects: Iterable[str] = (),
        *,
        swap: bool = True,
        seed: int | None = None,
    ) -> None:
        self.kernel = Kernel(version, defects=defects, swap=swap)
        self.swap = swap
        self.scheduler = Scheduler(self.kernel)
        self.draw = None if seed is None else random.Random(seed)
        self.owners: dict[Userfaultfd, Process] = {}
        self.files: dict[int, File] = {}
        """The file of an area, by the area's start."""

    @property
    def observer(self) -> Any:
        from conformance.model_observer import ModelObserver

        return ModelObserver()

    def settle(self) -> None:
        """Let everybody run until all sleep."""
        scheduler, draw = self.scheduler, self.draw
        quiet = scheduler.settle(limit=STEPS) if draw is None else scheduler.run(draw.choice, limit=STEPS)
        assert quiet, "somebody runs in circles"
        scheduler.schedule.clear()

    def process(self) -> Process:
        return Process(self, self.kernel.process(f"process {len(self.kernel.processes) + 1}"))

    def virgin(self, way: str) -> Virgin:
        assert way in ("syscall", "device")
        return Virgin(self.kernel.process(way))

    def messages(self, uffd: Userfaultfd) -> list[Message]:
        self.settle()
        found = uffd.read_messages()
        assert found, "no message comes"
        return found

    def quiet(self, uffd: Userfaultfd) -> bool:
        self.settle()
        return not self.owners[uffd].process.calls.context(uffd.fileno()).readable

    def serve(self, running: Running[T], uffd: Userfaultfd, answer: Callable[[Message], object]) -> T:
        while True:
            self.settle()
            found = uffd.read_messages()
            for message in found:
                answer(message)
            if running.finished():
                return running.result()
            assert found, f"the operation does not end: {running.thread.what}"

    def page_out(self, process: Process, start: int, length: int) -> None:
        assert process.main.madvise(start, length, 21).result() == 0
        assert not any(process.entry(at).present for at in range(start, start + length, 4096))

    def merging(self) -> AbstractContextManager[None]:
        raise Unavailable("the model does not merge pages")

    def merged(self, process: Process, area: Area, *, wait: bool = True) -> bool:
        raise Unavailable("the model does not merge pages")

    def folio_sizes(self, kind: Kind) -> list[int]:
        return []

    def folios(self, kind: Kind, size: int) -> AbstractContextManager[None]:
        raise Unavailable("the model has folios of one page and of 2 MiB")

    def ioctl(self, uffd: Userfaultfd, request: int, argument: ctypes.Structure) -> int:
        owner = self.owners[uffd]
        ctx = owner.process.calls.context(uffd.fileno())
        which, field = FILLS[request]
        values: Any = argument
        if hasattr(values, "dst"):
            fill = Fill(values.dst, values.len, values.mode, values.src)
        else:
            fill = Fill(values.range.start, values.range.len, values.mode)
        caller = owner._caller()
        reply = run_alone(caller, which(caller, ctx, fill))
        if reply.out is not None:
            setattr(values, field, reply.out)
        assert reply.errno != errno.ESRCH
        return int(reply.errno)
