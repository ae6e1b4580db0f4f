"""Other memory tests of the kernel that use userfaultfd."""

from __future__ import annotations

from conformance.backend import (
    HUGE,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_UNMERGEABLE,
    PROT_READ,
    PROT_WRITE,
    Backend,
    Kind,
    Unavailable,
)
from conformance.checklist import item
from conformance.setting import MISSING, PROTECT, WP, content, done, fault, load, setting, store
from userfault import abi

RESET = abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC


@item("pagemap_ioctl", Kind.ANON, Kind.THP, Kind.HUGETLB, Kind.SHMEM, Kind.FILE)
def a_scan_tells_exactly_what_was_written_since_the_last(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, HUGE // 4096 if kind is Kind.THP else 8)
    if kind is Kind.THP:
        assert process.main.madvise(area.start, area.length, MADV_HUGEPAGE).result() == 0
    for address in area.pages:
        store(process, address, 1)
    uffd = process.userfaultfd(abi.UFFD_FEATURE_WP_ASYNC)
    done(uffd.register(area.start, area.length, WP))

    def written(flags: int) -> list[int]:
        regions = process.scan(
            area.start, area.end, flags=flags, any_of=abi.PAGE_IS_WRITTEN, report=abi.PAGE_IS_WRITTEN
        )
        return [at for region in regions for at in range(region.start, region.end, area.page)]

    # Nothing is protected yet, so every page counts as written; the scan protects what it reports.
    assert written(RESET) == list(area.pages)
    assert written(0) == []
    chosen = [area.pages[n] for n in (1, 2, 5, 7)]
    for address in chosen:
        assert process.main.store(address, 2).result().signal is None
    for address in area.pages[:3]:
        load(process, address)
    assert written(0) == chosen, "reading is not writing, and a plain scan changes nothing"
    assert written(RESET) == chosen
    assert written(RESET) == []
    assert backend.quiet(uffd)


@item("hugepage-mremap", Kind.HUGETLB)
def registered_hugetlb_memory_moves_with_its_content(backend: Backend, kind: Kind) -> None:
    process, _, area = setting(backend, kind, WP, filled=True)
    to = process.room(area.length, area.page)
    assert process.main.mremap(area.start, area.length, to).result() == 0
    for n, offset in enumerate(range(0, area.length, area.page)):
        assert load(process, to + offset) == n + 1


@item("guard-regions", Kind.ANON)
def a_guard_page_raises_sigsegv_and_no_message(backend: Backend, kind: Kind) -> None:
    process, uffd, area = setting(backend, kind, MISSING)
    guarded = area.pages[3]
    if process.main.madvise(guarded, area.page, MADV_GUARD_INSTALL).result():
        raise Unavailable("this kernel has no guard pages (Linux 6.13)")
    assert process.main.load(guarded).result().signal == "SIGSEGV"
    assert process.main.store(guarded, 1).result().signal == "SIGSEGV"
    assert backend.quiet(uffd)
    assert process.main.madvise(guarded, area.page, MADV_GUARD_REMOVE).result() == 0
    running = process.thread().load(guarded)
    [message] = backend.messages(uffd)
    assert fault(message).address == guarded
    done(uffd.copy(guarded, content(area, 6)))
    assert running.result().value == 6


@item("ksm_functional_tests", Kind.ANON)
def merged_pages_come_apart_under_write_protection(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, 64)
    process.main.write(area.start, b"\x5a" * area.length).result()
    with backend.merging():
        assert process.main.madvise(area.start, area.length, MADV_MERGEABLE).result() == 0
        if not backend.merged(process, area):
            raise Unavailable("the kernel merged no page in time")
        uffd = process.userfaultfd()
        done(uffd.register(area.start, area.length, WP))
        done(uffd.writeprotect(area.start, area.length, PROTECT))
        # Unmerging breaks the sharing without a message and without losing the content.
        assert process.main.madvise(area.start, area.length, MADV_UNMERGEABLE).result() == 0
        assert not backend.merged(process, area, wait=False)
    assert process.main.read(area.start, area.length).result() == b"\x5a" * area.length
    assert all(process.entry(address).uffd_wp for address in area.pages)
    assert backend.quiet(uffd)


@item("mkdirty", Kind.ANON)
def a_copy_into_read_only_memory_leaves_it_read_only(backend: Backend, kind: Kind) -> None:
    process, uffd, area = setting(backend, kind, MISSING)
    assert process.main.mprotect(area.start, area.length, PROT_READ).result() == 0
    done(uffd.copy(area.start, content(area, 3)))
    assert process.main.store(area.start, 4).result().signal == "SIGSEGV"
    assert load(process, area.start) == 3
    assert process.main.mprotect(area.start, area.length, PROT_READ | PROT_WRITE).result() == 0
    store(process, area.start, 5)
    assert load(process, area.start) == 5


@item("cow", Kind.ANON)
def copy_on_write(backend: Backend, kind: Kind) -> None:
    raise Unavailable("the kernel's test names no assertion about userfaultfd")
