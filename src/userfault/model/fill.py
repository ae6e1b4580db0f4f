"""What all fill operations share: the order of their checks, the walk over pages, and the wake at the end.

    1. an event is unread          EAGAIN, stored in the result field too [E4]
    2. the argument                EFAULT if unreadable, EINVAL for range or mode; the field stays untouched
    3. the address space is gone   ESRCH, untouched [D1]
    4. the destination             the whole range in one registered VMA, else ENOENT [F2]; EINVAL for what
                                   the VMA cannot do
    5. page by page                stops at the first refusal: its errno if it is the first page, else EAGAIN
                                   with the bytes done [F6]
    6. wake                        the waiters inside the bytes done, unless DONTWAKE; a failure wakes nobody
                                   [F10]

COPY, ZEROPAGE, CONTINUE and POISON differ only in what they do to one page: a `Filler` in a file of its own.
MOVE has a walk of its own (move.py) and shares the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from userfault.model.access import MemoryFault, touch, translate
from userfault.model.content import Content, join
from userfault.model.context import Context
from userfault.model.errnos import EAGAIN, EEXIST, EFAULT, EINTR, EINVAL, ENOENT, ESRCH
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.page import Page
from userfault.model.pagetable import Marker, Present
from userfault.model.release import begin_call, end_call
from userfault.model.reply import Reply, range_is_valid, refused_before_handshake
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma

DONTWAKE = 1  # the same bit for every fill
WITH_WP = 2  # COPY and CONTINUE


class Fill(NamedTuple):
    """The argument of a fill. Addresses and lengths in bytes; src only for COPY and MOVE."""

    dst: int
    length: int
    mode: int = 0
    src: int = 0


class Filler(Protocol):
    """How one kind of fill treats one page."""

    name: str
    reads_source: bool

    def small(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """Fill one 4 KiB page of anonymous memory or shmem. 0 or -errno."""

    def huge(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """Fill one 2 MiB page of hugetlb. 0 or -errno."""

    def accepts(self, vma: Vma) -> bool:
        """The kind of memory can be filled so."""


def fill_ioctl(
    thread: Thread,
    ctx: Context,
    name: str,
    args: Fill | None,
    valid: Callable[[Fill], bool],
    work: Callable[[Fill], Op[int]],
) -> Op[Reply]:
    """The frame of every fill. `args` None: the argument cannot be read. `work` returns bytes or -errno."""
    begin_call(ctx)
    reply = yield from _fill_ioctl(ctx, name, args, valid, work)
    yield from end_call(ctx)
    return reply


def _fill_ioctl(
    ctx: Context,
    name: str,
    args: Fill | None,
    valid: Callable[[Fill], bool],
    work: Callable[[Fill], Op[int]],
) -> Op[Reply]:
    refused = refused_before_handshake(ctx)
    if refused:
        return refused
    yield f"{name}: look at mmap_changing"
    if ctx.changing:
        if ctx.kernel.version < (6, 12):  # the field was left alone until 6.15, mended in 6.12 too
            return Reply(EAGAIN)
        return Reply(EFAULT) if args is None else Reply(EAGAIN, -EAGAIN)
    if args is None:
        return Reply(EFAULT)
    if not valid(args):
        return Reply(EINVAL)
    if not ctx.mm.alive:
        return Reply(ESRCH)
    done = yield from work(args)
    ctx.kernel.note(f"{name} of {args.length} bytes at {args.dst:#x}: {done}")
    if done < 0:
        return Reply(-done, done)
    if not args.mode & DONTWAKE:
        yield f"{name}: wake {args.dst:#x} to {args.dst + done:#x}"
        ctx.wake(args.dst, done)
    return Reply(0 if done == args.length else EAGAIN, done)


def fill_range(thread: Thread, ctx: Context, filler: Filler, args: Fill) -> Op[int]:
    """mfill_atomic, mfill_atomic_hugetlb: bytes done, or -errno if nothing was."""
    mm = ctx.mm
    done = 0
    held: Content | None = None  # a source page that had to be read with the locks dropped
    while True:
        yield from mm.mmap_lock.read(filler.name)
        vma = destination(mm, args.dst, args.length)
        if vma is None:
            mm.mmap_lock.unread()
            return done or -ENOENT
        if not vma.shared:
            mm.prepare_anonymous(vma)  # anon_vma_prepare, whatever the fill then does
        yield from ctx.map_changing_lock.read(filler.name)  # 6.8; before, mmap_lock did both
        error = _cannot_fill(ctx, filler, vma, args)
        unread_source = False
        while not error and done < args.length:
            yield f"{filler.name}: page {args.dst + done:#x}"
            content = held
            if filler.reads_source and content is None:
                content = peek(thread.process.mm, args.src + done, vma.page_size)
                unread_source = content is None and not _refused_unread(filler, mm, vma, args.dst + done)
                if unread_source:
                    _table(mm, vma, args.dst + done)
                    break
            error = _fill_page(filler, mm, vma, args.dst + done, content, bool(args.mode & WITH_WP))
            if not error:
                mm.kernel.note(f"{filler.name}: filled {args.dst + done:#x}")
                done += vma.page_size
                held = None
                if thread.killed:
                    error = -EINTR
        page_size = vma.page_size
        ctx.map_changing_lock.unread()
        mm.mmap_lock.unread()
        if not unread_source:
            return done or error
        try:
            held = yield from read_source(thread, args.src + done, page_size)
        except MemoryFault:
            return done or -EFAULT


def destination(mm: AddressSpace, dst: int, length: int) -> Vma | None:
    """uffd_mfill_lock, validate_dst_vma: the one registered VMA that holds the whole range.

    It may belong to any userfaultfd, and its modes do not matter [F3].
    """
    vma = mm.find(dst)
    if vma is None or vma.uffd is None or dst + length > vma.end:
        return None
    return vma


def _cannot_fill(ctx: Context, filler: Filler, vma: Vma, args: Fill) -> int:
    if ctx.changing:
        return -EAGAIN
    if args.mode & WITH_WP and not vma.modes.wp:
        return -EINVAL
    if vma.hugetlb:
        aligned = args.dst % HUGE_PAGE == 0 and args.length % HUGE_PAGE == 0
        return 0 if aligned and filler.accepts(vma) else -EINVAL
    return 0 if (vma.anonymous or vma.shmem) and filler.accepts(vma) else -EINVAL


def _fill_page(
    filler: Filler, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool
) -> int:
    if not vma.hugetlb and type(mm.table.pmd(at)) is Present:  # a huge page is there: be strict
        return -EEXIST
    _table(mm, vma, at)
    fill = filler.huge if vma.hugetlb else filler.small
    return fill(mm, vma, at, content, protect)


def _table(mm: AddressSpace, vma: Vma, at: int) -> None:
    """Make the page table that the page will stand in; it is there before the source is read."""
    if vma.hugetlb:
        from userfault.model.hugetlb import table_alloc

        table_alloc(mm, vma, at)
    else:
        mm.table.pte_table_alloc(at)


def _refused_unread(filler: Filler, mm: AddressSpace, vma: Vma, at: int) -> bool:
    """The page is refused before its source is read: a huge entry, or a hugetlb page that is there."""
    if vma.hugetlb:
        entry = mm.table.pmd(at)
        there = entry is not None and type(entry) is not Marker
        assert vma.file is not None
        return there or (vma.shared and vma.file.cached(vma.index(at)))
    return type(mm.table.pmd(at)) is Present


# The source of COPY.


def peek(mm: AddressSpace, address: int, length: int) -> Content | None:
    """The bytes there if they can be read without a fault (copy_from_user with page faults disabled)."""
    parts: list[Content] = []
    at = address
    while at < address + length:
        vma = mm.find(at)
        place = translate(mm, at, False) if vma is not None and (vma.read or vma.write) else None
        if place is None:
            return None
        page, offset = place
        if at % PAGE == 0 and address + length - at >= PAGE:
            parts.append(page.content if page.size == PAGE else page.content.part(offset, PAGE))
            at += PAGE
        else:
            piece = min(PAGE - at % PAGE, address + length - at)
            parts.append(Content(page.content.read(offset, piece)))
            at += piece
    if len(parts) == 1:
        return parts[0]
    if address % PAGE == 0:
        return join(parts, PAGE)
    data = _unaligned(parts, address, length)
    return Content(data[0]) if data == data[:1] * length else Content(data)


def _unaligned(parts: list[Content], address: int, length: int) -> bytes:
    data = b""
    for part in parts:
        at = address + len(data)
        data += part.read(0, min(PAGE - at % PAGE, length - len(data)))
    return data


def read_source(thread: Thread, address: int, length: int) -> Op[Content]:
    """copy_from_user with the locks dropped: it may fault, and sleep on a userfaultfd [F8]."""
    mm = thread.process.mm
    while True:
        content = peek(mm, address, length)
        if content is not None:
            return content
        at = address
        while at < address + length:
            yield f"read the source at {at:#x}"
            yield from touch(thread, mm, at, write=False, user=False)
            at = at // PAGE * PAGE + PAGE


# Putting a page into the page table.


def install(mm: AddressSpace, vma: Vma, at: int, page: Page, protect: bool) -> int:
    """mfill_atomic_install_pte: map a filled page; a marker of any kind gives way. 0 or -errno."""
    if vma.file is not None and vma.beyond_end_of_file(at):
        return -EFAULT
    entry = mm.table.pte(at)
    if entry is not None and type(entry) is not Marker:
        return -EEXIST
    writable = vma.write and (vma.shared or page.file is None)
    mm.table.set_pte(at, Present(page, write=writable and not protect, uffd_wp=protect))
    if page.file is None:
        mm.prepare_anonymous(vma)
    return 0


def install_huge(mm: AddressSpace, vma: Vma, at: int, page: Page, protect: bool) -> int:
    """The end of hugetlb_mfill_atomic_pte."""
    entry = mm.table.pmd(at)
    if entry is not None and type(entry) is not Marker:
        return -EEXIST
    writable = vma.write and (vma.shared or page.file is None)
    mm.table.set_pmd(at, Present(page, write=writable and not protect, uffd_wp=protect))
    if page.file is None:
        mm.prepare_anonymous(vma)
    return 0


def valid_destination(args: Fill) -> bool:
    """The range of ZEROPAGE, CONTINUE and POISON."""
    return range_is_valid(args.dst, args.length)
