"""`sigbus`: faults that raise a signal in the touching thread instead of a message."""

from __future__ import annotations

from conformance.backend import ALL, Backend, Cure, Kind, Process, Userfaultfd
from conformance.checklist import item
from conformance.setting import MISSING, WP, Setting, content, done, load, setting
from userfault import abi
from userfault.abi import Fork

COPY_WP = abi.UFFDIO_COPY_MODE_WP


def forked(backend: Backend, where: Setting, features: int) -> tuple[Process, Userfaultfd]:
    running = where.process.thread().fork()
    [message] = backend.messages(where.uffd)
    assert isinstance(message, Fork)
    child = running.result()
    return child, child.adopt(message.ufd, features)


@item("sigbus.self", *ALL)
def the_signal_handler_fills_the_page_and_the_access_succeeds(backend: Backend, kind: Kind) -> None:
    process, uffd, area = setting(backend, kind, MISSING, abi.UFFD_FEATURE_SIGBUS)
    for n, address in enumerate(area.pages):
        assert process.main.load(address).result().signal == "SIGBUS"
        cure = Cure(uffd, address, area.page, content(area, n + 1))
        assert process.main.load(address, cure).result() == (None, n + 1, 1)
    assert backend.quiet(uffd)


@item("sigbus.child", *ALL)
def a_forked_child_gets_the_signal_and_the_monitor_no_fault(backend: Backend, kind: Kind) -> None:
    features = abi.UFFD_FEATURE_SIGBUS | abi.UFFD_FEATURE_EVENT_FORK
    where = setting(backend, kind, MISSING, features)
    child, child_uffd = forked(backend, where, features)
    for address in where.area.pages:
        assert child.main.load(address).result().signal == "SIGBUS"
    assert backend.quiet(where.uffd)
    assert backend.quiet(child_uffd)


@item("sigbus-wp", *ALL)
def a_protected_page_raises_a_second_signal_on_write(backend: Backend, kind: Kind) -> None:
    features = abi.UFFD_FEATURE_SIGBUS | abi.UFFD_FEATURE_EVENT_FORK
    where = setting(backend, kind, MISSING | WP, features)
    process, uffd, area = where
    for n, address in enumerate(area.pages):
        fill = Cure(uffd, address, area.page, content(area, n + 1), COPY_WP)
        assert process.main.load(address, fill).result() == (None, n + 1, 1)
        assert process.main.store(address, 99).result().signal == "SIGBUS"
        release = Cure(uffd, address, area.page, None)
        assert process.main.store(address, 99, release).result() == (None, 0, 1)
        assert load(process, address) == 99
    done(uffd.writeprotect(area.start, area.length, abi.UFFDIO_WRITEPROTECT_MODE_WP))
    child, child_uffd = forked(backend, where, features)
    for address in area.pages:
        assert child.main.store(address, 1).result().signal == "SIGBUS"
    assert backend.quiet(uffd)
    assert backend.quiet(child_uffd)
