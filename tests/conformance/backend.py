"""What a conformance item needs of a kernel, real or simulated.

The items (in `items/`) are functions of a `Backend` and a kind of memory. They say what happens to whom; how
a process is made and how one waits for it is the backend's business. `kernel.py` drives the running kernel; a
backend of the executable model runs the same list.

Time. Every method of a `Thread` starts an operation and returns a `Running`; the operation may sleep on a
fault. `Running.result()` says that it must finish now: a backend with real time fails after some seconds, one
with simulated time when nothing can run any more.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar

from userfault.abi import Message, Outcome, PageRegion

T_co = TypeVar("T_co", covariant=True)

MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_PAGEOUT = 21
MADV_COLLAPSE = 25
MADV_GUARD_INSTALL = 102
MADV_GUARD_REMOVE = 103
PROT_READ = 1
PROT_WRITE = 2

HUGE = 2 << 20


class Unavailable(Exception):
    """This machine cannot run the item; the message says why."""


class Kind(enum.Enum):
    """A kind of memory."""

    ANON = "anon"
    SHMEM = "shmem"
    SHMEM_PRIVATE = "shmem-private"
    HUGETLB = "hugetlb"
    HUGETLB_PRIVATE = "hugetlb-private"
    THP = "thp"
    FILE = "file"
    FILE_PRIVATE = "file-private"
    NONE = "no-memory"

    @property
    def shared(self) -> bool:
        """The pages belong to a file that other mappings see."""
        return self in (Kind.SHMEM, Kind.HUGETLB, Kind.FILE)

    @property
    def hugetlb(self) -> bool:
        """The page is 2 MiB."""
        return self in (Kind.HUGETLB, Kind.HUGETLB_PRIVATE)


ALL = (Kind.ANON, Kind.SHMEM, Kind.SHMEM_PRIVATE, Kind.HUGETLB, Kind.HUGETLB_PRIVATE)
"""What the kernel's own tests call all memory types."""


class Area(NamedTuple):
    """Empty memory of one kind; addresses and lengths in bytes."""

    kind: Kind
    start: int
    length: int
    page: int
    alias: int | None
    """Where the same pages are mapped a second time; None for private memory."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def pages(self) -> range:
        """The address of every page."""
        return range(self.start, self.end, self.page)


class Access(NamedTuple):
    """How a touch ended."""

    signal: str | None
    """None, "SIGBUS" or "SIGSEGV"."""
    value: int
    """The byte that was loaded, else 0."""
    cures: int
    """How often the signal handler filled the page and the access was tried again."""


class Entry(NamedTuple):
    """One page table entry, as pagemap shows it."""

    present: bool
    swapped: bool
    uffd_wp: bool


class Userfaultfd(Protocol):
    """`userfault.Userfaultfd`, as far as the items use it; also `userfault.model.Userfaultfd`."""

    def register(self, start: int, length: int, mode: int) -> Outcome: ...
    def unregister(self, start: int, length: int) -> Outcome: ...
    def wake(self, start: int, length: int) -> Outcome: ...
    def copy(self, dst: int, src: bytes, length: int | None = None, mode: int = 0) -> Outcome: ...
    def zeropage(self, start: int, length: int, mode: int = 0) -> Outcome: ...
    def writeprotect(self, start: int, length: int, mode: int) -> Outcome: ...
    def continue_(self, start: int, length: int, mode: int = 0) -> Outcome: ...
    def poison(self, start: int, length: int, mode: int = 0) -> Outcome: ...
    def move(self, dst: int, src: int, length: int, mode: int = 0) -> Outcome: ...
    def read_messages(self) -> list[Message]: ...
    def close(self) -> None: ...


class Cure(NamedTuple):
    """What a signal handler does about a SIGBUS: UFFDIO_COPY of `content`; without content, it unprotects."""

    uffd: Userfaultfd
    start: int
    length: int
    content: bytes | None
    mode: int = 0


class Running(Protocol[T_co]):
    """An operation under way."""

    def finished(self) -> bool:
        """It has ended, as far as one can see without waiting."""

    def result(self) -> T_co:
        """Its result; a failure of the test if it does not end."""


class Thread(Protocol):
    """A thread of a process: one operation at a time."""

    def load(self, address: int, cure: Cure | None = None) -> Running[Access]:
        """Reads one byte."""

    def store(self, address: int, value: int, cure: Cure | None = None) -> Running[Access]:
        """Writes one byte."""

    def read(self, address: int, length: int) -> Running[bytes]:
        """Reads bytes, with loads; a signal fails the test."""

    def write(self, address: int, content: bytes) -> Running[None]:
        """Writes bytes, with stores; a signal fails the test."""

    def madvise(self, start: int, length: int, advice: int) -> Running[int]:
        """madvise(2): its errno, 0 for success."""

    def mprotect(self, start: int, length: int, protection: int) -> Running[int]:
        """mprotect(2): its errno."""

    def mremap(self, start: int, length: int, to: int) -> Running[int]:
        """mremap(2) with MREMAP_MAYMOVE | MREMAP_FIXED, the length unchanged: its errno."""

    def fork(self) -> Running[Process]:
        """fork(2): the child, which has one thread."""

    def bump(self, area: Area, seed: int, count: int) -> Running[int]:
        """`count` times: picks a page, locks it, counts it up. -1 if a page was seen that was not whole.

        A page is a lock (u32) at 0, a counter (u64, never 0) at 8, and the counter again in its last bytes.
        The first touch of a page is a read.
        """

    def sleeps_uninterruptibly(self) -> bool:
        """The operation under way waits, or comes to wait within a moment, without listening to signals."""


class Process(Protocol):
    """A process with one thread, and more when asked for."""

    @property
    def main(self) -> Thread: ...

    def thread(self) -> Thread:
        """One more thread."""

    def area(self, kind: Kind, pages: int) -> Area:
        """Fresh memory without pages, aligned to 2 MiB; Unavailable if the machine has no such memory."""

    def room(self, length: int, align: int) -> int:
        """An address range that is reserved and not accessible, as a target for mremap."""

    def userfaultfd(self, features: int = 0, *, nonblocking: bool = True) -> Userfaultfd:
        """A userfaultfd of this process; Unavailable if a feature is not permitted."""

    def adopt(self, ufd: int, features: int) -> Userfaultfd:
        """The userfaultfd that a fork message carried, for this child."""

    def entry(self, address: int) -> Entry:
        """What pagemap says of a page."""

    def scan(self, start: int, end: int, *, flags: int = 0, any_of: int, report: int) -> list[PageRegion]:
        """PAGEMAP_SCAN of this process, to the end of the range."""


class Virgin(Protocol):
    """A userfaultfd before its handshake."""

    def handshake(self, api: int, features: int) -> tuple[int, int, int]:
        """UFFDIO_API: errno, and what the fields features and ioctls hold afterwards."""


class Backend(Protocol):
    """A kernel."""

    swap: bool
    """MADV_PAGEOUT has somewhere to write private pages to."""

    def process(self) -> Process:
        """A new process."""

    def virgin(self, way: str) -> Virgin:
        """A userfaultfd by "syscall" or "device"; Unavailable if that way is closed."""

    def messages(self, uffd: Userfaultfd) -> list[Message]:
        """Waits for a message and reads what there is; a failure of the test if none comes."""

    def quiet(self, uffd: Userfaultfd) -> bool:
        """No message waits, and none comes within a moment."""

    def serve(self, running: Running[T_co], uffd: Userfaultfd, answer: Callable[[Message], object]) -> T_co:
        """Answers every message until the operation has ended; gives its result."""

    def page_out(self, process: Process, start: int, length: int) -> None:
        """MADV_PAGEOUT until no page is mapped; Unavailable if the kernel will not."""

    def merging(self) -> AbstractContextManager[None]:
        """Page merging (KSM) is on meanwhile; Unavailable if it cannot be."""

    def folio_sizes(self, kind: Kind) -> list[int]:
        """The sizes in bytes between a page and 2 MiB in which the kernel can give memory of a kind."""

    def folios(self, kind: Kind, size: int) -> AbstractContextManager[None]:
        """Meanwhile MADV_HUGEPAGE asks for folios of that size."""

    def merged(self, process: Process, area: Area, *, wait: bool = True) -> bool:
        """Page merging (KSM): all pages of the area are the same one. `wait`: they become so in some
        seconds."""

    def ioctl(self, uffd: Userfaultfd, request: int, argument: ctypes.Structure) -> int:
        """A raw ioctl: its errno. The struct is changed as the kernel changes it."""
