"""`api`: UFFDIO_API, by the system call and by the device."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from conformance.backend import Backend, Kind, Virgin
from conformance.checklist import item
from userfault import abi


def virgins(backend: Backend) -> Iterator[Virgin]:
    yield backend.virgin("syscall")
    yield backend.virgin("device")


@item("api.version")
def another_api_number_is_refused(backend: Backend, kind: Kind) -> None:
    for virgin in virgins(backend):
        assert virgin.handshake(0xAB, 0) == (errno.EINVAL, 0, 0)


@item("api.unknown-feature")
def an_unknown_feature_is_refused(backend: Backend, kind: Kind) -> None:
    for virgin in virgins(backend):
        assert virgin.handshake(abi.UFFD_API, 1 << 63) == (errno.EINVAL, 0, 0)


@item("api.retry")
def after_a_refusal_the_same_descriptor_accepts_a_right_handshake(backend: Backend, kind: Kind) -> None:
    for virgin in virgins(backend):
        assert virgin.handshake(0xAB, 0)[0] == errno.EINVAL
        assert virgin.handshake(abi.UFFD_API, 1 << 63)[0] == errno.EINVAL
        refusal, features, ioctls = virgin.handshake(abi.UFFD_API, 0)
        assert refusal == 0
        assert features & abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
        assert ioctls == 1 << abi._UFFDIO_API | 1 << abi._UFFDIO_REGISTER | 1 << abi._UFFDIO_UNREGISTER


@item("api.once")
def a_second_handshake_is_refused(backend: Backend, kind: Kind) -> None:
    for virgin in virgins(backend):
        assert virgin.handshake(abi.UFFD_API, 0)[0] == 0
        assert virgin.handshake(abi.UFFD_API, 1) == (errno.EINVAL, 0, 0)
