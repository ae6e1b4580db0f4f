"""Files and their page cache: shmem (memfd, tmpfs, shared anonymous memory), hugetlb, and everything else.

A file is named by its kind, because userfaultfd's rules are:

    shmem       may be registered with all modes; a page may be in swap (the cache then holds a SwapSlot)
    hugetlb     may be registered with all modes; pages of 2 MiB from a pool that can run out
    sysv        System V shared memory: shmem behind other operations, so not registrable (vma_is_shmem
                says no)
    ordinary    a file on disk, secretmem and the like: only WP_ASYNC tracking
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.content import ZERO, Content
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.page import Page, SwapSlot

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel


class File:
    """An inode with its page cache. Pages are found by index: offset // page_size."""

    __slots__ = ("charged", "huge_folios", "kernel", "kind", "name", "page_limit", "pages", "seals", "size")

    def __init__(self, kernel: Kernel, kind: str, size: int, name: str = "") -> None:
        self.kernel = kernel
        self.kind = kind
        self.name = name
        self.size = size
        self.pages: dict[int, Page | SwapSlot] = {}
        self.huge_folios: set[int] = set()  # first indexes of 2 MiB folios that MADV_COLLAPSE made
        self.charged = 0  # pages accounted to this file; always len(pages) when nothing runs
        self.page_limit: int | None = None  # a tmpfs of limited size
        self.seals: frozenset[str] = frozenset()
        kernel.files.append(self)

    @property
    def page_size(self) -> int:
        """Bytes of one page of the cache."""
        return HUGE_PAGE if self.kind == "hugetlb" else PAGE

    def cached(self, index: int) -> bool:
        """The cache holds the page, in memory or in swap."""
        return index in self.pages

    def page(self, index: int) -> Page | None:
        """The cached page, brought in from swap if need be; None: a hole."""
        found = self.pages.get(index)
        if type(found) is SwapSlot:
            page = Page(found.content, self.page_size, self)
            self.pages[index] = page
            return page
        if found is not None:
            found.uptodate = True
        return found

    def part(self, index: int) -> Content:
        """What the cached page holds: all of it, or its part of a huge folio."""
        found = self.pages[index]
        if type(found) is Page and found.size != self.page_size:
            return found.content.part(index * PAGE % HUGE_PAGE, PAGE)
        return found.content

    def split_folio(self, index: int) -> None:
        """Make small pages of the huge folio around the index, if there is one; it leaves every mapping."""
        first = index // 512 * 512
        if first not in self.huge_folios:
            return
        from userfault.model.zap import unmap_file

        unmap_file(self, first * PAGE, first * PAGE + HUGE_PAGE, private_too=False)
        self.huge_folios.discard(first)
        for at in range(first, first + 512):
            self.pages[at] = Page(self.pages[at].content.part(at * PAGE % HUGE_PAGE, PAGE), PAGE, self)

    def add(self, index: int, content: Content = ZERO) -> Page | None:
        """A new page for a hole, charged to the file; None: the pool or the file's limit is used up."""
        if not self.charge():
            return None
        page = Page(content, self.page_size, self)
        self.pages[index] = page
        return page

    def allocate(self, index: int) -> bool:
        """fallocate(2) of one page: it is in the cache, but holds no data yet (hazards C8)."""
        if index in self.pages:
            return True
        page = self.add(index)
        if page is not None and self.kind == "shmem":
            page.uptodate = False
        return page is not None

    def holds_data(self, index: int) -> bool:
        """What lseek(SEEK_DATA) says about the page."""
        found = self.pages.get(index)
        return found is not None and (type(found) is SwapSlot or found.uptodate)

    def charge(self) -> bool:
        """Account one page to the file before it is there."""
        if self.page_limit is not None and self.charged >= self.page_limit:
            return False
        if self.kind == "hugetlb" and not self.kernel.hugetlb.take():
            return False
        self.charged += 1
        return True

    def uncharge(self) -> None:
        """Give one accounted page back."""
        self.charged -= 1
        if self.kind == "hugetlb":
            self.kernel.hugetlb.give_back()

    def drop(self, index: int) -> None:
        """Remove a page from the cache (punch, truncate). A page that somebody still holds is not freed."""
        found = self.pages.pop(index)
        if type(found) is Page and found.held and self.kind == "hugetlb":
            self.charged -= 1  # leaked: the pool does not get it back
            return
        self.uncharge()

    def read(self, offset: int, length: int) -> bytes:
        """pread(2): holes read as zeros and stay holes; ends at the end of the file."""
        length = max(0, min(length, self.size - offset))
        data = bytearray()
        while length:
            index, inside = divmod(offset, self.page_size)
            piece = min(length, self.page_size - inside)
            data += self.part(index).read(inside, piece) if index in self.pages else bytes(piece)
            offset, length = offset + piece, length - piece
        return bytes(data)

    def write(self, offset: int, data: bytes) -> int:
        """pwrite(2) through the page cache; extends the file. No mapping is told (P8). Returns bytes
        written."""
        done = 0
        while done < len(data):
            index, inside = divmod(offset + done, self.page_size)
            piece = data[done : done + self.page_size - inside]
            page = self.page(index) or self.add(index)
            if page is None:
                break
            at = (index * self.page_size + inside) % page.size
            page.content = page.content.write(at, piece, page.size)
            done += len(piece)
        self.size = max(self.size, offset + done)
        return done

    def __repr__(self) -> str:
        return f"File({self.kind}, {self.name or 'unnamed'}, {self.size} bytes)"


class HugetlbPool:
    """The machine's reserve of 2 MiB pages (nr_hugepages)."""

    __slots__ = ("free",)

    def __init__(self, pages: int) -> None:
        self.free = pages

    def take(self) -> bool:
        """Take one page; False: the pool is empty."""
        if self.free == 0:
            return False
        self.free -= 1
        return True

    def give_back(self) -> None:
        """Return one page to the pool."""
        self.free += 1
