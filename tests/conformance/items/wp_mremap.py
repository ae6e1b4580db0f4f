"""`wp-mremap`: write protection does not follow memory that moves without EVENT_REMAP."""

from __future__ import annotations

from conformance.backend import (
    HUGE,
    MADV_COLLAPSE,
    MADV_HUGEPAGE,
    Backend,
    Kind,
    Unavailable,
)
from conformance.checklist import item
from conformance.items.moving import mapped_huge
from conformance.setting import PROTECT, WP, Setting, done, store


def fresh(backend: Backend, kind: Kind, pages: int, *, huge: bool = False) -> Setting:
    """Filled memory that is registered and protected; `huge`: mapped by huge entries."""
    process = backend.process()
    area = process.area(kind, pages)
    if huge and not kind.shared:
        assert process.main.madvise(area.start, area.length, MADV_HUGEPAGE).result() == 0
    for address in area.pages:
        store(process, address, 7)
    if huge and kind.shared and process.main.madvise(area.start, area.length, MADV_COLLAPSE).result():
        raise Unavailable("the kernel would not collapse shared memory into huge pages")
    if huge and not mapped_huge(process, area):
        raise Unavailable("the kernel gave no transparent huge pages")
    uffd = process.userfaultfd()
    done(uffd.register(area.start, area.length, WP))
    done(uffd.writeprotect(area.start, area.length, PROTECT))
    assert all(process.entry(address).uffd_wp for address in area.pages)
    return Setting(process, uffd, area)


def moved_unprotected(where: Setting) -> None:
    process, _, area = where
    to = process.room(area.length, max(area.page, HUGE))
    assert process.main.mremap(area.start, area.length, to).result() == 0
    for offset in range(0, area.length, area.page):
        assert not process.entry(to + offset).uffd_wp
        # Nobody is asked: the new place is not registered.
        store(process, to + offset, 8)


def paged_out(backend: Backend, where: Setting) -> None:
    """Unmaps the pages; their protection must survive that."""
    process, _, area = where
    if not area.kind.shared and not backend.swap:
        raise Unavailable("this machine has no swap to page private memory out to: swapon FILE")
    backend.page_out(process, area.start, area.length)
    for address in area.pages:
        entry = process.entry(address)
        assert entry.uffd_wp
        assert not entry.present


@item("wp-mremap.page", Kind.ANON, Kind.SHMEM)
def a_moved_page_is_unprotected(backend: Backend, kind: Kind) -> None:
    moved_unprotected(fresh(backend, kind, 1))


@item("wp-mremap.page-swapped", Kind.ANON, Kind.SHMEM)
def a_moved_page_that_was_paged_out_is_unprotected(backend: Backend, kind: Kind) -> None:
    where = fresh(backend, kind, 1)
    paged_out(backend, where)
    moved_unprotected(where)


@item("wp-mremap.thp", Kind.THP, Kind.SHMEM)
def a_moved_huge_page_is_unprotected(backend: Backend, kind: Kind) -> None:
    moved_unprotected(fresh(backend, kind, HUGE // 4096, huge=True))


@item("wp-mremap.thp-smaller", Kind.THP, Kind.SHMEM)
def a_moved_folio_of_any_size_is_unprotected(backend: Backend, kind: Kind) -> None:
    sizes = backend.folio_sizes(kind)
    if not sizes:
        raise Unavailable("this kernel has no folios between a page and 2 MiB")
    for size in sizes:
        process = backend.process()
        # Not longer than the folio, or the kernel would rather give one of 2 MiB.
        area = process.area(kind, size // 4096)
        with backend.folios(kind, size):
            assert process.main.madvise(area.start, area.length, MADV_HUGEPAGE).result() == 0
            store(process, area.start, 7)
        if not all(process.entry(address).present for address in area.pages):
            # One touch maps a whole folio.
            raise Unavailable(f"the kernel gave no folio of {size >> 10} KiB")
        uffd = process.userfaultfd()
        done(uffd.register(area.start, area.length, WP))
        done(uffd.writeprotect(area.start, area.length, PROTECT))
        assert all(process.entry(address).uffd_wp for address in area.pages)
        moved_unprotected(Setting(process, uffd, area))


@item("wp-mremap.thp-swapped", Kind.THP, Kind.SHMEM)
def a_moved_huge_page_that_was_paged_out_is_unprotected(backend: Backend, kind: Kind) -> None:
    where = fresh(backend, kind, HUGE // 4096, huge=True)
    paged_out(backend, where)
    moved_unprotected(where)


@item("wp-mremap.hugetlb", Kind.HUGETLB, Kind.HUGETLB_PRIVATE)
def a_moved_hugetlb_page_is_unprotected(backend: Backend, kind: Kind) -> None:
    moved_unprotected(fresh(backend, kind, 2))


@item("wp-mremap.pageout", Kind.ANON, Kind.SHMEM)
def the_protection_survives_paging_out(backend: Backend, kind: Kind) -> None:
    paged_out(backend, fresh(backend, kind, 4))
