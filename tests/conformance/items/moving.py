"""`move`: pages that change their address."""

from __future__ import annotations

from conformance.backend import (
    HUGE,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    Area,
    Backend,
    Kind,
    Process,
    Unavailable,
)
from conformance.checklist import item
from conformance.setting import MISSING, done, fault, load, page_at, store
from userfault import abi
from userfault.abi import Message, Pagefault

HUGE_PAGES = 2


def filled(process: Process, area: Area) -> None:
    for n, address in enumerate(area.pages):
        store(process, address, n % 255 + 1)


def move_on_faults(
    backend: Backend, process: Process, source: Area, target: Area, step: int
) -> list[Pagefault]:
    """Reads the target's pages; every fault is answered by moving `step` bytes."""
    uffd = process.userfaultfd(abi.UFFD_FEATURE_MOVE)
    done(uffd.register(target.start, target.length, MISSING))
    toucher = process.thread()
    faults: list[Pagefault] = []

    def answer(message: Message) -> None:
        faults.append(fault(message))
        offset = (page_at(target, faults[-1].address) - target.start) // step * step
        assert uffd.move(target.start + offset, source.start + offset, step) == (step, 0)

    for n, address in enumerate(target.pages):
        access = backend.serve(toucher.load(address), uffd, answer)
        assert (access.signal, access.value) == (None, n % 255 + 1)
    return faults


@item("move.page", Kind.ANON)
def every_missing_page_is_served_by_a_move(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    source, target = process.area(kind, 16), process.area(kind, 16)
    filled(process, source)
    move_on_faults(backend, process, source, target, target.page)


@item("move.source-empty", Kind.ANON)
def the_source_is_empty_afterwards(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    source, target = process.area(kind, 16), process.area(kind, 16)
    filled(process, source)
    move_on_faults(backend, process, source, target, target.page)
    assert [load(process, address) for address in source.pages] == [0] * 16


@item("move.fault-stats", Kind.ANON)
def there_are_as_many_plain_faults_as_pages(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    source, target = process.area(kind, 16), process.area(kind, 16)
    filled(process, source)
    faults = move_on_faults(backend, process, source, target, target.page)
    assert [(f.flags, f.address) for f in faults] == [(0, address) for address in target.pages]


def huge_move(backend: Backend, advice_of_target: int) -> tuple[Process, Area, Area]:
    process = backend.process()
    small = HUGE_PAGES * HUGE // 4096
    source, target = process.area(Kind.THP, small), process.area(Kind.THP, small)
    assert process.main.madvise(source.start, source.length, MADV_HUGEPAGE).result() == 0
    assert process.main.madvise(target.start, target.length, advice_of_target).result() == 0
    filled(process, source)
    if not mapped_huge(process, source):
        raise Unavailable("the kernel gave no transparent huge pages for the source")
    faults = move_on_faults(backend, process, source, target, HUGE)
    assert [f.address for f in faults] == list(range(target.start, target.end, HUGE))
    assert all(f.flags == 0 for f in faults)
    assert [load(process, address) for address in range(source.start, source.end, HUGE)] == [0] * HUGE_PAGES
    return process, source, target


def mapped_huge(process: Process, area: Area) -> bool:
    """All of the area is mapped by huge entries."""
    regions = process.scan(area.start, area.end, any_of=abi.PAGE_IS_HUGE, report=abi.PAGE_IS_HUGE)
    return sum(region.end - region.start for region in regions) == area.length


@item("move-pmd", Kind.THP)
def a_huge_page_travels_whole(backend: Backend, kind: Kind) -> None:
    process, _, target = huge_move(backend, MADV_HUGEPAGE)
    assert mapped_huge(process, target)


@item("move-pmd-split", Kind.THP)
def a_huge_page_arrives_where_no_huge_pages_are_wanted(backend: Backend, kind: Kind) -> None:
    # Meant to force a split. Linux 6.18 still moves the entry whole if the target's page table is empty; what
    # must hold either way is the content, and huge_move has compared it.
    huge_move(backend, MADV_NOHUGEPAGE)
