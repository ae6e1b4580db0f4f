"""The kernel's numbers, structs and messages, in pure Python.

Everything Linux 6.18 has for a user of userfaultfd, under the kernel's own names (``linux/userfaultfd.h``,
``linux/fs.h``, ``Documentation/admin-guide/mm/pagemap.rst``). It needs neither the compiled part nor Linux:
the executable model stands on this file alone. Addresses, lengths and sizes are in bytes. A test compares
every number, size and offset with the Rust side and with the machine's own kernel header.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, TypeAlias

_u8, _u16, _u32, _u64, _s64 = (
    ctypes.c_uint8,
    ctypes.c_uint16,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int64,
)


# Structs -------------------------------------------------------------------------------------------------


class uffdio_api(ctypes.Structure):
    """Argument of ``UFFDIO_API``. The kernel's answer in ``features`` is a menu, not what was switched on."""

    _fields_: ClassVar = [("api", _u64), ("features", _u64), ("ioctls", _u64)]


class uffdio_range(ctypes.Structure):
    """A range of addresses: argument of ``UFFDIO_UNREGISTER`` and ``UFFDIO_WAKE``."""

    _fields_: ClassVar = [("start", _u64), ("len", _u64)]


class uffdio_register(ctypes.Structure):
    """Argument of ``UFFDIO_REGISTER``; the kernel stores the mask of ioctls in ``ioctls``."""

    _fields_: ClassVar = [("range", uffdio_range), ("mode", _u64), ("ioctls", _u64)]


class uffdio_copy(ctypes.Structure):
    """Argument of ``UFFDIO_COPY``; the kernel stores bytes done or -errno in ``copy``."""

    _fields_: ClassVar = [("dst", _u64), ("src", _u64), ("len", _u64), ("mode", _u64), ("copy", _s64)]


class uffdio_zeropage(ctypes.Structure):
    """Argument of ``UFFDIO_ZEROPAGE``; the kernel stores bytes done or -errno in ``zeropage``."""

    _fields_: ClassVar = [("range", uffdio_range), ("mode", _u64), ("zeropage", _s64)]


class uffdio_writeprotect(ctypes.Structure):
    """Argument of ``UFFDIO_WRITEPROTECT``. It has no result field."""

    _fields_: ClassVar = [("range", uffdio_range), ("mode", _u64)]


class uffdio_continue(ctypes.Structure):
    """Argument of ``UFFDIO_CONTINUE``; the kernel stores bytes done or -errno in ``mapped``."""

    _fields_: ClassVar = [("range", uffdio_range), ("mode", _u64), ("mapped", _s64)]


class uffdio_poison(ctypes.Structure):
    """Argument of ``UFFDIO_POISON``; the kernel stores bytes done or -errno in ``updated``."""

    _fields_: ClassVar = [("range", uffdio_range), ("mode", _u64), ("updated", _s64)]


class uffdio_move(ctypes.Structure):
    """Argument of ``UFFDIO_MOVE``; the kernel stores bytes done or -errno in ``move``."""

    _fields_: ClassVar = [("dst", _u64), ("src", _u64), ("len", _u64), ("mode", _u64), ("move", _s64)]


class pm_scan_arg(ctypes.Structure):
    """Argument of ``PAGEMAP_SCAN``; the kernel stores how far it came in ``walk_end``."""

    _fields_: ClassVar = [
        ("size", _u64),
        ("flags", _u64),
        ("start", _u64),
        ("end", _u64),
        ("walk_end", _u64),
        ("vec", _u64),
        ("vec_len", _u64),
        ("max_pages", _u64),
        ("category_inverted", _u64),
        ("category_mask", _u64),
        ("category_anyof_mask", _u64),
        ("return_mask", _u64),
    ]


class page_region(ctypes.Structure):
    """One answer of ``PAGEMAP_SCAN``: neighbouring pages of the same categories."""

    _fields_: ClassVar = [("start", _u64), ("end", _u64), ("categories", _u64)]


class uffd_msg_feat(ctypes.Union):
    """What a feature adds to a fault message."""

    _fields_: ClassVar = [("ptid", _u32)]


class uffd_msg_pagefault(ctypes.Structure):
    """The argument of ``UFFD_EVENT_PAGEFAULT``."""

    _fields_: ClassVar = [("flags", _u64), ("address", _u64), ("feat", uffd_msg_feat)]


class uffd_msg_fork(ctypes.Structure):
    """The argument of ``UFFD_EVENT_FORK``."""

    _fields_: ClassVar = [("ufd", _u32)]


class uffd_msg_remap(ctypes.Structure):
    """The argument of ``UFFD_EVENT_REMAP``."""

    _fields_: ClassVar = [("from", _u64), ("to", _u64), ("len", _u64)]


class uffd_msg_remove(ctypes.Structure):
    """The argument of ``UFFD_EVENT_REMOVE`` and ``UFFD_EVENT_UNMAP``."""

    _fields_: ClassVar = [("start", _u64), ("end", _u64)]


class uffd_msg_reserved(ctypes.Structure):
    """The argument as raw words."""

    _fields_: ClassVar = [("reserved1", _u64), ("reserved2", _u64), ("reserved3", _u64)]


class uffd_msg_arg(ctypes.Union):
    """The part of a message that depends on its event."""

    _fields_: ClassVar = [
        ("pagefault", uffd_msg_pagefault),
        ("fork", uffd_msg_fork),
        ("remap", uffd_msg_remap),
        ("remove", uffd_msg_remove),
        ("reserved", uffd_msg_reserved),
    ]


class uffd_msg(ctypes.Structure):
    """One message as read(2) delivers it: 32 bytes."""

    _fields_: ClassVar = [
        ("event", _u8),
        ("reserved1", _u8),
        ("reserved2", _u16),
        ("reserved3", _u32),
        ("arg", uffd_msg_arg),
    ]


# Numbers -------------------------------------------------------------------------------------------------


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


def _iowr(number: int, struct: type[ctypes.Structure]) -> int:
    return _ioc(3, UFFDIO, number, ctypes.sizeof(struct))


def _ior(number: int, struct: type[ctypes.Structure]) -> int:
    return _ioc(2, UFFDIO, number, ctypes.sizeof(struct))


UFFD_API: Final = 0xAA
UFFDIO: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC_NEW: Final = _ioc(0, 0xAA, 0, 0)

_UFFDIO_REGISTER: Final = 0x00
_UFFDIO_UNREGISTER: Final = 0x01
_UFFDIO_WAKE: Final = 0x02
_UFFDIO_COPY: Final = 0x03
_UFFDIO_ZEROPAGE: Final = 0x04
_UFFDIO_MOVE: Final = 0x05
_UFFDIO_WRITEPROTECT: Final = 0x06
_UFFDIO_CONTINUE: Final = 0x07
_UFFDIO_POISON: Final = 0x08
_UFFDIO_API: Final = 0x3F

UFFDIO_API: Final = _iowr(_UFFDIO_API, uffdio_api)
UFFDIO_REGISTER: Final = _iowr(_UFFDIO_REGISTER, uffdio_register)
UFFDIO_UNREGISTER: Final = _ior(_UFFDIO_UNREGISTER, uffdio_range)
UFFDIO_WAKE: Final = _ior(_UFFDIO_WAKE, uffdio_range)
UFFDIO_COPY: Final = _iowr(_UFFDIO_COPY, uffdio_copy)
UFFDIO_ZEROPAGE: Final = _iowr(_UFFDIO_ZEROPAGE, uffdio_zeropage)
UFFDIO_MOVE: Final = _iowr(_UFFDIO_MOVE, uffdio_move)
UFFDIO_WRITEPROTECT: Final = _iowr(_UFFDIO_WRITEPROTECT, uffdio_writeprotect)
UFFDIO_CONTINUE: Final = _iowr(_UFFDIO_CONTINUE, uffdio_continue)
UFFDIO_POISON: Final = _iowr(_UFFDIO_POISON, uffdio_poison)

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2

UFFDIO_COPY_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_COPY_MODE_WP: Final = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0
# The other way round than COPY's bits.
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_CONTINUE_MODE_WP: Final = 1 << 1
UFFDIO_POISON_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: Final = 1 << 1

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_POISON: Final = 1 << 14
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFD_FEATURE_MOVE: Final = 1 << 16

UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0
UFFD_PAGEFAULT_FLAG_WP: Final = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR: Final = 1 << 2

PAGEMAP_SCAN: Final = _ioc(3, 0x66, 16, ctypes.sizeof(pm_scan_arg))
PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_GUARD: Final = 1 << 8
PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

PM_SOFT_DIRTY: Final = 1 << 55
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_UFFD_WP: Final = 1 << 57
PM_GUARD_REGION: Final = 1 << 58
PM_FILE: Final = 1 << 61
PM_SWAP: Final = 1 << 62
PM_PRESENT: Final = 1 << 63


def feature_names(mask: int) -> list[str]:
    """Names the ``UFFD_FEATURE_`` bits in ``mask``, lowest first; an unknown bit is ``"bit 40"``."""
    known = {
        value: name
        for name, value in globals().items()
        if name.startswith("UFFD_FEATURE_") and isinstance(value, int)
    }
    bits = (1 << n for n in range(mask.bit_length()))
    return [known.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits if mask & bit]


# Results -------------------------------------------------------------------------------------------------


# Linux's number, also where the model runs on another system, whose errno module has others.
_EAGAIN: Final = 11


class Outcome(NamedTuple):
    """The exact result of one ioctl.

    The kernel keeps apart how far a call came and why it stopped, and so does this type: a fill of eight
    pages that meets a page already there after three of them answers ``Outcome(3 * page, EAGAIN)``, and only
    a second call for the rest learns the real reason.

    ``done`` is never negative: where the kernel stores ``-errno`` in its result field, or does not touch the
    field, nothing was done and ``done`` is 0. ``errno == EAGAIN`` with ``done == 0`` therefore has one
    meaning only: an event (fork, mremap, munmap, madvise) is unread, and every fill is refused until it is
    read.

    The calls without a result field (``unregister``, ``wake``, ``writeprotect``) report their whole length
    when they succeed and 0 when they fail. ``register`` reports the mask of ioctls that the range takes
    instead of bytes: test it with ``outcome.done & (1 << _UFFDIO_COPY)``.
    """

    done: int
    """Bytes done, 0 or more; from ``register`` a mask of ioctls."""
    errno: int
    """0 for success, else the errno of the call (Linux's numbers)."""

    @property
    def ok(self) -> bool:
        """True if the call did all that it was asked to."""
        return self.errno == 0

    @property
    def event_pending(self) -> bool:
        """True if the call was refused because an event is unread."""
        return self.errno == _EAGAIN and self.done == 0

    def check(self) -> int:
        """Returns ``done``, or raises :class:`OSError` with the errno if the call failed."""
        if self.errno:
            raise OSError(self.errno, f"{os.strerror(self.errno)} ({self.done} bytes done)")
        return self.done


class PageRegion(NamedTuple):
    """Neighbouring pages of the same categories, as ``pagemap_scan`` reports them."""

    start: int
    """First byte's address."""
    end: int
    """One past the last byte."""
    categories: int
    """``PAGE_IS_`` bits, as far as the scan was asked to report them."""


# Messages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pagefault:
    """A thread touched a page and waits."""

    flags: int
    """``UFFD_PAGEFAULT_FLAG_`` bits: none, WRITE, WRITE|WP, MINOR or WRITE|MINOR."""
    address: int
    """The page; with ``UFFD_FEATURE_EXACT_ADDRESS`` the byte."""
    ptid: int = 0
    """The thread with ``UFFD_FEATURE_THREAD_ID``, else 0."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; whoever reads this owns the descriptor and must close it."""

    ufd: int
    """The child's userfaultfd, its handshake done."""


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap() moved memory."""

    from_: int
    """Old address."""
    to: int
    """New address."""
    length: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise() took pages away."""

    start: int
    """First byte's address."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Unmap:
    """munmap() took the mapping away."""

    start: int
    """First byte's address."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """An event that this version does not know."""

    event: int
    """Its number."""
    words: tuple[int, int, int]
    """Its argument, raw."""


Message: TypeAlias = Pagefault | Fork | Remap | Remove | Unmap | UnknownEvent


def parse_message(raw: uffd_msg) -> Message:
    """Reads one raw message. A fork message's descriptor belongs to the caller from here on."""
    arg = raw.arg
    match raw.event:
        case 0x12:
            return Pagefault(arg.pagefault.flags, arg.pagefault.address, arg.pagefault.feat.ptid)
        case 0x13:
            return Fork(arg.fork.ufd)
        case 0x14:
            return Remap(getattr(arg.remap, "from"), arg.remap.to, arg.remap.len)
        case 0x15:
            return Remove(arg.remove.start, arg.remove.end)
        case 0x16:
            return Unmap(arg.remove.start, arg.remove.end)
        case event:
            words = arg.reserved
            return UnknownEvent(event, (words.reserved1, words.reserved2, words.reserved3))


def parse_messages(data: bytes | bytearray | memoryview) -> Iterator[Message]:
    """Reads what read(2) of a userfaultfd returned: whole messages of 32 bytes each.

    Raises :class:`ValueError` if the length is no multiple of 32.
    """
    size = ctypes.sizeof(uffd_msg)
    if len(data) % size:
        raise ValueError(f"{len(data)} bytes are no whole number of messages of {size} bytes")
    for offset in range(0, len(data), size):
        yield parse_message(uffd_msg.from_buffer_copy(data, offset))
