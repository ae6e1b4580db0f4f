"""Reading and polling a userfaultfd, and what the cases of waking share with that (s_wake.c)."""

from __future__ import annotations

from typing import Any

from userfault import abi
from userfault.model.descriptor import poll, read
from userfault.model.errnos import EAGAIN, EINVAL, EOPNOTSUPP, SystemCallError, errno_name
from userfault.model.handshake import O_NONBLOCK, api
from userfault.model.layout import PAGE
from userfault.model.oracle.memory import DST, SRC, Memory
from userfault.model.oracle.probe import (
    Died,
    Probe,
    Seen,
    Uffd,
    user_read,
    user_write,
)
from userfault.model.step import Op
from userfault.model.thread import Thread

MISSING = abi.UFFDIO_REGISTER_MODE_MISSING


def set_up(p: Probe, kind: str, mode: int, features: int) -> tuple[Memory, Uffd]:
    """SETUP."""
    memory = p.memory(kind)
    uffd = p.uffd(features)
    if uffd.register(DST, memory.length, mode)["ret"]:
        p.see("die", "register")
        raise Died
    p.see("mem", kind)
    p.see("mode", {1: "missing", 3: "missing+wp", 5: "missing+minor"}[mode])
    p.see("features", f"{features:#x}")
    return memory, uffd


def pending(uffd: Uffd) -> Seen:
    """putpend."""
    return {"pending": uffd.ctx.pending, "total": uffd.ctx.total}


def one(p: Probe, uffd: Uffd, thread: Thread | None = None) -> list[Seen]:
    """rd1."""
    message = uffd.read_one()
    return [] if message is None else [p.message(message, DST, thread)]


def read_result(p: Probe, uffd: Uffd, size: int) -> list[Any]:
    """[bytes, errno] of a read."""
    try:
        return [32 * len(uffd.read(size)), "ok"]
    except SystemCallError as error:
        return [-1, errno_name(error.errno)]


def fifo(p: Probe) -> None:
    """Three faults, one read."""
    _, uffd = set_up(p, "anon", MISSING, 0)
    for page in (3, 1, 2):
        p.start(user_read(DST + page * PAGE))
    messages = uffd.read(8 * 32)
    p.see("one_read_bytes", 32 * len(messages))
    p.see("messages", [p.message(message, DST) for message in messages])
    p.see("note", "faults on pages 3,1,2 in that order")


def buffer_sizes(p: Probe) -> None:
    """Reads into buffers of all sizes, odd vectors and bad memory."""
    _, uffd = set_up(p, "anon", MISSING, 0)
    p.see("reads_empty", [[size, *read_result(p, uffd, size)] for size in (0, 1, 31, 32, 40, 64)])
    p.start(user_read(DST))
    p.start(user_read(DST + PAGE))
    rows = []
    for size in (0, 31, 33, 63):
        rows.append([size, *read_result(p, uffd, size)])
        p.see(f"pend_after_{size}", pending(uffd))
    p.see("reads_2pending", rows)
    p.see("wake", uffd.wake(DST, 4 * PAGE))
    p.settle()
    p.see("read_bad_ptr", _scattered(p, uffd, (64,), writable=False))
    p.see("pend_after_bad_ptr", pending(uffd))
    p.see("read_after_bad_ptr", read_result(p, uffd, 64)[0])
    uffd.wake(DST, 4 * PAGE)
    p.settle()
    p.see("readv_16_16_40_8", _scattered(p, uffd, (16, 16, 40, 8)))
    uffd.wake(DST, 4 * PAGE)
    p.settle()
    p.see("pread", _pread(p, uffd))


def _scattered(p: Probe, uffd: Uffd, sizes: tuple[int, ...], *, writable: bool = True) -> list[Any]:
    """readv(2): [bytes, errno]."""
    from userfault.model.descriptor import readv

    try:
        return [32 * len(p.call(readv(p.caller, uffd.file, sizes, writable=writable))), "ok"]
    except SystemCallError as error:
        return [-1, errno_name(error.errno)]


def _pread(p: Probe, uffd: Uffd) -> list[Any]:
    from userfault.model.descriptor import try_operation

    return [-1, errno_name(try_operation(uffd.file, "pread"))]


def _hex_poll(uffd: Uffd) -> list[Any]:
    found = poll(uffd.file)
    return [int(bool(found)), f"{found:#x}"]


def _read_into(p: Probe, uffd: Uffd, into: list[abi.Message]) -> Any:
    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        try:
            messages = yield from read(thread, uffd.file, 32)
        except SystemCallError as error:
            return -1, error.errno, -1
        into.extend(messages)
        return 32 * len(messages), 0, -1

    return run


def blocking(p: Probe) -> None:
    """A blocking descriptor: read sleeps, poll complains, a signal interrupts."""
    memory = p.memory("anon")
    uffd = p.uffd_open(0)
    api(p.process, uffd.ctx, abi.UFFD_API, 0)
    uffd.register(DST, memory.length, MISSING)
    p.see("poll_idle", _hex_poll(uffd))
    p.see("preadv2_nowait_idle", [-1, errno_name(_nowait(p, uffd))])
    got: list[abi.Message] = []
    reader = p.start(_read_into(p, uffd, got))
    p.see("reader_blocked_state", reader.thread.state)
    p.start(user_write(DST + 3, 1))
    p.see("reader_ret", reader.thread.result[0])
    p.see("message", p.message(got[0], DST))
    uffd.wake(DST, PAGE)
    p.settle()
    p.see("poll_pending", _hex_poll(uffd))
    uffd.file.nonblock = True
    p.see("poll_pending_after_setfl_nonblock", _hex_poll(uffd))
    uffd.copy(DST, SRC, PAGE)
    p.settle()
    uffd.file.nonblock = False
    again = p.start(_read_into(p, uffd, got))
    again.thread.signal("SIGUSR1")
    p.settle()
    p.see("read_interrupted", again.seen(DST))


def _nowait(p: Probe, uffd: Uffd) -> int:
    """preadv2(RWF_NOWAIT): the errno."""
    if p.kernel.version < (6, 10):
        return EOPNOTSUPP  # no read_iter
    if uffd.readable():
        return 0
    return EAGAIN if uffd.ctx.initialized else EINVAL


def poll_states(p: Probe) -> None:
    """What poll and an edge-triggered epoll say, from birth to a second fault."""
    memory = p.memory("anon")
    uffd = p.uffd_open(O_NONBLOCK)
    p.see("before_api", _hex_poll(uffd))
    api(p.process, uffd.ctx, abi.UFFD_API, 0)
    p.see("idle", _hex_poll(uffd))
    uffd.register(DST, memory.length, MISSING)
    p.start(user_read(DST))
    p.see("pending", _hex_poll(uffd))
    messages = one(p, uffd)
    p.see("after_read_unresolved", _hex_poll(uffd))
    p.see("messages", messages)
    before = len(uffd.ctx.fault_pending)
    p.see("epoll_et_idle", int(uffd.readable()))
    p.start(user_read(DST + PAGE))
    edge = len(uffd.ctx.fault_pending) > before
    p.see("epoll_et_fault", [int(edge), f"{poll(uffd.file) if edge else 0:#x}"])
    p.see("epoll_et_again", int(len(uffd.ctx.fault_pending) > before + 1))
