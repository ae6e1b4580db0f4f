"""`events`: what fork, mremap and madvise tell the monitor."""

from __future__ import annotations

from typing import NamedTuple

from conformance.backend import ALL, MADV_DONTNEED, MADV_REMOVE, Area, Backend, Kind, Process, Userfaultfd
from conformance.checklist import item
from conformance.setting import MISSING, WP, content, done, fault, load, page_at, setting
from userfault import abi
from userfault.abi import Fork, Message, Pagefault, Remap, Remove

EVENTS = abi.UFFD_FEATURE_EVENT_FORK | abi.UFFD_FEATURE_EVENT_REMAP | abi.UFFD_FEATURE_EVENT_REMOVE


class Child(NamedTuple):
    """A forked process under the userfaultfd that came with the event."""

    process: Process
    uffd: Userfaultfd
    area: Area


class Monitor:
    """Serves one userfaultfd: fills missing pages, releases protected ones, follows mremap and madvise."""

    def __init__(self, uffd: Userfaultfd, area: Area, *, protect: bool) -> None:
        self.uffd = uffd
        self.area = area
        self.protect = protect
        self.missing: list[int] = []
        self.written: list[int] = []
        self.events: list[Message] = []

    def answer(self, message: Message) -> None:
        if isinstance(message, Pagefault):
            page = page_at(self.area, message.address)
            if fault(message).flags & abi.UFFD_PAGEFAULT_FLAG_WP:
                self.written.append(page)
                done(self.uffd.writeprotect(page, self.area.page, 0))
            else:
                self.missing.append(page)
                value = (page - self.area.start) // self.area.page + 1
                mode = abi.UFFDIO_COPY_MODE_WP if self.protect else 0
                done(self.uffd.copy(page, content(self.area, value), mode=mode))
            return
        self.events.append(message)
        if isinstance(message, Remap):
            assert message.from_ == self.area.start
            self.area = self.area._replace(start=message.to, alias=None)
        elif isinstance(message, Remove):
            done(self.uffd.unregister(message.start, message.end - message.start))


def child_of(backend: Backend, kind: Kind, *, protect: bool) -> Child:
    """Forks a process with empty registered memory. The monitor goes on with the child's userfaultfd."""
    where = setting(backend, kind, MISSING | WP if protect else MISSING, EVENTS)
    running = where.process.thread().fork()
    [message] = backend.messages(where.uffd)
    assert isinstance(message, Fork)
    child = running.result()
    return Child(child, child.adopt(message.ufd, EVENTS), where.area)


def touch(backend: Backend, child: Child, monitor: Monitor, addresses: range, *, write: bool) -> None:
    """The child reads (and writes) pages; content is what the monitor filled in."""
    toucher = child.process.main
    for address in addresses:
        value = (address - monitor.area.start) // monitor.area.page + 1
        access = backend.serve(toucher.load(address), child.uffd, monitor.answer)
        assert (access.signal, access.value) == (None, value)
        if write:
            stored = backend.serve(toucher.store(address, value), child.uffd, monitor.answer)
            assert stored.signal is None


def whole_life(backend: Backend, kind: Kind, *, protect: bool) -> tuple[Monitor, Area]:
    """A forked child touches its memory, moves it, touches the rest, and gives it back."""
    child = child_of(backend, kind, protect=protect)
    process, uffd, area = child
    monitor = Monitor(uffd, area, protect=protect)
    half = area.pages[: len(area.pages) // 2]
    touch(backend, child, monitor, half, write=protect)
    # mremap: the bookkeeping moves with the memory, filled pages keep their content.
    to = process.room(area.length, area.page)
    moved = backend.serve(process.main.mremap(area.start, area.length, to), uffd, monitor.answer)
    assert moved == 0
    assert monitor.area.start == to
    touch(backend, child, monitor, monitor.area.pages, write=protect)
    # madvise: the monitor lets go of the range, which reads as zeros.
    advice = MADV_REMOVE if kind.shared else MADV_DONTNEED
    gone = backend.serve(process.main.madvise(to, area.length, advice), uffd, monitor.answer)
    assert gone == 0
    assert [load(process, address) for address in monitor.area.pages] == [0] * len(area.pages)
    return monitor, area


@item("events.fork", *ALL)
def the_childs_faults_arrive_at_the_userfaultfd_of_the_event(backend: Backend, kind: Kind) -> None:
    child = child_of(backend, kind, protect=False)
    monitor = Monitor(child.uffd, child.area, protect=False)
    touch(backend, child, monitor, child.area.pages, write=False)
    assert monitor.missing == list(child.area.pages)


@item("events.remap", *ALL)
def mremap_tells_where_the_memory_went(backend: Backend, kind: Kind) -> None:
    monitor, area = whole_life(backend, kind, protect=False)
    assert monitor.events[0] == Remap(area.start, monitor.area.start, area.length)


@item("events.remove", *ALL)
def madvise_tells_what_is_gone(backend: Backend, kind: Kind) -> None:
    monitor, _ = whole_life(backend, kind, protect=False)
    assert monitor.events[-1] == Remove(monitor.area.start, monitor.area.end)


@item("events.count", *ALL)
def every_page_is_asked_for_once(backend: Backend, kind: Kind) -> None:
    monitor, area = whole_life(backend, kind, protect=False)
    half = len(area.pages) // 2
    assert monitor.missing == list(area.pages[:half]) + list(monitor.area.pages[half:])
    assert monitor.written == []


@item("events-wp", *ALL)
def the_same_holds_with_write_protect_faults_on_top(backend: Backend, kind: Kind) -> None:
    monitor, area = whole_life(backend, kind, protect=True)
    half = len(area.pages) // 2
    assert monitor.missing == list(area.pages[:half]) + list(monitor.area.pages[half:])
    assert monitor.written == monitor.missing
    assert monitor.events == [
        Remap(area.start, monitor.area.start, area.length),
        Remove(monitor.area.start, monitor.area.end),
    ]
