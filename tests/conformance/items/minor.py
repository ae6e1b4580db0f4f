"""`minor`: pages that the page cache holds but that are not mapped."""

from __future__ import annotations

import errno

from conformance.backend import HUGE, MADV_COLLAPSE, Backend, Kind
from conformance.checklist import item
from conformance.setting import MINOR, WP, Setting, done, fault, load, page_at, setting, store
from userfault import abi
from userfault.abi import Message, Pagefault

CACHED = (Kind.SHMEM, Kind.HUGETLB)


def cached(
    backend: Backend, kind: Kind, mode: int = MINOR, features: int = 0, pages: int | None = None
) -> Setting:
    """Registered memory whose pages were filled through the alias: page n holds n + 1 at its start and
    end."""
    where = setting(backend, kind, mode, features, pages=pages)
    for n, address in enumerate(where.area.pages):
        store(where.process, alias_of(where, address), n % 255 + 1)
        store(where.process, alias_of(where, address) + where.area.page - 1, n % 255 + 1)
    return where


def alias_of(where: Setting, address: int) -> int:
    assert where.area.alias is not None
    return address - where.area.start + where.area.alias


def read_all(backend: Backend, where: Setting, mode: int = 0) -> list[Pagefault]:
    """Reads every page; the handler flips the bits of the page's first byte through the alias, then maps
    it."""
    process, uffd, area = where
    toucher = process.thread()
    faults: list[Pagefault] = []

    def answer(message: Message) -> None:
        faults.append(fault(message))
        page = page_at(area, faults[-1].address)
        old = load(process, alias_of(where, page))
        store(process, alias_of(where, page), old ^ 0xFF)
        assert uffd.continue_(page, area.page, mode) == (area.page, 0)

    for n, address in enumerate(area.pages):
        access = backend.serve(toucher.load(address), uffd, answer)
        assert (access.signal, access.value) == (None, (n % 255 + 1) ^ 0xFF)
        assert load(process, address + area.page - 1) == n % 255 + 1
    return faults


def one_minor_fault_a_page(faults: list[Pagefault], where: Setting) -> bool:
    return [(f.flags, page_at(where.area, f.address)) for f in faults] == [
        (abi.UFFD_PAGEFAULT_FLAG_MINOR, address) for address in where.area.pages
    ]


@item("minor.count", *CACHED)
def every_page_raises_one_minor_fault(backend: Backend, kind: Kind) -> None:
    where = cached(backend, kind)
    assert one_minor_fault_a_page(read_all(backend, where), where)


@item("minor.modify", *CACHED)
def the_reader_sees_what_the_handler_changed(backend: Backend, kind: Kind) -> None:
    # read_all compares every byte it loads with what the handler made of it.
    where = cached(backend, kind)
    assert len(read_all(backend, where)) == len(where.area.pages)


def second_continue_is_refused(backend: Backend, where: Setting, mode: int) -> None:
    _, uffd, area = where
    argument = abi.uffdio_continue(abi.uffdio_range(area.start, area.page), mode, 0)
    assert backend.ioctl(uffd, abi.UFFDIO_CONTINUE, argument) == errno.EEXIST
    assert argument.mapped == -errno.EEXIST


@item("minor.repeat", *CACHED)
def a_second_continue_finds_the_page(backend: Backend, kind: Kind) -> None:
    where = cached(backend, kind)
    read_all(backend, where)
    second_continue_is_refused(backend, where, 0)


@item("minor-wp", *CACHED)
def continue_can_map_write_protected(backend: Backend, kind: Kind) -> None:
    # No feature stands for CONTINUE_MODE_WP; WP_UNPOPULATED came with the same kernel, Linux 6.4.
    features = abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | abi.UFFD_FEATURE_WP_UNPOPULATED
    where = cached(backend, kind, MINOR | WP, features)
    mode = abi.UFFDIO_CONTINUE_MODE_WP
    assert one_minor_fault_a_page(read_all(backend, where, mode), where)
    second_continue_is_refused(backend, where, mode)
    process, uffd, area = where
    assert all(process.entry(address).uffd_wp for address in area.pages)
    running = process.thread().store(area.start, 9)
    [message] = backend.messages(uffd)
    assert fault(message).flags == abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP
    done(uffd.writeprotect(area.start, area.page, 0))
    assert running.result().signal is None


@item("minor-collapse", Kind.SHMEM)
def collapsing_maps_huge_pages_with_the_same_content(backend: Backend, kind: Kind) -> None:
    where = cached(backend, kind, pages=HUGE // 4096)
    process, uffd, area = where
    read_all(backend, where)
    assert process.main.madvise(area.start, area.length, MADV_COLLAPSE).result() == 0
    for n, address in enumerate(area.pages):
        assert load(process, address) == (n % 255 + 1) ^ 0xFF
    huge = process.scan(area.start, area.end, any_of=abi.PAGE_IS_HUGE, report=abi.PAGE_IS_HUGE)
    assert [(region.start, region.end) for region in huge] == [(area.start, area.end)]
    assert backend.quiet(uffd)
