"""`wp-unpopulated`: write protection of anonymous pages that are not there."""

from __future__ import annotations

from conformance.backend import MADV_DONTNEED, Backend, Kind
from conformance.checklist import item
from conformance.setting import PROTECT, WP, Setting, done, load, setting, store
from userfault import abi
from userfault.abi import Message, Pagefault


def marked(backend: Backend) -> Setting:
    """An empty area whose first page has been protected."""
    where = setting(backend, Kind.ANON, WP, abi.UFFD_FEATURE_WP_UNPOPULATED)
    done(where.uffd.writeprotect(where.area.start, where.area.page, PROTECT))
    return where


@item("wp-unpopulated.set", Kind.ANON)
def protecting_an_empty_page_leaves_a_marker(backend: Backend, kind: Kind) -> None:
    process, _, area = marked(backend)
    entry = process.entry(area.start)
    assert entry.uffd_wp
    assert not entry.present


@item("wp-unpopulated.clear", Kind.ANON)
def unprotecting_removes_the_marker(backend: Backend, kind: Kind) -> None:
    process, uffd, area = marked(backend)
    done(uffd.writeprotect(area.start, area.page, 0))
    assert process.entry(area.start) == (False, False, False)


@item("wp-unpopulated.zap", Kind.ANON)
def dontneed_removes_the_marker(backend: Backend, kind: Kind) -> None:
    process, _, area = marked(backend)
    assert process.main.madvise(area.start, area.page, MADV_DONTNEED).result() == 0
    assert process.entry(area.start) == (False, False, False)


@item("wp-unpopulated.write", Kind.ANON)
def a_write_fault_that_is_answered_leaves_the_page_unprotected(backend: Backend, kind: Kind) -> None:
    process, uffd, area = marked(backend)
    flags = []

    def answer(message: Message) -> None:
        assert isinstance(message, Pagefault)
        flags.append(message.flags)
        done(uffd.writeprotect(area.start, area.page, 0))

    assert backend.serve(process.thread().store(area.start, 5), uffd, answer).signal is None
    assert flags == [abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP]
    assert not process.entry(area.start).uffd_wp
    store(process, area.start, 6)
    assert load(process, area.start) == 6


@item("wp-unpopulated.read", Kind.ANON)
def reading_through_a_marker_maps_the_page_of_zeros(backend: Backend, kind: Kind) -> None:
    process, _, area = marked(backend)
    assert load(process, area.start) == 0
    entry = process.entry(area.start)
    assert entry.present
    assert entry.uffd_wp
    zero = process.scan(
        area.start, area.start + area.page, any_of=abi.PAGE_IS_PFNZERO, report=abi.PAGE_IS_PFNZERO
    )
    assert [(region.start, region.end) for region in zero] == [(area.start, area.start + area.page)]
