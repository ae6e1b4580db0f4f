"""MOVE, huge pages, shared page tables (s_move.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from userfault import abi
from userfault.model.errnos import errno_name
from userfault.model.exit import exit_process
from userfault.model.fork import fork
from userfault.model.layout import HUGE_PAGE, PAGE, PUD_SPAN
from userfault.model.madvise import madvise, mlock
from userfault.model.mapping import READ, mprotect, munmap
from userfault.model.mremap import mremap
from userfault.model.oracle.memory import DST, MODE_NAMES, MSRC, RTO, SRC, Memory, mode_number
from userfault.model.oracle.probe import (
    EXACT,
    FORK,
    REMAP,
    REMOVE,
    UNPOPULATED,
    Accessor,
    Probe,
    Seen,
    Uffd,
    user_read,
    user_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.oracle.sections.processes import fork_idle
from userfault.model.oracle.sections.vmops import answer
from userfault.model.pagecache import File
from userfault.model.step import Op
from userfault.model.thread import Thread

FOUR = (0, 1, 2, 3)
HUGE = (0, 1, 2, 511)
PLAIN = Memory("anon")
HOLES = abi.UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES


def run(p: Probe, name: str, parts: list[str]) -> None:
    """move/CASE, move_thp/CASE, thp/..., hugetlb_pmd_share/MODE."""
    case = parts[0]
    if name == "move" and case in MOVES:
        _move(p, case)
    elif name == "move_thp" and case in HUGE_MOVES:
        _move_huge(p, case)
    elif name == "thp" and case == "collapse":
        _collapse(p, *parts[1:])
    elif name == "thp" and case in HUGE_CASES:
        _huge(p, case)
    elif name == "hugetlb_pmd_share" and (case in MODE_NAMES or case == "unregistered"):
        _shared_tables(p, case)
    else:
        raise Unsupported


def _first(p: Probe, key: str, uffd: Uffd, base: int, access: Callable[[Thread], Op[Any]]) -> None:
    """first_ev: an access and the first message it raises."""
    accessor = p.start(access)
    p.see(key, p.pump(uffd, PLAIN, [accessor], "stop", base=base).messages)
    p.see(f"{key}_result", accessor.seen(base))


MOVES = (
    "basic_4pages",
    "src_registered_missing",
    "src_registered_wp_wpd_page_dst_missing",
    "src_wpd_dst_wp_registered",
    "dst_wp_only",
    "same_vma",
    "same_page",
    "overlap_fwd",
    "src_hole_first",
    "src_hole_mid",
    "src_hole_allow",
    "src_all_holes_allow",
    "src_no_pagetable_allow",
    "src_zeropage",
    "src_shared_after_fork",
    "src_shared_after_fork_child_exited",
    "src_prot_ro_dst_rw",
    "both_ro",
    "src_mlocked",
    "both_mlocked",
    "dst_mlocked",
    "src_unmapped",
    "src_spans_vma_end",
    "dst_spans_vma_end",
    "dst_unregistered",
    "src_shmem",
    "dst_shmem_private",
    "src_hugetlb",
    "mode_bit2",
    "dontwake",
    "unaligned_src",
    "unaligned_dst",
    "unaligned_len",
    "len0",
    "src_other_uffd",
    "dst_marker_wp",
    "waiter_woken",
    "src_madv_free",
    "dst_prot_none_both",
    "partial_then_retry",
    "src_then_access_event",
    "wake_only_dst",
    "move_wp_bit_dst_registered_wp_src_unreg",
    "dst_guard",
    "src_guard",
    "dst_partial_eexist_first",
)


class _Arguments:
    """What the MOVE will be called with; a case changes it."""

    def __init__(self, uffd: Uffd) -> None:
        self.uffd = uffd
        self.src, self.dst, self.length, self.mode = MSRC, DST, 4 * PAGE, 0
        self.waiter: Accessor | None = None


_OTHER_SOURCE = ("src_unmapped", "src_shmem", "src_hugetlb")
_HOLES = {
    "src_hole_first": (0,),
    "src_hole_mid": (2,),
    "src_hole_allow": (2,),
    "src_all_holes_allow": FOUR,
    "src_no_pagetable_allow": FOUR,
}


def _move(p: Probe, case: str) -> None:
    p.see("op", f"move:{case}")
    arguments = _Arguments(p.uffd(0))
    uffd = arguments.uffd
    if case not in _OTHER_SOURCE:
        p.mmap(MSRC, 8 * PAGE)
    if case != "dst_shmem_private":
        p.mmap(DST, 8 * PAGE)
    mode = 1
    if case in ("src_wpd_dst_wp_registered", "move_wp_bit_dst_registered_wp_src_unreg", "dst_marker_wp"):
        mode = 3
    elif case == "dst_wp_only":
        mode = 2
    if case not in ("dst_unregistered", "dst_shmem_private"):
        uffd.register(DST, 4 * PAGE, mode)
    if case not in _OTHER_SOURCE:
        for page in FOUR:
            if page in _HOLES.get(case, ()):
                continue
            if case == "src_zeropage":
                p.peek(MSRC + page * PAGE)
            else:
                p.poke(MSRC + page * PAGE, 0x50 + page)
    if case == "src_all_holes_allow":
        p.poke(MSRC + 5 * PAGE, 1)
    _prepare(p, case, arguments)
    uffd = arguments.uffd
    if case not in (*_OTHER_SOURCE, "dst_shmem_private"):
        p.see("src_pre", p.pages(PLAIN, FOUR, base=MSRC))
    done = uffd.move(arguments.dst, arguments.src, arguments.length, arguments.mode)
    p.see("result", done)
    if case not in (*_OTHER_SOURCE, "dst_prot_none_both"):
        p.see("src_post", p.pages(PLAIN, FOUR, base=MSRC))
    if case not in ("dst_shmem_private", "dst_prot_none_both"):
        p.see("dst_post", p.pages(PLAIN, FOUR))
    if case in ("partial_then_retry", "dst_partial_eexist_first"):
        _retry(p, arguments, done)
    if arguments.waiter is not None:
        p.settle()
        p.see("waiter_done", arguments.waiter.done)
        if not arguments.waiter.done:
            uffd.wake(DST, 4 * PAGE)
            p.settle()
            p.see("waiter_done_after_wake", arguments.waiter.done)
    if case in ("src_then_access_event", "src_registered_missing"):
        _first(p, "src_write", uffd, MSRC, user_write(MSRC))
    if case in (
        "src_registered_wp_wpd_page_dst_missing",
        "src_wpd_dst_wp_registered",
        "move_wp_bit_dst_registered_wp_src_unreg",
    ):
        _first(p, "dst_write", uffd, DST, user_write(DST))


def _retry(p: Probe, arguments: _Arguments, done: Seen) -> None:
    out = done.get("out")
    moved = out if isinstance(out, int) and out > 0 else 0
    uffd, dst, src, length = arguments.uffd, arguments.dst, arguments.src, arguments.length
    p.see("retry", uffd.move(dst + moved, src + moved, length - moved))
    moved += PAGE
    p.see("retry_skip", uffd.move(dst + moved, src + moved, length - moved))
    p.see("dst_post2", p.pages(PLAIN, FOUR))


def _prepare(p: Probe, case: str, a: _Arguments) -> None:
    """The case's own preparations."""
    uffd = a.uffd
    match case:
        case "src_registered_missing" | "src_then_access_event":
            uffd.register(MSRC, 4 * PAGE, 1)
        case "src_registered_wp_wpd_page_dst_missing" | "src_wpd_dst_wp_registered":
            uffd.register(MSRC, 4 * PAGE, 2)
            uffd.wp(MSRC, 2 * PAGE, 1)
        case "same_vma":
            _fresh_destination(p, uffd)
            for page in FOUR:
                uffd.copy(DST + (4 + page) * PAGE, MSRC + page * PAGE, PAGE)
            a.src = DST + 4 * PAGE
        case "same_page":
            uffd.copy(DST, MSRC, 4 * PAGE)
            a.src = DST
        case "overlap_fwd":
            _fresh_destination(p, uffd)
            for page in (1, 2, 3, 4):
                uffd.copy(DST + page * PAGE, MSRC, PAGE)
            a.src = DST + PAGE
        case "src_hole_allow" | "src_all_holes_allow" | "src_no_pagetable_allow":
            a.mode = HOLES
        case "src_shared_after_fork":
            fork_idle(p)
        case "src_shared_after_fork_child_exited":
            p.call(fork(p.caller, lambda child: exit_process(child, child.process)))
            p.settle()
        case "src_prot_ro_dst_rw":
            p.call(mprotect(p.caller, MSRC, 8 * PAGE, READ))
        case "both_ro":
            p.call(mprotect(p.caller, MSRC, 8 * PAGE, READ))
            p.call(mprotect(p.caller, DST, 8 * PAGE, READ))
        case "src_mlocked" | "both_mlocked" | "dst_mlocked":
            if case != "dst_mlocked":
                p.call(mlock(p.caller, MSRC, 8 * PAGE))
            if case != "src_mlocked":
                p.see("mlock2_dst", p.attempt(mlock(p.caller, DST, 4 * PAGE, on_fault=True)))
        case "src_spans_vma_end":
            a.src = MSRC + 6 * PAGE
        case "dst_spans_vma_end":
            p.call(munmap(p.caller, DST + 4 * PAGE, 4 * PAGE))
            a.dst = DST + 2 * PAGE
        case "src_shmem":
            p.mmap(MSRC, 8 * PAGE, file=File(p.kernel, "shmem", 8 * PAGE))
            for page in FOUR:
                p.poke(MSRC + page * PAGE, 1)
        case "dst_shmem_private":
            p.mmap(DST, 8 * PAGE, file=File(p.kernel, "shmem", 8 * PAGE))
            uffd.register(DST, 4 * PAGE, 1)
        case "src_hugetlb":
            p.mmap(MSRC, HUGE_PAGE, hugetlb=True)
            p.poke(MSRC, 1)
        case "mode_bit2":
            a.mode = 4
        case "dontwake":
            a.mode = abi.UFFDIO_MOVE_MODE_DONTWAKE
            a.waiter = p.start(user_read(DST))
        case "unaligned_src":
            a.src = MSRC + 1
        case "unaligned_dst":
            a.dst = DST + 1
        case "unaligned_len":
            a.length = PAGE + 1
        case "len0":
            a.length = 0
        case "src_other_uffd":
            p.uffd(0).register(MSRC, 4 * PAGE, 3)
        case "dst_marker_wp":
            uffd.close()
            a.uffd = p.uffd(UNPOPULATED)
            a.uffd.register(DST, 4 * PAGE, 3)
            a.uffd.wp(DST + 2 * PAGE, PAGE, 1)
        case "waiter_woken":
            a.waiter = p.start(user_read(DST + PAGE))
        case "src_madv_free":
            p.call(madvise(p.caller, MSRC, 4 * PAGE, "FREE"))
        case "dst_prot_none_both":
            p.call(mprotect(p.caller, MSRC, 8 * PAGE, 0))
            p.call(mprotect(p.caller, DST, 8 * PAGE, 0))
        case "partial_then_retry":
            uffd.copy(DST + 2 * PAGE, MSRC, PAGE)
        case "wake_only_dst":
            a.waiter = p.start(user_read(DST + 3 * PAGE))
            a.length = 2 * PAGE
        case "dst_guard":
            p.attempt(madvise(p.caller, DST + PAGE, PAGE, "GUARD_INSTALL"))
        case "src_guard":
            p.attempt(madvise(p.caller, MSRC + PAGE, PAGE, "GUARD_INSTALL"))
        case "dst_partial_eexist_first":
            uffd.copy(DST, MSRC + 4 * PAGE, PAGE)


def _fresh_destination(p: Probe, uffd: Uffd) -> None:
    p.call(munmap(p.caller, DST, 8 * PAGE))
    p.mmap(DST, 8 * PAGE)
    uffd.register(DST, 8 * PAGE, 1)


HUGE_MOVES = (
    "whole_pmd",
    "sub_page",
    "dst_unaligned",
    "dst_pmd_has_pte_table",
    "src_partially_mapped",
    "dst_is_thp",
    "huge_zero_src",
    "whole_two_pmds_len",
    "src_wp_pmd",
    "dst_nohugepage",
)


def _move_huge(p: Probe, case: str) -> None:
    p.see("op", f"move_thp:{case}")
    uffd = p.uffd(0)
    p.mmap(MSRC, 2 * HUGE_PAGE)
    p.mmap(DST, 2 * HUGE_PAGE)
    p.call(madvise(p.caller, MSRC, 2 * HUGE_PAGE, "HUGEPAGE"))
    p.call(madvise(p.caller, DST, 2 * HUGE_PAGE, "NOHUGEPAGE" if case == "dst_nohugepage" else "HUGEPAGE"))
    if case == "dst_is_thp":
        p.fill(DST, HUGE_PAGE, 7)
    uffd.register(DST, 2 * HUGE_PAGE, 3 if case == "src_wp_pmd" else 1)
    if case == "huge_zero_src":
        p.peek(MSRC)
    else:
        p.fill(MSRC, HUGE_PAGE, 0x51)
        if case == "whole_two_pmds_len":
            p.fill(MSRC + HUGE_PAGE, HUGE_PAGE, 0x52)
    if case == "src_partially_mapped":
        p.call(madvise(p.caller, MSRC + 5 * PAGE, PAGE, "DONTNEED"))
    if case == "dst_pmd_has_pte_table":
        uffd.zero(DST + HUGE_PAGE - PAGE, PAGE)
        p.call(madvise(p.caller, DST + HUGE_PAGE - PAGE, PAGE, "DONTNEED"))
    if case == "src_wp_pmd":
        uffd.register(MSRC, 2 * HUGE_PAGE, 2)
        uffd.wp(MSRC, HUGE_PAGE, 1)
    p.see("src_pre", p.pages(PLAIN, HUGE, base=MSRC))
    to, at, length = {
        "sub_page": (DST + PAGE, MSRC + PAGE, PAGE),
        "dst_unaligned": (DST + PAGE, MSRC, HUGE_PAGE),
        "whole_two_pmds_len": (DST, MSRC, 2 * HUGE_PAGE),
    }.get(case, (DST, MSRC, HUGE_PAGE))
    p.see("result", uffd.move(to, at, length))
    p.see("src_post", p.pages(PLAIN, HUGE, base=MSRC))
    p.see("dst_post", p.pages(PLAIN, HUGE))


def _collapse(p: Probe, kind: str, mode_name: str, holes_text: str, wp_text: str) -> None:
    """thp/collapse/anon|shmem/MODE/hHOLES/wWP."""
    shmem, holes, wp = kind == "shmem", int(holes_text[1:]), int(wp_text[1:])
    mode = 0 if mode_name == "unregistered" else mode_number(mode_name)
    p.see("mem", "shmem_shared" if shmem else "anon")
    p.see("mode", mode_name)
    p.see("state", ("full", "one_hole", "wp_marker_hole")[holes] + ("+one_wp_page" if wp else ""))
    p.see("op", "MADV_COLLAPSE")
    if shmem:
        p.mmap(DST, HUGE_PAGE, shared=True, file=File(p.kernel, "shmem", HUGE_PAGE))
    else:
        p.mmap(DST, HUGE_PAGE)
    for page in range(512):
        if not (holes and page == 7):
            p.poke(DST + page * PAGE, page & 255)
    uffd = p.uffd(UNPOPULATED)
    if mode:
        p.see("register", uffd.register(DST, HUGE_PAGE, mode))
    if wp:
        uffd.wp(DST + 3 * PAGE, PAGE, 1)
    if holes == 2:
        uffd.wp(DST + 7 * PAGE, PAGE, 1)
    returned = p.attempt(madvise(p.caller, DST, HUGE_PAGE, "COLLAPSE"))
    p.see("result", {"ret": returned, "errno": errno_name(p.errno)})
    p.see("post", p.pages(PLAIN, (0, 3, 7, 511)))
    if mode:
        _first(p, "write_page7", uffd, DST, user_write(DST + 7 * PAGE))
        _first(p, "write_page3", uffd, DST, user_write(DST + 3 * PAGE))


HUGE_CASES = (
    "copy_2m_into_hugepage_vma",
    "wp_only_first_touch_hugepage",
    "wp_only_unpop_marker_first_touch",
    "wp_subrange_splits",
    "unwp_subrange_splits",
    "wp_pmd_write_event_exact",
    "missing_first_touch_zeropage",
    "copy_onto_thp",
    "zeropage_onto_thp",
    "poison_onto_thp",
    "dontneed_sub_with_remove_event",
    "mremap_wp_pmd_with_event",
    "mremap_wp_pmd_no_event",
    "fork_wp_pmd_with_event",
    "register_subrange_of_thp",
    "unregister_wp_pmd",
    "wp_only_huge_marker_read",
    "missing_wp_copy_wp_2m",
    "unwp_4k_waiter_on_pmd",
)
_FEATURES = {
    "wp_only_unpop_marker_first_touch": UNPOPULATED,
    "wp_only_huge_marker_read": UNPOPULATED,
    "wp_pmd_write_event_exact": EXACT,
    "dontneed_sub_with_remove_event": REMOVE,
    "mremap_wp_pmd_with_event": REMAP,
    "fork_wp_pmd_with_event": FORK,
}
_MISSING_MODE = (
    "copy_2m_into_hugepage_vma",
    "missing_first_touch_zeropage",
    "copy_onto_thp",
    "zeropage_onto_thp",
    "poison_onto_thp",
    "dontneed_sub_with_remove_event",
)
_TOUCHED = (
    "wp_subrange_splits",
    "unwp_subrange_splits",
    "wp_pmd_write_event_exact",
    "copy_onto_thp",
    "zeropage_onto_thp",
    "poison_onto_thp",
    "dontneed_sub_with_remove_event",
    "mremap_wp_pmd_with_event",
    "mremap_wp_pmd_no_event",
    "fork_wp_pmd_with_event",
    "register_subrange_of_thp",
    "unregister_wp_pmd",
    "unwp_4k_waiter_on_pmd",
)
_PROTECTED = (
    "unwp_subrange_splits",
    "wp_pmd_write_event_exact",
    "mremap_wp_pmd_with_event",
    "mremap_wp_pmd_no_event",
    "fork_wp_pmd_with_event",
    "unregister_wp_pmd",
    "unwp_4k_waiter_on_pmd",
)


def _huge(p: Probe, case: str) -> None:
    p.see("op", f"thp:{case}")
    uffd = p.uffd(_FEATURES.get(case, 0))
    p.mmap(DST, 2 * HUGE_PAGE)
    p.call(madvise(p.caller, DST, 2 * HUGE_PAGE, "HUGEPAGE"))
    p.mmap(SRC, 2 * HUGE_PAGE)
    p.fill(SRC, 2 * HUGE_PAGE, 0xC0)
    mode = 1 if case in _MISSING_MODE else 3 if case == "missing_wp_copy_wp_2m" else 2
    if case in _TOUCHED:
        p.fill(DST, HUGE_PAGE, 0x11)
    part = case == "register_subrange_of_thp"
    start, length = (DST + 4 * PAGE, 8 * PAGE) if part else (DST, 2 * HUGE_PAGE)
    p.see("register", uffd.register(start, length, mode))
    if case in _PROTECTED:
        uffd.wp(DST, HUGE_PAGE, 1)
    p.see("pre", p.pages(PLAIN, HUGE))
    _huge_step(p, case, uffd)
    p.see("post", p.pages(PLAIN, HUGE))


def _huge_step(p: Probe, case: str, uffd: Uffd) -> None:
    match case:
        case "copy_2m_into_hugepage_vma":
            p.see("result", uffd.copy(DST, SRC, HUGE_PAGE))
        case "wp_only_first_touch_hugepage":
            p.poke(DST + PAGE, 1)
        case "wp_only_unpop_marker_first_touch":
            p.see("wp", uffd.wp(DST, HUGE_PAGE, 1))
            p.see("after_wp", p.pages(PLAIN, HUGE))
            _first(p, "write", uffd, DST, user_write(DST + PAGE))
        case "wp_subrange_splits":
            p.see("result", uffd.wp(DST + PAGE, PAGE, 1))
        case "unwp_subrange_splits":
            p.see("result", uffd.wp(DST + PAGE, PAGE, 0))
            _first(p, "write_page1", uffd, DST, user_write(DST + PAGE))
            _first(p, "write_page2", uffd, DST, user_write(DST + 2 * PAGE))
        case "wp_pmd_write_event_exact":
            _first(p, "write", uffd, DST, user_write(DST + 5 * PAGE + 0x123))
        case "missing_first_touch_zeropage":
            p.see("result", uffd.zero(DST, HUGE_PAGE))
        case "copy_onto_thp":
            p.see("result", uffd.copy(DST + PAGE, SRC, PAGE))
        case "zeropage_onto_thp":
            p.see("result", uffd.zero(DST + PAGE, PAGE))
        case "poison_onto_thp":
            p.see("result", uffd.poison(DST + PAGE, PAGE))
        case "dontneed_sub_with_remove_event":
            dropper = p.start(lambda thread: answer(madvise(thread, DST + PAGE, 2 * PAGE, "DONTNEED")))
            p.see("messages", p.pump(uffd, PLAIN, [dropper], "none").messages)
        case "mremap_wp_pmd_with_event" | "mremap_wp_pmd_no_event":
            mover = p.start(lambda thread: answer(mremap(thread, DST, HUGE_PAGE, HUGE_PAGE, RTO)))
            p.see("messages", p.pump(uffd, PLAIN, [mover], "none").messages)
            p.see("new", p.pages(PLAIN, HUGE, base=RTO))
            p.see("vmflags_new", p.vmflags(RTO, HUGE_PAGE))
        case "fork_wp_pmd_with_event":
            forker = p.start(lambda thread: _fork(p, thread))
            p.see("messages", p.pump(uffd, PLAIN, [forker], "none").messages)
        case "register_subrange_of_thp":
            p.see("vmflags", p.vmflags(DST, 2 * HUGE_PAGE))
            p.see("wp_sub", uffd.wp(DST + 4 * PAGE, PAGE, 1))
            p.see("after", p.pages(PLAIN, (0, 3, 4, 5)))
            p.see("wp_outside", uffd.wp(DST + 2 * PAGE, PAGE, 1))
        case "unregister_wp_pmd":
            p.see("result", uffd.unregister(DST, 2 * HUGE_PAGE))
        case "wp_only_huge_marker_read":
            p.see("wp", uffd.wp(DST, HUGE_PAGE, 1))
            _first(p, "read", uffd, DST, user_read(DST + PAGE))
        case "missing_wp_copy_wp_2m":
            p.see("result", uffd.copy(DST, SRC, HUGE_PAGE, abi.UFFDIO_COPY_MODE_WP))
        case "unwp_4k_waiter_on_pmd":
            writer = p.start(user_write(DST + 5 * PAGE, 7))
            p.see("unwp_wrong_page", uffd.wp(DST + 9 * PAGE, PAGE, 0))
            p.settle()
            p.see("done_after_wrong", writer.done)
            p.see("unwp_page5", uffd.wp(DST + 5 * PAGE, PAGE, 0))
            p.settle()
            p.see("done", writer.done)


def _fork(p: Probe, thread: Thread) -> Op[tuple[int, int, int]]:
    def child(thread: Thread) -> Op[None]:
        yield "the child looks"
        p.see("child_pages", p.pages(PLAIN, HUGE, process=thread.process))
        yield from exit_process(thread, thread.process)

    born = yield from fork(thread, child)
    while not born.main.done:
        yield "wait for the child"
    return 0, 0, -1


def _shared_tables(p: Probe, mode_name: str) -> None:
    """Two mappings of one hugetlb file, each a whole aligned GiB; one of them is registered."""
    mode = 0 if mode_name == "unregistered" else mode_number(mode_name)
    p.see("op", "hugetlb_pmd_sharing")
    p.see("mode", mode_name)
    file = File(p.kernel, "hugetlb", PUD_SPAN)
    plain, registered = 0x200000000000, 0x201000000000
    for address in (plain, registered):
        p.mmap(address, PUD_SPAN, shared=True, file=file)
    memory = Memory("hugetlb_shared")

    def pages(base: int) -> list[Seen]:
        return p.pages(memory, FOUR, base=base)

    def mapped(page: int) -> int:
        return int(p.pages(memory, (page,), base=registered)[0]["pte"] == "present")

    p.poke(plain, 1)
    p.poke(registered + HUGE_PAGE, 2)
    p.poke(plain + 2 * HUGE_PAGE, 3)
    p.see("B_before", pages(registered))
    p.see("shared_before", mapped(2))
    uffd = p.uffd(0)
    if mode:
        p.see("register_B", uffd.register(registered, PUD_SPAN, mode))
    p.see("B_after_register", pages(registered))
    p.see("A_after_register", pages(plain))
    p.poke(plain + 3 * HUGE_PAGE, 4)
    p.see("B_after_touch_A3", pages(registered))
    p.see("shared_after", mapped(3))
    if mode:
        for key, page in (("read_B3", 3), ("read_B0", 0), ("read_B5_unpopulated", 5)):
            _first(p, key, uffd, registered, user_read(registered + page * HUGE_PAGE + 5))
