"""UFFDIO_MOVE (6.8): pages change their place, without being copied.

It is the one fill that checks the owner and the address space [F12], and it takes anonymous memory only:

    source      none ENOENT (with ALLOW_SRC_HOLES skipped); present, zero page, swap: moved; a marker EFAULT;
                shared by fork EBUSY, even after the child is gone [F13]
    destination none; everything else EEXIST, markers too

A present page loses its uffd-wp bit on the way, a swap entry keeps it. A whole huge page travels whole if the
destination has no page table there; otherwise it is split first [H4].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import Context
from userfault.model.errnos import EAGAIN, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, ENOENT, ESRCH
from userfault.model.fill import DONTWAKE, Fill, fill_ioctl
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.pagetable import Marker, Present, Swap
from userfault.model.reply import Reply, range_is_valid
from userfault.model.step import Op
from userfault.model.thp import split_pmd

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


def move(thread: Thread, ctx: Context, args: Fill | None) -> Op[Reply]:
    """UFFDIO_MOVE (userfaultfd_move)."""
    if ctx.kernel.version < (6, 8):
        return _unknown()

    def valid(args: Fill) -> bool:
        return (
            ctx.mm is thread.process.mm
            and range_is_valid(args.dst, args.length)
            and range_is_valid(args.src, args.length)
            and not args.mode & ~(DONTWAKE | abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
        )

    return fill_ioctl(thread, ctx, "MOVE", args, valid, lambda fill: _move_pages(thread, ctx, fill))


def _unknown() -> Op[Reply]:
    yield "MOVE"
    return Reply(EINVAL)


def _move_pages(thread: Thread, ctx: Context, args: Fill) -> Op[int]:
    """move_pages: bytes done, or -errno if nothing was."""
    mm = ctx.mm
    if not mm.alive:
        return -ESRCH
    yield from mm.mmap_lock.read("MOVE")
    yield from ctx.map_changing_lock.read("MOVE")
    error = -EAGAIN if ctx.changing else _cannot_move(ctx, mm, args)
    done = 0
    while not error and done < args.length:
        yield f"MOVE: {args.src + done:#x} to {args.dst + done:#x}"
        step = _move_one(mm, args, done)
        if step < 0:
            error = step
        else:
            done += step
            if thread.killed:
                error = -EINTR
    ctx.map_changing_lock.unread()
    mm.mmap_lock.unread()
    return done or error


def _cannot_move(ctx: Context, mm: AddressSpace, args: Fill) -> int:
    """find_vmas_mm_locked, validate_move_areas."""
    dst, src = mm.find(args.dst), mm.find(args.src)
    if dst is None or src is None:
        return -ENOENT
    invalid = (
        src.shared
        or args.src + args.length > src.end
        or dst.shared
        or args.dst + args.length > dst.end
        # validate_move_areas
        or (src.read, src.write, src.execute) != (dst.read, dst.write, dst.execute)
        or src.locked != dst.locked
        or not src.write
        or dst.uffd is not ctx
        or not dst.anonymous
        or not src.anonymous
    )
    return -EINVAL if invalid else 0


def _move_one(mm: AddressSpace, args: Fill, done: int) -> int:
    """One entry, small or huge: the bytes it covers, or -errno."""
    at, to = args.src + done, args.dst + done
    holes = bool(args.mode & abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
    source, target = mm.table.pmd(at), mm.table.pmd(to)
    if source is None and not holes and mm.table.pmd_table(at) is None:
        return -ENOENT
    mm.table.pmd_table_alloc(to)
    if type(target) is Present:
        return -EEXIST
    src_vma, dst_vma = mm.find(at), mm.find(to)
    assert src_vma is not None
    assert dst_vma is not None
    if type(source) is Present:
        splits = at % HUGE_PAGE or to % HUGE_PAGE or args.length - done < HUGE_PAGE
        if splits or target is not None:
            if not source.page.zero and not source.page.exclusive:
                return -EBUSY
            split_pmd(mm, src_vma, at)
        else:
            return _move_huge(mm, dst_vma, at, to, source)
    elif source is None and not holes:
        return -ENOENT
    mm.table.pte_table_alloc(at)
    mm.table.pte_table_alloc(to)
    return _move_small(mm, dst_vma, at, to, holes)


def _move_huge(mm: AddressSpace, dst_vma: Vma, at: int, to: int, source: Present) -> int:
    """move_pages_huge_pmd."""
    if not source.page.zero and not source.page.exclusive:
        return -EBUSY
    mm.table.set_pmd(at, None)
    mm.table.set_pmd(to, Present(source.page, write=dst_vma.write and not source.page.zero))
    mm.prepare_anonymous(dst_vma)
    return HUGE_PAGE


def _move_small(mm: AddressSpace, dst_vma: Vma, at: int, to: int, holes: bool) -> int:
    """move_pages_pte."""
    if mm.table.pte(to) is not None:
        return -EEXIST
    entry = mm.table.pte(at)
    if entry is None:
        return PAGE if holes else -ENOENT
    if type(entry) is Present:
        if entry.page.zero:
            moved: Present | Swap = Present(entry.page, write=False)
        elif not entry.page.exclusive:
            return -EBUSY
        else:
            moved = Present(entry.page, write=dst_vma.write)
    elif type(entry) is Swap:
        if not entry.slot.exclusive:
            return -EBUSY
        moved = entry
    else:
        assert type(entry) is Marker
        return -EFAULT
    mm.table.set_pte(at, None)
    mm.table.set_pte(to, moved)
    mm.prepare_anonymous(dst_vma)
    return PAGE
