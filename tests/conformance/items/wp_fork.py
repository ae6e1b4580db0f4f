"""`wp-fork`: write protection in the child of a fork, without and with the event."""

from __future__ import annotations

from conformance.backend import ALL, MADV_DONTNEED, Backend, Kind, Process, Unavailable
from conformance.checklist import item
from conformance.setting import PROTECT, WP, Setting, done, setting, store
from userfault import abi
from userfault.abi import Fork


def protected(backend: Backend, kind: Kind, features: int = 0) -> Setting:
    found = setting(backend, kind, WP, features, filled=True)
    _, uffd, area = found
    done(uffd.writeprotect(area.start, area.length, PROTECT))
    assert found.process.entry(area.start).uffd_wp
    return found


def unmap_first_page(backend: Backend, where: Setting) -> None:
    """Leaves a marker (shared) or a swap entry (private) where the page was."""
    process, _, area = where
    if area.kind.shared:
        assert process.main.madvise(area.start, area.page, MADV_DONTNEED).result() == 0
    elif area.kind.hugetlb:
        raise Unavailable("private hugetlb pages cannot be paged out")
    elif not backend.swap:
        raise Unavailable("this machine has no swap to page private memory out to: swapon FILE")
    else:
        backend.page_out(process, area.start, area.page)
    entry = process.entry(area.start)
    assert entry.uffd_wp
    assert not entry.present


def fork_with_event(backend: Backend, where: Setting, features: int) -> Process:
    """Forks; the event is read, and its userfaultfd is kept for the child."""
    running = where.process.thread().fork()
    [message] = backend.messages(where.uffd)
    assert isinstance(message, Fork)
    child = running.result()
    child.adopt(message.ufd, features)
    return child


@item("wp-fork.present", *ALL)
def without_the_event_the_child_is_unprotected(backend: Backend, kind: Kind) -> None:
    process, _, area = protected(backend, kind)
    child = process.main.fork().result()
    assert not child.entry(area.start).uffd_wp
    assert process.entry(area.start).uffd_wp


@item("wp-fork.nonpresent", *ALL)
def without_the_event_an_unmapped_page_is_unprotected_too(backend: Backend, kind: Kind) -> None:
    where = protected(backend, kind)
    unmap_first_page(backend, where)
    child = where.process.main.fork().result()
    assert not child.entry(where.area.start).uffd_wp
    assert where.process.entry(where.area.start).uffd_wp


@item("wp-fork.unprotect", *ALL)
def unprotecting_clears_an_unmapped_page_and_a_write_passes(backend: Backend, kind: Kind) -> None:
    where = protected(backend, kind)
    process, uffd, area = where
    unmap_first_page(backend, where)
    done(uffd.writeprotect(area.start, area.page, 0))
    assert not process.entry(area.start).uffd_wp
    store(process, area.start, 77)
    assert not process.entry(area.start).uffd_wp


@item("wp-fork-with-event", *ALL)
def with_the_event_the_protection_persists_in_the_child(backend: Backend, kind: Kind) -> None:
    features = abi.UFFD_FEATURE_EVENT_FORK | abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    where = protected(backend, kind, features)
    area = where.area
    child = fork_with_event(backend, where, features)
    assert child.entry(area.start).uffd_wp
    assert where.process.entry(area.start).uffd_wp


@item("wp-fork-with-event.nonpresent", *ALL)
def with_the_event_a_marker_or_swap_entry_persists_too(backend: Backend, kind: Kind) -> None:
    features = abi.UFFD_FEATURE_EVENT_FORK | abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    where = protected(backend, kind, features)
    unmap_first_page(backend, where)
    child = fork_with_event(backend, where, features)
    assert child.entry(where.area.start).uffd_wp


GUP = "needs the kernel's GUP test driver (CONFIG_GUP_TEST), which this suite does not drive"


@item("wp-fork-pin.early-cow", *ALL)
def a_pinned_page_is_copied_unprotected(backend: Backend, kind: Kind) -> None:
    raise Unavailable(GUP)


@item("wp-fork-pin.unshare", *ALL)
def a_page_pinned_in_the_child_loses_the_protection(backend: Backend, kind: Kind) -> None:
    raise Unavailable(GUP)


@item("wp-fork-pin-with-event", *ALL)
def with_the_event_a_pinned_page_keeps_the_protection(backend: Backend, kind: Kind) -> None:
    raise Unavailable(GUP)
