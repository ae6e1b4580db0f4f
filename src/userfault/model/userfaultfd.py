"""`Userfaultfd` over the model: the same methods as `userfault.Userfaultfd`, so that one handler runs on
both.

The calls are made by one thread of a simulated process, the `caller`. Each runs to its end; while it has to
sleep (a COPY whose source is missing, a read that waits) the other threads run. If nobody can run any more
the call raises Deadlock, where the real one would hang.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeVar

from userfault import abi
from userfault.model import descriptor, handshake, versions
from userfault.model.context import Context
from userfault.model.errnos import EINVAL, SystemCallError, errno_name
from userfault.model.layout import HUGE_PAGE, PAGE, round_up
from userfault.model.mapping import mmap
from userfault.model.pagemap import Scan as Question
from userfault.model.process import OpenFile, Process
from userfault.model.step import Op
from userfault.model.system_calls import SystemCalls
from userfault.model.thread import Deadlock, Thread

T = TypeVar("T")

_CATEGORIES_OF_6_7 = abi.PAGE_IS_GUARD - 1
_BOUNCE = 0x7E0000000000  # where bytes given to copy() stand in the caller's memory
_current: list[Process] = []


class Scan(NamedTuple):
    """What `Userfaultfd.pagemap_scan` found."""

    regions: list[abi.PageRegion]
    """The matching pages, in the order of their addresses."""
    walk_end: int
    """Everything before this address was looked at; `end` unless `max_pages` stopped the scan."""


class Userfaultfd:
    """One userfaultfd of a simulated process, its handshake done.

    The parameters are those of the real class; `process` is the one that opens it (default: the one whose
    `simulated_process` block is open), `caller` the thread that makes the calls (default: its main thread).
    Raises OSError.

    planned: outcomes that the next calls of a method return instead of asking the model, by method name: how
    a test injects failures. `after`: called after every call (a simulation lets the other threads run there).
    """

    features: int
    """The bits that were asked for in the handshake."""
    offered: int
    """The bits that the kernel has; 0 if the descriptor was handed over."""
    ioctls: int
    """The mask of ioctls that the descriptor takes; 0 if it was handed over."""
    way: str
    """"syscall", "device" or "given"."""

    def __init__(
        self,
        features: int = 0,
        *,
        prefer: int = 0,
        kernel_faults: bool | None = None,
        nonblocking: bool = True,
        way: Literal["syscall", "device"] | None = None,
        process: Process | None = None,
        caller: Thread | None = None,
    ) -> None:
        process = process or current_process()
        offered = versions.features(process.kernel.version)
        asked = features | (prefer & offered)
        if not process.privileged and not features & abi.UFFD_FEATURE_EVENT_FORK:
            asked &= ~abi.UFFD_FEATURE_EVENT_FORK
        flags = handshake.O_CLOEXEC | (handshake.O_NONBLOCK if nonblocking else 0)
        fd, used = _open(process, flags, kernel_faults, way)
        self._take(process, caller or process.main, fd, asked, used)
        reply = handshake.api(process, self.context, abi.UFFD_API, asked)
        if reply.errno:
            self._caller.process.run(SystemCalls(process.main).close(fd))
            missing = ", ".join(abi.feature_names(asked & ~offered)) or "EVENT_FORK without CAP_SYS_PTRACE"
            raise OSError(reply.errno, f"{errno_name(reply.errno)}: the kernel refuses {missing}")
        self.offered = reply.features or 0
        self.ioctls = reply.ioctls or 0

    @classmethod
    def from_fd(
        cls, fd: int, features: int = 0, *, process: Process | None = None, caller: Thread | None = None
    ) -> Self:
        """Take a descriptor over whose handshake is done. Raises OSError EBADF if `fd` is not open."""
        process = process or current_process()
        self = cls.__new__(cls)
        try:
            process.descriptors.get(fd)
        except SystemCallError as error:
            raise OSError(error.errno, errno_name(error.errno)) from None
        self._take(process, caller or process.main, fd, features, "given")
        self.offered = self.ioctls = 0
        return self

    def _take(self, process: Process, caller: Thread, fd: int, features: int, way: str) -> None:
        self._fd: int | None = fd
        self._caller = caller
        self._file: OpenFile = process.descriptors.get(fd)
        self.features = features
        self.way = way
        self.planned: dict[str, list[abi.Outcome]] = {}
        self.after: Callable[[], object] = lambda: None
        self._bounce(b"")

    # The descriptor

    def fileno(self) -> int:
        """The number in the simulated process. Raises ValueError when closed, as all methods do.

        It means nothing to the selectors of the real machine."""
        if self._fd is None:
            raise ValueError("the userfaultfd is closed")
        return self._fd

    @property
    def context(self) -> Context:
        """The model's object behind the descriptor, to look at."""
        context: Context = self._file.target
        return context

    @property
    def closed(self) -> bool:
        """True after `close` or `detach`."""
        return self._fd is None

    @property
    def kernel_faults(self) -> bool:
        """True if system calls on missing pages wait, False if they get EFAULT."""
        return not self.context.user_mode_only

    def close(self) -> None:
        """Close the descriptor; again is no error. If it was the last copy every sleeper goes on."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._run(self._calls.close(fd))

    def detach(self) -> int:
        """Give the descriptor away: return it and count as closed."""
        fd = self.fileno()
        self._fd = None
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Userfaultfd closed>"
        return f"<Userfaultfd fd={self._fd} features={self.features:#x} (model)>"

    # Ranges

    def register(self, start: int, length: int, mode: int) -> abi.Outcome:
        """UFFDIO_REGISTER; `done` is the mask of ioctls that the range takes."""
        return self._call("register", self._calls.register(self.fileno(), start, length, mode))

    def unregister(self, start: int, length: int) -> abi.Outcome:
        """UFFDIO_UNREGISTER. It wakes sleepers only in ranges that were registered MISSING."""
        return self._call("unregister", self._calls.unregister(self.fileno(), start, length))

    def wake(self, start: int, length: int) -> abi.Outcome:
        """UFFDIO_WAKE: wake the threads that sleep on `length` bytes."""
        return self._call("wake", self._calls.wake(self.fileno(), start, length))

    # Answers to faults

    def copy(
        self, dst: int, src: int | bytes | bytearray | memoryview, length: int | None = None, mode: int = 0
    ) -> abi.Outcome:
        """UFFDIO_COPY of `length` bytes to `dst`, from an address in the caller's memory or from bytes.

        Raises ValueError if the buffer is too short."""
        if not isinstance(src, int):
            data = bytes(src)
            length = len(data) if length is None else length
            if len(data) < length:
                raise ValueError(f"the buffer has {len(data)} bytes, not {length}")
            src = self._bounce(data[:length])
        elif length is None:
            raise ValueError("an address needs a length")
        return self._call("copy", self._calls.copy(self.fileno(), dst, src, length, mode))

    def zeropage(self, start: int, length: int, mode: int = 0) -> abi.Outcome:
        """UFFDIO_ZEROPAGE of `length` bytes. EINVAL on hugetlb."""
        return self._call("zeropage", self._calls.zeropage(self.fileno(), start, length, mode))

    def writeprotect(self, start: int, length: int, mode: int) -> abi.Outcome:
        """UFFDIO_WRITEPROTECT of `length` bytes; without the WP bit it unprotects and wakes."""
        return self._call("writeprotect", self._calls.writeprotect(self.fileno(), start, length, mode))

    def continue_(self, start: int, length: int, mode: int = 0) -> abi.Outcome:
        """UFFDIO_CONTINUE: map `length` bytes that the page cache holds. EFAULT where it holds none."""
        return self._call("continue_", self._calls.continue_(self.fileno(), start, length, mode))

    def poison(self, start: int, length: int, mode: int = 0) -> abi.Outcome:
        """UFFDIO_POISON: make a touch of absent pages raise SIGBUS. Lengths in bytes."""
        return self._call("poison", self._calls.poison(self.fileno(), start, length, mode))

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> abi.Outcome:
        """UFFDIO_MOVE: fill `length` bytes at `dst` with the pages at `src`, which are absent afterwards."""
        return self._call("move", self._calls.move(self.fileno(), dst, src, length, mode))

    # Messages and page tables

    def read_messages(self, limit: int = 64, *, wait: bool = False) -> list[abi.Message]:
        """Read at most `limit` messages (1 to 64): faults before events. Without one an empty list, or with
        `wait` (or a blocking descriptor) sleep until there is one. Raises OSError."""
        if not 1 <= limit <= 64:
            raise ValueError("limit is 1 to 64 messages")
        calls, fd = self._calls, self.fileno()
        if wait and self._file.nonblock and not self.context.readable:
            self._run(calls.poll(fd))
        if self._file.nonblock and not self.context.readable:
            return []
        return self._run(calls.read_messages(fd, limit))

    @property
    def readable(self) -> bool:
        """A poll would say that a message waits."""
        return bool(descriptor.poll(self._file) & descriptor.POLLIN)

    def pagemap_scan(
        self,
        start: int,
        end: int,
        *,
        flags: int = 0,
        category_inverted: int = 0,
        category_mask: int = 0,
        category_anyof_mask: int = 0,
        return_mask: int = _CATEGORIES_OF_6_7,
        max_pages: int = 0,
        vector: bool = True,
        pid: int | None = None,
    ) -> Scan:
        """PAGEMAP_SCAN (6.7) of the bytes from `start` to `end`, or to `max_pages`. `pid`: of another process
        of the model. Raises OSError."""
        thread = self._caller
        if pid is not None:
            thread = next(process.main for process in thread.process.kernel.processes if process.pid == pid)
        question = Question(
            start,
            end,
            flags,
            category_mask,
            category_anyof_mask,
            category_inverted,
            return_mask,
            max_pages,
            1 << 20 if vector else 0,
        )
        reply = self._run(SystemCalls(thread).pagemap_scan(question))
        if reply.errno:
            raise OSError(reply.errno, errno_name(reply.errno))
        return Scan(reply.regions, reply.walk_end)

    # Running the calls

    @property
    def _calls(self) -> SystemCalls:
        return SystemCalls(self._caller)

    def _call(self, name: str, operation: Op[abi.Outcome]) -> abi.Outcome:
        planned = self.planned.get(name)
        if planned:
            operation.close()
            return planned.pop(0)
        return self._run(operation)

    def _run(self, operation: Op[T]) -> T:
        try:
            result = run_alone(self._caller, operation)
        except SystemCallError as error:
            raise OSError(error.errno, errno_name(error.errno)) from None
        self.after()
        return result

    def _bounce(self, data: bytes) -> int:
        """Put bytes into the caller's memory.

        The place is mapped when the userfaultfd is made: mmap would have to wait for a thread that is in the
        middle of a fault."""
        mm = self._caller.process.mm
        vma = mm.find(_BOUNCE)
        length = round_up(len(data), PAGE)
        if vma is None or vma.end - vma.start < length:
            run_alone(self._caller, mmap(self._caller, _BOUNCE, max(length, HUGE_PAGE), replace=True))
        run_alone(self._caller, self._calls.store(_BOUNCE, data))
        return _BOUNCE


def run_alone(caller: Thread, operation: Op[T]) -> T:
    """Run an operation on `caller` to its end; the others run while it sleeps. Raises Deadlock."""
    caller.start(operation)
    try:
        while not caller.done:
            if caller.runnable:
                caller.step()
                continue
            others = [thread for thread in caller.process.kernel.threads if thread.runnable]
            if not others:
                raise Deadlock(f"{caller.name} would {caller.what} for ever: nobody else can run")
            for thread in others:
                thread.step()
    finally:
        if caller.program is not None:
            caller.program.close()
            caller.abandon()
    if caller.error is not None:
        raise caller.error
    if caller.fault is not None:
        raise caller.fault
    result: T = caller.result
    return result


def _open(
    process: Process, flags: int, kernel_faults: bool | None, way: Literal["syscall", "device"] | None
) -> tuple[int, str]:
    """The first way that works, as the real class tries them. Raises OSError."""
    tries: list[tuple[str, int]] = []
    if kernel_faults is not False:
        tries += [("syscall", flags), ("device", flags)]
    if kernel_faults is not True:
        tries += [("syscall", flags | abi.UFFD_USER_MODE_ONLY), ("device", flags | abi.UFFD_USER_MODE_ONLY)]
    refused = SystemCallError(EINVAL)
    for kind, wanted in tries:
        if way is not None and kind != way:
            continue
        try:
            if kind == "syscall":
                return handshake.userfaultfd(process, wanted), kind
            handshake.open_device(process)
            return handshake.device_ioctl(process, abi.USERFAULTFD_IOC_NEW, wanted), kind
        except SystemCallError as error:
            refused = error
    raise OSError(refused.errno, f"{errno_name(refused.errno)}: no way to open a userfaultfd is left")


def current_process() -> Process:
    """The process whose simulation is open. Raises RuntimeError if there is none."""
    if not _current:
        raise RuntimeError("no simulated process: open one with userfault.testing.simulated_process()")
    return _current[-1]


def enter_process(process: Process) -> None:
    """Make a process the current one."""
    _current.append(process)


def leave_process() -> None:
    """Forget the current process."""
    _current.pop()
