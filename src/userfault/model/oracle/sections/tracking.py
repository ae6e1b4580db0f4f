"""Tracking writes with WP_ASYNC and PAGEMAP_SCAN (s_life.c)."""

from __future__ import annotations

from userfault import abi
from userfault.model.errnos import errno_name
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.madvise import madvise
from userfault.model.oracle.memory import DST, MODE_NAMES, SRC, Memory, mode_number
from userfault.model.oracle.probe import (
    ASYNC,
    Probe,
    Seen,
    Uffd,
    user_read,
    user_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.pagecache import File
from userfault.model.pagemap import Scan, pagemap_scan


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


# WP_ASYNC and PAGEMAP_SCAN.

FOUR = (0, 1, 2, 3)
WRITTEN = abi.PAGE_IS_WRITTEN
PROTECT = abi.PM_SCAN_WP_MATCHING
CHECK = abi.PM_SCAN_CHECK_WPASYNC


def run(p: Probe, name: str, parts: list[str]) -> None:
    """wp_async/MEM/MODE and wp_async/CASE."""
    if parts == ["pagemap_scan_edge_cases"]:
        _edge_cases(p)
    elif parts in (["ext4_private"], ["ext4_shared"]):
        _ordinary_file(p, parts[0] == "ext4_shared")
    elif parts == ["thp_scan"]:
        _thp_scan(p)
    elif len(parts) == 2:
        _async(p, parts[0], parts[1])
    else:
        raise Unsupported


def _scan(
    p: Probe,
    start: int,
    length: int,
    flags: int,
    anyof: int,
    mask: int,
    inverted: int,
    returned: int,
    most: int = 0,
    vector: int = 16,
) -> Seen:
    """scan: what the ioctl leaves behind."""
    end = (start + length) % (1 << 64)
    if p.kernel.version < (6, 13):
        returned &= ~abi.PAGE_IS_GUARD  # the probe leaves it out there
    scan = Scan(start, end, flags, mask, anyof, inverted, returned, most, vector)
    reply = pagemap_scan(p.process.mm, scan)
    regions = [[region.start - start, region.end - start, region.categories] for region in reply.regions]
    return {
        "ret": -1 if reply.errno else len(regions),
        "errno": errno_name(reply.errno),
        "walk_end": reply.walk_end - start,
        "regions": [] if reply.errno else regions,
    }


def _async(p: Probe, kind: str, mode_name: str) -> None:
    mode = mode_number(mode_name)
    memory = p.memory(kind)
    size, length = memory.page_size, memory.length
    p.see("mem", kind)
    p.see("mode", MODE_NAMES[mode])
    p.see("features", f"{ASYNC:#x}")
    p.fill(DST, HUGE_PAGE if memory.thp else 2 * size, 0x11)
    uffd = p.uffd(ASYNC)

    def pages() -> list[Seen]:
        return p.pages(memory, FOUR, cache=1)

    def scan(key: str, flags: int, returned: int, most: int = 0, vector: int = 16) -> None:
        p.see(key, _scan(p, DST, length, flags, 0, WRITTEN, 0, returned, most, vector))

    p.see("fdinfo", p.fdinfo(uffd))
    p.see("register", uffd.register(DST, length, mode))
    p.see("after_register", pages())
    scan("scan_written0", 0, 0x1FF)
    scan("scan_wp_matching", PROTECT | CHECK, WRITTEN)
    p.see("after_wp_matching", pages())
    scan("scan_written1", 0, 0x1FF)
    p.see("write_page0", p.start(user_write(DST + 9)).seen(DST))
    p.see("message_pending", _readable(p, uffd))
    if not mode & 1:
        p.see("read_page2_unpopulated", p.start(user_read(DST + 2 * size + 9)).seen(DST))
        p.see("write_page3_unpopulated", p.start(user_write(DST + 3 * size + 9)).seen(DST))
    p.see("after_writes", pages())
    scan("scan_written2", 0, 0x1FF)
    scan("get_and_reset_max1", PROTECT | CHECK, WRITTEN, most=1)
    scan("scan_written3", 0, WRITTEN)
    scan("reset_all_novec", PROTECT | CHECK, WRITTEN, vector=0)
    scan("scan_written4", 0, WRITTEN)
    span = HUGE_PAGE if memory.thp else size
    p.see("uffdio_wp_set", uffd.wp(DST, span, 1))
    p.see("uffdio_wp_clear", uffd.wp(DST, span, 0))
    p.see("after_uffdio_unwp", pages())
    p.see("dontneed", p.attempt(madvise(p.caller, DST, length, "DONTNEED")))
    p.see("after_dontneed", pages())
    scan("scan_written5", 0, 0x1FF)


def _edge_cases(p: Probe) -> None:
    memory = p.memory("anon")
    length = memory.length
    p.fill(DST, length, 0x11)

    def scan(
        key: str,
        flags: int,
        mask: int,
        *,
        start: int = DST,
        span: int = length,
        inverted: int = 0,
        returned: int = WRITTEN,
        vector: int = 16,
    ) -> None:
        p.see(key, _scan(p, start, span, flags, 0, mask, inverted, returned, 0, vector))

    scan("unregistered_wp_matching", PROTECT, WRITTEN)
    scan("unregistered_wp_matching_check", PROTECT | CHECK, WRITTEN)
    scan("unregistered_check_only", CHECK, WRITTEN)
    uffd = p.uffd(0)
    uffd.register(DST, length, 2)
    scan("sync_wp_matching", PROTECT, WRITTEN)
    p.see("p0", p.pages(memory, (0,)))
    scan("sync_wp_matching_check", PROTECT | CHECK, WRITTEN)
    scan("bad_flag", 4, WRITTEN)
    scan("unaligned_start", 0, WRITTEN, start=DST + 1, span=PAGE)
    scan("bad_cat", 0, 1 << 9)
    scan("max_less_no_match", 0, abi.PAGE_IS_SWAPPED)
    scan("inverted_present", 0, abi.PAGE_IS_PRESENT, inverted=abi.PAGE_IS_PRESENT, returned=0x1FF)
    scan("vec0", 0, WRITTEN, vector=0)
    scan("end_before_start", 0, WRITTEN, span=-PAGE)
    p.start(user_write(DST + 9))
    p.see("sync_wp_by_scan_then_write_event", _readable(p, uffd))
    p.see("messages", _messages(p, uffd, 1))


def _ordinary_file(p: Probe, shared: bool) -> None:
    file = File(p.kernel, "ordinary", 4 * PAGE)
    file.write(0, b"\xab" * 4 * PAGE)
    memory = Memory("anon")
    length = memory.length
    p.mmap(DST, length, shared=shared, file=file)
    p.see("mem", f"ext4_{'shared' if shared else 'private'}")
    p.peek(DST)
    uffd = p.uffd(ASYNC)

    def pages() -> list[Seen]:
        return p.pages(memory, FOUR)

    p.see("register_wp", uffd.register(DST, length, 2))
    p.see("register_missing_wp", uffd.register(DST, length, 3))
    p.see("p", pages())
    p.see("wp_matching", _scan(p, DST, length, PROTECT | CHECK, 0, WRITTEN, 0, WRITTEN))
    p.see("after_wp", pages())
    p.see("uffdio_then_scan", _scan(p, DST, length, 0, 0, WRITTEN, 0, WRITTEN))
    p.see("uffdio_wp", uffd.wp(DST, length, 1))
    p.see("after_uffdio_wp", pages())
    p.see("write", p.start(user_write(DST + 9)).seen(DST))
    p.see("after_write", pages())
    p.see("written", _scan(p, DST, length, 0, 0, WRITTEN, 0, WRITTEN))
    p.mmap(SRC, PAGE)
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.see("zeropage", uffd.zero(DST, PAGE))
    p.see("continue", uffd.cont(DST, PAGE))
    p.see("poison", uffd.poison(DST, PAGE))
    p.see("unregister", uffd.unregister(DST, length))


def _thp_scan(p: Probe) -> None:
    memory = p.memory("anon_thp_4k")
    p.fill(DST, HUGE_PAGE, 0x11)
    uffd = p.uffd(ASYNC)
    uffd.register(DST, memory.length, 2)
    some = (0, 1, 2, 511)

    def scan(key: str, flags: int, returned: int, start: int = DST, span: int = HUGE_PAGE) -> None:
        p.see(key, _scan(p, start, span, flags, 0, WRITTEN, 0, returned))

    p.see("p0", p.pages(memory, some))
    scan("wp_full", PROTECT | CHECK, WRITTEN)
    p.see("p1", p.pages(memory, some))
    p.poke(DST + 5 * PAGE, 1)
    p.see("p2_after_write_page5", p.pages(memory, some))
    scan("written", 0, 0x1FF)
    scan("wp_full2", PROTECT | CHECK, WRITTEN)
    scan("wp_partial_already", PROTECT | CHECK, WRITTEN, span=4 * PAGE)
    p.poke(DST + 7 * PAGE, 1)
    scan("wp_partial_page7only", PROTECT | CHECK, 0x1FF, start=DST + 7 * PAGE, span=PAGE)
    p.see("p3", p.pages(memory, some))
    scan("written_end", 0, 0x1FF)
