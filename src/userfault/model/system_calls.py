"""Everything a thread can do, as one object: what programs of scenarios and tests are written with.

    def program(t: SystemCalls) -> Op[bytes]:
        address = yield from t.mmap(0x10000000, 4096)
        yield from t.store(address, b"hello")
        return (yield from t.load(address, 5))

    thread = process.spawn("writer", program)

Each method is an operation: `yield from` it inside a program. Descriptors are numbers, addresses and lengths
bytes. System calls raise SystemCallError; accesses raise MemoryFault (the signal a real thread would get),
so a program that catches it has a signal handler. The ioctls of userfaultfd return `abi.Outcome`, as the real
class does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from userfault import abi
from userfault.model import access, descriptor, handshake, mapping, mremap
from userfault.model import exit as exits
from userfault.model import fork as forks
from userfault.model import madvise as advice
from userfault.model.context import Context
from userfault.model.errnos import EBADF, EFAULT, EINVAL, SystemCallError, errno_name
from userfault.model.fill import Fill
from userfault.model.fill_continue import continue_
from userfault.model.fill_copy import copy
from userfault.model.fill_poison import poison
from userfault.model.fill_zeropage import zeropage
from userfault.model.mapping import READ, WRITE
from userfault.model.move import move
from userfault.model.pagecache import File
from userfault.model.pagemap import PagemapEntry, Scan, ScanReply, pagemap_entry, pagemap_scan
from userfault.model.process import OpenFile
from userfault.model.register import register, unregister
from userfault.model.release import close_context
from userfault.model.reply import Reply
from userfault.model.smaps import Mapping, smaps
from userfault.model.step import Op, Sleep
from userfault.model.wake import wake
from userfault.model.writeprotect import writeprotect
from userfault.model.zap import punch, truncate

if TYPE_CHECKING:
    from userfault.model.process import Process
    from userfault.model.thread import Thread

T = TypeVar("T")

_Fill = Callable[["Thread", Context, "Fill | None"], Op[Reply]]


class _Until(Sleep):
    """Waiting for something between the threads of a program (a condition variable, a pipe)."""

    __slots__ = ("_ready", "_what")
    interruptible = True

    def __init__(self, what: str, ready: Callable[[], bool]) -> None:
        self._what = what
        self._ready = ready

    def ready(self) -> bool:
        return self._ready()

    @property
    def what(self) -> str:
        return f"wait for {self._what}"


class SystemCalls:
    """What one thread can do. `thread` is the thread itself."""

    __slots__ = ("thread",)

    def __init__(self, thread: Thread) -> None:
        self.thread = thread

    def _user(self, operation: Op[T]) -> Op[T]:
        """Back in user space: a thread that was killed meanwhile never comes there."""
        result = yield from operation
        if self.thread.killed:
            raise access.Killed
        return result

    # Memory.

    def load(self, address: int, length: int = 1) -> Op[bytes]:
        """Read bytes, as the processor does. Raises MemoryFault."""
        return self._user(access.load(self.thread, self.thread.process.mm, address, length))

    def store(self, address: int, data: bytes) -> Op[None]:
        """Write bytes, as the processor does. Raises MemoryFault."""
        return self._user(access.store(self.thread, self.thread.process.mm, address, data))

    def atomic(self, address: int, length: int, change: Callable[[bytes], bytes]) -> Op[bytes]:
        """Read, change and write bytes in one step; returns what was there. Raises MemoryFault."""
        return self._user(access.atomic(self.thread, self.thread.process.mm, address, length, change))

    def compare_exchange(self, address: int, expected: bytes, new: bytes) -> Op[bool]:
        """Write `new` if `expected` is there; whether it was. It faults as a write in either case. Raises
        MemoryFault."""
        found = yield from self.atomic(address, len(new), lambda old: new if old == expected else old)
        return found == expected

    def fill(self, address: int, length: int, value: int) -> Op[None]:
        """memset. Raises MemoryFault."""
        return self._user(access.fill(self.thread, self.thread.process.mm, address, length, value))

    def write_from(self, address: int, length: int) -> Op[bytes]:
        """A system call that reads user memory (write(2) of it into a pipe); returns the bytes it got. Raises
        SystemCallError EFAULT."""
        return self._copied(access.load(self.thread, self.thread.process.mm, address, length, user=False))

    def read_into(self, address: int, data: bytes) -> Op[None]:
        """A system call that writes user memory (read(2) of a pipe into it). Raises SystemCallError
        EFAULT."""
        return self._copied(access.store(self.thread, self.thread.process.mm, address, data, user=False))

    def _copied(self, operation: Op[T]) -> Op[T]:
        try:
            return (yield from self._user(operation))
        except access.MemoryFault:
            raise SystemCallError(EFAULT) from None

    def mmap(self, address: int, length: int, protection: int = READ | WRITE, **options: Any) -> Op[int]:
        """mmap(2); see `mapping.mmap` for the options."""
        return self._user(mapping.mmap(self.thread, address, length, protection, **options))

    def munmap(self, address: int, length: int) -> Op[None]:
        """munmap(2)."""
        return self._user(mapping.munmap(self.thread, address, length))

    def mprotect(self, address: int, length: int, protection: int) -> Op[None]:
        """mprotect(2)."""
        return self._user(mapping.mprotect(self.thread, address, length, protection))

    def mremap(self, address: int, old: int, new: int, to: int | None = None, **options: bool) -> Op[int]:
        """mremap(2); `to`: MREMAP_FIXED there. See `mremap.mremap`."""
        return self._user(mremap.mremap(self.thread, address, old, new, to, **options))

    def madvise(self, address: int, length: int, what: str) -> Op[None]:
        """madvise(2); `what` without MADV_, as in "DONTNEED"."""
        return self._user(advice.madvise(self.thread, address, length, what))

    def mlock(self, address: int, length: int) -> Op[None]:
        """mlock(2)."""
        return self._user(advice.mlock(self.thread, address, length))

    def memfd_create(self, size: int, *, hugetlb: bool = False, name: str = "memfd") -> Op[int]:
        """memfd_create(2) and ftruncate(2): a descriptor of a file of `size` bytes."""
        yield "memfd_create"
        process = self.thread.process
        file = File(process.kernel, "hugetlb" if hugetlb else "shmem", size, name)
        return process.descriptors.install(OpenFile(file))

    def file(self, fd: int) -> File:
        """The file behind a descriptor, for mmap. Raises SystemCallError EBADF."""
        target = self.thread.process.descriptors.get(fd).target
        if not isinstance(target, File):
            raise SystemCallError(EBADF)
        return target

    def pread(self, fd: int, length: int, offset: int) -> Op[bytes]:
        """pread(2) of a file: no mapping is touched, no fault is raised."""
        yield "pread"
        return self.file(fd).read(offset, length)

    def pwrite(self, fd: int, data: bytes, offset: int) -> Op[int]:
        """pwrite(2) of a file: write-protected mappings notice nothing [P8]."""
        yield "pwrite"
        return self.file(fd).write(offset, data)

    def punch_hole(self, fd: int, offset: int, length: int) -> Op[None]:
        """fallocate(FALLOC_FL_PUNCH_HOLE): pages leave the file and every mapping, without an event [E2]."""
        yield "punch a hole"
        punch(self.file(fd), offset, length)

    def ftruncate(self, fd: int, size: int) -> Op[None]:
        """ftruncate(2)."""
        yield "ftruncate"
        truncate(self.file(fd), size)

    def pagemap_scan(self, scan: Scan) -> Op[ScanReply]:
        """PAGEMAP_SCAN of this process."""
        mm = self.thread.process.mm
        yield from mm.mmap_lock.read("PAGEMAP_SCAN")
        reply = pagemap_scan(mm, scan)
        mm.mmap_lock.unread()
        return reply

    def pagemap(self, address: int) -> Op[PagemapEntry]:
        """A read of /proc/self/pagemap: the entry of the page at an address."""
        mm = self.thread.process.mm
        yield from mm.mmap_lock.read("read pagemap")
        entry = pagemap_entry(mm, address)
        mm.mmap_lock.unread()
        return entry

    def smaps(self) -> Op[list[Mapping]]:
        """A read of /proc/self/smaps: every mapping with its flags."""
        mm = self.thread.process.mm
        yield from mm.mmap_lock.read("read smaps")
        mappings = smaps(mm)
        mm.mmap_lock.unread()
        return mappings

    # Processes.

    def fork(self, program: Callable[[SystemCalls], Op[Any]], name: str = "child") -> Op[Process]:
        """fork(2): the child runs `program`."""
        return self._user(forks.fork(self.thread, lambda child: program(SystemCalls(child)), name))

    def exit(self) -> Op[None]:
        """exit_group(2): the other threads die, descriptors are closed, the address space goes."""
        return exits.exit_process(self.thread, self.thread.process)

    def execve(self) -> Op[None]:
        """execve(2): a new, empty address space; descriptors with CLOEXEC are closed."""
        return exits.execve(self.thread)

    def wait_for(self, what: str, ready: Callable[[], bool]) -> Op[None]:
        """Sleep until `ready()`: a pipe, a condition variable, a join. `what`: what comes then, in words."""
        yield _Until(what, ready)
        if self.thread.killed:
            raise access.Killed

    def step(self, label: str) -> Op[None]:
        """A step of the program itself, with a name: others may come in before it."""
        yield label
        if self.thread.killed:
            raise access.Killed

    # userfaultfd.

    def userfaultfd(
        self, features: int = 0, *, nonblock: bool = True, user_mode_only: bool = False, device: bool = False
    ) -> Op[int]:
        """userfaultfd(2), or with `device` USERFAULTFD_IOC_NEW of /dev/userfaultfd (6.1); then UFFDIO_API: a
        descriptor. Raises SystemCallError."""
        flags = handshake.O_CLOEXEC | (handshake.O_NONBLOCK if nonblock else 0)
        flags |= abi.UFFD_USER_MODE_ONLY if user_mode_only else 0
        process = self.thread.process
        if device:
            yield "open /dev/userfaultfd"
            handshake.open_device(process)
            fd = handshake.device_ioctl(process, abi.USERFAULTFD_IOC_NEW, flags)
        else:
            yield "userfaultfd"
            fd = handshake.userfaultfd(process, flags)
        reply = handshake.api(process, self.context(fd), abi.UFFD_API, features)
        if reply.errno:
            yield from self.close(fd)
            raise SystemCallError(reply.errno)
        return fd

    def context(self, fd: int) -> Context:
        """The context behind a descriptor, to look at. Raises SystemCallError EBADF or EINVAL."""
        target = self.thread.process.descriptors.get(fd).target
        if not isinstance(target, Context):
            raise SystemCallError(EINVAL)
        return target

    def register(self, fd: int, start: int, length: int, mode: int) -> Op[abi.Outcome]:
        """UFFDIO_REGISTER; done is the mask of ioctls."""
        return self._outcome(register(self.thread, self.context(fd), start, length, mode), length)

    def unregister(self, fd: int, start: int, length: int) -> Op[abi.Outcome]:
        """UFFDIO_UNREGISTER."""
        return self._outcome(unregister(self.thread, self.context(fd), start, length), length)

    def wake(self, fd: int, start: int, length: int) -> Op[abi.Outcome]:
        """UFFDIO_WAKE."""
        return self._outcome(wake(self.thread, self.context(fd), start, length), length)

    def copy(self, fd: int, dst: int, src: int, length: int, mode: int = 0) -> Op[abi.Outcome]:
        """UFFDIO_COPY from this process's own memory."""
        return self._fill(copy, fd, Fill(dst, length, mode, src))

    def zeropage(self, fd: int, start: int, length: int, mode: int = 0) -> Op[abi.Outcome]:
        """UFFDIO_ZEROPAGE."""
        return self._fill(zeropage, fd, Fill(start, length, mode))

    def continue_(self, fd: int, start: int, length: int, mode: int = 0) -> Op[abi.Outcome]:
        """UFFDIO_CONTINUE."""
        return self._fill(continue_, fd, Fill(start, length, mode))

    def poison(self, fd: int, start: int, length: int, mode: int = 0) -> Op[abi.Outcome]:
        """UFFDIO_POISON."""
        return self._fill(poison, fd, Fill(start, length, mode))

    def move(self, fd: int, dst: int, src: int, length: int, mode: int = 0) -> Op[abi.Outcome]:
        """UFFDIO_MOVE."""
        return self._fill(move, fd, Fill(dst, length, mode, src))

    def writeprotect(self, fd: int, start: int, length: int, mode: int) -> Op[abi.Outcome]:
        """UFFDIO_WRITEPROTECT; mode 1 protects, 0 unprotects and wakes, 2 unprotects without a wake."""
        return self._outcome(writeprotect(self.thread, self.context(fd), start, length, mode), length)

    def _fill(self, which: _Fill, fd: int, args: Fill) -> Op[abi.Outcome]:
        return self._outcome(which(self.thread, self.context(fd), args), args.length)

    def _outcome(self, operation: Op[Reply], length: int) -> Op[abi.Outcome]:
        outcome = (yield from self._user(operation)).outcome(length)
        partly = f", {outcome.done} bytes done" if outcome.errno and outcome.done else ""
        self.thread.process.kernel.note(f"answered {errno_name(outcome.errno)}{partly}")
        return outcome

    def read_messages(self, fd: int, most: int = 16, *, into: int | None = None) -> Op[list[abi.Message]]:
        """read(2) of the descriptor: up to `most` messages, into a buffer of its own or the one at `into`.
        Raises SystemCallError EAGAIN if there is none and the descriptor is non-blocking."""
        file = self.thread.process.descriptors.get(fd)
        return self._user(descriptor.read(self.thread, file, most * descriptor.MESSAGE, into))

    def poll(self, fd: int, *, wait: bool = True) -> Op[int]:
        """poll(2): descriptor.POLLIN if a message waits, POLLERR on a blocking descriptor; `wait`: not before
        there is something."""
        file, ctx = self.thread.process.descriptors.get(fd), self.context(fd)
        if wait and not descriptor.poll(file) & descriptor.POLLERR:
            yield descriptor.ReadWait(ctx)
        else:
            yield "poll"
        if self.thread.killed:
            raise access.Killed
        return descriptor.poll(file)

    def close(self, fd: int) -> Op[None]:
        """close(2); the last one of a userfaultfd lets everybody go [E11]."""
        yield "close"
        last = self.thread.process.descriptors.remove(fd)
        if last is not None and isinstance(last.target, Context):
            yield from close_context(last.target)

    def dup(self, fd: int) -> Op[int]:
        """dup(2)."""
        yield "dup"
        descriptors = self.thread.process.descriptors
        return descriptors.install(descriptors.get(fd))

    def send_descriptor(self, fd: int, to: Process) -> Op[int]:
        """Pass a descriptor to another process (SCM_RIGHTS); returns its number there."""
        yield "send a descriptor"
        return to.descriptors.install(self.thread.process.descriptors.get(fd))
