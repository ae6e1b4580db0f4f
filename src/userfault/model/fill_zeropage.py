"""UFFDIO_ZEROPAGE: the zero page, or on shared shmem a zero-filled page of the file.

private memory   only none; markers, poison and everything else EEXIST [F5]
shared shmem     exactly as COPY, zero-filled: so here it lifts poison [F14]
hugetlb          EINVAL, always [H2]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import ZERO, Content
from userfault.model.context import Context
from userfault.model.errnos import EEXIST, EFAULT, EINVAL
from userfault.model.fill import DONTWAKE, Fill, fill_ioctl, fill_range, valid_destination
from userfault.model.fill_copy import add_to_file
from userfault.model.pagetable import Present
from userfault.model.reply import Reply
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


class Zeropage:
    """ZEROPAGE of one page (mfill_atomic_pte_zeropage)."""

    name = "ZEROPAGE"
    reads_source = False

    def accepts(self, vma: Vma) -> bool:
        """The kind of memory can be filled so."""
        return not vma.hugetlb

    def small(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 4 KiB page: 0 or -errno."""
        if vma.shared:
            return add_to_file(mm, vma, at, ZERO, protect)
        if vma.file is not None and vma.beyond_end_of_file(at):
            return -EFAULT
        if mm.table.pte(at) is not None:
            return -EEXIST
        mm.table.set_pte(at, Present(mm.kernel.zero_page, write=False))
        return 0

    def huge(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 2 MiB page of hugetlb: 0 or -errno."""
        return -EINVAL


_ZEROPAGE = Zeropage()


def zeropage(thread: Thread, ctx: Context, args: Fill | None) -> Op[Reply]:
    """UFFDIO_ZEROPAGE (userfaultfd_zeropage)."""

    def valid(args: Fill) -> bool:
        return valid_destination(args) and not args.mode & ~DONTWAKE

    return fill_ioctl(
        thread, ctx, "ZEROPAGE", args, valid, lambda fill: fill_range(thread, ctx, _ZEROPAGE, fill)
    )
