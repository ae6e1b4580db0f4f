"""Opening a userfaultfd and the handshake UFFDIO_API.

userfaultfd(2)       needs CAP_SYS_PTRACE, the sysctl, or UFFD_USER_MODE_ONLY [A2]
/dev/userfaultfd     6.1: whoever has a descriptor of the device gets an unrestricted one [A3]
UFFDIO_API           once; answers with what the kernel has, not with what was chosen [A5]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from userfault import abi
from userfault.model import versions
from userfault.model.context import Context
from userfault.model.errnos import EACCES, EFAULT, EINVAL, ENOENT, EPERM, SystemCallError
from userfault.model.process import OpenFile, Process

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel

O_NONBLOCK = 0o4000
O_CLOEXEC = 0o2000000


class ApiReply(NamedTuple):
    """What UFFDIO_API leaves in its struct: all zero after a refusal; None: the struct was not written."""

    errno: int
    api: int | None = None
    features: int | None = None
    ioctls: int | None = None


def userfaultfd(process: Process, flags: int) -> int:
    """userfaultfd(2): a descriptor. Raises SystemCallError EPERM, EINVAL or EMFILE."""
    kernel = process.kernel
    if not (flags & abi.UFFD_USER_MODE_ONLY or process.privileged or kernel.unprivileged_userfaultfd):
        raise SystemCallError(EPERM)
    return new_userfaultfd(process, flags)


def new_userfaultfd(process: Process, flags: int) -> int:
    """What both ways of opening share (new_userfaultfd, USERFAULTFD_IOC_NEW)."""
    if flags & ~(O_CLOEXEC | O_NONBLOCK | abi.UFFD_USER_MODE_ONLY):
        raise SystemCallError(EINVAL)
    ctx = Context(process.kernel, process.mm, user_mode_only=bool(flags & abi.UFFD_USER_MODE_ONLY))
    file = OpenFile(ctx, nonblock=bool(flags & O_NONBLOCK), writable=False)
    return process.descriptors.install(file, cloexec=bool(flags & O_CLOEXEC))


def api(
    process: Process,
    ctx: Context,
    version: int,
    features: int,
    *,
    readable: bool = True,
    writable: bool = True,
) -> ApiReply:
    """UFFDIO_API (userfaultfd_api). readable, writable: what the kernel can do with the argument's memory."""
    if not readable:
        return ApiReply(EFAULT)
    offered = versions.features(ctx.kernel.version)
    if version != abi.UFFD_API:
        return _refused(EINVAL, writable)
    if features & abi.UFFD_FEATURE_EVENT_FORK and not process.privileged:
        return _refused(EPERM, writable)
    if features & ~offered:
        return _refused(EINVAL, writable)
    if not writable:
        return ApiReply(EFAULT)  # before anything is switched on: a retry works [A8]
    if ctx.initialized:
        return _refused(EINVAL, writable)
    if features & abi.UFFD_FEATURE_WP_ASYNC:
        features |= abi.UFFD_FEATURE_WP_UNPOPULATED  # [A9]
    ctx.features = features
    ctx.initialized = True
    ioctls = 1 << abi._UFFDIO_REGISTER | 1 << abi._UFFDIO_UNREGISTER | 1 << abi._UFFDIO_API
    return ApiReply(0, abi.UFFD_API, offered, ioctls)


def _refused(errno: int, writable: bool) -> ApiReply:
    return ApiReply(errno, 0, 0, 0) if writable else ApiReply(EFAULT)


def open_device(process: Process) -> None:
    """open(/dev/userfaultfd): root's file. Raises SystemCallError EACCES, or ENOENT before 6.1."""
    if process.kernel.version < (6, 1):
        raise SystemCallError(ENOENT)
    if not process.privileged:
        raise SystemCallError(EACCES)


def device_ioctl(process: Process, request: int, flags: int) -> int:
    """An ioctl on an open /dev/userfaultfd, by whoever holds it [A3]. Raises SystemCallError."""
    if request != abi.USERFAULTFD_IOC_NEW:
        raise SystemCallError(EINVAL)
    return new_userfaultfd(process, flags)


def device_read(process: Process) -> int:
    """read(2) of the device: it has no such operation. Raises SystemCallError."""
    raise SystemCallError(EINVAL)


def ioctl_known(kernel: Kernel, request: int) -> bool:
    """The request number, with its size and direction, is one of userfaultfd's [A11]."""
    known = {
        abi.UFFDIO_API: (4, 3),
        abi.UFFDIO_REGISTER: (4, 3),
        abi.UFFDIO_UNREGISTER: (4, 3),
        abi.UFFDIO_WAKE: (4, 3),
        abi.UFFDIO_COPY: (4, 3),
        abi.UFFDIO_ZEROPAGE: (4, 3),
        abi.UFFDIO_WRITEPROTECT: (5, 7),
        abi.UFFDIO_CONTINUE: (5, 13),
        abi.UFFDIO_POISON: (6, 6),
        abi.UFFDIO_MOVE: (6, 8),
    }
    return request in known and kernel.version >= known[request]
