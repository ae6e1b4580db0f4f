"""Who is woken by what (s_wake.c)."""

from __future__ import annotations

from typing import Any

from userfault import abi
from userfault.model.descriptor import poll
from userfault.model.errnos import errno_name
from userfault.model.exit import exit_process
from userfault.model.fork import fork
from userfault.model.handshake import O_NONBLOCK, api
from userfault.model.layout import PAGE
from userfault.model.madvise import madvise
from userfault.model.mapping import READ, WRITE, mprotect, munmap
from userfault.model.oracle.memory import ALIAS, DST, MSRC, SRC, Memory, mode_number
from userfault.model.oracle.probe import (
    REMOVE,
    THREAD_ID,
    Accessor,
    Probe,
    Seen,
    Uffd,
    kernel_write,
    user_read,
    user_write,
)
from userfault.model.oracle.sections import Unsupported, reading
from userfault.model.step import Op
from userfault.model.thread import Thread
from userfault.model.zap import punch

MISSING = abi.UFFDIO_REGISTER_MODE_MISSING


def run(p: Probe, name: str, parts: list[str]) -> None:
    """wake/..., read/..., poll/..."""
    case = parts[0] if name == "wake" else f"{name}/{parts[0]}"
    if case in _PLAIN and len(parts) == 1:
        _PLAIN[case](p)
    elif case in _BY_MEMORY and len(parts) == 2:
        _BY_MEMORY[case](p, parts[1])
    elif case in HOWS and len(parts) == 4:
        _waiter(p, case, parts[1], parts[2], parts[3])
    else:
        raise Unsupported


def _done(*accessors: Accessor) -> list[int]:
    """putdone."""
    return [accessor.done for accessor in accessors]


def _all(p: Probe, uffd: Uffd, thread: Thread | None = None) -> list[Seen]:
    """rdall, putmsgs: everything there is to read."""
    p.settle()
    messages: list[Seen] = []
    while len(messages) < 20:
        message = uffd.read_one()
        if message is None:
            break
        messages.append(p.message(message, DST, thread))
        p.settle()
    return messages


def _two_threads_same_page(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, THREAD_ID)
    first = p.start(user_read(DST + 8))
    second = p.start(user_write(DST + 16, 5))
    p.see("pend", reading.pending(uffd))
    messages = reading.one(p, uffd, first.thread)
    p.see("pend_after_1_read", reading.pending(uffd))
    messages += reading.one(p, uffd, second.thread)
    p.see("pend_after_2_reads", reading.pending(uffd))
    p.see("messages", messages)
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done", _done(first, second))
    p.see("pend_end", reading.pending(uffd))
    p.see("note", "two threads, same page => two messages; one COPY wakes both")


def _two_pages(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    first = p.start(user_read(DST))
    second = p.start(user_read(DST + 2 * PAGE))
    p.see("messages", _all(p, uffd))
    p.see("copy_page0", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done_after_copy_page0", _done(first, second))
    p.see("wake_all_range", uffd.wake(DST, 4 * PAGE))
    p.see("messages_after_wake", _all(p, uffd))
    p.see("done_after_wake", _done(first, second))
    p.see("copy_page2", uffd.copy(DST + 2 * PAGE, SRC, PAGE))
    p.settle()
    p.see("done_end", _done(first, second))


def _copy_dontwake(p: Probe, kind: str) -> None:
    memory, uffd = reading.set_up(p, kind, MISSING, 0)
    writer = p.start(user_write(DST, 7))
    p.see("messages", _all(p, uffd))
    p.see("copy_dontwake", uffd.copy(DST, SRC, memory.page_size, abi.UFFDIO_COPY_MODE_DONTWAKE))
    p.settle()
    p.see("done_after_dontwake", _done(writer))
    p.see("pend", reading.pending(uffd))
    p.see("copy_again", uffd.copy(DST, SRC, memory.page_size))
    p.settle()
    p.see("done_after_eexist", _done(writer))
    p.see("wake", uffd.wake(DST, memory.page_size))
    p.settle()
    p.see("done_after_wake", _done(writer))
    p.see("messages_end", _all(p, uffd))


def _wake_without_resolution(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    writer = p.start(user_write(DST + 5, 7))
    messages: list[Seen] = []
    for i in range(3):
        messages += _all(p, uffd)
        p.see(f"wake{i}", uffd.wake(DST, PAGE))
        p.settle()
    messages += _all(p, uffd)
    p.see("messages", messages)
    p.see("note", "each WAKE without resolution re-queues an identical message")
    p.see("zeropage", uffd.zero(DST, PAGE))
    p.settle()
    p.see("done", _done(writer))


def _wake_unread(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    p.start(user_write(DST + 5, 7))
    p.see("wake_unread", uffd.wake(DST, PAGE))
    p.settle()
    p.see("pend", reading.pending(uffd))
    p.see("wake_unread2", uffd.wake(DST, PAGE))
    messages = _all(p, uffd)
    p.see("msgs_read", len(messages))
    p.see("messages", messages)


def _copy_before_read(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    writer = p.start(user_write(DST + 5, 7))
    p.see("poll_before", int(bool(poll(uffd.file))))
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done", _done(writer))
    p.see("poll_after", int(bool(poll(uffd.file))))
    p.see("read_after", reading.read_result(p, uffd, 32))
    p.see("note", "resolved before being read: message vanishes")


def _range_matching(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    writer = p.start(user_write(DST + PAGE + 5, 7))
    p.see("messages", _all(p, uffd))
    p.see("wake_page0", uffd.wake(DST, PAGE))
    p.settle()
    p.see("d0", _done(writer))
    p.see("wake_page2", uffd.wake(DST + 2 * PAGE, PAGE))
    p.settle()
    p.see("d2", _done(writer))
    uffd.copy(DST + PAGE, SRC, PAGE, abi.UFFDIO_COPY_MODE_DONTWAKE)
    p.see("wake_0_to_2", uffd.wake(DST, 2 * PAGE))
    p.settle()
    p.see("d", _done(writer))


def _eexist_does_not_wake(p: Probe) -> None:
    memory, uffd = reading.set_up(p, "shmem_shared", MISSING, 0)
    writer = p.start(user_write(DST, 7))
    p.see("messages", _all(p, uffd))
    p.poke(ALIAS, 0x55)
    p.settle()
    p.see("done_after_alias_fill", _done(writer))
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done_after_copy_eexist", _done(writer))
    p.see("wake", uffd.wake(DST, PAGE))
    p.settle()
    p.see("done_after_wake", _done(writer))
    p.see("messages_after", _all(p, uffd))
    p.see("post", p.pages(memory, (0,), cache=1))


def _partial_copy(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    uffd.copy(DST + 2 * PAGE, SRC, PAGE)
    readers = [p.start(user_read(DST + page * PAGE)) for page in (0, 1, 3)]
    p.see("messages", _all(p, uffd))
    p.see("copy4", uffd.copy(DST, SRC, 4 * PAGE))
    p.settle()
    p.see("done_0_1_3", _done(*readers))
    p.see("copy_rest", uffd.copy(DST + 2 * PAGE, SRC, 2 * PAGE))
    p.settle()
    p.see("done_after_eexist", _done(*readers))


def _signal_during(p: Probe, kernel: bool) -> None:
    _, uffd = reading.set_up(p, "anon", MISSING, 0)
    access = kernel_write(DST + 7, b"\x03") if kernel else user_write(DST + 7, 3)
    sleeper = p.start(access)
    messages = reading.one(p, uffd)
    sleeper.thread.signal("SIGUSR1")
    p.settle()
    p.see("refaulted", int(uffd.ctx.pending >= 1))
    extra: list[Seen] = []
    for _ in range(20):
        extra += reading.one(p, uffd)
        p.settle()
    p.see("extra_messages_bucket", "0" if not extra else "1" if len(extra) == 1 else ">1")
    if len(extra) <= 3:
        p.see("messages", messages + extra)
    p.see("thread_state", sleeper.thread.state)
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done", _done(sleeper))
    p.see("access", sleeper.seen(DST))


def _other_uffd(p: Probe) -> None:
    _, uffd = reading.set_up(p, "anon", 3, 0)
    other = p.uffd(0)
    writer = p.start(user_write(DST + 7, 3))
    p.see("messages", reading.one(p, uffd))
    p.see("other_wake", other.wake(DST, PAGE))
    p.settle()
    p.see("done_after_other_wake", _done(writer))
    p.see("other_copy", other.copy(DST, SRC, PAGE))
    p.settle()
    p.see("done_after_other_copy", _done(writer))
    p.see("owner_copy", uffd.copy(DST, SRC, PAGE))
    p.see("owner_wake", uffd.wake(DST, PAGE))
    p.settle()
    p.see("done_after_owner_wake", _done(writer))
    p.see("other_wp", other.wp(DST, PAGE, 1))
    p.see("other_unwp", other.wp(DST, PAGE, 0))
    p.see("other_zeropage", other.zero(DST + PAGE, PAGE))
    p.see("other_poison", other.poison(DST + 2 * PAGE, PAGE))
    p.mmap(MSRC, PAGE)
    p.fill(MSRC, PAGE, 1)
    p.see("other_move", other.move(DST + 3 * PAGE, MSRC, PAGE))
    p.see("other_register", other.register(DST, PAGE, 1))
    p.see("other_unregister", other.unregister(DST, PAGE))
    p.see("owner_reregister", uffd.register(DST, PAGE, 3))


def _wp(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.fill(DST, memory.length, 0x11)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 2)
    p.see("mem", kind)
    uffd.wp(DST, memory.length, 1)
    writers = [p.start(user_write(DST + page * size + 7, 3)) for page in (0, 2)]
    p.see("messages", _all(p, uffd))
    p.see("unwp_dontwake_p0", uffd.wp(DST, size, abi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE))
    p.settle()
    p.see("d1", _done(*writers))
    p.see("wake_p0", uffd.wake(DST, size))
    p.settle()
    p.see("d2", _done(*writers))
    p.see("wp_set_p2", uffd.wp(DST + 2 * size, size, 1))
    p.settle()
    p.see("d3", _done(*writers))
    p.see("wake_p2_still_wp", uffd.wake(DST + 2 * size, size))
    p.see("messages_after_wake", _all(p, uffd))
    p.see("unwp_all", uffd.wp(DST, memory.length, 0))
    p.settle()
    p.see("d4", _done(*writers))
    p.see("wp_dontwake_combo", uffd.wp(DST, memory.length, 3))


def _minor(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.fill(ALIAS, memory.length, 0xCA)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 4)
    p.see("mem", kind)
    accessors = [p.start(user_read(DST + 7)), p.start(user_write(DST + size + 7, 3))]
    p.see("messages", _all(p, uffd))
    p.see("continue_dontwake_p0", uffd.cont(DST, size, abi.UFFDIO_CONTINUE_MODE_DONTWAKE))
    p.settle()
    p.see("d1", _done(*accessors))
    p.see("continue_again_p0", uffd.cont(DST, size))
    p.settle()
    p.see("d2", _done(*accessors))
    p.see("wake", uffd.wake(DST, size))
    p.settle()
    p.see("d3", _done(*accessors))
    p.fill(ALIAS + size, 8, 0xCB)
    p.see("continue_p1_p2", uffd.cont(DST + size, 2 * size))
    p.settle()
    p.see("d4", _done(*accessors))
    p.see("r0", accessors[0].seen(DST))
    p.see("post", p.pages(memory, (0, 1, 2, 3), cache=1))


def _minor_then_punched(p: Probe, kind: str) -> None:
    memory, uffd = reading.set_up(p, kind, 5, 0)
    p.fill(ALIAS, memory.page_size, 0xCA)
    reader = p.start(user_read(DST + 7))
    p.see("messages", _all(p, uffd))
    p.see("punch", p.attempt(_punch(memory)))
    p.see("continue_after_punch", uffd.cont(DST, memory.page_size))
    p.settle()
    p.see("d1", _done(reader))
    p.see("wake", uffd.wake(DST, memory.page_size))
    p.see("messages_after_wake", _all(p, uffd))
    p.see("copy", uffd.copy(DST, SRC, memory.page_size))
    p.settle()
    p.see("d2", _done(reader))
    p.see("note", "minor fault, then page punched: refault becomes missing")


def _punch(memory: Memory) -> Op[None]:
    assert memory.file is not None
    yield "punch a hole"
    punch(memory.file, 0, memory.page_size)


def _missing_then_filled(p: Probe, kind: str) -> None:
    memory, uffd = reading.set_up(p, kind, 5, 0)
    reader = p.start(user_read(DST + 7))
    p.see("messages", _all(p, uffd))
    p.fill(ALIAS, memory.page_size, 0xCA)
    p.see("copy", uffd.copy(DST, SRC, memory.page_size))
    p.settle()
    p.see("d1", _done(reader))
    p.see("wake", uffd.wake(DST, memory.page_size))
    p.see("messages_after_wake", _all(p, uffd))
    p.see("continue", uffd.cont(DST, memory.page_size))
    p.settle()
    p.see("d2", _done(reader))
    p.see("r", reader.seen(DST))


def _killability(p: Probe) -> None:
    """Two children with a userfaultfd each: one sleeps in a fault, one in an event; both get SIGTERM."""
    memory, _ = reading.set_up(p, "anon", MISSING, 0)

    def child(features: int, sleeps: Any) -> Any:
        def program(thread: Thread) -> Op[None]:
            yield "the child begins"
            own = _own_uffd(thread, features)
            from userfault.model.register import register

            yield from register(thread, own, DST, memory.length, MISSING)
            yield from sleeps(thread)
            yield from exit_process(thread, thread.process)

        return program

    def touch(thread: Thread) -> Op[Any]:
        return user_read(DST)(thread)

    def drop(thread: Thread) -> Op[Any]:
        return madvise(thread, DST, PAGE, "DONTNEED")

    children = []
    for features, sleeps in ((0, touch), (REMOVE, drop)):
        born = p.call(fork(p.caller, child(features, sleeps)))
        p.settle()
        born.main.kill()
        p.settle()
        children.append(born)
    faulting, changing = children
    killed = faulting.main.done and not faulting.exited
    p.see("sigterm_kills_faulting_process", _SIGTERM if killed else -1)
    # The probe reaps the second child without asking how it ended.
    p.see("sigterm_fatal_default_on_event_waiter_reaped", int(changing.main.done))


_SIGTERM = 15


def _own_uffd(thread: Thread, features: int) -> Any:
    from userfault.model.handshake import userfaultfd

    process = thread.process
    ctx = process.descriptors.get(userfaultfd(process, O_NONBLOCK)).target
    api(process, ctx, abi.UFFD_API, features)
    return ctx


HOWS = ("unregister", "close", "munmap", "madv_dontneed", "mprotect_rw", "unregister_other_page")


def _waiter(p: Probe, how: str, kind: str, mode: str, waiter: str) -> None:
    """A thread sleeps in a fault; then something happens to its memory."""
    memory = p.memory(kind)
    size = memory.page_size
    p.see("mem", kind)
    p.see("mode", mode)
    p.see("op", how)
    p.see("state", waiter)
    if waiter == "wp_waiter":
        p.fill(DST, size, 0x11)
    elif waiter == "minor_waiter":
        p.fill(ALIAS, size, 0xCA)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, mode_number(mode))
    if waiter == "wp_waiter":
        uffd.wp(DST, size, 1)
    writer = p.start(user_write(DST + 9, 7))
    p.see("messages", _all(p, uffd))
    p.see("result", _happen(p, memory, uffd, how))
    p.settle()
    p.see("woken", _done(writer))
    if how != "close":
        p.see("pend", reading.pending(uffd))
        if not writer.done:
            p.see("wake", uffd.wake(DST, size))
            p.settle()
            p.see("done_after_wake", _done(writer))
            p.see("messages_after_wake", _all(p, uffd))
    p.see("access_result", writer.seen(DST))
    if how != "munmap":
        p.see("post", p.pages(memory, (0,), cache=1))


def _happen(p: Probe, memory: Memory, uffd: Uffd, how: str) -> Seen:
    length = memory.length
    match how:
        case "unregister":
            return uffd.unregister(DST, length)
        case "unregister_other_page":
            return uffd.unregister(DST + memory.page_size, memory.page_size)
        case "close":
            uffd.close()
            return {"ret": 0, "errno": errno_name(0)}
        case "munmap":
            returned = p.attempt(munmap(p.caller, DST, length))
        case "madv_dontneed":
            returned = p.attempt(madvise(p.caller, DST, length, "DONTNEED"))
        case _:
            returned = p.attempt(mprotect(p.caller, DST, length, READ))
            p.attempt(mprotect(p.caller, DST, length, READ | WRITE))
    return {"ret": returned, "errno": errno_name(0)}  # the probe keeps no errno here


_PLAIN = {
    "two_threads_same_page": _two_threads_same_page,
    "two_pages": _two_pages,
    "wake_without_resolution": _wake_without_resolution,
    "wake_unread_fault": _wake_unread,
    "copy_before_read": _copy_before_read,
    "range_matching": _range_matching,
    "eexist_does_not_wake_shmem": _eexist_does_not_wake,
    "partial_copy_wakes_only_progress": _partial_copy,
    "read_fifo_order": reading.fifo,
    "read/buffer_sizes": reading.buffer_sizes,
    "read/blocking_fd": reading.blocking,
    "poll/states": reading.poll_states,
    "signal_during_user_fault": lambda p: _signal_during(p, False),
    "signal_during_kernel_fault": lambda p: _signal_during(p, True),
    "other_uffd_same_mm": _other_uffd,
    "killability": _killability,
}

_BY_MEMORY = {
    "copy_dontwake": _copy_dontwake,
    "wp": _wp,
    "minor": _minor,
    "minor_then_punched": _minor_then_punched,
    "missing_then_filled": _missing_then_filled,
}
