"""A page of physical memory (the kernel's struct folio), wherever it is mapped or cached."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from userfault.model.content import Content
from userfault.model.layout import PAGE

if TYPE_CHECKING:
    from userfault.model.pagecache import File


@final
class Page:
    """One page: what it holds, who caches it, how often it is mapped.

    content    its bytes
    size       bytes: 4 KiB or 2 MiB
    file       the file whose page cache it belongs to; None: anonymous memory
    mapcount   number of page table entries that map it
    exclusive  anonymous and mapped by one process since it was filled (PageAnonExclusive): a write may reuse
               it, MOVE may take it. fork() clears it for good; only a write that copies gets a new one.
    held       references taken by somebody in passing; 0 whenever nothing runs (defect minor_leak)
    zero       the zero page, or the huge zero page: never written, never counted
    lazyfree   MADV_FREE said that it may be dropped
    uptodate   it holds data; a page that fallocate(2) made is cached, but reads as a hole until it is used
    """

    __slots__ = ("content", "exclusive", "file", "held", "lazyfree", "mapcount", "size", "uptodate", "zero")

    def __init__(
        self,
        content: Content,
        size: int = PAGE,
        file: File | None = None,
        *,
        exclusive: bool = False,
        zero: bool = False,
    ) -> None:
        self.content = content
        self.size = size
        self.file = file
        self.exclusive = exclusive
        self.zero = zero
        self.mapcount = 0
        self.held = 0
        self.lazyfree = False
        self.uptodate = True

    @property
    def anonymous(self) -> bool:
        """It belongs to no file (the zero page does not count as anonymous)."""
        return self.file is None and not self.zero

    def __repr__(self) -> str:
        kind = "zero" if self.zero else "anon" if self.file is None else "file"
        return f"Page({kind}, {self.content!r}, mapped {self.mapcount})"


@final
class SwapSlot:
    """A page that was written out to swap. `file`: a page of shmem rather than an anonymous one."""

    __slots__ = ("content", "exclusive", "references")

    def __init__(self, content: Content, *, exclusive: bool = False) -> None:
        self.content = content
        self.exclusive = exclusive
        self.references = 1

    def __repr__(self) -> str:
        return f"SwapSlot({self.content!r})"
