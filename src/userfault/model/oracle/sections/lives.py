"""fork, exec, exit, close (s_life.c)."""

from __future__ import annotations

import ctypes
from typing import Any

from userfault import abi
from userfault.model.access import load, store
from userfault.model.descriptor import poll
from userfault.model.errnos import SystemCallError, errno_name
from userfault.model.exit import execve, exit_process
from userfault.model.fork import fork
from userfault.model.handshake import O_CLOEXEC, O_NONBLOCK, api
from userfault.model.layout import PAGE
from userfault.model.madvise import madvise
from userfault.model.mapping import munmap
from userfault.model.mremap import mremap
from userfault.model.oracle.memory import DST, MSRC, RTO, SRC, Memory
from userfault.model.oracle.probe import (
    EXACT,
    FORK,
    REMAP,
    REMOVE,
    THREAD_ID,
    UNMAP,
    UNPOPULATED,
    Accessor,
    Probe,
    Seen,
    Uffd,
    kernel_write,
    result,
    user_read,
    user_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.oracle.sections.processes import Pause, event_number, pause
from userfault.model.process import Process
from userfault.model.reply import Reply
from userfault.model.step import Op
from userfault.model.thread import Thread


def run(p: Probe, name: str, parts: list[str]) -> None:
    """lifecycle/CASE[/MEM]."""
    if parts[0] in _PLAIN and len(parts) == 1:
        _PLAIN[parts[0]](p)
    elif parts[0] in _BY_MEMORY and len(parts) == 2:
        _BY_MEMORY[parts[0]](p, parts[1])
    else:
        raise Unsupported


def _messages(p: Probe, uffd: Uffd, most: int) -> list[Seen]:
    """msgs_now."""
    p.settle()
    found: list[Seen] = []
    while len(found) < most:
        message = uffd.read_one()
        if message is None:
            break
        found.append(p.message(message, DST))
    return found


def _readable(p: Probe, uffd: Uffd) -> int:
    """waitin."""
    p.settle()
    return int(uffd.readable())


def _all_operations(p: Probe, uffd: Uffd, memory: Memory, prefix: str) -> None:
    """allops."""
    size = memory.page_size
    p.see(f"{prefix}_copy", uffd.copy(DST, SRC, size))
    p.see(f"{prefix}_zeropage", uffd.zero(DST + size, size))
    p.see(f"{prefix}_writeprotect", uffd.wp(DST, size, 1))
    p.see(f"{prefix}_unwriteprotect", uffd.wp(DST, size, 0))
    p.see(f"{prefix}_continue", uffd.cont(DST, size))
    p.see(f"{prefix}_poison", uffd.poison(DST + 2 * size, size))
    p.see(f"{prefix}_move", uffd.move(DST + 3 * size, MSRC, size))
    p.see(f"{prefix}_wake", uffd.wake(DST, size))
    p.see(f"{prefix}_register", uffd.register(DST, memory.length, 1))
    p.see(f"{prefix}_unregister", uffd.unregister(DST, memory.length))


def _remote(p: Probe, dead: bool) -> None:
    """A child registers its own memory and passes the descriptor to the parent."""
    memory = p.memory("anon")
    p.mmap(MSRC, PAGE)
    p.fill(MSRC, PAGE, 0x5A)
    passed: list[int] = []
    said: list[int] = []
    released: list[bool] = []

    def child(thread: Thread) -> Op[None]:
        from userfault.model.handshake import userfaultfd
        from userfault.model.register import register

        yield "the child begins"
        process = thread.process
        file = process.descriptors.get(userfaultfd(process, O_CLOEXEC | O_NONBLOCK))
        api(process, file.target, abi.UFFD_API, THREAD_ID)
        yield from register(thread, file.target, DST, memory.length, 3)
        passed.append(p.process.descriptors.install(file))
        if not dead:
            said.extend((yield from load(thread, process.mm, DST, 1)))
        while not released:
            yield Pause()
        yield from exit_process(thread, process)

    born = p.call(fork(p.caller, child))
    p.settle()
    uffd = Uffd(p, passed[0])
    if not dead:
        p.see("fault_arrives", _readable(p, uffd))
        message = uffd.read_one()
        if message is not None:
            p.see("message", p.message(message, DST, born.main))
        p.see("copy", uffd.copy(DST, SRC, PAGE))
        p.settle()
        if said:
            p.see("child_saw", said[0])
        _all_operations(p, uffd, memory, "live")
        return
    _kill(p, born)
    _all_operations(p, uffd, memory, "dead")
    p.see("dead_read", _read(uffd))
    found = poll(uffd.file)
    p.see("dead_poll", [int(bool(found)), found])
    p.see("dead_fdinfo", p.fdinfo(uffd))
    uffd.close()
    p.see("close", int(uffd.number in p.process.descriptors.files))


def _kill(p: Probe, process: Process) -> None:
    """SIGKILL: its threads end, then everything it had goes."""
    for thread in process.threads:
        thread.kill()
    p.settle()
    if not process.exited:
        p.call(exit_process(p.caller, process))


def _read(uffd: Uffd) -> list[Any]:
    try:
        return [32 * len(uffd.read()), errno_name(0)]
    except SystemCallError as error:
        return [-1, errno_name(error.errno)]


def _exec(p: Probe, cloexec: bool) -> None:
    """The descriptor goes through an exec: the new program tries everything on it."""
    memory = p.memory("anon")
    uffd = p.uffd_open(O_NONBLOCK | (O_CLOEXEC if cloexec else 0))
    api(p.process, uffd.ctx, abi.UFFD_API, 0)
    uffd.register(DST, memory.length, 3)
    p.see("cloexec", str(int(cloexec)))
    p.call(execve(p.caller))
    source = RTO
    p.mmap(source, PAGE)
    try:
        after = Uffd(p, uffd.number)
    except SystemCallError as error:
        _closed(p, error.errno)
        return
    p.see("copy", after.copy(DST, source, PAGE))
    p.see("zeropage", after.zero(DST, PAGE))
    p.see("writeprotect", after.wp(DST, PAGE, 1))
    p.see("continue", after.cont(DST, PAGE))
    p.see("poison", after.poison(DST, PAGE))
    p.see("move", after.move(DST, source, PAGE))
    p.see("wake", after.wake(DST, PAGE))
    p.see("register", after.register(DST, PAGE, 1))
    p.see("unregister", after.unregister(DST, PAGE))
    p.see("read", _read(after))


def _closed(p: Probe, errno: int) -> None:
    """Every call on a closed descriptor fails alike; the structs keep what they held."""
    failed = Reply(errno)
    for name in (
        "copy",
        "zeropage",
        "writeprotect",
        "continue",
        "poison",
        "move",
        "wake",
        "register",
        "unregister",
    ):
        p.see(name, result(failed, None if name in ("writeprotect", "wake", "unregister") else "out"))
    p.see("read", [-1, errno_name(errno)])


def _fork_without_event(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.fill(DST, size, 0x11)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 3)
    uffd.wp(DST, size, 1)
    p.see("mem", kind)

    def child(thread: Thread) -> Op[None]:
        from userfault.model.fill import Fill
        from userfault.model.fill_copy import copy

        process = thread.process
        p.see("child_vmflags", p.vmflags(DST, memory.length, process))
        yield from store(thread, process.mm, DST, b"\x77")
        seen = yield from load(thread, process.mm, DST + size, 1)
        p.see("child_rw", {"write_ok": 1, "missing_page_reads": seen[0]})
        inherited = process.descriptors.get(uffd.number).target
        reply = yield from copy(thread, inherited, Fill(DST + 2 * size, size, 0, SRC))
        p.see("child_copy_on_inherited_fd_page2", result(reply, "out"))
        yield from exit_process(thread, process)

    born = p.call(fork(p.caller, child))
    p.settle()
    p.see("child_status", 0 if born.exited else -1)
    p.see("parent_pages", p.pages(memory, (0, 1, 2), cache=1))
    p.see("note", "uffd fd stays bound to creator mm after fork")


def _forker(child: Any) -> Any:
    """A thread that forks; its result is the child."""

    def run(thread: Thread) -> Op[Any]:
        born = yield from fork(thread, child)
        return born, 0, -1

    return run


def _fork_event(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.fill(DST, size, 0x11)
    uffd = p.uffd(FORK | THREAD_ID)
    uffd.register(DST, memory.length, 3)
    uffd.wp(DST, size, 1)
    p.see("mem", kind)
    pipe: list[int] = []

    def child(thread: Thread) -> Op[None]:
        pipe.extend((yield from load(thread, thread.process.mm, DST + size + 3, 1)))
        yield from store(thread, thread.process.mm, DST + 5, b"\x44")
        pipe.append(1)
        yield from pause(thread)

    forker = p.start(_forker(child))
    message = uffd.read_one()
    if not isinstance(message, abi.Fork):
        p.see("err", "no event")
        return
    p.see("fork_message", p.message(message, DST))
    p.settle()
    p.see("forked", forker.done)
    born: Process = forker.thread.result[0]
    other = Uffd(p, message.ufd)
    p.see("child_fdinfo", p.fdinfo(other))
    flags = O_NONBLOCK if other.file.nonblock else 0
    cloexec = int(other.number in p.process.descriptors.cloexec)
    p.see("child_fd", {"getfl": f"{flags:#x}", "cloexec": cloexec})
    again = api(p.process, other.ctx, abi.UFFD_API, 0)
    p.see("api_on_child_fd", [-1 if again.errno else 0, errno_name(again.errno)])
    p.see("child_vmflags", p.vmflags(DST, memory.length, born))
    p.see("child_page0", p.pages(memory, (0,), process=born, read_through=False))
    message = other.read_one()
    if message is not None:
        p.see("child_fault1", p.message(message, DST, born.main))
        p.see("copy_via_child_uffd", other.copy(DST + size, SRC, size))
    p.settle()
    if pipe:
        p.see("child_read_value", pipe[0])
    message = other.read_one()
    if message is not None:
        p.see("child_fault2_wp", p.message(message, DST, born.main))
        p.see("unwp_via_child_uffd", other.wp(DST, size, 0))
    p.settle()
    if len(pipe) > 1:
        p.see("child_write_done", pipe[1])
    p.see("parent_uffd_readable", _readable(p, uffd))
    p.see("parent_vmflags", p.vmflags(DST, memory.length))
    p.see("parent_pages", p.pages(memory, (0, 1), cache=1))
    other.close()
    p.see("child_vmflags_after_close", p.vmflags(DST, memory.length, born))


def _close_state(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    four = (0, 1, 2, 3)
    p.fill(DST, size, 0x11)
    p.see("mem", kind)
    uffd = p.uffd(UNPOPULATED)
    uffd.register(DST, memory.length, 3)
    uffd.wp(DST, 2 * size, 1)
    uffd.poison(DST + 2 * size, size)
    p.see("pre", p.pages(memory, four, cache=1))
    uffd.close()
    p.see("post", p.pages(memory, four, cache=1))
    p.see("vmflags", p.vmflags(DST, memory.length))
    p.see("read_poisoned_after_close", p.start(user_read(DST + 2 * size)).seen(DST))
    p.see("dontneed", p.attempt(madvise(p.caller, DST, memory.length, "DONTNEED")))
    p.see("post_dontneed", p.pages(memory, four, cache=1))
    p.see("read_poisoned_after_dontneed", p.start(user_read(DST + 2 * size)).seen(DST))


def _fork_emfile(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(FORK)
    uffd.register(DST, memory.length, 1)
    forker = p.start(_forker(pause))
    descriptors = p.process.descriptors
    old, descriptors.limit = descriptors.limit, len(descriptors.files) + 3
    p.see("read_emfile", _read(uffd))
    descriptors.limit = old
    found = poll(uffd.file)
    p.see("poll_after_failed_read", [int(bool(found)), found])
    p.see("fork_returned", forker.done)
    messages = uffd.read()
    p.see("read_retry", [32 * len(messages), event_number(messages[0])])
    p.settle()
    p.see("fork_returned_after_retry", forker.done)


def _fork_parent_closes(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(FORK)
    uffd.register(DST, memory.length, 1)
    forker = p.start(_forker(pause))
    uffd.close()
    p.settle()
    p.see("fork_returned_after_close", forker.done)
    p.see(
        "note",
        "embryonic child's fd table copy keeps the uffd file open, so close() in parent does not release it; "
        "fork() stays blocked in D state (killable only)",
    )


def _fork_multiple(p: Probe) -> None:
    memory = p.memory("anon")
    first, second, third = p.uffd(FORK), p.uffd(FORK), p.uffd(0)
    for page, uffd in enumerate((first, second, third)):
        uffd.register(DST + page * PAGE, PAGE, 1)
    forker = p.start(_forker(pause))
    p.see("u_first", _readable(p, first))
    p.see("v_before_u_read", _readable(p, second))
    p.see("u_msgs", _messages(p, first, 1))
    p.see("v_after_u_read", _readable(p, second))
    p.see("v_msgs", _messages(p, second, 1))
    p.settle()
    p.see("done", forker.done)
    if forker.done:
        p.see("child_vmflags", p.vmflags(DST, memory.length, forker.thread.result[0]))


def _close_dup(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 1)
    other = p.process.descriptors.install(uffd.file)
    writer = p.start(user_write(DST, 3))
    uffd.close()
    p.settle()
    p.see("done_after_close_one_of_two", writer.done)
    p.close(other)
    p.settle()
    p.see("done_after_close_last", writer.done)
    p.see("vmflags", p.vmflags(DST, memory.length))
    p.see("access", writer.seen(DST))


def _handler_death(p: Probe) -> None:
    """Only a child holds the descriptor; it reads one message and is killed."""
    memory = p.memory("anon")
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 3)
    uffd.copy(DST + PAGE, SRC, PAGE, abi.UFFDIO_COPY_MODE_WP)

    def child(thread: Thread) -> Op[None]:
        from userfault.model.descriptor import ReadWait, read

        yield ReadWait(uffd.ctx)
        yield from read(thread, uffd.file, 32)
        yield from pause(thread)

    handler = p.call(fork(p.caller, child))
    uffd.close()
    writers = [p.start(user_write(DST, 3)), p.start(user_write(DST + PAGE, 3))]
    p.settle()
    p.see("blocked_before_handler_death", [int(not writer.done) for writer in writers])
    _kill(p, handler)
    p.settle()
    p.see("released_after_handler_death", [writer.done for writer in writers])
    p.see("vmflags", p.vmflags(DST, memory.length))
    p.see("post", p.pages(memory, (0, 1)))
    p.see("note", "missing page becomes zero-filled, WP cleared: data loss hazard on handler crash")


def _raw_messages(p: Probe) -> None:
    memory = p.memory("anon")
    p.fill(DST + PAGE, 3 * PAGE, 1)
    uffd = p.uffd(REMOVE | REMAP | UNMAP | FORK | EXACT | THREAD_ID)
    uffd.register(DST, memory.length, 3)
    uffd.wp(DST + PAGE, PAGE, 1)

    def system_call(operation: Any) -> Any:
        def run(thread: Thread) -> Op[Any]:
            yield from operation(thread)
            return 0, 0, -1

        return run

    causes = (
        user_read(DST + 0x123),
        user_write(DST + PAGE + 0x45, 0),
        system_call(lambda thread: madvise(thread, DST + PAGE, PAGE, "DONTNEED")),
        system_call(lambda thread: munmap(thread, DST + 3 * PAGE, PAGE)),
        system_call(lambda thread: mremap(thread, DST + 2 * PAGE, PAGE, PAGE, RTO)),
        _forker(pause),
    )
    rows = []
    for number, cause in enumerate(causes):
        accessor = p.start(cause)
        for _ in range(3):
            p.settle()
            message = uffd.read_one()
            if message is None:
                break
            rows.append(_raw(message, accessor).hex())
            if number == 0:
                uffd.copy(DST, SRC, PAGE)
            elif number == 1:
                uffd.wp(DST + PAGE, PAGE, 0)
        p.settle()
    p.see("raw_hex_addresses_made_relative", rows)
    p.see(
        "note",
        "order: missing read, wp write, remove, unmap, remap(+unmap), fork; ptid->11111111, ufd->22222222",
    )


def _raw(message: abi.Message, accessor: Accessor) -> bytes:
    """The 32 bytes, with what differs from run to run replaced as the probe does."""
    raw = abi.uffd_msg()
    match message:
        case abi.Pagefault(flags, address, ptid):
            raw.event = abi.UFFD_EVENT_PAGEFAULT
            raw.arg.pagefault.flags, raw.arg.pagefault.address = flags, address - DST
            raw.arg.pagefault.feat.ptid = 0x11111111 if ptid == accessor.thread.tid else ptid
        case abi.Fork():
            raw.event = abi.UFFD_EVENT_FORK
            raw.arg.fork.ufd = 0x22222222
        case abi.Remap(from_, to, length):
            raw.event = abi.UFFD_EVENT_REMAP
            setattr(raw.arg.remap, "from", from_ - DST)
            raw.arg.remap.to, raw.arg.remap.len = to - RTO, length
        case abi.Remove(start, end) | abi.Unmap(start, end):
            remove = isinstance(message, abi.Remove)
            raw.event = abi.UFFD_EVENT_REMOVE if remove else abi.UFFD_EVENT_UNMAP
            raw.arg.remove.start, raw.arg.remove.end = start - DST, end - DST
    data = bytes(raw)
    assert len(data) == ctypes.sizeof(abi.uffd_msg)
    return data


def _user_mode_only(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(0, abi.UFFD_USER_MODE_ONLY)
    uffd.register(DST, memory.length, 1)
    p.start(user_read(DST))
    p.see("user_fault_delivered", _readable(p, uffd))
    p.see("messages", _messages(p, uffd, 1))
    uffd.copy(DST, SRC, PAGE)
    p.settle()
    p.see("kernel_write", p.start(kernel_write(DST + PAGE, b"\x00")).seen(DST))
    p.see("pending_after", _readable(p, uffd))
    p.see("getfl", f"{O_NONBLOCK if uffd.file.nonblock else 0:#x}")
    p.see("fdinfo", p.fdinfo(uffd))
    p.see("copy_src_is_missing_page", uffd.copy(DST + 2 * PAGE, DST + 3 * PAGE, PAGE))


_PLAIN = {
    "remote_mm_alive": lambda p: _remote(p, False),
    "remote_mm_dead_ESRCH": lambda p: _remote(p, True),
    "exec_keeps_fd": lambda p: _exec(p, False),
    "exec_cloexec": lambda p: _exec(p, True),
    "fork_event_emfile": _fork_emfile,
    "fork_event_parent_closes": _fork_parent_closes,
    "fork_event_multiple_uffds": _fork_multiple,
    "close_dup": _close_dup,
    "handler_process_death": _handler_death,
    "raw_message_bytes": _raw_messages,
    "user_mode_only": _user_mode_only,
}

_BY_MEMORY = {
    "fork_without_event": _fork_without_event,
    "fork_event": _fork_event,
    "close_state": _close_state,
}
