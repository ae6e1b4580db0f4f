"""UFFDIO_COPY: a page of bytes, put in place in one atomic step.

    private memory   none, wp marker, poison  -> a new private page, over a cached page too [H3]
                     present, swap            -> EEXIST
    shared memory    not cached               -> a new page of the file, whatever marker was here [F5]
                     cached                   -> EEXIST (CONTINUE is what maps it)

A plain COPY leaves the page writable even over a write-protect marker [P4]; COPY_MODE_WP (5.7) installs it
protected from birth. A read-only destination takes COPY as well [F7].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import Content
from userfault.model.context import Context
from userfault.model.errnos import EEXIST, EFAULT, ENOMEM
from userfault.model.fill import (
    DONTWAKE,
    WITH_WP,
    Fill,
    fill_ioctl,
    fill_range,
    install,
    install_huge,
)
from userfault.model.page import Page
from userfault.model.reply import Reply, range_is_valid, unaligned_range_is_valid
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


class Copy:
    """COPY of one page."""

    name = "COPY"
    reads_source = True

    def accepts(self, vma: Vma) -> bool:
        """The kind of memory can be filled so."""
        return True

    def small(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """One 4 KiB page: 0 or -errno."""
        assert content is not None
        if vma.shared:
            return add_to_file(mm, vma, at, content, protect)
        return install(mm, vma, at, Page(content, exclusive=True), protect)

    def huge(self, mm: AddressSpace, vma: Vma, at: int, content: Content | None, protect: bool) -> int:
        """hugetlb_mfill_atomic_pte."""
        from userfault.model.hugetlb import new_private_page
        from userfault.model.pagetable import Marker

        assert content is not None
        assert vma.file is not None
        entry = mm.table.pmd(at)
        if entry is not None and type(entry) is not Marker:
            return -EEXIST
        index = vma.index(at)
        if vma.shared:
            if vma.file.cached(index):
                return -EEXIST
            if vma.beyond_end_of_file(at):
                return -EFAULT
            page = vma.file.add(index, content)
        else:
            page = new_private_page(mm)
        if page is None:
            return -ENOMEM
        page.content = content
        return install_huge(mm, vma, at, page, protect)


def add_to_file(mm: AddressSpace, vma: Vma, at: int, content: Content, protect: bool) -> int:
    """shmem_mfill_atomic_pte: the page joins the file, then is mapped; a failure changes no counter (5.14,
    7d64ae3ab648; defect account_early is the order before that, without the give-back)."""
    file = vma.file
    assert file is not None
    if vma.beyond_end_of_file(at):
        return -EFAULT
    index = vma.index(at)
    early = "account_early" in mm.kernel.defects
    if early and not file.charge():
        return -ENOMEM
    if file.cached(index):
        return -EEXIST
    if early:
        page: Page | None = Page(content, file=file)
        assert page is not None
        file.pages[index] = page
    else:
        page = file.add(index, content)
    if page is None:
        return -ENOMEM
    error = install(mm, vma, at, page, protect)
    if error:
        file.drop(index)
    return error


_COPY = Copy()


def copy(thread: Thread, ctx: Context, args: Fill | None) -> Op[Reply]:
    """UFFDIO_COPY (userfaultfd_copy)."""
    version = ctx.kernel.version
    modes = DONTWAKE if "no_copy_mode_wp" in ctx.kernel.defects else DONTWAKE | WITH_WP

    def valid(args: Fill) -> bool:
        if version >= (6, 6) and not unaligned_range_is_valid(args.src, args.length):
            return False
        return range_is_valid(args.dst, args.length) and not args.mode & ~modes

    return fill_ioctl(thread, ctx, "COPY", args, valid, lambda fill: fill_range(thread, ctx, _COPY, fill))
