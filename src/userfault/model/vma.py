"""A VMA (struct vm_area_struct): one range of an address space with one set of properties."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from userfault.model.layout import HUGE_PAGE, PAGE

if TYPE_CHECKING:
    from userfault.model.context import Context
    from userfault.model.pagecache import File


@dataclass(slots=True)
class Modes:
    """Which faults a registration asks for (VM_UFFD_MISSING, VM_UFFD_WP, VM_UFFD_MINOR)."""

    missing: bool = False
    wp: bool = False
    minor: bool = False

    def __le__(self, other: Modes) -> bool:
        """Every mode of this one is a mode of `other`."""
        return self.missing <= other.missing and self.wp <= other.wp and self.minor <= other.minor

    def __bool__(self) -> bool:
        return self.missing or self.wp or self.minor


NO_MODES = Modes()


class AnonVma:
    """What VMAs share whose private pages belong together (struct anon_vma).

    inherited: of a forked child, whose pages may also be the parent's.
    """

    __slots__ = ("inherited",)

    def __init__(self, *, inherited: bool = False) -> None:
        self.inherited = inherited


@dataclass(slots=True)
class Vma:
    """One mapping, [start, end) in bytes.

    read, write, execute   what mprotect says; write is what a fault asks (VM_WRITE)
    shared      MAP_SHARED
    may_write   it could be made writable (VM_MAYWRITE): false for a shared mapping of a read-only descriptor
    file        None: anonymous
    offset      of `start` in the file, bytes; of anonymous memory the address where it was before its first
                page (vm_pgoff): neighbours that do not follow each other there do not merge
    uffd        the userfaultfd context it is registered with, and `modes`
    anon_vma    it has had private pages: fork() must copy its page table, and it merges only with VMAs whose
                private pages it shares this with, or that had none
    special     a mapping of the kernel's own pages (vdso, vvar)
    """

    start: int
    end: int
    read: bool = True
    write: bool = True
    execute: bool = False
    shared: bool = False
    may_write: bool = True
    file: File | None = None
    offset: int = 0
    uffd: Context | None = None
    modes: Modes = field(default_factory=lambda: NO_MODES)
    anon_vma: AnonVma | None = None
    hugepage: bool | None = None  # MADV_HUGEPAGE / MADV_NOHUGEPAGE / never asked
    locked: bool = False
    lock_on_fault: bool = False
    dontfork: bool = False
    wipeonfork: bool = False
    droppable: bool = False
    growsdown: bool = False
    mergeable: bool = False
    guarded: bool = False
    special: bool = False

    @property
    def anonymous(self) -> bool:
        """No file behind it (vma_is_anonymous)."""
        return self.file is None and not self.special

    @property
    def shmem(self) -> bool:
        """Memory of shmem, shared or private (vma_is_shmem)."""
        return self.file is not None and self.file.kind == "shmem"

    @property
    def hugetlb(self) -> bool:
        """Memory of hugetlb, shared or private (is_vm_hugetlb_page)."""
        return self.file is not None and self.file.kind == "hugetlb"

    @property
    def page_size(self) -> int:
        """Bytes of one page of this mapping (vma_kernel_pagesize): THP does not count."""
        return HUGE_PAGE if self.hugetlb else PAGE

    def index(self, address: int) -> int:
        """The page of the file that the address maps, as an index of its cache."""
        assert self.file is not None
        return (address - self.start + self.offset) // self.file.page_size

    def beyond_end_of_file(self, address: int) -> bool:
        """The address lies behind the last page of the file."""
        assert self.file is not None
        size = self.file.page_size
        return self.index(address) >= (self.file.size + size - 1) // size

    def mergeable_with(self, other: Vma) -> bool:
        """`other`, which begins where this one ends, may become one VMA with it (can_vma_merge_after)."""
        if self.uffd is not other.uffd or not self.could_share_with(other):
            return False
        if (self.read, self.write, self.execute) != (other.read, other.write, other.execute):
            return False
        mine, theirs = self.anon_vma, other.anon_vma
        if mine is theirs:
            return True
        one = mine or theirs
        return (mine is None or theirs is None) and one is not None and not one.inherited

    def could_share_with(self, other: Vma) -> bool:
        """`other`, which begins where this one ends, may have the same anon_vma (anon_vma_compatible)."""
        if self.special or self.end != other.start or self.file is not other.file:
            return False
        if self.offset + (self.end - self.start) != other.offset:
            return False
        return _properties(self) == _properties(other)

    @property
    def anonymous_pages(self) -> bool:
        """It has, or has had, private pages."""
        return self.anon_vma is not None

    def piece(self, start: int, end: int) -> Vma:
        """A VMA like this one for a part of it."""
        return replace(self, start=start, end=end, offset=self.offset + start - self.start, modes=self.modes)


def _properties(vma: Vma) -> tuple[object, ...]:
    modes = vma.modes
    """Flags of a VMA, without those that mprotect changes."""
    return (
        vma.shared,
        vma.may_write,
        vma.hugepage,
        vma.locked,
        vma.dontfork,
        vma.wipeonfork,
        vma.droppable,
        vma.growsdown,
        vma.mergeable,
        modes.missing,
        modes.wp,
        modes.minor,
    )
