"""Closing a userfaultfd: who is let go, and when.

The last descriptor's close releases the context, unless an ioctl is still at work on it: that ioctl holds the
file open, and releases it when it returns.
"""

from __future__ import annotations

from userfault.model.context import Context
from userfault.model.register import clear
from userfault.model.step import Op
from userfault.model.vma import NO_MODES


def close_context(ctx: Context) -> Op[None]:
    """The last descriptor is gone."""
    ctx.closed = True
    if ctx.calls == 0:
        yield from release(ctx)


def begin_call(ctx: Context) -> None:
    """An ioctl takes a reference (fdget)."""
    ctx.calls += 1


def end_call(ctx: Context) -> Op[None]:
    """It gives the reference back (fdput)."""
    ctx.calls -= 1
    if ctx.closed and ctx.calls == 0 and not ctx.released:
        yield from release(ctx)


def release(ctx: Context) -> Op[None]:
    """The last descriptor is closed (userfaultfd_release): unregister, wake everybody [E11].

    Sleepers go on into zero-filled or unprotected pages: silent data loss if the handler only died.
    """
    yield f"close {ctx.name}: mark it released"
    ctx.released = True
    mm = ctx.mm
    if mm.alive:
        yield from mm.mmap_lock.write(f"close {ctx.name}")
        for vma in [vma for vma in mm.vmas if vma.uffd is ctx]:
            if ctx.kernel.version >= (6, 12):
                clear(mm, vma, vma.start, vma.end)
            else:  # the bits stayed in present entries
                vma.uffd, vma.modes = None, NO_MODES
        if mm.vmas:
            mm.merge(mm.vmas[0].start, mm.vmas[-1].end)
        mm.mmap_lock.unwrite()
    yield f"close {ctx.name}: wake everybody"
    ctx.wake(0, 0)
    ctx.events.clear()
