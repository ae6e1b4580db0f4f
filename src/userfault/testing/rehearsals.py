"""A program and its fault handler, rehearsed: ordinary functions as threads, in as many orders as seeds.

    from userfault import abi
    from userfault.testing import rehearsal

    def handler(uffd):                       # what you want to test; it runs on the real class as well
        while True:
            for message in uffd.read_messages(wait=True):
                if isinstance(message, abi.Pagefault):
                    uffd.copy(message.address, b"\\x2a" * 4096)

    with rehearsal(seed=1) as process:
        memory = process.map(4 * 4096)
        uffd = process.userfaultfd()
        uffd.register(memory, 4 * 4096, abi.UFFDIO_REGISTER_MODE_MISSING).check()
        process.start(handler, uffd)
        reader = process.start(process.load, memory, 1)
        process.run()
        assert reader.result == b"\\x2a"

`simulated_process` is for a handler that the test calls. Here it runs on a thread of its own, for as long as
it likes, against threads that touch memory. Everything is the executable model's: the kernel's answers, its
races, its order of checks. The seed decides who goes next; the same seed gives the same execution, so a
failure is repeated by its seed. Time stands still while anybody can run, and then jumps to the next sleeper.
Calls can be made to fail.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from userfault.abi import Message, Outcome
from userfault.model.content import Content
from userfault.model.errnos import EAGAIN, SystemCallError
from userfault.model.fiber import Fiber, current
from userfault.model.kernel import Kernel
from userfault.model.layout import HUGE_PAGE, PAGE, round_up
from userfault.model.page import Page
from userfault.model.pagetable import Present
from userfault.model.process import Process
from userfault.model.scheduler import Scheduler, TraceLine
from userfault.model.step import Op, Sleep
from userfault.model.system_calls import SystemCalls
from userfault.model.thread import Deadlock, Thread
from userfault.model.userfaultfd import Userfaultfd
from userfault.model.vma import AnonVma, Vma

T = TypeVar("T")

STEPS: Final = 100_000
"""After so many steps `run` says that somebody runs in circles."""

_FIRST_MAPPING: Final = 0x10000000
_BOUNCE: Final = 0x7E0000000000  # where buffers stand for bytes objects in the callers' memory
_BOUNCE_LENGTH: Final = 1 << 26  # for each thread


class StillRunning(Exception):
    """`run` took its bound of steps, and threads could still go on: somebody runs in circles."""


class _Until(Sleep):
    """A thread that sleeps until a simulated time."""

    __slots__ = ("_process", "time")
    interruptible = True

    def __init__(self, process: Rehearsal, time: float) -> None:
        self._process = process
        self.time = time

    def ready(self) -> bool:
        return self._process.time() >= self.time

    @property
    def what(self) -> str:
        return f"sleep until second {self.time:g}"


@dataclass(slots=True)
class _Failure:
    call: str
    errno: int
    times: int


class Task:
    """A simulated thread that runs a function."""

    def __init__(self, thread: Thread, fiber: Fiber) -> None:
        self._thread = thread
        self._fiber = fiber

    @property
    def name(self) -> str:
        """The thread's name."""
        return self._thread.name

    @property
    def done(self) -> bool:
        """The function has ended."""
        return self._thread.done

    @property
    def waits_for(self) -> str | None:
        """What it sleeps on, in words; None if it does not sleep."""
        return self._thread.what if self._thread.asleep else None

    @property
    def result(self) -> Any:
        """What the function returned. Raises MemoryFault if it got a signal that it did not handle, and
        RuntimeError while it has not ended."""
        if not self.done:
            raise RuntimeError(f"{self.name} has not ended: {self._thread.what}")
        error = self._thread.fault or self._thread.error
        if error is not None:
            raise error
        return self._thread.result

    def kill(self) -> None:
        """Send SIGKILL to this thread alone; it ends where it sleeps."""
        self._thread.kill()

    def __repr__(self) -> str:
        return f"<Task {self.name}: {'done' if self.done else self._thread.what}>"


class Rehearsal:
    """A process on a simulated machine, and who runs in it. Make it by `rehearsal`, in a `with` statement.

    Its methods may be called from the test, to set a scene, and from the functions that `start` runs.
    Addresses and lengths are in bytes.
    """

    def __init__(self, version: str, seed: int, defects: Iterable[str], swap: bool) -> None:
        self.kernel = Kernel(version, defects=defects, swap=swap)
        self.process: Process = self.kernel.process("process")
        self.scheduler = Scheduler(self.kernel, trace=True)
        self.seed = seed
        self._draw = random.Random(seed)
        self._now = 0.0
        self._fibers: list[Fiber] = []
        self._failures: list[_Failure] = []
        self._free = _FIRST_MAPPING
        self.failed: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fiber in self._fibers:
            fiber.abandon()

    # Memory.

    def map(self, length: int, *, shared: bool = False, hugetlb: bool = False) -> int:
        """Map fresh memory; returns its address. shared: shmem; hugetlb: 2 MiB pages."""
        unit = HUGE_PAGE if hugetlb else PAGE
        address = round_up(self._free, HUGE_PAGE)
        self._free = address + round_up(length, unit) + HUGE_PAGE
        mapped: int = self.do(lambda t: t.mmap(address, length, shared=shared, hugetlb=hugetlb))
        return mapped

    def load(self, address: int, length: int = 1) -> bytes:
        """Read `length` bytes. Raises MemoryFault where a real thread would get a signal."""
        data: bytes = self.do(lambda t: t.load(address, length))
        return data

    def store(self, address: int, data: bytes) -> None:
        """Write bytes. Raises MemoryFault where a real thread would get a signal."""
        self.do(lambda t: t.store(address, data))

    def madvise(self, address: int, length: int, advice: str) -> None:
        """madvise(2) of `length` bytes; `advice` without MADV_. Raises OSError."""
        self._system_call("madvise", lambda t: t.madvise(address, length, advice))

    def munmap(self, address: int, length: int) -> None:
        """munmap(2) of `length` bytes. Raises OSError."""
        self._system_call("munmap", lambda t: t.munmap(address, length))

    def mremap(self, address: int, old: int, new: int, to: int | None = None) -> int:
        """mremap(2) from `old` to `new` bytes, to a place of its own or to `to`. Raises OSError."""
        moved: int = self._system_call("mremap", lambda t: t.mremap(address, old, new, to))
        return moved

    def system_call(self, operation: Callable[[SystemCalls], Op[T]]) -> T:
        """Anything else that `userfault.model.SystemCalls` can do. Raises OSError."""
        result: T = self._system_call("system call", operation)
        return result

    def userfaultfd(self, features: int = 0, **options: Any) -> Userfaultfd:
        """A userfaultfd of this process; the options are those of `userfault.Userfaultfd`. Raises OSError."""
        uffd = _RehearsedUserfaultfd(features, process=self.process, **options)
        uffd.rehearsal = self
        return uffd

    def take(self, fd: int, features: int = 0) -> Userfaultfd:
        """A descriptor from a fork message, as a Userfaultfd. Raises OSError."""
        uffd = _RehearsedUserfaultfd.from_fd(fd, features, process=self.process)
        uffd.rehearsal = self
        return uffd

    # Threads and time.

    def start(self, function: Callable[..., Any], *arguments: Any, name: str | None = None) -> Task:
        """Another thread, which runs an ordinary function; it takes no step before `run`."""
        label = name if name is not None else str(getattr(function, "__name__", "thread"))
        taken = {thread.name for thread in self.kernel.threads}
        unique = label
        number = 2
        while unique in taken:
            unique, number = f"{label} {number}", number + 1
        fiber = Fiber(lambda: function(*arguments), unique)
        self._fibers.append(fiber)
        return Task(self.process.spawn(unique, fiber.program), fiber)

    def time(self) -> float:
        """Simulated seconds since the beginning; give it to a handler in place of time.monotonic."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Sleep so many simulated seconds; give it to a handler in place of time.sleep."""
        until = self._now + seconds

        def sleep(t: SystemCalls) -> Op[None]:
            yield _Until(self, until)

        self.do(sleep)

    def run(self, *, seconds: float | None = None, steps: int = STEPS) -> None:
        """Let the threads run, in an order drawn from the seed, until all have ended or wait for good.

        seconds   stop when that much simulated time has passed
        steps     raise StillRunning after so many steps
        """
        end = None if seconds is None else self._now + seconds
        for _ in range(steps):
            runnable = self.scheduler.runnable()
            if runnable:
                self.scheduler.step(self._draw.choice(runnable))
            elif not self._jump(end):
                return
        raise StillRunning(f"{steps} steps were taken; seed {self.seed}")

    def _jump(self, end: float | None) -> bool:
        """Nobody can run: let time pass until the first sleeper wakes. False: there is none before `end`."""
        times = [
            thread.next.time
            for thread in self.kernel.threads
            if thread.asleep and isinstance(thread.next, _Until)
        ]
        if not times or (end is not None and min(times) > end):
            self._now = self._now if end is None else end
            return False
        self._now = max(self._now, min(times))
        return True

    @property
    def trace(self) -> list[TraceLine]:
        """Every step so far: who did what, and what it changed."""
        assert self.scheduler.trace is not None
        return self.scheduler.trace

    # Failures.

    def fail(self, call: str, errno: int, times: int = 1) -> None:
        """The next `times` calls of a method of Userfaultfd fail with `errno` and do nothing.

        `call` is the method's name, such as "copy" or "read_messages". Raises ValueError if there is none.
        """
        if not hasattr(Userfaultfd, call):
            raise ValueError(f"Userfaultfd has no method {call!r}")
        self._failures.append(_Failure(call, errno, times))

    def fails(self, call: str) -> int:
        """The errno that was planned for this call, 0 if none was."""
        for failure in self._failures:
            if failure.call == call and failure.times > 0:
                failure.times -= 1
                self.failed.append(call)
                return failure.errno
        return 0

    # Doing things for whoever calls.

    def caller(self) -> Thread:
        """The simulated thread that is calling: a function's, or the main thread for the test itself."""
        fiber = current()
        if fiber is not None and fiber in self._fibers:
            assert fiber.thread is not None
            return fiber.thread
        return self.process.main

    def do(self, operation: Callable[[SystemCalls], Op[Any]]) -> Any:
        """Do an operation for whoever is calling. Raises what the operation raises."""
        fiber = current()
        if fiber is not None and fiber in self._fibers:
            return fiber.call(operation)
        return self._from_the_test(operation)

    def _from_the_test(self, operation: Callable[[SystemCalls], Op[Any]]) -> Any:
        """On the main thread; the others run while it sleeps. Raises Deadlock if nobody can wake it."""
        main = self.process.main
        main.start(operation(SystemCalls(main)))
        while not main.done:
            if main.runnable:
                self.scheduler.step(main)
                continue
            runnable = self.scheduler.runnable()
            if runnable:
                self.scheduler.step(self._draw.choice(runnable))
            elif not self._jump(None):
                raise Deadlock(f"the test would {main.what}, and nobody can change that")
        error = main.fault or main.error
        if error is not None:
            raise error
        return main.result

    def _system_call(self, name: str, operation: Callable[[SystemCalls], Op[Any]]) -> Any:
        try:
            return self.do(operation)
        except SystemCallError as error:
            raise OSError(error.errno, f"{name}: {os.strerror(error.errno)}") from None


class _RehearsedUserfaultfd(Userfaultfd):
    """Calls are made by the thread of whoever calls, step by step among the others."""

    rehearsal: Rehearsal | None = None

    @property
    def _calls(self) -> SystemCalls:
        return SystemCalls(self._caller if self.rehearsal is None else self.rehearsal.caller())

    def _call(self, name: str, operation: Op[Outcome]) -> Outcome:
        errno = 0 if self.rehearsal is None else self.rehearsal.fails(name)
        if errno:
            operation.close()
            return Outcome(0, errno)
        return self._run(operation)

    def _run(self, operation: Op[T]) -> T:
        if self.rehearsal is None:
            return super()._run(operation)
        try:
            result: T = self.rehearsal.do(lambda t: operation)
        except SystemCallError as error:
            raise OSError(error.errno, os.strerror(error.errno)) from None
        return result

    def read_messages(self, limit: int = 64, *, wait: bool = False) -> list[Message]:
        """At most `limit` messages; `wait` sleeps until there is one. Raises OSError."""
        fd = self.fileno()
        errno = 0 if self.rehearsal is None else self.rehearsal.fails("read_messages")
        if errno:
            raise OSError(errno, os.strerror(errno))
        calls = self._calls

        def read() -> Op[list[Message]]:
            while True:
                if wait:
                    yield from calls.poll(fd)
                try:
                    return (yield from calls.read_messages(fd, limit))
                except SystemCallError as error:  # another thread was faster, or the fault went away
                    if error.errno != EAGAIN:
                        raise
                    if not wait:
                        return []

        return self._run(read())

    def _bounce(self, data: bytes) -> int:
        """Put bytes into the caller's memory, as if they had always been there; returns their address."""
        thread = self._calls.thread
        mm = thread.process.mm
        start = _BOUNCE + thread.tid * _BOUNCE_LENGTH
        end = start + max(round_up(len(data), PAGE), PAGE)
        vma = mm.find(start)
        if vma is None:
            mm.insert(Vma(start, end, anon_vma=AnonVma()))
        elif vma.end < end:
            vma.end = end
        for at in range(0, len(data), PAGE):
            whole = data[at : at + PAGE].ljust(PAGE, b"\0")
            content = Content(whole[0]) if whole == whole[:1] * PAGE else Content(whole)
            mm.table.pte_table_alloc(start + at)
            mm.table.set_pte(start + at, Present(Page(content, exclusive=True), write=True))
        return start


def rehearsal(
    version: str = "6.18", *, seed: int = 0, defects: Iterable[str] = (), swap: bool = True
) -> Rehearsal:
    """A process on a simulated machine, for a `with` statement.

    version  of the kernel: "5.17", "6.1", "6.12", "6.18"
    seed     decides who takes the next step
    defects  of `userfault.model.defects`, to be switched on
    swap     MADV_PAGEOUT has somewhere to write to
    """
    return Rehearsal(version, seed, defects, swap)
