"""UFFDIO_POISON (6.6): a marker that makes every later access fail, where no page and no marker is.

Only none takes it, cached or not; everything else is EEXIST [F5]. It outlives unregistration, close, private
fork and mremap [E12], and goes with the mapping, by MADV_DONTNEED, COPY or CONTINUE [F14].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import Content
from userfault.model.context import Context
from userfault.model.errnos import EEXIST, EFAULT, EINVAL
from userfault.model.fill import DONTWAKE, Fill, fill_ioctl, fill_range, valid_destination
from userfault.model.pagetable import POISON_MARKER
from userfault.model.reply import Reply
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


class Poison:
    """POISON of one page (mfill_atomic_pte_poison)."""

    name = "POISON"
    reads_source = False

    def accepts(self, vma: Vma) -> bool:
        """The kind of memory can be filled so."""
        return True

    def small(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 4 KiB page: 0 or -errno."""
        if vma.file is not None and vma.beyond_end_of_file(at):
            return -EFAULT
        if mm.table.pte(at) is not None:
            return -EEXIST
        mm.table.set_pte(at, POISON_MARKER)
        return 0

    def huge(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 2 MiB page of hugetlb: 0 or -errno."""
        if mm.table.pmd(at) is not None:
            return -EEXIST
        mm.table.set_pmd(at, POISON_MARKER)
        return 0


_POISON = Poison()


def poison(thread: Thread, ctx: Context, args: Fill | None) -> Op[Reply]:
    """UFFDIO_POISON (userfaultfd_poison)."""
    if ctx.kernel.version < (6, 6):
        return _unknown()

    def valid(args: Fill) -> bool:
        return valid_destination(args) and not args.mode & ~DONTWAKE

    return fill_ioctl(thread, ctx, "POISON", args, valid, lambda fill: fill_range(thread, ctx, _POISON, fill))


def _unknown() -> Op[Reply]:
    """An ioctl number that this kernel does not know."""
    yield "POISON"
    return Reply(EINVAL)
