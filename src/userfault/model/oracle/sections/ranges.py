"""Ranges with one odd page, and bad arguments (s_range.c)."""

from __future__ import annotations

from typing import NamedTuple

from userfault import abi
from userfault.model.fill import Fill
from userfault.model.fill_copy import copy
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.mapping import READ, mprotect, munmap
from userfault.model.oracle.memory import ALIAS, DST, MSRC, SRC, Memory
from userfault.model.oracle.probe import UNPOPULATED, Probe, Seen, Uffd, result
from userfault.model.oracle.sections import Unsupported
from userfault.model.oracle.sections.processes import fork_idle
from userfault.model.pagecache import File
from userfault.model.reply import Reply
from userfault.model.step import Op
from userfault.model.thread import Thread

OPERATIONS = (
    "copy",
    "copy_wp",
    "zeropage",
    "continue",
    "continue_wp",
    "poison",
    "move",
    "move_holes",
    "copy_src_unmapped",
    "writeprotect",
)
OBSTACLES = (
    "none",
    "present",
    "hole",
    "wp_marker",
    "poison_marker",
    "src_hole",
    "src_zeropage",
    "src_shared_exclusive0",
)
FOUR = (0, 1, 2, 3)


def run(p: Probe, name: str, parts: list[str]) -> None:
    """range/MEM/OP/OBSTACLE@PAGE and bad/ARGUMENT/OP."""
    if name == "range":
        kind, operation, where = parts
        obstacle, _, page = where.partition("@")
        if operation not in OPERATIONS or obstacle not in OBSTACLES:
            raise Unsupported
        _range(p, kind, operation, obstacle, int(page))
    else:
        argument = "/".join(parts[:-1])
        if argument not in ARGUMENTS or parts[-1] not in BAD_OPERATIONS:
            raise Unsupported
        _bad(p, ARGUMENTS[argument], parts[-1])


def _range(p: Probe, kind: str, operation: str, obstacle: str, odd: int) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    mode = 7 if memory.fileish else 3
    p.see("mem", kind)
    p.see("mode", "missing+wp+minor" if memory.fileish else "missing+wp")
    p.see("features", f"{UNPOPULATED:#x}")
    p.see("op", operation)
    p.see("state", f"{obstacle} at page {odd}")
    p.see("args", {"off": 0, "pages": 4, "page_size": size})
    if operation.startswith("continue"):
        for i in FOUR:
            if not (i == odd and obstacle == "hole"):
                p.fill(ALIAS + i * size, size, 0xC0 + i)
    if obstacle == "present":
        p.fill(DST + odd * size, size, 0x11)
    moves = operation.startswith("move")
    if moves:
        p.mmap(MSRC, 4 * PAGE)
        for i in FOUR:
            if i == odd and obstacle == "src_hole":
                continue
            if i == odd and obstacle == "src_zeropage":
                p.peek(MSRC + i * PAGE)
                continue
            p.fill(MSRC + i * PAGE, PAGE, 0x50 + i)
        if obstacle == "src_shared_exclusive0":
            fork_idle(p)
    if operation == "copy_src_unmapped":
        p.call(munmap(p.caller, SRC + odd * size, size))
    uffd = p.uffd(UNPOPULATED)
    uffd.register(DST, memory.length, mode)
    if obstacle == "wp_marker":
        uffd.wp(DST + odd * size, size, abi.UFFDIO_WRITEPROTECT_MODE_WP)
    if obstacle == "poison_marker":
        uffd.poison(DST + odd * size, size)
    p.see("pre", p.pages(memory, FOUR, cache=1))
    first = _operate(memory, uffd, operation, 0, 4)
    p.see("result", first)
    p.see("post", p.pages(memory, FOUR, cache=1))
    if moves:
        p.see("src_after", p.pages(Memory("anon"), FOUR, base=MSRC))
    done = first.get("out")
    if first["ret"] and isinstance(done, int) and done > 0:
        pages = done // size
        if pages < 4:
            p.see("retry_rest", _operate(memory, uffd, operation, pages, 4 - pages))
        if pages < 3:
            p.see("retry_skip_one", _operate(memory, uffd, operation, pages + 1, 3 - pages))
        p.see("post_retry", p.pages(memory, FOUR, cache=1))


def _operate(memory: Memory, uffd: Uffd, operation: str, first: int, pages: int) -> Seen:
    """doop."""
    size = memory.page_size
    at, length = DST + first * size, pages * size
    match operation:
        case "copy" | "copy_src_unmapped":
            return uffd.copy(at, SRC + first * size, length)
        case "copy_wp":
            return uffd.copy(at, SRC + first * size, length, abi.UFFDIO_COPY_MODE_WP)
        case "zeropage":
            return uffd.zero(at, length)
        case "continue":
            return uffd.cont(at, length)
        case "continue_wp":
            return uffd.cont(at, length, abi.UFFDIO_CONTINUE_MODE_WP)
        case "poison":
            return uffd.poison(at, length)
        case "move":
            return uffd.move(at, MSRC + first * size, length)
        case "move_holes":
            return uffd.move(at, MSRC + first * size, length, abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES)
    return uffd.wp(at, length, abi.UFFDIO_WRITEPROTECT_MODE_WP)


# Bad arguments. The layout, in pages from DST: [0, 4) registered; [4, 8) registered, read-only; [8, 12) not
# registered; [12, 16) hole; [16, 20) another userfaultfd's; [20, 24) registered MISSING; [32, 36) shmem,
# registered; at 16 MiB two hugetlb pages, registered.

BIG = 0x7FFFFFFFF000  # the end of the address space
KERNEL = 0xFFFF800000000000
BAD_OPERATIONS = (
    "register",
    "unregister",
    "wake",
    "copy",
    "zeropage",
    "writeprotect",
    "unwriteprotect",
    "continue",
    "poison",
    "move",
)
_WORD = 1 << 64


class Argument(NamedTuple):
    """One argument: start from DST (or absolute), length, mode, and which odd source."""

    start: int
    length: int
    mode: int = 0
    source: str = ""
    absolute: bool = False


_ONE = (PAGE, PAGE)
ARGUMENTS = {
    "ok_one_page": Argument(*_ONE),
    "start_unaligned": Argument(PAGE + 1, PAGE),
    "len_unaligned": Argument(PAGE, PAGE + 1),
    "len_zero": Argument(PAGE, 0),
    "len_less_than_page": Argument(PAGE, 100),
    "wrap_around": Argument(PAGE, -PAGE),
    "len_all_ones_aligned": Argument(PAGE, -4 * PAGE),
    "start_task_size": Argument(BIG, PAGE, absolute=True),
    "start_last_page": Argument(BIG - PAGE, PAGE, absolute=True),
    "end_beyond_task_size": Argument(BIG - PAGE, 2 * PAGE, absolute=True),
    "start_kernel_addr": Argument(KERNEL, PAGE, absolute=True),
    "start_zero": Argument(0, PAGE, absolute=True),
    "unregistered_vma": Argument(8 * PAGE, PAGE),
    "hole": Argument(12 * PAGE, PAGE),
    "reg_then_unregistered": Argument(7 * PAGE, 2 * PAGE),
    "reg_last_then_hole_via_unreg": Argument(11 * PAGE, 2 * PAGE),
    "hole_then_other": Argument(15 * PAGE, 2 * PAGE),
    "two_registered_vmas": Argument(3 * PAGE, 2 * PAGE),
    "read_only_vma": Argument(5 * PAGE, PAGE),
    "other_uffd_vma": Argument(17 * PAGE, PAGE),
    "other_uffd_then_ours": Argument(19 * PAGE, 2 * PAGE),
    "hole_before_registered_far": Argument(30 * PAGE, 4 * PAGE),
    "shmem_vma": Argument(33 * PAGE, PAGE),
    "past_vma_end_into_hole": Argument(35 * PAGE, 2 * PAGE),
    "bad_mode_bit_2": Argument(*_ONE, 4),
    "bad_mode_bit_8": Argument(*_ONE, 0x100),
    "bad_mode_bit_63": Argument(*_ONE, 1 << 63),
    "mode_1": Argument(*_ONE, 1),
    "mode_2": Argument(*_ONE, 2),
    "mode_3": Argument(*_ONE, 3),
    "hugetlb_ok": Argument(16 << 20, 2 << 20),
    "hugetlb_4k_len": Argument(16 << 20, PAGE),
    "hugetlb_4k_start": Argument((16 << 20) + PAGE, 2 << 20),
    "hugetlb_4k_both": Argument((16 << 20) + PAGE, PAGE),
    "hugetlb_end_unaligned": Argument(16 << 20, (2 << 20) + PAGE),
    "src_unaligned": Argument(*_ONE, source="unaligned"),
    "src_null": Argument(*_ONE, source="null"),
    "src_unmapped": Argument(*_ONE, source="unmapped"),
    "src_wrap": Argument(PAGE, 2 * PAGE, source="wrap"),
    "src_kernel": Argument(*_ONE, source="kernel"),
    "src_prot_none": Argument(*_ONE, source="prot_none"),
    "src_eq_dst": Argument(*_ONE, source="eq_dst"),
    "src_beyond_task": Argument(*_ONE, source="beyond_task"),
    "src_read_only": Argument(*_ONE, source="read_only"),
    "src_overlap_dst": Argument(PAGE, 2 * PAGE, source="overlap_dst"),
}
_NAMES = {argument: name for name, argument in ARGUMENTS.items()}


def _bad(p: Probe, argument: Argument, operation: str) -> None:
    uffd = _lay_out(p, operation)
    start = argument.start if argument.absolute else DST + argument.start
    length = argument.length % _WORD
    source = _source(p, argument, start)
    p.see("op", operation)
    p.see("state", _NAMES[argument])
    p.see(
        "args",
        {
            "start": f"{'' if argument.absolute else 'base+'}{argument.start:#x}",
            "len": f"{length:#x}",
            "mode": f"{argument.mode:#x}",
            "src": _NAMES[argument] if argument.source else "anon page 0xC0",
        },
    )
    if argument.source in ("eq_dst", "overlap_dst") and operation == "copy":
        _copy_from_itself(p, uffd, start, source, length)
        return
    done = _call(uffd, operation, start, length, argument.mode, source)
    p.see("result", done)
    if operation in ("register", "unregister") or not done["ret"]:
        p.see("vmflags", p.vmflags(DST, 40 * PAGE))


def _lay_out(p: Probe, operation: str) -> Uffd:
    p.mmap(DST, 12 * PAGE)
    p.mmap(DST + 16 * PAGE, 8 * PAGE)
    shmem = File(p.kernel, "shmem", 4 * PAGE)
    p.mmap(DST + 32 * PAGE, 4 * PAGE, shared=True, file=shmem)
    if operation == "continue":
        for i in FOUR:
            shmem.write(i * PAGE, b"\xca" * PAGE)
    hugetlb = File(p.kernel, "hugetlb", 2 * HUGE_PAGE)
    p.mmap(DST + (16 << 20), 2 * HUGE_PAGE, shared=True, file=hugetlb)
    if operation == "continue":
        p.mmap(ALIAS, 2 * HUGE_PAGE, shared=True, file=hugetlb)
        p.poke(ALIAS, 1)
    p.mmap(SRC, 4 * HUGE_PAGE)
    p.fill(SRC, 3 * HUGE_PAGE, 0xC0)
    p.call(mprotect(p.caller, DST + 4 * PAGE, 4 * PAGE, READ))
    uffd, other = p.uffd(0), p.uffd(0)
    uffd.register(DST, 8 * PAGE, 3)
    other.register(DST + 16 * PAGE, 4 * PAGE, 3)
    uffd.register(DST + 20 * PAGE, 4 * PAGE, 1)
    uffd.register(DST + 32 * PAGE, 4 * PAGE, 7)
    uffd.register(DST + (16 << 20), 2 * HUGE_PAGE, 7)
    return uffd


def _source(p: Probe, argument: Argument, start: int) -> int:
    match argument.source:
        case "unaligned":
            return SRC + 1
        case "null":
            return 0
        case "unmapped":
            return SRC + 5 * HUGE_PAGE
        case "wrap":
            return _WORD - PAGE
        case "kernel":
            return KERNEL
        case "prot_none":
            p.call(mprotect(p.caller, SRC, PAGE, 0))
        case "eq_dst":
            return start
        case "beyond_task":
            return BIG - PAGE
        case "read_only":
            p.call(mprotect(p.caller, SRC, PAGE, READ))
        case "overlap_dst":
            return start + PAGE
    return SRC


def _call(uffd: Uffd, operation: str, start: int, length: int, mode: int, source: int) -> Seen:
    match operation:
        case "register":
            return uffd.register(start, length, mode or 1)
        case "unregister":
            return uffd.unregister(start, length)
        case "wake":
            return uffd.wake(start, length)
        case "copy":
            return uffd.copy(start, source, length, mode)
        case "zeropage":
            return uffd.zero(start, length, mode)
        case "writeprotect":
            return uffd.wp(start, length, mode | 1)
        case "unwriteprotect":
            return uffd.wp(start, length, mode)
        case "continue":
            return uffd.cont(start, length, mode)
        case "poison":
            return uffd.poison(start, length, mode)
    return uffd.move(start, source, length, mode)


def _copy_from_itself(p: Probe, uffd: Uffd, start: int, source: int, length: int) -> None:
    """A COPY whose source is missing on the same userfaultfd: it sleeps on itself."""
    replies: list[Reply] = []

    def nested(thread: Thread) -> Op[tuple[int, int, int]]:
        replies.append((yield from copy(thread, uffd.ctx, Fill(start, length, 0, source))))
        return 0, 0, -1

    accessor = p.start(nested)
    pumped = p.pump(uffd, Memory("anon"), [accessor], "stop")
    p.see("messages", pumped.messages)
    p.see("ioctl_blocked", int(not accessor.done))
    p.see("zeropage_on_src_by_other_thread", uffd.zero(source // PAGE * PAGE, PAGE))
    p.settle()
    p.see("result", result(replies[0], "out") if replies else "still_blocked")
