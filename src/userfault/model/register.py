"""UFFDIO_REGISTER and UFFDIO_UNREGISTER: which memory a context watches, and for what.

modes          M (MISSING), W (WP, 5.7; file memory 5.19), I (MINOR, hugetlb 5.13, shmem 5.14)
all or nothing one VMA that cannot take the modes fails the whole call and changes nothing [R4]
owner          a VMA of another context: REGISTER EBUSY, UNREGISTER EINVAL [R5]
again          new modes within the old ones: nothing happens; else they replace the old ones [R7]
entries        registering never touches page table entries; UNREGISTER of a W range unprotects [R9]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.context import Context
from userfault.model.errnos import EBUSY, EFAULT, EINVAL, ENOMEM, EPERM
from userfault.model.layout import HUGE_PAGE
from userfault.model.reply import Reply, range_is_valid, refused_before_handshake
from userfault.model.step import Op
from userfault.model.vma import NO_MODES, Modes, Vma
from userfault.model.writeprotect import protect

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread

_ALL = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP | abi.UFFDIO_REGISTER_MODE_MINOR


def register(thread: Thread, ctx: Context, start: int | None, length: int, mode: int) -> Op[Reply]:
    """UFFDIO_REGISTER (userfaultfd_register); the reply's `out` is the mask of ioctls.

    `start` None: the argument cannot be read.
    """
    refused = refused_before_handshake(ctx)
    if refused:
        return refused
    if start is None:
        return Reply(EFAULT)
    if not mode or mode & ~_ALL or not range_is_valid(start, length):
        return Reply(EINVAL)
    mm = ctx.mm
    if not mm.alive:
        return Reply(ENOMEM)
    modes = Modes(
        bool(mode & abi.UFFDIO_REGISTER_MODE_MISSING),
        bool(mode & abi.UFFDIO_REGISTER_MODE_WP),
        bool(mode & abi.UFFDIO_REGISTER_MODE_MINOR),
    )
    yield from mm.mmap_lock.write("REGISTER")
    end = start + length
    vmas = mm.overlapping(start, end)
    errno = _cannot_register(ctx, vmas, start, end, modes)
    if errno == 0:
        for vma in vmas:
            _register_vma(mm, ctx, vma, max(start, vma.start), min(end, vma.end), modes)
        mm.merge(start, end)
    mm.mmap_lock.unwrite()
    if errno:
        return Reply(errno)
    return Reply(0, _ioctls(ctx, modes, any(vma.hugetlb for vma in vmas)))


def _cannot_register(ctx: Context, vmas: list[Vma], start: int, end: int, modes: Modes) -> int:
    """The checks of every VMA before any is changed."""
    if not vmas and ctx.kernel.version < (6, 3) and not any(vma.end > start for vma in ctx.mm.vmas):
        return ENOMEM  # nothing mapped there or above it
    if not vmas or (vmas[0].hugetlb and start % HUGE_PAGE):
        return EINVAL
    for vma in vmas:
        if not _can_userfault(ctx, vma, modes):
            return EINVAL
        if not vma.may_write:  # a fill would write a file that this mapping may not write [R3]
            return EPERM
        if vma.hugetlb and end <= vma.end and end % HUGE_PAGE:
            return EINVAL
        if vma.uffd is not None and vma.uffd is not ctx:
            return EBUSY
    return 0


def _can_userfault(ctx: Context, vma: Vma, modes: Modes) -> bool:
    """vma_can_userfault: the kind of memory allows the modes."""
    version = ctx.kernel.version
    if vma.special or (vma.droppable and version >= (6, 13)):  # MAP_DROPPABLE is 6.11, forbidden later
        return False
    if modes.minor and not vma.hugetlb and not (vma.shmem and version >= (5, 14)):
        return False
    if ctx.wp_async and modes.wp and not (modes.missing or modes.minor):
        return True  # WP_ASYNC alone tracks any memory
    if modes.wp and not vma.anonymous and version < (5, 19):
        return False
    return vma.anonymous or vma.hugetlb or vma.shmem


def _register_vma(mm: AddressSpace, ctx: Context, vma: Vma, start: int, end: int, modes: Modes) -> None:
    """userfaultfd_register_range for one VMA."""
    if vma.uffd is ctx and modes <= vma.modes:
        return  # cannot be narrowed
    for piece in mm.carve(start, end):
        piece.uffd = ctx
        piece.modes = modes
        if piece.hugetlb:
            from userfault.model.hugetlb import unshare_all

            unshare_all(mm, piece)


def _ioctls(ctx: Context, modes: Modes, hugetlb: bool) -> int:
    """What the range is said to take: by page size and modes, not by what the memory can really do [R2]."""
    version = ctx.kernel.version
    mask = 1 << abi._UFFDIO_WAKE | 1 << abi._UFFDIO_COPY
    if not hugetlb:
        mask |= 1 << abi._UFFDIO_ZEROPAGE
        if version >= (6, 8):
            mask |= 1 << abi._UFFDIO_MOVE
    if version >= (6, 6):
        mask |= 1 << abi._UFFDIO_POISON
    if modes.wp:
        mask |= 1 << abi._UFFDIO_WRITEPROTECT
    if modes.minor:
        mask |= 1 << abi._UFFDIO_CONTINUE
    return mask


def unregister(thread: Thread, ctx: Context, start: int | None, length: int) -> Op[Reply]:
    """UFFDIO_UNREGISTER (userfaultfd_unregister). Wakes the range, but only in VMAs that had MISSING [K3]."""
    refused = refused_before_handshake(ctx)
    if refused:
        return refused
    if start is None:
        return Reply(EFAULT)
    if not range_is_valid(start, length):
        return Reply(EINVAL)
    mm = ctx.mm
    if not mm.alive:
        return Reply(ENOMEM)
    yield from mm.mmap_lock.write("UNREGISTER")
    end = start + length
    vmas = mm.overlapping(start, end)
    errno = _cannot_unregister(ctx, vmas, start, end)
    if errno == 0:
        for vma in vmas:
            if vma.uffd is None:
                continue
            low, high = max(start, vma.start), min(end, vma.end)
            if vma.modes.missing:
                ctx.wake(low, high - low)
            clear(mm, vma, low, high)
        mm.merge(start, end)
    mm.mmap_lock.unwrite()
    return Reply(errno)


def _cannot_unregister(ctx: Context, vmas: list[Vma], start: int, end: int) -> int:
    if not vmas or (vmas[0].hugetlb and start % HUGE_PAGE):
        return EINVAL
    for vma in vmas:
        if not _can_userfault(ctx, vma, vma.modes):
            return EINVAL
        if vma.hugetlb and end < vma.end and end % HUGE_PAGE:
            return EINVAL  # split_vma refuses to cut a huge page
        if ctx.kernel.version >= (6, 18) and vma.uffd is not None and vma.uffd is not ctx:
            return EINVAL  # before, it was taken away from its owner
    return 0


def clear(mm: AddressSpace, vma: Vma, start: int, end: int) -> None:
    """userfaultfd_clear_vma: unprotect what was W, then forget the registration. The lock is held."""
    if vma.modes.wp:
        protect(mm, vma, start, end, False)
    for piece in mm.carve(start, end):
        piece.uffd = None
        piece.modes = NO_MODES
