"""The probe's tools, on the model: the same memory, the same threads, the same words for what is seen.

A scenario in `sections` performs the steps of the C probe with these tools and says what it sees by `see`;
what it should see is in the table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from userfault import abi
from userfault.model import access, handshake
from userfault.model.context import Context
from userfault.model.descriptor import poll, read
from userfault.model.errnos import SystemCallError, errno_name
from userfault.model.fill import Fill
from userfault.model.fill_continue import continue_
from userfault.model.fill_copy import copy
from userfault.model.fill_poison import poison
from userfault.model.fill_zeropage import zeropage
from userfault.model.kernel import Kernel
from userfault.model.layout import HUGE_PAGE, PAGE, TASK_SIZE
from userfault.model.mapping import READ, WRITE, mmap
from userfault.model.move import move
from userfault.model.oracle.memory import ALIAS, DST, RTO, SRC, Memory
from userfault.model.pagemap import Scan, pagemap_entry, pagemap_scan
from userfault.model.process import OpenFile, Process
from userfault.model.register import register, unregister
from userfault.model.release import close_context
from userfault.model.reply import Reply
from userfault.model.scheduler import Scheduler
from userfault.model.smaps import smaps
from userfault.model.step import Op
from userfault.model.thread import Deadlock, Thread
from userfault.model.wake import wake
from userfault.model.writeprotect import writeprotect

T = TypeVar("T")
Seen = dict[str, Any]

STACK = 0x7FFFFF000000

FORK, REMAP, REMOVE, UNMAP = 0x2, 0x4, 0x8, 0x40
SIGBUS, THREAD_ID, EXACT, UNPOPULATED, ASYNC = 0x80, 0x100, 0x800, 0x2000, 0x8000

_VM_FLAGS = ("um", "uw", "ui", "wf")
SCAN_NAMES = ("WPALLOWED", "WRITTEN", "FILE", "PRESENT", "SWAPPED", "PFNZERO", "HUGE", "SOFT_DIRTY", "GUARD")


class Died(Exception):
    """The probe gave up (DIE): the row has outcome exit:99."""


class Accessor:
    """A thread that makes one access or one system call (struct acc).

    The operation returns (ret, errno, value): value -1 is none.
    """

    def __init__(self, thread: Thread) -> None:
        self.thread = thread

    @property
    def done(self) -> int:
        """1 if it has ended, as the probe writes it."""
        return int(self.thread.done)

    def seen(self, base: int) -> Seen:
        """acc_result."""
        thread = self.thread
        if not thread.done:
            return {"r": "blocked"}
        if thread.fault is not None:
            fault = thread.fault
            return {"r": fault.signal, "si_code": fault.code, "off": fault.address - base}
        ret, errno, value = thread.result
        seen: Seen = {"r": "done", "ret": ret, "errno": errno_name(errno)}
        if value >= 0:
            seen["val"] = value
        return seen


class Uffd:
    """A userfaultfd as the probe's ioctl wrappers use it: each returns what the struct shows afterwards."""

    def __init__(self, probe: Probe, number: int, process: Process | None = None) -> None:
        self.probe = probe
        self.number = number
        self.process = process or probe.process
        self.file: OpenFile = self.process.descriptors.get(number)
        self.ctx: Context = self.file.target

    def _run(self, operation: Callable[[Thread], Op[Reply]]) -> Reply:
        thread = self.probe.caller
        return self.probe.call(operation(thread))

    def fill(self, which: Callable[[Thread, Context, Fill | None], Op[Reply]], args: Fill | None) -> Seen:
        """Any fill; `args` None: a bad pointer."""
        return result(self._run(lambda thread: which(thread, self.ctx, args)), "out")

    def copy(self, dst: int, src: int, length: int, mode: int = 0) -> Seen:
        """UFFDIO_COPY."""
        return self.fill(copy, Fill(dst, length, mode, src))

    def zero(self, dst: int, length: int, mode: int = 0) -> Seen:
        """UFFDIO_ZEROPAGE."""
        return self.fill(zeropage, Fill(dst, length, mode))

    def cont(self, dst: int, length: int, mode: int = 0) -> Seen:
        """UFFDIO_CONTINUE."""
        return self.fill(continue_, Fill(dst, length, mode))

    def poison(self, dst: int, length: int, mode: int = 0) -> Seen:
        """UFFDIO_POISON."""
        return self.fill(poison, Fill(dst, length, mode))

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> Seen:
        """UFFDIO_MOVE."""
        return self.fill(move, Fill(dst, length, mode, src))

    def wp(self, start: int, length: int, mode: int) -> Seen:
        """UFFDIO_WRITEPROTECT."""
        return result(self._run(lambda thread: writeprotect(thread, self.ctx, start, length, mode)), None)

    def wake(self, start: int, length: int) -> Seen:
        """UFFDIO_WAKE."""
        return result(self._run(lambda thread: wake(thread, self.ctx, start, length)), None)

    def register(self, start: int, length: int, mode: int) -> Seen:
        """UFFDIO_REGISTER."""
        return result(self._run(lambda thread: register(thread, self.ctx, start, length, mode)), "ioctls")

    def unregister(self, start: int, length: int) -> Seen:
        """UFFDIO_UNREGISTER."""
        return result(self._run(lambda thread: unregister(thread, self.ctx, start, length)), None)

    def readable(self) -> bool:
        """poll says that a message waits."""
        return bool(poll(self.file) & 1)

    def read(self, size: int = 32) -> list[abi.Message]:
        """Raises SystemCallError."""
        return self.probe.call(read(self.probe.caller, self.file, size))

    def read_one(self) -> abi.Message | None:
        """One message, or None."""
        try:
            return self.read()[0]
        except SystemCallError:
            return None

    def close(self) -> None:
        """close(2)."""
        self.probe.close(self.number, self.process)


def result(reply: Reply, field: str | None) -> Seen:
    """sb_res: how an ioctl's result is written down."""
    seen: Seen = {"ret": -1 if reply.errno else 0, "errno": errno_name(reply.errno)}
    if field is None:
        return seen
    if reply.out is None:
        seen["out"] = "untouched"
    elif field == "ioctls":
        seen["ioctls"] = f"{reply.out:#x}"
    else:
        seen["out"] = reply.out
        if reply.out < 0:
            seen["out_name"] = "-" + errno_name(-reply.out)
    return seen


class Probe:
    """One case: a fresh machine with one process."""

    def __init__(self, version: str, *, swap: bool = False) -> None:
        self.kernel = Kernel(version, swap=swap)
        self.scheduler = Scheduler(self.kernel)
        self.process = self.kernel.process("probe")
        self.caller = self.process.main
        self.mmap(STACK, TASK_SIZE - (32 << 12) - STACK, growsdown=True)
        self.seen: Seen = {}

    def see(self, key: str, value: Any) -> None:
        """Write an observation down."""
        self.seen[key] = value

    # Running things.

    def call(self, operation: Op[T]) -> T:
        """Run an operation of the main thread to its end; others run while it sleeps."""
        main = self.caller
        main.start(operation)
        while not main.done:
            if main.runnable:
                main.step()
                continue
            others = [thread for thread in self.kernel.threads if thread is not main and thread.runnable]
            if not others:
                what = main.what
                raise Deadlock(f"the probe would {what}")
            for thread in others:
                self.scheduler.step(thread)
        if main.error is not None:
            raise main.error
        if main.fault is not None:
            raise main.fault
        returned: T = main.result
        return returned

    def attempt(self, operation: Op[Any]) -> int:
        """Run a system call; 0, or -1 and the errno in `self.errno`."""
        try:
            self.call(operation)
        except SystemCallError as error:
            self.errno = error.errno
            return -1
        self.errno = 0
        return 0

    errno = 0

    def start(self, operation: Callable[[Thread], Op[tuple[int, int, int]]], name: str = "acc") -> Accessor:
        """acc_start: another thread makes an access; it runs until it is done or sleeps."""
        accessor = Accessor(self.process.thread(name))
        accessor.thread.start(operation(accessor.thread))
        self.settle()
        return accessor

    def settle(self) -> None:
        """Let every thread run until all sleep."""
        self.scheduler.settle()

    def close(self, number: int, process: Process | None = None) -> None:
        """close(2)."""
        file = (process or self.process).descriptors.remove(number)
        if file is not None and isinstance(file.target, Context):
            self.call(close_context(file.target))

    # Memory.

    def mmap(self, address: int, length: int, **options: Any) -> int:
        """mmap(2) by the main thread; the options are those of `mapping.mmap`."""
        return self.call(
            mmap(self.caller, address, length, options.pop("protection", READ | WRITE), **options)
        )

    def memory(self, kind: str, pages: int = 4) -> Memory:
        """mem_setup: the region at DST, its alias, and a source of COPY full of 0xC0."""
        memory = Memory(kind, pages)
        if memory.fileish:
            memory.file = self.file("hugetlb" if memory.huge else "shmem", memory.length)
            self.mmap(DST, memory.length, shared=memory.shared, file=memory.file)
            self.mmap(ALIAS, memory.length, shared=True, file=memory.file)
        else:
            self.mmap(DST, memory.length)
            if memory.thp:
                self.process.mm.vmas[0].hugepage = True
        source = pages * HUGE_PAGE if memory.huge else 2 * HUGE_PAGE
        self.mmap(SRC, source)
        self.fill(SRC, source if memory.huge or memory.thp else pages * PAGE, 0xC0)
        return memory

    def file(self, kind: str, size: int) -> Any:
        """A new file of `size` bytes."""
        from userfault.model.pagecache import File

        return File(self.kernel, kind, size)

    def fill(self, address: int, length: int, value: int) -> None:
        """memset by the main thread."""
        self.call(access.fill(self.caller, self.caller.process.mm, address, length, value))

    def peek(self, address: int) -> int:
        """A read of one byte by the main thread."""
        return self.call(access.load(self.caller, self.caller.process.mm, address, 1))[0]

    def poke(self, address: int, value: int) -> None:
        """A write of one byte by the main thread."""
        self.call(access.store(self.caller, self.caller.process.mm, address, bytes((value,))))

    # userfaultfd.

    def uffd_open(self, flags: int) -> Uffd:
        """userfaultfd(2). Raises SystemCallError."""
        return Uffd(self, handshake.userfaultfd(self.caller.process, flags), self.caller.process)

    def uffd(self, features: int, flags: int = 0) -> Uffd:
        """uffd_new: open and shake hands, or give up."""
        uffd = self.uffd_open(handshake.O_CLOEXEC | handshake.O_NONBLOCK | flags)
        reply = handshake.api(self.caller.process, uffd.ctx, abi.UFFD_API, features)
        if reply.errno:
            self.see("die", f"UFFDIO_API: {errno_name(reply.errno)}")
            raise Died
        return uffd

    # What is seen.

    def pages(
        self,
        memory: Memory,
        indexes: Iterable[int],
        *,
        base: int | None = None,
        cache: int = 0,
        process: Process | None = None,
        read_through: bool = True,
    ) -> list[Seen]:
        """put_pages. cache 1: with the byte read through the file; 2: only whether it is cached."""
        base = DST if base is None else base
        unit = memory.page_size if memory.huge else PAGE
        return [
            self._page(memory, base, index * unit, index, cache, process or self.caller.process, read_through)
            for index in indexes
        ]

    def target(self, memory: Memory, cache: int = 1) -> list[Seen]:
        """put_target."""
        return self.pages(memory, (0, 1, 2, 511) if memory.thp else (1, 2), cache=cache)

    def _page(
        self,
        memory: Memory,
        base: int,
        offset: int,
        index: int,
        cache: int,
        process: Process,
        read_through: bool,
    ) -> Seen:
        mm = process.mm
        address = base + offset
        entry = pagemap_entry(mm, address)
        if entry.present:
            kind = "present"
        elif entry.marker is not None:
            names = [name for name in ("uffd_wp", "poison", "guard") if getattr(entry.marker, name)]
            kind = "marker:" + ",".join(names)
        elif entry.swap:
            kind = "swap"
        else:
            kind = "nonpresent_wp" if entry.uffd_wp else "none"
        seen: Seen = {
            "i": index,
            "pte": kind,
            "wp": int(entry.uffd_wp),
            "file": int(entry.file),
            "excl": int(entry.exclusive),
        }
        if entry.marker is not None and entry.marker.guard:
            seen["guard"] = 1
        if entry.present and read_through:
            vma = mm.find(address)
            place = access.translate(mm, address, False)
            readable = vma is not None and place is not None and (vma.read or vma.write or vma.execute)
            seen["b"] = place[0].content.read(place[1], 1)[0] if readable and place is not None else None
        end = address + (memory.page_size if memory.huge else PAGE)
        known = 0x1FF if self.kernel.version >= (6, 13) else 0xFF  # the probe leaves GUARD out there
        reply = pagemap_scan(mm, Scan(address, end, 0, 0, known, 0, known, 0, 1))
        if reply.errno:
            seen["scan"] = "ERR:" + errno_name(reply.errno)
        else:
            found = reply.regions[0].categories if reply.regions else 0
            seen["scan"] = "|".join(name for bit, name in enumerate(SCAN_NAMES) if found >> bit & 1)
        if cache and memory.file is not None:
            file = memory.file
            if not memory.huge:
                cached = file.holds_data(offset // PAGE) and offset < file.size
                seen["cache"] = int(cached)
                if cached and cache == 1:
                    seen["cb"] = file.read(offset, 1)[0]
            elif cache == 1 and file.read(offset, 1):
                seen["cb"] = file.read(offset, 1)[0]
        return seen

    def vmflags(self, start: int, length: int, process: Process | None = None) -> list[list[Any]]:
        """put_vmflags: the lines of smaps, as [start, end, permissions, flags]."""
        lines = []
        for low, high, permissions, flags in smaps((process or self.caller.process).mm):
            if low < start + length and start < high:
                shown = " ".join(flag for flag in flags if flag in _VM_FLAGS)
                lines.append([low - start, high - start, permissions, shown])
        return lines

    def fdinfo(self, uffd: Uffd) -> str:
        """fdinfo_feat."""
        ctx = uffd.ctx
        flags = handshake.O_NONBLOCK if uffd.file.nonblock else 0
        if uffd.number in uffd.process.descriptors.cloexec:
            flags |= handshake.O_CLOEXEC
        features = ctx.features | (0x80000000 if ctx.initialized else 0)
        ioctls = 0x8000000000000003 | _range_ioctls(self.kernel)
        return f"flags: 0{flags:o};pending: {ctx.pending};total: {ctx.total};API: aa:{features:x}:{ioctls:x};"

    def message(self, message: abi.Message, base: int, thread: Thread | None = None) -> Seen:
        """sb_msg. Addresses from the region's start."""
        match message:
            case abi.Pagefault(flags, address, ptid):
                letters = "".join(letter for bit, letter in enumerate("WPM") if flags >> bit & 1)
                return {
                    "ev": "pagefault",
                    "fl": letters,
                    "off": address - base,
                    "ptid": self._ptid(ptid, thread),
                }
            case abi.Fork(ufd):
                return {"ev": "fork", "fd_ok": int(ufd in self.caller.process.descriptors.files)}
            case abi.Remap(from_, to, length):
                return {
                    "ev": "remap",
                    "from": from_ - base,
                    "to_minus_RTO": to - RTO,
                    "to_minus_base": to - base,
                    "len": length,
                }
            case abi.Remove(start, end):
                return {"ev": "remove", "start": start - base, "end": end - base}
            case abi.Unmap(start, end):
                return {"ev": "unmap", "start": start - base, "end": end - base}
        raise AssertionError(message)

    def _ptid(self, ptid: int, thread: Thread | None) -> str:
        if ptid == 0:
            return "0"
        if thread is not None and ptid == thread.tid:
            return "faulting_tid"
        return "tgid" if ptid == self.process.pid else "other"

    def pump(
        self,
        uffd: Uffd,
        memory: Memory,
        accessors: list[Accessor],
        policy: str,
        *,
        most: int = 8,
        base: int = DST,
    ) -> Pumped:
        """Read messages while the accessors run; policy "resolve" answers each, "stop" ends after the
        first."""
        messages: list[Seen] = []
        fork = -1
        while True:
            self.settle()
            alldone = all(accessor.done for accessor in accessors)
            if not uffd.readable():
                return Pumped(messages, 0 if alldone else 1, fork)
            message = uffd.read_one()
            if message is None:
                return Pumped(messages, 0, fork)
            threads = [accessor.thread for accessor in accessors]
            ptid = message.ptid if isinstance(message, abi.Pagefault) else 0
            thread = next((t for t in threads if t.tid == ptid), threads[0] if threads else None)
            seen = self.message(message, base, thread)
            if isinstance(message, abi.Fork):
                fork = message.ufd
            if policy == "resolve":
                answer = self._resolve(uffd, memory, message)
                if answer:
                    seen["res"] = answer
            messages.append(seen)
            if policy == "stop":
                return Pumped(messages, 0, fork)
            if len(messages) >= most:
                return Pumped(messages, 0 if alldone else 2, fork)

    def _resolve(self, uffd: Uffd, memory: Memory, message: abi.Message) -> str | None:
        if not isinstance(message, abi.Pagefault):
            return None
        size = memory.page_size
        address = message.address // size * size
        if message.flags & abi.UFFD_PAGEFAULT_FLAG_WP:
            return "unwp:" + str(uffd.wp(address, size, 0)["errno"])
        if message.flags & abi.UFFD_PAGEFAULT_FLAG_MINOR:
            return "continue:" + str(uffd.cont(address, size)["errno"])
        return "copy:" + str(uffd.copy(address, SRC, size)["errno"])


class Pumped:
    """What a pump saw. stuck: 1 nothing came although somebody waits, 2 too many messages."""

    def __init__(self, messages: list[Seen], stuck: int, fork: int) -> None:
        self.messages = messages
        self.stuck = stuck
        self.fork = fork


def _range_ioctls(kernel: Kernel) -> int:
    mask = 0b11011100
    if kernel.version >= (6, 6):
        mask |= 1 << abi._UFFDIO_POISON
    if kernel.version >= (6, 8):
        mask |= 1 << abi._UFFDIO_MOVE
    return mask


# Accesses.


def user_read(address: int) -> Callable[[Thread], Op[tuple[int, int, int]]]:
    """A load of one byte."""

    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        data = yield from access.load(thread, thread.process.mm, address, 1)
        return 0, 0, data[0]

    return run


def user_write(address: int, value: int = 0x77) -> Callable[[Thread], Op[tuple[int, int, int]]]:
    """A store of one byte."""

    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        yield from access.store(thread, thread.process.mm, address, bytes((value,)))
        return 0, 0, -1

    return run


def kernel_read(address: int, length: int = 1) -> Callable[[Thread], Op[tuple[int, int, int]]]:
    """write(2) of bytes there into a pipe."""

    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        try:
            data = yield from access.load(thread, thread.process.mm, address, length, user=False)
        except access.MemoryFault:
            return -1, 14, -1
        return length, 0, data[0] if length == 1 else -1

    return run


def kernel_write(address: int, data: bytes = b"\x77") -> Callable[[Thread], Op[tuple[int, int, int]]]:
    """read(2) of a pipe into memory there."""

    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        try:
            yield from access.store(thread, thread.process.mm, address, data, user=False)
        except access.MemoryFault:
            return -1, 14, -1
        return len(data), 0, -1

    return run


ACCESSES: dict[str, Callable[[int], Callable[[Thread], Op[tuple[int, int, int]]]]] = {
    "user_read": user_read,
    "user_write": user_write,
    "kernel_read": kernel_read,
    "kernel_write": kernel_write,
}
