"""The kernel's userfaultfd as a Python class, for people who write their own handlers.

One method is one ioctl. Results are exact (:class:`userfault.abi.Outcome`: the bytes done and the errno),
nothing is retried, and the interpreter is released during every call.

**The interpreter lock.** A thread that touches a missing page holds the interpreter lock while it sleeps
(``memoryview``, ``ndarray`` and ``mmap`` all touch memory with the lock held). If the handler is Python
code in the same process, it never runs again: both wait for ever, no signal handler runs, and only a kill
ends them. ``os.fork()`` under ``UFFD_FEATURE_EVENT_FORK`` is the same trap. A handler written with this
class therefore belongs into **another process**. The touching process makes the userfaultfd and sends it
over a Unix socket, and the handler fills memory that is not its own::

    # the process with the memory                       # the handler, another process
    uffd = Userfaultfd()                                _, [fd], _, _ = socket.recv_fds(connection, 1, 1)
    uffd.register(start, length, MISSING).check()       uffd = Userfaultfd.from_fd(fd)
    socket.send_fds(connection, [b"u"],                 while True:
                    [uffd.fileno()])                        for message in uffd.read_messages(wait=True):
    memory[5000]    # waits for the handler                     uffd.copy(message.address, page)

The page "Write your own fault handler" of the documentation has this as a whole program. Every call works
remotely but :meth:`Userfaultfd.move`, and the source of :meth:`Userfaultfd.copy` is the handler's own
memory. Keep the descriptor open in the touching process too: when the last copy is closed, by the death of
the handler for instance, every sleeper goes on into zeros.
"""

from __future__ import annotations

import select
from types import TracebackType
from typing import Literal, NamedTuple, Self

from userfault import _native, abi
from userfault.abi import Message, Outcome, PageRegion

#: Every category that Linux 6.7, the first kernel with PAGEMAP_SCAN, knows.
_CATEGORIES_OF_6_7 = abi.PAGE_IS_GUARD - 1


class Scan(NamedTuple):
    """What :meth:`Userfaultfd.pagemap_scan` found."""

    regions: list[PageRegion]
    """The matching pages, in the order of their addresses; a run of equal pages may come in pieces."""
    walk_end: int
    """Everything before this address was looked at; ``end`` unless ``max_pages`` stopped the scan."""


class Userfaultfd:
    """One userfaultfd, opened and its handshake done.

    ``features`` are ``abi.UFFD_FEATURE_`` bits that must be there, ``prefer`` those to switch on where the
    kernel has them (``EVENT_FORK`` also where this process may: it needs CAP_SYS_PTRACE). ``kernel_faults``
    says whether system calls that meet a missing page wait for the handler too (``True``), get EFAULT
    (``False``), or whatever this machine allows (``None``). ``nonblocking`` is needed for selectors.
    ``way`` forces one way of opening.

    Raises :class:`OSError` when there is no descriptor or a feature is missing; the message names all that
    was tried and the command that would mend it.

    Addresses and lengths are ints in bytes, multiples of the memory's page size. They are taken as given,
    as with :mod:`ctypes`: filling memory that something else relies on breaks that something. A userfaultfd
    serves the memory of the process that made it, also when another process holds it, and after a fork the
    parent's.

    It is a context manager, has ``fileno()``, and becomes readable when messages wait. Handlers belong into
    another process than the memory's, because of the interpreter lock: see the module's text.
    """

    __slots__ = ("_native",)

    def __init__(
        self,
        features: int = 0,
        *,
        prefer: int = 0,
        kernel_faults: bool | None = None,
        nonblocking: bool = True,
        way: Literal["syscall", "device"] | None = None,
    ) -> None:
        self._native = _native.Userfaultfd(features, prefer, kernel_faults, nonblocking, way)

    @classmethod
    def from_fd(cls, fd: int, features: int = 0) -> Self:
        """Takes a descriptor over whose handshake is done: from a fork message, or sent by another process.

        ``features`` are the bits that were switched on, for the attribute of that name; the kernel does
        not tell them again. Raises :class:`OSError` (EBADF) if ``fd`` is not open.
        """
        self = cls.__new__(cls)
        self._native = _native.Userfaultfd.from_fd(fd, features)
        return self

    # The descriptor

    def fileno(self) -> int:
        """The descriptor. Raises :class:`ValueError` when closed, as all methods do."""
        return self._native.fileno()

    def close(self) -> None:
        """Closes the descriptor; again is no error.

        If it was the last copy, all ranges are unregistered and every sleeper goes on into zeros or an
        unprotected page. A read that another thread has under way ends first.
        """
        self._native.close()

    def detach(self) -> int:
        """Gives the descriptor away: returns it and counts as closed."""
        return self._native.detach()

    @property
    def closed(self) -> bool:
        """True after :meth:`close` or :meth:`detach`."""
        return self._native.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Userfaultfd closed>"
        return f"<Userfaultfd fd={self.fileno()} features={self.features:#x}>"

    @property
    def features(self) -> int:
        """The ``UFFD_FEATURE_`` bits that were asked for in the handshake, and so are switched on."""
        return self._native.features

    @property
    def offered(self) -> int:
        """The ``UFFD_FEATURE_`` bits that the kernel has; 0 if the descriptor was handed over."""
        return self._native.offered

    @property
    def ioctls(self) -> int:
        """The mask of ioctls that the descriptor takes; 0 if it was handed over."""
        return self._native.ioctls

    @property
    def kernel_faults(self) -> bool:
        """True if system calls on missing pages wait, False if they get EFAULT."""
        return self._native.kernel_faults

    @property
    def way(self) -> str:
        """``"syscall"``, ``"device"`` or ``"given"``."""
        return self._native.way

    # Ranges

    def register(self, start: int, length: int, mode: int) -> Outcome:
        """UFFDIO_REGISTER of ``length`` bytes with ``abi.UFFDIO_REGISTER_MODE_`` bits.

        ``done`` of the outcome is the mask of ioctls that the range takes.

        A subset of the modes that a range has already changes nothing; another set *replaces* them.
        """
        return Outcome(*self._native.register(start, length, mode))

    def unregister(self, start: int, length: int) -> Outcome:
        """UFFDIO_UNREGISTER of ``length`` bytes. Missing pages read as zeros from here on.

        It wakes sleepers only in ranges that were registered MISSING; :meth:`wake` the others.
        """
        return Outcome(*self._native.unregister(start, length))

    def wake(self, start: int, length: int) -> Outcome:
        """UFFDIO_WAKE: wakes the threads that sleep on ``length`` bytes. Woken too early, they ask again."""
        return Outcome(*self._native.wake(start, length))

    # Answers to faults

    def copy(
        self, dst: int, src: int | bytes | bytearray | memoryview, length: int | None = None, mode: int = 0
    ) -> Outcome:
        """UFFDIO_COPY: fills ``length`` bytes at ``dst``, every page at once and whole.

        ``src`` is an address in the calling process, of any alignment, or an object with the buffer protocol;
        then ``length`` may be left out. ``mode``: ``abi.UFFDIO_COPY_MODE_`` bits.

        Success wakes the sleepers on what was done. A failure wakes nobody: after EEXIST on a page that
        somebody waits for, call :meth:`wake`. Raises :class:`ValueError` if the buffer is too short.
        """
        return Outcome(*self._native.copy(dst, src, length, mode))

    def zeropage(self, start: int, length: int, mode: int = 0) -> Outcome:
        """UFFDIO_ZEROPAGE: fills ``length`` bytes with zeros. EINVAL on hugetlb."""
        return Outcome(*self._native.zeropage(start, length, mode))

    def writeprotect(self, start: int, length: int, mode: int) -> Outcome:
        """UFFDIO_WRITEPROTECT of ``length`` bytes.

        It protects with ``abi.UFFDIO_WRITEPROTECT_MODE_WP``; without it, it unprotects and wakes.

        It spans mappings; when it fails in a later one it has done its work in the earlier ones.
        """
        return Outcome(*self._native.writeprotect(start, length, mode))

    def continue_(self, start: int, length: int, mode: int = 0) -> Outcome:
        """UFFDIO_CONTINUE: maps ``length`` bytes that the page cache holds. EFAULT where it holds none."""
        return Outcome(*self._native.continue_(start, length, mode))

    def poison(self, start: int, length: int, mode: int = 0) -> Outcome:
        """UFFDIO_POISON: makes a touch of absent pages raise SIGBUS (a system call gets EFAULT).

        Start and length are in bytes.
        """
        return Outcome(*self._native.poison(start, length, mode))

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> Outcome:
        """UFFDIO_MOVE: fills ``dst`` with the pages at ``src``, which are absent afterwards.

        Anonymous memory only, and only in the process that made the userfaultfd.
        """
        return Outcome(*self._native.move(dst, src, length, mode))

    # Messages and page tables

    def read_messages(self, limit: int = 64, *, wait: bool = False) -> list[Message]:
        """Reads the messages that wait, at most ``limit`` (1 to 64), in the kernel's order: faults before
        events.

        They are 32 bytes each. Without a message the answer is an empty list; with ``wait=True`` it sleeps
        until there is one. (A blocking descriptor always sleeps.) A poll that said "readable" promises
        nothing: a fault that was answered meanwhile leaves no message.

        A :class:`userfault.abi.Fork` message carries a descriptor that the caller must close or pass to
        :meth:`from_fd`. Raises :class:`OSError`; EMFILE says that a fork message still waits.
        """
        messages = list(abi.parse_messages(self._native.read_raw(limit)))
        while wait and not messages:
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            poll.poll()
            messages = list(abi.parse_messages(self._native.read_raw(limit)))
        return messages

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
        """PAGEMAP_SCAN (Linux 6.7) of the bytes from ``start`` to ``end``, to the end or to
        ``max_pages``.

        A page matches when, after turning the sense of the ``category_inverted`` ones, all of
        ``category_mask`` and, if not 0, one of ``category_anyof_mask`` are set (``abi.PAGE_IS_`` bits;
        ``return_mask`` says which are reported). ``flags``: ``PM_SCAN_WP_MATCHING`` protects what matches,
        ``PM_SCAN_CHECK_WPASYNC`` makes memory an error (EPERM) that WP_ASYNC does not track; without it
        such memory is passed over as if clean. ``max_pages`` counts pages of the base size; 0 is no bound.
        ``vector=False`` protects and reports nothing. ``pid`` names another process, whose memory then is
        scanned.

        The scan is not one instant: pages may change behind it. Raises :class:`OSError`.
        """
        question = (flags, category_inverted, category_mask, category_anyof_mask, return_mask)
        regions, walk_end = _native.pagemap_scan(pid, start, end, question, max_pages, vector)
        return Scan([PageRegion(*region) for region in regions], walk_end)


def offered_features() -> int:
    """The ``UFFD_FEATURE_`` bits that this machine's kernel has.

    Raises :class:`OSError` if there is no userfaultfd to ask.
    """
    return _native.offered_features()


__all__ = ["Scan", "Userfaultfd", "offered_features"]
