"""UFFDIO_CONTINUE (5.13): map the page that the file's cache holds, after a minor fault.

    anonymous             EINVAL
    not cached            EFAULT; shmem beyond the end of the file EINVAL [F7]
    cached                none, wp marker, poison -> mapped; present, swap -> EEXIST [F5]

On a private mapping the page is mapped read-only, so that the first write copies it. CONTINUE_MODE_WP since
6.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import Content
from userfault.model.context import Context
from userfault.model.errnos import EFAULT, EINVAL
from userfault.model.fault import cached_page
from userfault.model.fill import (
    DONTWAKE,
    WITH_WP,
    Fill,
    fill_ioctl,
    fill_range,
    install,
    install_huge,
    valid_destination,
)
from userfault.model.reply import Reply
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


class Continue:
    """CONTINUE of one page (mfill_atomic_pte_continue)."""

    name = "CONTINUE"
    reads_source = False

    def accepts(self, vma: Vma) -> bool:
        """The kind of memory can be filled so."""
        return vma.shmem or vma.hugetlb

    def small(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 4 KiB page: 0 or -errno."""
        assert vma.file is not None
        if vma.beyond_end_of_file(at):
            return -EINVAL
        page = cached_page(vma, at)
        return -EFAULT if page is None else install(mm, vma, at, page, protect)

    def huge(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 2 MiB page of hugetlb: 0 or -errno."""
        assert vma.file is not None
        page = vma.file.page(vma.index(at))
        return -EFAULT if page is None else install_huge(mm, vma, at, page, protect)


_CONTINUE = Continue()


def continue_(thread: Thread, ctx: Context, args: Fill | None) -> Op[Reply]:
    """UFFDIO_CONTINUE (userfaultfd_continue)."""
    modes = DONTWAKE | WITH_WP if ctx.kernel.version >= (6, 4) else DONTWAKE

    def valid(args: Fill) -> bool:
        return valid_destination(args) and not args.mode & ~modes

    return fill_ioctl(
        thread, ctx, "CONTINUE", args, valid, lambda fill: fill_range(thread, ctx, _CONTINUE, fill)
    )
