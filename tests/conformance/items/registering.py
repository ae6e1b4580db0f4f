"""`register-ioctls`: which modes a kind of memory takes, and which ioctls it is offered."""

from __future__ import annotations

import errno

from conformance.backend import ALL, Backend, Kind
from conformance.checklist import item
from conformance.setting import MINOR, MISSING, WP, pages_of
from userfault import abi


@item("register-ioctls.no-mode", *ALL)
def no_mode_is_refused(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, pages_of(kind))
    assert process.userfaultfd().register(area.start, area.length, 0) == (0, errno.EINVAL)


@item("register-ioctls.anon-minor", Kind.ANON)
def anonymous_memory_has_no_minor_faults(backend: Backend, kind: Kind) -> None:
    process = backend.process()
    area = process.area(kind, pages_of(kind))
    uffd = process.userfaultfd()
    for mode in (MINOR, MINOR | MISSING, MINOR | WP, MINOR | MISSING | WP):
        assert uffd.register(area.start, area.length, mode) == (0, errno.EINVAL)


@item("register-ioctls.mask", *ALL)
def the_mask_of_ioctls_follows_the_modes(backend: Backend, kind: Kind) -> None:
    for mode in range(1, 8):
        if kind is Kind.ANON and mode & MINOR:
            continue
        process = backend.process()
        area = process.area(kind, pages_of(kind))
        uffd = process.userfaultfd()
        mask, refusal = uffd.register(area.start, area.length, mode)
        assert refusal == 0
        assert mask & 1 << abi._UFFDIO_WAKE
        if mode & MISSING:
            assert mask & 1 << abi._UFFDIO_COPY
        assert bool(mask & 1 << abi._UFFDIO_WRITEPROTECT) == bool(mode & WP)
        assert bool(mask & 1 << abi._UFFDIO_CONTINUE) == bool(mode & MINOR)
        assert uffd.unregister(area.start, area.length) == (area.length, 0)
