"""`mmap-changing`: while an event is unread, nothing is filled."""

from __future__ import annotations

import ctypes
import errno

from conformance.backend import MADV_REMOVE, Backend, Kind, Running
from conformance.checklist import item
from conformance.setting import MISSING, Setting, content, done, setting
from userfault import abi
from userfault.abi import Remove

FILLS: list[tuple[int, type[ctypes.Structure], str]] = [
    (abi.UFFDIO_COPY, abi.uffdio_copy, "copy"),
    (abi.UFFDIO_ZEROPAGE, abi.uffdio_zeropage, "zeropage"),
    (abi.UFFDIO_MOVE, abi.uffdio_move, "move"),
    (abi.UFFDIO_POISON, abi.uffdio_poison, "updated"),
    (abi.UFFDIO_CONTINUE, abi.uffdio_continue, "mapped"),
]


def removing(backend: Backend) -> tuple[Setting, Running[int]]:
    """A thread inside MADV_REMOVE of a filled page, its event unread."""
    # With MOVE, so that a kernel which lacks one of the five fills is not asked for it.
    features = abi.UFFD_FEATURE_EVENT_REMOVE | abi.UFFD_FEATURE_MOVE
    where = setting(backend, Kind.SHMEM, MISSING, features)
    process, uffd, area = where
    done(uffd.copy(area.start, content(area, 1)))
    thread = process.thread()
    running = thread.madvise(area.start, area.page, MADV_REMOVE)
    assert thread.sleeps_uninterruptibly()
    return where, running


@item("mmap-changing.state", Kind.SHMEM)
def who_removes_pages_sleeps_until_the_event_is_read(backend: Backend, kind: Kind) -> None:
    _, running = removing(backend)
    assert not running.finished()


@item("mmap-changing.fills", Kind.SHMEM)
def every_fill_is_refused_before_its_arguments_are_looked_at(backend: Backend, kind: Kind) -> None:
    (_, uffd, _), _ = removing(backend)
    for request, struct, _ in FILLS:
        assert backend.ioctl(uffd, request, struct()) == errno.EAGAIN


@item("mmap-changing.field", Kind.SHMEM)
def every_refused_fill_says_so_in_its_result_field(backend: Backend, kind: Kind) -> None:
    (_, uffd, _), _ = removing(backend)
    for request, struct, field in FILLS:
        argument = struct()
        backend.ioctl(uffd, request, argument)
        assert getattr(argument, field) == -errno.EAGAIN


@item("mmap-changing.release", Kind.SHMEM)
def reading_the_event_lets_the_thread_go_on(backend: Backend, kind: Kind) -> None:
    (process, uffd, area), running = removing(backend)
    assert backend.messages(uffd) == [Remove(area.start, area.start + area.page)]
    assert running.result() == 0
    done(uffd.copy(area.start, content(area, 2)))
    assert process.main.load(area.start).result().value == 2
