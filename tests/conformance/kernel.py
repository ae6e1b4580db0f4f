"""The running kernel as a conformance backend.

The memory belongs to puppets (puppet.c), and the test serves their faults from outside, through
`userfault.Userfaultfd`. So a mistake can make a puppet sleep for ever, never the test: it is killed with
its whole process group at the end. Of all calls only MOVE must be made by the process whose memory it is;
the puppet does that on a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import userfault
from child_process import TIME_SCALE
from conformance import kernel_settings
from conformance.backend import (
    HUGE,
    MADV_PAGEOUT,
    PROT_READ,
    PROT_WRITE,
    Access,
    Area,
    Cure,
    Entry,
    Kind,
    Unavailable,
)
from userfault import abi
from userfault.abi import Message, Outcome, PageRegion

T = TypeVar("T")

SECONDS = 15 * TIME_SCALE
"""An operation that must finish fails the test after so long."""
MOMENT = 0.05
"""How long nothing must happen to be called quiet."""

SYSCALL, LOAD, STORE, READ, WRITE, THREAD, FORK, SEND_FD, RECEIVE_FD, BUMP = range(10)
REQUEST, REPLY = struct.Struct("9Q"), struct.Struct("5qQ")
CHUNK = 1 << 16

CALLS = (
    "mmap", "munmap", "mprotect", "ioctl", "mremap", "madvise", "gettid", "userfaultfd", "rt_sigprocmask",
    "close",
)  # fmt: skip
NUMBERS = {
    "x86_64": dict(zip(CALLS, (9, 11, 10, 16, 25, 28, 186, 323, 14, 3), strict=True)),
    "aarch64": dict(zip(CALLS, (222, 215, 226, 29, 216, 233, 178, 282, 135, 57), strict=True)),
}
"""Numbers of the system calls that a puppet is told to make."""
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
ROOMS, ROOM = 1 << 38, 1 << 30
"""Where the memory of tests begins, and what one middle-level page table maps, in bytes."""
MAP_FIXED_NOREPLACE = 0x100000
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_HUGETLB = 1, 2, 16, 32, 0x4000, 0x40000


def number(name: str) -> int:
    machine = os.uname().machine
    if machine not in NUMBERS:
        raise Unavailable(f"the numbers of the system calls are not known for {machine}")
    return NUMBERS[machine][name]


class Answer:
    """What a puppet's thread answered."""

    def __init__(self, packet: bytes, fds: list[int]) -> None:
        numbers: tuple[int, ...] = REPLY.unpack_from(packet)
        self.result, self.errno, self.signal, self.code, self.cures, length = numbers
        self.payload = packet[REPLY.size : REPLY.size + length]
        self.fds = fds

    def unharmed(self) -> Answer:
        assert self.signal == 0, f"the access raised {signal.Signals(self.signal).name}"
        return self

    def succeeded(self) -> Answer:
        if self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        return self.unharmed()


class Running(Generic[T]):
    """An operation that a puppet's thread has been told to do."""

    def __init__(self, channel: socket.socket, convert: Callable[[Answer], T]) -> None:
        self.channel = channel
        self.convert = convert
        self.value: list[T] = []

    def finished(self) -> bool:
        return bool(self.value) or bool(select.select([self.channel], [], [], 0)[0])

    def result(self) -> T:
        if not self.value:
            ready, _, _ = select.select([self.channel], [], [], SECONDS)
            assert ready, f"the operation did not end within {SECONDS} seconds"
            packet, fds, _, _ = socket.recv_fds(self.channel, REPLY.size + CHUNK, 1)
            assert packet, "the process died"
            self.value.append(self.convert(Answer(packet, fds)))
        return self.value[0]


class Thread:
    """A thread of a puppet, at the other end of its socket."""

    def __init__(self, process: Process, channel: socket.socket) -> None:
        self.process = process
        self.channel = channel
        self.tid = 0

    def ask(
        self,
        op: int,
        *arguments: int,
        payload: bytes = b"",
        convert: Callable[[Answer], T],
        fd: int | None = None,
    ) -> Running[T]:
        padded = [argument % (1 << 64) for argument in arguments] + [0] * (7 - len(arguments))
        packet = REQUEST.pack(op, *padded, len(payload)) + payload
        socket.send_fds(self.channel, [packet], [] if fd is None else [fd])
        return Running(self.channel, convert)

    def syscall(self, name: str, *arguments: int | bytes, convert: Callable[[Answer], T]) -> Running[T]:
        """A system call; bytes among the arguments are passed by address, and come back as they are then."""
        op, payload = SYSCALL, b""
        numbers = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, bytes):
                op |= 1 << (8 + i + 1)
                payload, argument = argument, 0
            numbers.append(argument)
        return self.ask(op, number(name), *numbers, payload=payload, convert=convert)

    def errno_of(self, name: str, *arguments: int | bytes) -> Running[int]:
        return self.syscall(name, *arguments, convert=lambda answer: answer.errno)

    def access(self, op: int, address: int, value: int, cure: Cure | None) -> Running[Access]:
        def convert(answer: Answer) -> Access:
            name = signal.Signals(answer.signal).name if answer.signal else None
            return Access(name, answer.result if op == LOAD else 0, answer.cures)

        if cure is None:
            return self.ask(op, address, value, convert=convert)
        assert isinstance(cure.uffd, Userfaultfd)
        if cure.content is None:
            request = abi.UFFDIO_WRITEPROTECT
            payload = bytes(abi.uffdio_writeprotect(abi.uffdio_range(cure.start, cure.length), cure.mode))
        else:
            request = abi.UFFDIO_COPY
            source = self.process.staging(cure.content)
            payload = bytes(abi.uffdio_copy(cure.start, source, cure.length, cure.mode, 0))
        return self.ask(op, address, value, cure.uffd.theirs, request, payload=payload, convert=convert)

    def load(self, address: int, cure: Cure | None = None) -> Running[Access]:
        return self.access(LOAD, address, 0, cure)

    def store(self, address: int, value: int, cure: Cure | None = None) -> Running[Access]:
        return self.access(STORE, address, value, cure)

    def read(self, address: int, length: int) -> Running[bytes]:
        def rest(answer: Answer) -> bytes:
            done = answer.unharmed().payload
            left = length - len(done)
            return done + self.read(address + len(done), left).result() if left else done

        return self.ask(READ, address, min(length, CHUNK), convert=rest)

    def write(self, address: int, content: bytes) -> Running[None]:
        def rest(answer: Answer) -> None:
            answer.unharmed()
            if len(content) > CHUNK:
                self.write(address + CHUNK, content[CHUNK:]).result()

        return self.ask(WRITE, address, payload=content[:CHUNK], convert=rest)

    def madvise(self, start: int, length: int, advice: int) -> Running[int]:
        return self.errno_of("madvise", start, length, advice)

    def mprotect(self, start: int, length: int, protection: int) -> Running[int]:
        return self.errno_of("mprotect", start, length, protection)

    def mremap(self, start: int, length: int, to: int) -> Running[int]:
        return self.errno_of("mremap", start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to)

    def bump(self, area: Area, seed: int, count: int) -> Running[int]:
        return self.ask(
            BUMP, area.start, area.page, len(area.pages), seed, count,
            convert=lambda answer: answer.unharmed().result,
        )  # fmt: skip

    def fork(self) -> Running[Process]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def convert(answer: Answer) -> Process:
            pid = answer.succeeded().result
            child = Process(self.process.backend, pid, ours)
            child.rooms = self.process.rooms
            # The child answers the same request on its own socket.
            assert Running(ours, lambda own: own.result).result() == pid
            return child

        running = self.ask(FORK, convert=convert, fd=theirs.fileno())
        theirs.close()
        return running

    def sleeps_uninterruptibly(self) -> bool:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            stat = Path(f"/proc/{self.process.pid}/task/{self.tid}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "D":
                return True
            time.sleep(0.002)
        return False


class Userfaultfd(userfault.Userfaultfd):
    """The real class over a puppet's userfaultfd; MOVE is made by the puppet, as the kernel wants it."""

    __slots__ = ("process", "theirs")

    process: Process
    theirs: int

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> Outcome:
        argument = abi.uffdio_move(dst, src, length, mode, 0)
        mover = self.process.mover()
        answer = mover.syscall(
            "ioctl", self.theirs, abi.UFFDIO_MOVE, bytes(argument), convert=lambda answer: answer
        ).result()
        done = abi.uffdio_move.from_buffer_copy(answer.payload).move
        return Outcome(max(done, 0), answer.errno)


class Process:
    """A puppet, or a forked child of one."""

    def __init__(self, backend: KernelBackend, pid: int, channel: socket.socket) -> None:
        self.backend = backend
        self.pid = pid
        self.main = Thread(self, channel)
        self.main.tid = pid
        self.own: list[Thread] = []
        self.rooms = 0
        backend.channels.append(channel)

    def thread(self) -> Thread:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.backend.channels.append(ours)
        self.main.ask(THREAD, convert=lambda answer: answer, fd=theirs.fileno()).result()
        theirs.close()
        thread = Thread(self, ours)
        thread.tid = thread.syscall("gettid", convert=lambda answer: answer.result).result()
        return thread

    def mover(self) -> Thread:
        """The thread that makes calls for the test; it never touches memory that may be missing."""
        if not self.own:
            self.own.append(self.thread())
        return self.own[0]

    def map(self, length: int, protection: int, flags: int, fd: int = -1, at: int = 0) -> int:
        running = self.main.syscall(
            "mmap", at, length, protection, flags, fd, 0, convert=lambda answer: answer.succeeded().result
        )
        return running.result() % (1 << 64)

    def staging(self, content: bytes) -> int:
        """Bytes in ordinary memory of the puppet."""
        address = self.map(len(content), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.mover().write(address, content).result()
        return address

    def room(self, length: int, align: int) -> int:
        # Far from everything else: no neighbour to merge with, and no page table that somebody else made.
        address = ROOMS + self.rooms * ROOM
        assert ROOM % align == 0
        self.rooms += -(-length // ROOM) + 1
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
        return self.map(length, 0, flags, at=address)

    def give(self, fd: int) -> int:
        """Sends a descriptor to the puppet: its number there."""
        return self.main.ask(RECEIVE_FD, convert=lambda answer: answer.result, fd=fd).result()

    def area(self, kind: Kind, pages: int) -> Area:
        page = HUGE if kind.hugetlb else mmap.PAGESIZE
        length = pages * page
        if kind.hugetlb:
            # Twice: a fork of private memory, or a second mapping, may want a page of its own.
            self.backend.hugepages(2 * pages)
        fd = self.backend.file(kind, length)
        theirs = -1 if fd < 0 else self.give(fd)
        flags = MAP_FIXED | (MAP_SHARED if kind.shared else MAP_PRIVATE)
        if fd < 0:
            flags |= MAP_ANONYMOUS
        start = self.map(length, PROT_READ | PROT_WRITE, flags, theirs, at=self.room(length, HUGE))
        alias = None
        if kind.shared:
            alias = self.map(length, PROT_READ | PROT_WRITE, flags, theirs, at=self.room(length, HUGE))
        if fd >= 0:
            self.backend.fds.append(fd)
            self.backend.files[start] = (fd, theirs)
        return Area(kind, start, length, page, alias)

    def userfaultfd(self, features: int = 0, *, nonblocking: bool = True) -> Userfaultfd:
        flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
        theirs, refusal = -1, 0
        for scope in (0, abi.UFFD_USER_MODE_ONLY):
            answer = self.main.syscall("userfaultfd", flags | scope, convert=lambda answer: answer).result()
            theirs, refusal = answer.result, answer.errno
            if not refusal:
                break
        if refusal:
            raise Unavailable(f"userfaultfd(2): {os.strerror(refusal)}")
        api = bytes(abi.uffdio_api(abi.UFFD_API, features, 0))
        refusal = self.main.errno_of("ioctl", theirs, abi.UFFDIO_API, api).result()
        if refusal == errno.EPERM:
            raise Unavailable("UFFD_FEATURE_EVENT_FORK needs CAP_SYS_PTRACE")
        if refusal == errno.EINVAL:
            lacking = features & ~abi_features()
            raise Unavailable(f"this kernel lacks {', '.join(abi.feature_names(lacking))}")
        assert refusal == 0, os.strerror(refusal)
        fd = self.main.ask(SEND_FD, theirs, convert=lambda answer: answer.fds[0]).result()
        uffd = Userfaultfd.from_fd(fd, features)
        uffd.process, uffd.theirs = self, theirs
        self.backend.uffds.append(uffd)
        return uffd

    def adopt(self, ufd: int, features: int) -> Userfaultfd:
        uffd = Userfaultfd.from_fd(ufd, features)
        uffd.process, uffd.theirs = self, self.give(ufd)
        self.backend.uffds.append(uffd)
        return uffd

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """Raw pagemap entries of pages of the base size."""
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            return struct.unpack(f"{count}Q", pagemap.read(8 * count))

    def entry(self, address: int) -> Entry:
        (word,) = self.words(address, 1)
        return Entry(bool(word & abi.PM_PRESENT), bool(word & abi.PM_SWAP), bool(word & abi.PM_UFFD_WP))

    def scan(self, start: int, end: int, *, flags: int = 0, any_of: int, report: int) -> list[PageRegion]:
        if not self.backend.uffds:
            self.userfaultfd()
        try:
            scan = self.backend.uffds[0].pagemap_scan(
                start, end, flags=flags, category_anyof_mask=any_of, return_mask=report, pid=self.pid
            )
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
            raise Unavailable("this kernel has no PAGEMAP_SCAN (Linux 6.7)") from None
        assert scan.walk_end == end
        return scan.regions


def abi_features() -> int:
    from userfault.userfaultfd import offered_features

    return offered_features()


class Virgin:
    """A userfaultfd of the test itself, before its handshake."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def handshake(self, api: int, features: int) -> tuple[int, int, int]:
        argument = abi.uffdio_api(api, features, 0)
        refusal = raw_ioctl(self.fd, abi.UFFDIO_API, argument)
        return refusal, argument.features, argument.ioctls


def raw_ioctl(fd: int, request: int, argument: ctypes.Structure) -> int:
    buffer = bytearray(bytes(argument))
    try:
        fcntl.ioctl(fd, request, buffer, True)
        refusal = 0
    except OSError as error:
        refusal = error.errno or errno.EIO
    ctypes.memmove(ctypes.addressof(argument), bytes(buffer), len(buffer))
    return refusal


class KernelBackend:
    """The kernel this test runs on. `puppet`: the compiled puppet.c. `hugepages(n)` adds to the pool."""

    @property
    def observer(self) -> Any:
        from conformance.kernel_observer import KernelObserver

        return KernelObserver()

    def __init__(self, puppet: Path, folder: Path, hugepages: Callable[[int], None]) -> None:
        self.puppet = puppet
        self.folder = folder
        self.hugepages = hugepages
        self.swap = len(Path("/proc/swaps").read_text().splitlines()) > 1
        self.children: list[subprocess.Popen[bytes]] = []
        self.channels: list[socket.socket] = []
        self.uffds: list[Userfaultfd] = []
        self.fds: list[int] = []
        self.turn = 0
        self.files: dict[int, tuple[int, int]] = {}
        """The descriptor of an area's file, ours and the puppet's, by the area's start."""

    def process(self) -> Process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = subprocess.Popen(
            [self.puppet, str(theirs.fileno())], pass_fds=[theirs.fileno()], process_group=0
        )
        theirs.close()
        self.children.append(child)
        return Process(self, child.pid, ours)

    def file(self, kind: Kind, length: int) -> int:
        """A fresh file for memory of a kind, or -1 for anonymous memory."""
        if kind in (Kind.ANON, Kind.THP):
            return -1
        if kind in (Kind.FILE, Kind.FILE_PRIVATE):
            fd = os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        elif kind.hugetlb:
            fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        else:
            fd = os.memfd_create("conformance", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return fd

    def virgin(self, way: str) -> Virgin:
        flags = os.O_CLOEXEC | os.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
        if way == "device":
            try:
                device = os.open("/dev/userfaultfd", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise Unavailable(f"/dev/userfaultfd: {error.strerror}") from None
            fd = fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
            os.close(device)
        else:
            fd = ctypes.CDLL(None, use_errno=True).syscall(number("userfaultfd"), flags)
            if fd < 0:
                raise Unavailable(f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
        self.fds.append(fd)
        return Virgin(fd)

    def messages(self, uffd: Any) -> list[Message]:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            select.select([uffd], [], [], SECONDS)
            found: list[Message] = uffd.read_messages()
            if found:
                return found
        raise AssertionError(f"no message came within {SECONDS} seconds")

    def quiet(self, uffd: Any) -> bool:
        return not select.select([uffd], [], [], MOMENT)[0]

    def serve(self, running: Any, uffd: Any, answer: Callable[[Message], object]) -> Any:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            select.select([uffd, running.channel], [], [], SECONDS)
            for message in uffd.read_messages():
                answer(message)
            if running.finished():
                return running.result()
        raise AssertionError(f"the operation did not end within {SECONDS} seconds")

    def page_out(self, process: Any, start: int, length: int) -> None:
        # A page that was touched a moment ago waits in a list of the processor it was touched on, and only a
        # call on that processor takes it from there.
        processors = os.sched_getaffinity(process.main.tid)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for processor in processors:
                os.sched_setaffinity(process.main.tid, {processor})
                refusal = process.main.madvise(start, length, MADV_PAGEOUT).result()
                assert refusal == 0, os.strerror(refusal)
            os.sched_setaffinity(process.main.tid, processors)
            words = process.words(start, length // mmap.PAGESIZE)
            if not any(word & abi.PM_PRESENT for word in words):
                return
            time.sleep(0.01)
        raise Unavailable(f"MADV_PAGEOUT left pages in memory for {SECONDS} seconds")

    def merging(self) -> contextlib.AbstractContextManager[None]:
        return kernel_settings.changed(kernel_settings.MERGING)

    def folio_sizes(self, kind: Kind) -> list[int]:
        return kernel_settings.folio_sizes(shared=kind.shared)

    def folios(self, kind: Kind, size: int) -> contextlib.AbstractContextManager[None]:
        return kernel_settings.changed(kernel_settings.folio_setting(size, shared=kind.shared))

    def merged(self, process: Any, area: Area, *, wait: bool = True) -> bool:
        deadline = time.monotonic() + (SECONDS if wait else 0)
        frame = (1 << 55) - 1
        while True:
            frames = {word & frame for word in process.words(area.start, len(area.pages))}
            if 0 in frames:
                raise Unavailable("page frame numbers are shown to root only")
            if len(frames) == 1 or time.monotonic() >= deadline:
                return len(frames) == 1
            time.sleep(0.02)

    def scanner(self) -> userfault.Userfaultfd:
        """Anything that can scan page tables."""
        return self.uffds[0]

    def another_processor(self, process: Process) -> None:
        """Whoever makes calls in the process does so on another processor from now on."""
        choice = sorted(os.sched_getaffinity(0))
        self.turn = (self.turn + 1) % len(choice)
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            os.sched_setaffinity(int(thread), {choice[self.turn]})

    def ioctl(self, uffd: Any, request: int, argument: ctypes.Structure) -> int:
        return raw_ioctl(uffd.fileno(), request, argument)

    def close(self) -> None:
        """Kills every puppet with its children, then closes what is open."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for channel in self.channels:
            channel.close()
        for uffd in self.uffds:
            uffd.close()
        for fd in self.fds:
            os.close(fd)
