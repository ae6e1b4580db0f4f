"""A simulated process to test a fault handler against: no privileges, no Linux, no luck.

    with simulated_process() as p:
        memory = p.map(4 * PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, abi.UFFDIO_REGISTER_MODE_MISSING).check()
        reader = p.read(memory.address, 5)         # a thread touches the memory, and sleeps
        my_handler(uffd)                           # the handler under test, any function
        assert reader.result() == b"hello"

Threads are simulated: nothing runs unless the test makes a call, and the same test does the same things every
time. By default everybody runs until all sleep, after each call; with `automatic=False` only `step` and
`settle` let them run. Time stands still until `advance`. `fail_next` makes the next calls fail.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from userfault import abi
from userfault.model import Kernel, Op, Process, Scheduler, SystemCalls, Thread, Userfaultfd
from userfault.model.layout import HUGE_PAGE, PAGE, round_up
from userfault.model.pagecache import File
from userfault.model.userfaultfd import enter_process, leave_process, run_alone

T = TypeVar("T")

_FIRST = 0x100000000000


class SimulatedMemory:
    """Memory of the simulated process. Sizes in bytes.

    address, length   where it is
    page_size         what one fill fills
    file              behind it, for file memory: `file.read`, `file.write` go around every mapping
    """

    def __init__(self, address: int, length: int, page_size: int, file: File | None) -> None:
        self.address = address
        self.length = length
        self.page_size = page_size
        self.file = file


class Running(Generic[T]):
    """Something that a simulated thread does."""

    def __init__(self, thread: Thread) -> None:
        self.thread = thread

    @property
    def done(self) -> bool:
        """It has ended."""
        return self.thread.done

    @property
    def waiting(self) -> str | None:
        """What it sleeps on, in words; None if it does not sleep."""
        return self.thread.what if self.thread.asleep else None

    def result(self) -> T:
        """What it returned.

        Raises AssertionError if it has not ended, MemoryFault for the signal that it died of, SystemCallError
        for a system call that failed."""
        if not self.done:
            raise AssertionError(f"{self.thread.name} has not ended: it would {self.thread.what}")
        if self.thread.fault is not None:
            raise self.thread.fault
        if self.thread.error is not None:
            raise self.thread.error
        value: T = self.thread.result
        return value


class SimulatedProcess:
    """One simulated process and the machine it runs on. Made by `simulated_process`.

    kernel, process, scheduler   the model's own objects, to look at
    """

    def __init__(self, kernel: Kernel, process: Process, *, automatic: bool, trace: bool) -> None:
        self.kernel = kernel
        self.process = process
        self.scheduler = Scheduler(kernel, trace=trace)
        self.automatic = automatic
        self._next_address = _FIRST
        self._names = itertools.count(1)
        self._now = 0.0
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._uffds: list[Userfaultfd] = []
        # The handler has a thread of its own, so that the main thread is free to be one that waits.
        self._handler = process.thread("handler")

    # Memory.

    def map(
        self, length: int, *, kind: str = "anonymous", shared: bool = True, file: File | None = None
    ) -> SimulatedMemory:
        """Map `length` bytes.

        kind: "anonymous", "shmem" or "hugetlb"; shared counts for the last two. `file`: map an object again,
        through another address (a view). Raises ValueError for another kind.
        """
        kind = file.kind if file is not None else kind
        size = HUGE_PAGE if kind == "hugetlb" else PAGE
        length = round_up(length, size)
        if kind not in ("anonymous", "shmem", "hugetlb"):
            raise ValueError(f"{kind!r} is no kind of memory; anonymous, shmem and hugetlb are")
        if kind != "anonymous" and file is None:
            file = File(self.kernel, kind, length)
        address = self._next_address
        self._next_address += round_up(length, HUGE_PAGE) + HUGE_PAGE
        calls = SystemCalls(self._handler)
        self._do(calls.mmap(address, length, shared=file is not None and shared, file=file))
        return SimulatedMemory(address, length, size, file)

    def peek(self, address: int, length: int) -> bytes:
        """`length` bytes there, read at once by the handler's thread.

        Raises MemoryFault, or Deadlock where it would have to wait for itself."""
        return self._do(SystemCalls(self._handler).load(address, length))

    def poke(self, address: int, data: bytes) -> None:
        """Write bytes at once by the handler's thread; raises as `peek`."""
        self._do(SystemCalls(self._handler).store(address, data))

    # userfaultfd.

    def userfaultfd(self, features: int = 0, **options: Any) -> Userfaultfd:
        """A userfaultfd of this process; the options are those of `userfault.Userfaultfd`. Raises OSError."""
        uffd = Userfaultfd(features, process=self.process, caller=self._handler, **options)
        return self._adopt(uffd)

    def take(self, fd: int, features: int = 0) -> Userfaultfd:
        """A descriptor from a fork message, as a Userfaultfd."""
        return self._adopt(Userfaultfd.from_fd(fd, features, process=self.process, caller=self._handler))

    def _adopt(self, uffd: Userfaultfd) -> Userfaultfd:
        uffd.after = self._after
        self._uffds.append(uffd)
        return uffd

    # Threads.

    def read(self, address: int, length: int = 1) -> Running[bytes]:
        """A new thread reads `length` bytes, as the processor does."""
        return self.start(lambda t: t.load(address, length), "reader")

    def write(self, address: int, data: bytes) -> Running[None]:
        """A new thread writes bytes, as the processor does."""
        return self.start(lambda t: t.store(address, data), "writer")

    def madvise(self, address: int, length: int, advice: str) -> Running[None]:
        """A new thread advises on `length` bytes ("DONTNEED"); it sleeps until its event is read."""
        return self.start(lambda t: t.madvise(address, length, advice), "madvise")

    def fork(self, program: Callable[[SystemCalls], Op[Any]]) -> Running[Process]:
        """A new thread forks; the child runs `program`."""
        return self.start(lambda t: t.fork(program), "forker")

    def start(self, program: Callable[[SystemCalls], Op[T]], name: str = "thread") -> Running[T]:
        """A new thread runs a program: a function of SystemCalls that returns an operation."""
        thread = self.process.spawn(f"{name} {next(self._names)}", program)
        self._after()
        return Running(thread)

    # Scheduling.

    def settle(self) -> bool:
        """Let everybody run until all sleep. False: somebody spins."""
        return self.scheduler.settle()

    def step(self, what: Running[Any] | Thread) -> None:
        """Let one thread take one step. Raises ValueError if it cannot."""
        thread = what.thread if isinstance(what, Running) else what
        if not thread.runnable:
            raise ValueError(f"{thread.name} cannot take a step: it would {thread.what}")
        self.scheduler.step(thread)

    def _after(self) -> None:
        if self.automatic:
            self.scheduler.settle()

    def _do(self, operation: Op[T]) -> T:
        result = run_alone(self._handler, operation)
        self._after()
        return result

    # Time.

    def clock(self) -> float:
        """The simulated time in seconds, for a handler that takes a clock."""
        return self._now

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Call `action` when so many simulated seconds have passed."""
        heapq.heappush(self._timers, (self._now + seconds, next(self._names), action))

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass; what was planned with `after` happens in its order."""
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._now, _, action = heapq.heappop(self._timers)
            action()
            self._after()
        self._now = end

    # Failures.

    def fail_next(self, uffd: Userfaultfd, call: str, errno: int, *, done: int = 0, times: int = 1) -> None:
        """Make the next `times` calls of a method fail: bytes `done`, and the errno (Linux's number).

        They do nothing, as if something had come first. Raises ValueError for what is no method.
        """
        if not callable(getattr(Userfaultfd, call, None)):
            raise ValueError(f"{call!r} is no method of Userfaultfd")
        uffd.planned.setdefault(call, []).extend([abi.Outcome(done, errno)] * times)


@contextmanager
def simulated_process(
    kernel: str = "6.18",
    *,
    defects: Iterable[str] = (),
    privileged: bool = True,
    hugetlb_pages: int = 64,
    automatic: bool = True,
    trace: bool = False,
) -> Iterator[SimulatedProcess]:
    """A process on a simulated kernel of that version.

    defects: names of `userfault.model.defects`. privileged: has CAP_SYS_PTRACE. hugetlb_pages: 2 MiB pages in
    the pool. automatic: everybody runs after each call. trace: `p.scheduler.trace` has a line for each step.
    Inside the block `userfault.model.Userfaultfd()` opens in this process. Raises ValueError for an unknown
    version or defect.
    """
    machine = Kernel(kernel, defects=defects, hugetlb_pages=hugetlb_pages)
    process = machine.process("process", privileged=privileged)
    enter_process(process)
    try:
        yield SimulatedProcess(machine, process, automatic=automatic, trace=trace)
    finally:
        leave_process()
