"""Opening a userfaultfd and the handshake UFFDIO_API.

    userfaultfd(2)       needs CAP_SYS_PTRACE, the sysctl, or UFFD_USER_MODE_ONLY [A2]
    /dev/userfaultfd     6.1: whoever has a descriptor of the device gets an unrestricted one [A3]
    UFFDIO_API           once; answers with what the kernel has, not with what was chosen [A5]
"""

from __future__ import annotations

from typing import NamedTuple

from userfault import abi
from userfault.model import versions
from userfault.model.context import Context
from userfault.model.errnos import EFAULT, EINVAL, EPERM, SystemCallError
from userfault.model.process import OpenFile, Process

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
    process: Process, ctx: Context, version: int, features: int, *, readable: bool = True, writable: bool = True
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
