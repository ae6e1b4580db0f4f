"""Reading, polling and closing a userfaultfd's descriptor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from userfault import abi
from userfault.model.access import MemoryFault, store
from userfault.model.context import Context
from userfault.model.errnos import (
    EAGAIN,
    EBADF,
    EFAULT,
    EINTR,
    EINVAL,
    EMFILE,
    ENODEV,
    ESPIPE,
    SystemCallError,
)
from userfault.model.process import Descriptors, OpenFile
from userfault.model.step import Op, Sleep

if TYPE_CHECKING:
    from userfault.model.thread import Thread

MESSAGE = 32  # bytes of one message

POLLIN = 1
POLLERR = 8


class ReadWait(Sleep):
    """A thread that waits for a message."""

    __slots__ = ("ctx",)
    interruptible = True

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def ready(self) -> bool:
        return self.ctx.readable

    @property
    def what(self) -> str:
        return f"wait for a message of {self.ctx.name}"


def read(thread: Thread, file: OpenFile, size: int, into: int | None = None) -> Op[list[abi.Message]]:
    """read(2): as many whole messages as fit into `size` bytes; sleeps for the first one only [M4, M7].

    All pending faults come before any event, each kind first in, first out [M5]. `into`: the buffer's
    address; None: one that is there. A buffer that is not to be had loses the message, and one that this
    userfaultfd serves makes the reader wait for itself [M6]. Raises SystemCallError.
    """
    ctx: Context = file.target
    if not ctx.initialized or size < MESSAGE:
        raise SystemCallError(EINVAL)
    messages: list[abi.Message] = []
    while len(messages) < size // MESSAGE:
        yield "read a message"
        if not ctx.readable:
            if messages:
                break
            if file.nonblock:
                ctx.kernel.note(f"{ctx.name}: nothing to read, EAGAIN")
                raise SystemCallError(EAGAIN)
            if thread.signals:
                thread.handle_signals()
                raise SystemCallError(EINTR)
            yield ReadWait(ctx)
            continue
        try:
            message = _take(thread, ctx, file)
            if into is not None:
                yield from _to_buffer(thread, into + MESSAGE * len(messages))
            messages.append(message)
        except SystemCallError:
            if messages:
                break
            raise
    return messages


def readv(
    thread: Thread, file: OpenFile, sizes: Sequence[int], *, writable: bool = True
) -> Op[list[abi.Message]]:
    """readv(2): messages run over the ends of vectors (before 6.10 a short one was EINVAL).

    writable False: the memory cannot be written; the message is taken from the queue and lost [M6].
    """
    version = file.target.kernel.version
    if version < (6, 10) and sizes[0] < MESSAGE:
        raise SystemCallError(EINVAL)
    if not writable:
        yield from read(thread, file, MESSAGE)
        raise SystemCallError(EFAULT)
    return (yield from read(thread, file, sum(sizes)))


def _to_buffer(thread: Thread, address: int) -> Op[None]:
    """copy_to_user of one message; only that the memory is touched matters here. Raises SystemCallError."""
    try:
        yield from store(thread, thread.process.mm, address, bytes(MESSAGE), user=False)
    except MemoryFault:
        raise SystemCallError(EFAULT) from None


def _take(thread: Thread, ctx: Context, file: OpenFile) -> abi.Message:
    """userfaultfd_ctx_read, without the waiting."""
    if ctx.fault_pending:
        fault = ctx.fault_pending.pop(0)
        ctx.faults.append(fault)
        ctx.kernel.note(f"{ctx.name}: read {fault.message}")
        return fault.message
    event = ctx.events[0]
    message = event.message
    if event.child is not None:  # resolve_userfault_fork: the reader gets the child's descriptor [E9]
        message = abi.Fork(_install_child(thread.process.descriptors, file, event.child))
    event.read = True
    ctx.events.pop(0)
    ctx.kernel.note(f"{ctx.name}: read {message}")
    return message


def _install_child(descriptors: Descriptors, file: OpenFile, child: Context) -> int:
    """Raises SystemCallError EMFILE, and the event stays in the queue [M6]."""
    if len(descriptors.files) + 3 > descriptors.limit:
        raise SystemCallError(EMFILE)
    return descriptors.install(OpenFile(child, nonblock=file.nonblock, writable=False), cloexec=True)


def poll(file: OpenFile) -> int:
    """poll(2): POLLIN if a message is unread; POLLERR before the handshake and on a blocking descriptor."""
    ctx: Context = file.target
    if not ctx.initialized or not file.nonblock:
        return POLLERR
    return POLLIN if ctx.readable else 0


# What else can be tried on the descriptor [A1].

MODE = 0o600
"""st_mode as fstat shows it: an anonymous inode has no type."""

NAME = "anon_inode:[userfaultfd]"
"""What /proc/self/fd shows."""


def try_operation(file: OpenFile, operation: str) -> int:
    """The errno of another system call on the descriptor: 'write', 'lseek', 'pread', 'mmap', 'fsync',
    'ftruncate'."""
    if operation == "write":
        return EINVAL if file.writable else EBADF
    if operation == "lseek":
        return 0  # noop_llseek: to position 0, wherever it was asked to go
    if operation == "pread":
        return ESPIPE  # an anonymous inode has no FMODE_PREAD
    if operation == "mmap":
        return ENODEV  # userfaultfd_fops has no mmap
    return EINVAL  # nor fsync; ftruncate wants a regular file
