"""Operations on registered VMAs, and what happens while an event is unread (s_vmop.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from userfault import abi
from userfault.model.descriptor import poll
from userfault.model.errnos import SystemCallError, errno_name
from userfault.model.exit import exit_process
from userfault.model.fill import Fill
from userfault.model.fill_continue import continue_
from userfault.model.fill_copy import copy
from userfault.model.fill_poison import poison
from userfault.model.fill_zeropage import zeropage
from userfault.model.fork import fork
from userfault.model.layout import PAGE
from userfault.model.madvise import madvise, mlock
from userfault.model.mapping import READ, WRITE, mmap, mprotect, munmap
from userfault.model.move import move
from userfault.model.mremap import mremap
from userfault.model.oracle.memory import ALIAS, DST, MSRC, RTO, SRC, Memory, mode_number
from userfault.model.oracle.probe import (
    FORK,
    REMAP,
    REMOVE,
    UNMAP,
    Probe,
    Seen,
    Uffd,
    result,
    user_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.oracle.sections.processes import event_number
from userfault.model.step import Op
from userfault.model.thread import Thread
from userfault.model.writeprotect import writeprotect
from userfault.model.zap import punch, truncate

PAGES = (0, 1, 2, 3, 4, 5)
_Result = tuple[int, int, int]


def answer(operation: Op[Any]) -> Op[_Result]:
    """A system call's return value and errno."""
    try:
        yield from operation
    except SystemCallError as error:
        return -1, error.errno, -1
    return 0, 0, -1


def _calls(memory: Memory) -> dict[str, Callable[[Thread], Op[Any]]]:
    """The calls, by name: dovm."""
    length, size = memory.length, memory.page_size

    def advise(advice: str, at: int = DST, span: int = length) -> Callable[[Thread], Op[Any]]:
        return lambda thread: madvise(thread, at, span, advice)

    def remap(*arguments: Any, **options: bool) -> Callable[[Thread], Op[Any]]:
        return lambda thread: mremap(thread, *arguments, **options)

    def protect(*protections: int) -> Callable[[Thread], Op[Any]]:
        def run(thread: Thread) -> Op[Any]:
            for protection in protections:
                yield from mprotect(thread, DST, length, protection)

        return run

    def guard_and_back(thread: Thread) -> Op[Any]:
        failed: SystemCallError | None = None
        for advice in ("GUARD_INSTALL", "GUARD_REMOVE"):
            try:
                yield from madvise(thread, DST + size, 3 * size, advice)
            except SystemCallError as error:
                failed = error
        if failed is not None:
            raise failed

    def on_file(change: Callable[[Any], None]) -> Callable[[Thread], Op[Any]]:
        def run(thread: Thread) -> Op[Any]:
            yield "a call on the file"
            change(memory.file)

        return run

    def allocate(file: Any) -> None:
        for index in range(length // size):
            file.allocate(index)

    return {
        "mremap_move": remap(DST, length, length, RTO),
        "mremap_move_partial": remap(DST + size, 2 * size, 2 * size, RTO + size),
        "mremap_grow_move": remap(DST, length, 2 * length, RTO),
        "mremap_grow_inplace": remap(DST, length, length + 2 * size, may_move=False),
        "mremap_shrink": remap(DST, length, length - 2 * size, may_move=False),
        "mremap_shrink_move": remap(DST, length, length - 2 * size, RTO),
        "mremap_dontunmap": remap(DST, length, length, RTO, dontunmap=True),
        "mremap_same": remap(DST, length, length),
        "mremap_move_over_mapping": remap(RTO, 2 * size, 2 * size, DST + size),
        "madv_dontneed": advise("DONTNEED"),
        "madv_dontneed_partial": advise("DONTNEED", DST + size, 2 * size),
        "madv_free": advise("FREE"),
        "madv_remove": advise("REMOVE"),
        "madv_cold": advise("COLD"),
        "madv_pageout": advise("PAGEOUT"),
        "madv_populate_read": advise("POPULATE_READ"),
        "madv_populate_write": advise("POPULATE_WRITE"),
        "munmap": lambda thread: munmap(thread, DST, length),
        "munmap_partial": lambda thread: munmap(thread, DST + size, 2 * size),
        "mmap_fixed_over": lambda thread: mmap(thread, DST + size, 2 * size, READ | WRITE, replace=True),
        "mprotect_read": protect(READ),
        "mprotect_none": protect(0),
        "mprotect_read_then_rw": protect(READ, READ | WRITE),
        "punch_hole_fd": on_file(lambda file: punch(file, 0, length)),
        "ftruncate_0": on_file(lambda file: truncate(file, 0)),
        "madv_guard_install": advise("GUARD_INSTALL", DST + size, 2 * size),
        "madv_guard_install_remove": guard_and_back,
        "mlock": lambda thread: mlock(thread, DST, length),
        "madv_dontneed_locked": advise("DONTNEED_LOCKED"),
        "madv_collapse": advise("COLLAPSE"),
        "madv_mergeable": advise("MERGEABLE"),
        "fallocate_fd": on_file(allocate),
    }


FORKS = {"fork": "", "dontfork+fork": "DONTFORK", "wipeonfork+fork": "WIPEONFORK"}


def run(p: Probe, name: str, parts: list[str]) -> None:
    """vmop/MEM/MODE/fFEATURES/CALL."""
    kind, mode, features_text, call = parts
    features = int(features_text[1:], 16)
    memory = p.memory(kind, len(PAGES))
    calls = _calls(memory)
    if call not in calls and call not in FORKS:
        raise Unsupported
    size = memory.page_size
    p.see("mem", kind)
    p.see("mode", mode)
    p.see("features", f"{features:#x}")
    p.see("op", f"vm:{call}")
    p.fill(DST + size, size, 0x11)
    p.fill(DST + 2 * size, size, 0x22)
    if memory.fileish:
        p.fill(ALIAS + 4 * size, size, 0xCA)
    else:
        p.peek(DST + 4 * size)
    uffd = p.uffd(features)
    if call == "mremap_move_over_mapping":
        p.mmap(RTO, 2 * size, hugetlb=memory.huge)
        p.fill(RTO, 2 * size, 0x99)
    registered = uffd.register(DST, memory.length, mode_number(mode))
    if registered["ret"]:
        p.see("setup_register", registered)
        return
    if mode_number(mode) & 2:
        done = uffd.wp(DST + 2 * size, 2 * size, abi.UFFDIO_WRITEPROTECT_MODE_WP)
        if done["ret"]:
            p.see("setup_wp", done)
    uffd.poison(DST + 5 * size, size)
    p.see("pre", p.pages(memory, PAGES, cache=1))
    if call in FORKS:
        accessor = p.start(lambda thread: _fork(p, thread, memory, FORKS[call]))
    else:
        accessor = p.start(lambda thread: answer(calls[call](thread)))
    pumped = p.pump(uffd, memory, [accessor], "resolve", most=24)
    p.see("messages", pumped.messages)
    if pumped.stuck:
        p.see("stuck", pumped.stuck)
    p.see("result", accessor.seen(DST))
    if pumped.fork >= 0:
        p.see("fork_fdinfo", p.fdinfo(Uffd(p, pumped.fork)))
    p.see("vmflags_old", p.vmflags(DST, memory.length + 2 * size))
    p.see("post_old", p.pages(memory, PAGES, cache=0 if call == "ftruncate_0" else 1))
    if call in _MOVES:
        p.see("vmflags_new", p.vmflags(RTO, 2 * memory.length))
        p.see("post_new", p.pages(memory, PAGES, base=RTO))


_MOVES = ("mremap_move", "mremap_move_partial", "mremap_grow_move", "mremap_shrink_move", "mremap_dontunmap")


def _fork(p: Probe, thread: Thread, memory: Memory, advice: str) -> Op[_Result]:
    """Fork; the child says what it sees and exits."""
    if advice:
        failed = yield from answer(madvise(thread, DST, memory.length, advice))
        if failed[0] and advice == "WIPEONFORK":
            return failed

    def child(thread: Thread) -> Op[int]:
        yield "the child looks"
        process = thread.process
        p.see("child_vmflags", p.vmflags(DST, memory.length, process))
        if advice == "DONTFORK":
            mapped = process.mm.table.entry(DST) is not None
            p.see("child_pages", f"unmapped:{int(not mapped)}")
        else:
            p.see("child_pages", p.pages(memory, PAGES, process=process))
        yield from exit_process(thread, process)
        return 0

    born = yield from fork(thread, child)
    while not born.main.done:
        yield "wait for the child"
    return 0, 0, -1


# While an event is unread.

EVENTS = {
    "remove_dontneed": REMOVE,
    "remove_madv_remove": REMOVE,
    "remap": REMAP,
    "unmap": UNMAP,
    "fork": FORK,
    "remove_free": REMOVE,
    "remap_and_unmap": REMAP | UNMAP,
}
OPERATIONS = (
    "copy",
    "copy_wp",
    "zeropage",
    "continue",
    "poison",
    "move",
    "writeprotect",
    "unwriteprotect",
    "wake",
    "register",
    "unregister",
)


def run_changing(p: Probe, name: str, parts: list[str]) -> None:
    """mmap_changing/MEM/EVENT/OP and the cases with a name of their own."""
    if parts[0] == "mid_copy":
        _mid_copy(p, parts[1])
    elif parts[0] == "close_releases":
        _close_releases(p, parts[1])
    elif parts == ["counter_two_events"]:
        _two_events(p)
    elif parts == ["fault_read_before_event"]:
        _fault_before_event(p)
    elif len(parts) == 3 and parts[1] in EVENTS and parts[2] in OPERATIONS:
        _while_pending(p, *parts)
    else:
        raise Unsupported


def _fork_and_wait(thread: Thread) -> Op[None]:
    born = yield from fork(thread, lambda child: exit_process(child, child.process))
    while not born.main.done:
        yield "wait for the child"


def _cause(memory: Memory, event: str, base: int = DST) -> Callable[[Thread], Op[_Result]]:
    """evthread: the call that causes an event."""
    size = memory.page_size
    at = base + 2 * size

    def run(thread: Thread) -> Op[_Result]:
        match event:
            case "remove_dontneed":
                return (yield from answer(madvise(thread, at, size, "DONTNEED")))
            case "remove_madv_remove":
                return (yield from answer(madvise(thread, at, size, "REMOVE")))
            case "remove_free":
                return (yield from answer(madvise(thread, at, size, "FREE")))
            case "unmap":
                return (yield from answer(munmap(thread, at, size)))
            case "fork":
                return (yield from answer(_fork_and_wait(thread)))
        return (yield from answer(mremap(thread, at, size, size, RTO)))

    return run


def _operate(uffd: Uffd, memory: Memory, operation: str, garbage: bool) -> Seen:
    """cdo."""
    at, length = (0, 0) if garbage else (DST, memory.page_size)
    source = 0 if garbage else MSRC if operation == "move" else SRC
    match operation:
        case "copy":
            return uffd.copy(at, source, length)
        case "copy_wp":
            return uffd.copy(at, source, length, abi.UFFDIO_COPY_MODE_WP)
        case "zeropage":
            return uffd.zero(at, length)
        case "continue":
            return uffd.cont(at, length)
        case "poison":
            return uffd.poison(at, length)
        case "move":
            return uffd.move(at, source, length)
        case "writeprotect":
            return uffd.wp(at, length, 1)
        case "unwriteprotect":
            return uffd.wp(at, length, 0)
        case "wake":
            return uffd.wake(at, length)
        case "register":
            return uffd.register(at, length, abi.UFFDIO_REGISTER_MODE_MISSING)
    return uffd.unregister(at, length)


def _null_pointer(p: Probe, uffd: Uffd, operation: str) -> str:
    """The same ioctl with a bad pointer: its errno."""
    ctx, thread = uffd.ctx, p.caller
    if operation in ("writeprotect", "unwriteprotect"):
        return errno_name(p.call(writeprotect(thread, ctx, 0, 0, None)).errno)
    fills = {"copy": copy, "copy_wp": copy, "zeropage": zeropage, "continue": continue_, "poison": poison}
    return errno_name(p.call(fills.get(operation, move)(thread, ctx, None)).errno)


def _poll(uffd: Uffd) -> list[int]:
    found = poll(uffd.file) & 9
    return [int(bool(found)), found]


def _while_pending(p: Probe, kind: str, event: str, operation: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    mode = "missing+wp+minor" if memory.fileish else "missing+wp"
    p.see("mem", kind)
    p.see("mode", mode)
    p.see("state", f"pending_event:{event}")
    p.see("op", operation)
    p.see("features", f"{EVENTS[event]:#x}")
    if memory.fileish and operation == "continue":
        p.fill(ALIAS, size, 0xCA)
    p.mmap(MSRC, 2 << 20)
    p.fill(MSRC, PAGE, 0x5A)
    p.fill(DST + 2 * size, size, 0x33)
    uffd = p.uffd(EVENTS[event])
    uffd.register(DST, memory.length, mode_number(mode))
    causer = p.start(_cause(memory, event))
    p.see("poll_pending", _poll(uffd))
    p.see("event_thread_state", causer.thread.state)
    p.see("event_thread_done", causer.done)
    p.see("while_pending", _operate(uffd, memory, operation, False))
    p.see("while_pending_garbage_args", _operate(uffd, memory, operation, True))
    if operation not in ("wake", "register", "unregister"):
        p.see("while_pending_null_ptr", _null_pointer(p, uffd, operation))
    messages = [uffd.read_one()]
    if event == "remap_and_unmap":
        p.settle()
        if uffd.readable():
            p.see("after_first_event_read", _operate(uffd, memory, operation, False))
            messages.append(uffd.read_one())
    p.see("messages", [m and p.message(m, DST, causer.thread) for m in messages])
    p.settle()
    p.see("event_call_result", causer.seen(DST))
    p.see("after_event_read", _operate(uffd, memory, operation, False))
    p.see("post", p.pages(memory, (0,), cache=1))


def _two_events(p: Probe) -> None:
    memory = p.memory("anon")
    p.fill(DST, memory.length, 0x33)
    uffd = p.uffd(REMOVE)
    uffd.register(DST, memory.length, 1)
    first = p.start(_cause(memory, "remove_dontneed"))
    second = p.start(_cause(memory, "remove_free"))
    messages: list[Seen] = []

    def read() -> None:
        message = uffd.read_one()
        if message is not None:
            messages.append(p.message(message, DST))
        p.settle()

    p.see("copy_2_pending", uffd.copy(DST, SRC, PAGE))
    read()
    unblocked = "first_caller" if first.done else "second_caller" if second.done else "none"
    p.see("first_read_unblocked", unblocked)
    p.see("copy_1_pending", uffd.copy(DST, SRC, PAGE))
    read()
    p.see("messages", messages)
    p.see("copy_0_pending", uffd.copy(DST, SRC, PAGE))


def _fault_before_event(p: Probe) -> None:
    memory = p.memory("anon")
    p.fill(DST + 2 * PAGE, PAGE, 0x33)
    uffd = p.uffd(REMOVE)
    uffd.register(DST, memory.length, 1)
    p.start(_cause(memory, "remove_dontneed"))
    writer = p.start(user_write(DST, 7))
    messages = uffd.read(4 * 32)
    p.see("one_read_bytes", 32 * len(messages))
    p.see("messages", [p.message(message, DST, writer.thread) for message in messages])
    p.see("note", "event queued before fault; order in one read")


def _close_releases(p: Probe, event: str) -> None:
    if event not in EVENTS:
        raise Unsupported
    memory = p.memory("anon")
    p.fill(DST + 2 * PAGE, PAGE, 0x33)
    uffd = p.uffd(REMOVE | REMAP | UNMAP | FORK)
    uffd.register(DST, memory.length, 1)
    p.see("state", f"pending_event:{event}")
    causer = p.start(_cause(memory, event))
    uffd.close()
    p.settle()
    p.see("event_call_after_close", causer.seen(DST))
    p.see("vmflags", p.vmflags(DST, memory.length))


MID_COPY = (
    "nothing",
    "remove_event_pending",
    "munmap_dst_all",
    "munmap_dst_tail",
    "unregister_dst",
    "close_uffd_dup",
    "fill_page2_in_dst",
    "reregister_wp",
    "mprotect_dst_read",
)


def _mid_copy(p: Probe, change: str) -> None:
    """COPY sleeps on its source, which is missing on another userfaultfd; meanwhile the destination
    changes."""
    if change not in MID_COPY:
        raise Unsupported
    memory = p.memory("anon", 8)
    p.see("state", "COPY of 4 pages blocked in copy_from_user at page 2")
    p.see("op", f"mid_copy:{change}")
    p.fill(DST + 6 * PAGE, PAGE, 1)
    uffd = p.uffd(REMOVE)
    uffd.register(DST, memory.length, 1)
    other = p.uffd(0)
    p.mmap(MSRC, 4 * PAGE)
    for page in (0, 1, 3):
        p.poke(MSRC + page * PAGE, 0x50 + page)
    other.register(MSRC, 4 * PAGE, 1)
    results: list[Seen] = []

    def copier(thread: Thread) -> Op[_Result]:
        results.append(result((yield from copy(thread, uffd.ctx, Fill(DST, 4 * PAGE, 0, MSRC))), "out"))
        return 0, 0, -1

    sleeper = p.start(copier)
    p.see("src_fault", int(other.readable()))
    message = other.read_one()
    if message is not None:
        p.see("src_message", p.message(message, MSRC, sleeper.thread))
    four = (0, 1, 2, 3)
    p.see("dst_while_blocked", p.pages(memory, four))
    _change_destination(p, uffd, memory, change)
    p.see("resolve_src", other.copy(MSRC + 2 * PAGE, SRC, PAGE))
    p.settle()
    p.see("result", results[0] if results else "still_blocked")
    if change != "munmap_dst_all":
        p.see("post", p.pages(memory, four))
    if change == "remove_event_pending":
        event = uffd.read_one()
        if event is not None:
            p.see("event", event_number(event))


def _change_destination(p: Probe, uffd: Uffd, memory: Memory, change: str) -> None:
    match change:
        case "remove_event_pending":
            p.start(_cause(memory, "remove_dontneed", DST + 4 * PAGE))
        case "munmap_dst_all":
            p.see("rc", p.attempt(munmap(p.caller, DST, memory.length)))
        case "munmap_dst_tail":
            p.see("rc", p.attempt(munmap(p.caller, DST + 3 * PAGE, PAGE)))
        case "unregister_dst":
            p.see("unreg", uffd.unregister(DST, memory.length))
        case "close_uffd_dup":
            uffd.close()
        case "fill_page2_in_dst":
            p.see("fill", uffd.zero(DST + 2 * PAGE, PAGE))
        case "reregister_wp":
            p.see("rereg", uffd.register(DST, memory.length, 2))
        case "mprotect_dst_read":
            p.see("rc", p.attempt(mprotect(p.caller, DST, memory.length, READ)))
