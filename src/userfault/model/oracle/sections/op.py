"""One ioctl, or one access, on one page in one state (s_op.c)."""

from __future__ import annotations

from userfault import abi
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.madvise import madvise
from userfault.model.mapping import munmap
from userfault.model.oracle.memory import ALIAS, DST, DST2, MSRC, SRC, Memory, mode_number
from userfault.model.oracle.probe import ACCESSES, Probe, Seen, Uffd, user_write
from userfault.model.oracle.sections import Unsupported
from userfault.model.pagemap import pagemap_entry

STATES = (
    "none",
    "present",
    "zeropage",
    "present_pagecache",
    "cache_only",
    "wp_present",
    "wp_zeropage",
    "wp_present_pagecache",
    "wp_marker_none",
    "wp_marker_cache",
    "poison_marker",
    "swapped",
    "wp_swapped",
)

OPERATIONS = (
    "copy",
    "copy_wp",
    "zeropage",
    "continue",
    "continue_wp",
    "writeprotect",
    "unwriteprotect",
    "move_dst",
    "move_src",
    "move_src_holes",
    "poison",
    "wake",
    "unregister",
)


def run(p: Probe, name: str, parts: list[str]) -> None:
    """op/MEM/MODE/fFEATURES/STATE/OP and access/MEM/MODE/fFEATURES[+user_mode_only]/STATE/ACCESS."""
    kind, mode, features, state, what = parts
    if state not in STATES or what not in (OPERATIONS if name == "op" else ACCESSES):
        raise Unsupported
    user_mode_only = features.endswith("+user_mode_only")
    asked = int(features.removesuffix("+user_mode_only")[1:], 16)
    memory = p.memory(kind)
    p.see("mem", kind)
    p.see("mode", mode)
    p.see("features", f"{asked:#x}")
    p.see("state", state)
    if name == "op":
        p.see("op", what)
        p.see("args", {"off": memory.target_offset, "len": memory.target_length})
    else:
        p.see("op", f"access:{what}")
        if user_mode_only:
            p.see("uffd_flags", "UFFD_USER_MODE_ONLY")
        p.see("args", {"off": memory.target_offset + 0x123, "write_val": 119})
    _before(p, memory, state)
    uffd = p.uffd(asked, abi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    registered = uffd.register(DST, memory.length, mode_number(mode))
    if registered["ret"]:
        p.see("setup_register", registered)
        return
    _after(p, memory, state, uffd)
    cache = 2 if state in ("swapped", "wp_swapped") else 1
    p.see("pre", p.target(memory, cache))
    if name == "op":
        _operate(p, memory, uffd, what, cache)
    else:
        _access(p, memory, uffd, what, cache)


def _state_range(memory: Memory) -> tuple[int, int]:
    """soff, slen: what is brought into the state; for THP the whole huge page."""
    return (DST, HUGE_PAGE) if memory.thp else (DST + memory.page_size, memory.page_size)


def _before(p: Probe, memory: Memory, state: str) -> None:
    """pre: what happens before the registration."""
    start, length = _state_range(memory)
    if state in ("present", "wp_present", "swapped", "wp_swapped"):
        p.fill(start, length, 0x11)
    elif state in ("zeropage", "wp_zeropage"):
        p.peek(start)
    elif state in ("present_pagecache", "wp_present_pagecache", "cache_only", "wp_marker_cache"):
        p.fill(ALIAS + memory.target_offset, memory.page_size, 0xCA)
        if state in ("present_pagecache", "wp_present_pagecache"):
            p.peek(DST + memory.target_offset)


def _after(p: Probe, memory: Memory, state: str, uffd: Uffd) -> None:
    """post: what happens after it."""
    start, length = _state_range(memory)
    if state.startswith("wp_"):
        done = uffd.wp(start, length, abi.UFFDIO_WRITEPROTECT_MODE_WP)
        if done["ret"]:
            p.see("setup_wp", done)
    elif state == "poison_marker":
        done = uffd.poison(DST + memory.target_offset, memory.target_length)
        if done["ret"]:
            p.see("setup_poison", done)
    if state in ("swapped", "wp_swapped"):
        if memory.file is not None:
            p.call(munmap(p.caller, ALIAS, memory.length))
        p.attempt(madvise(p.caller, DST + memory.target_offset, memory.page_size, "PAGEOUT"))
        if pagemap_entry(p.process.mm, DST + memory.target_offset).present:
            p.see("setup_swap", "FAILED")


def _operate(p: Probe, memory: Memory, uffd: Uffd, what: str, cache: int) -> None:
    at, length = DST + memory.target_offset, memory.target_length
    if what == "move_dst":
        p.mmap(MSRC, max(length, HUGE_PAGE))
        if memory.kind == "anon_thp_2m":
            p.call(madvise(p.caller, MSRC, length, "HUGEPAGE"))
        p.fill(MSRC, length, 0x5A)
    elif what in ("move_src", "move_src_holes"):
        p.mmap(DST2, 2 * HUGE_PAGE)
        if memory.thp:
            p.call(madvise(p.caller, DST2, 2 * HUGE_PAGE, "HUGEPAGE"))
        second = uffd.register(DST2, 2 * HUGE_PAGE, abi.UFFDIO_REGISTER_MODE_MISSING)
        if second["ret"]:
            p.see("setup_reg2", second)
    p.see("result", _one(memory, uffd, what, at, length))
    p.see("post", p.target(memory, cache))
    plain = Memory("anon")
    if what == "move_dst":
        p.see("src_after", p.pages(plain, (0,), base=MSRC))
    elif what in ("move_src", "move_src_holes"):
        p.see("dst2_after", p.pages(plain, (memory.target_offset // PAGE,), base=DST2))
    elif what == "unregister":
        p.see("vmflags", p.vmflags(DST, memory.length))
    writer = p.start(user_write(at + 0x123))
    pumped = p.pump(uffd, memory, [writer], "stop")
    p.see("then_write", pumped.messages)
    p.see("then_write_result", writer.seen(DST))


def _one(memory: Memory, uffd: Uffd, what: str, at: int, length: int) -> Seen:
    match what:
        case "copy" | "copy_wp":
            return uffd.copy(at, SRC, length, abi.UFFDIO_COPY_MODE_WP if what == "copy_wp" else 0)
        case "zeropage":
            return uffd.zero(at, length)
        case "continue" | "continue_wp":
            return uffd.cont(at, length, abi.UFFDIO_CONTINUE_MODE_WP if what == "continue_wp" else 0)
        case "writeprotect":
            return uffd.wp(at, length, abi.UFFDIO_WRITEPROTECT_MODE_WP)
        case "unwriteprotect":
            return uffd.wp(at, length, 0)
        case "move_dst":
            return uffd.move(at, MSRC, length)
        case "move_src":
            return uffd.move(DST2 + memory.target_offset, at, length)
        case "move_src_holes":
            return uffd.move(DST2 + memory.target_offset, at, length, abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
        case "poison":
            return uffd.poison(at, length)
        case "wake":
            return uffd.wake(at, length)
    return uffd.unregister(DST, memory.length)


def _access(p: Probe, memory: Memory, uffd: Uffd, what: str, cache: int) -> None:
    accessor = p.start(ACCESSES[what](DST + memory.target_offset + 0x123))
    pumped = p.pump(uffd, memory, [accessor], "resolve", most=6)
    p.see("messages", pumped.messages)
    if pumped.stuck:
        p.see("stuck", pumped.stuck)
    p.see("result", accessor.seen(DST))
    p.see("post", p.target(memory, cache))
