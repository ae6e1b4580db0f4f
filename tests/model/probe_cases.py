"""The ids of every case that the probe's loops can make on Linux 6.18: more than any table holds."""

from __future__ import annotations

from collections.abc import Iterator

from userfault.model.oracle.memory import KINDS, MODE_NAMES
from userfault.model.oracle.sections import (
    kernel_accesses,
    lives,
    moves,
    op,
    page_lives,
    ranges,
    vmops,
    wakes,
)

FILES = KINDS[3:]
HUGE = KINDS[5:]
FIVE = ("anon", *FILES)
UNPOPULATED, ASYNC = 0x2000, 0x8000


def all_cases() -> Iterator[str]:
    """Every id."""
    yield from _api()
    yield from _register()
    yield from _op()
    yield from _access()
    yield from _range_and_bad()
    yield from _vmop()
    yield from _changing()
    yield from _wake()
    yield from _life()
    yield from _move()
    yield from _misc()


def _modes(kind: str) -> Iterator[tuple[int, str]]:
    for mode in range(1, 8):
        if not (mode & 4 and kind not in FILES):
            yield mode, MODE_NAMES[mode]


def _state_exists(kind: str, mode: int, state: str, features: int) -> bool:
    """st_ok."""
    file, wp = kind in FILES, bool(mode & 2)
    if state == "zeropage":
        return not file
    if state in ("present_pagecache", "cache_only"):
        return file
    if state == "wp_present":
        return wp
    if state == "wp_zeropage":
        return wp and not file
    if state in ("wp_present_pagecache", "wp_marker_cache"):
        return wp and file
    if state == "wp_marker_none":
        return wp and (file or bool(features & (UNPOPULATED | ASYNC)))
    if state in ("swapped", "wp_swapped"):
        return kind not in HUGE and "thp" not in kind and (state == "swapped" or wp)
    return True


def _api() -> Iterator[str]:
    yield "api/constants"
    yield from (f"api/feature_bit_{bit}" for bit in range(64))
    for features in (0, 0x1FFFF, 0x1FF7F, ASYNC, UNPOPULATED, 1 | 1 << 63, (1 << 64) - 1):
        yield f"api/features_{features:x}"
    for version in (0, 0xAB, 0xA9, 0xAA000000AA, (1 << 64) - 1):
        yield f"api/version_{version:x}"
    yield "api/version_ab_with_fork"
    for flags in (0, 1):
        yield from (f"api/unpriv_flags{flags}_feat{features:x}" for features in (0, 2, 0x4C))
    yield from ("api/bad_pointer", "api/ops_before_api", "api/syscall_flags", "api/dev_userfaultfd")
    yield from ("api/dev_userfaultfd_unpriv", "api/unknown_ioctls_and_fd_ops")


def _register() -> Iterator[str]:
    for number, features in enumerate((0, ASYNC, 0x1FF7F)):
        for kind in KINDS:
            for mode in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x80, 1 << 63):
                if kind != "anon_thp_2m" and not (number and mode > 7):
                    yield f"register/{kind}/{mode:x}/f{features:x}"
    for kind in ("anon", "shmem_shared", "hugetlb_shared"):
        for _, first in _modes(kind):
            yield from (f"reregister/{kind}/{first}/then/{second}" for _, second in _modes(kind))
    for vma in range(26):
        for mode in ("missing", "wp", "minor", "wp/wp_async", "missing+wp/wp_async"):
            yield f"register_vma/{vma}/{mode}"


def _op() -> Iterator[str]:
    for kind in KINDS:
        for mode, name in _modes(kind):
            for features in (0, UNPOPULATED):
                if features and (kind in FILES or not mode & 2):
                    continue
                for state in op.STATES:
                    if _state_exists(kind, mode, state, features):
                        yield from (
                            f"op/{kind}/{name}/f{features:x}/{state}/{what}" for what in op.OPERATIONS
                        )


def _access() -> Iterator[str]:
    for kind in KINDS:
        if kind == "anon_thp_2m":
            continue
        for mode, name in _modes(kind):
            for features, only in (
                (0, ""),
                (UNPOPULATED, ""),
                (0x80, ""),
                (0x900, ""),
                (ASYNC, ""),
                (0, "+user_mode_only"),
            ):
                if features == UNPOPULATED and (kind in FILES or not mode & 2):
                    continue
                if features == ASYNC and not mode & 2:
                    continue
                for state in op.STATES:
                    if not _state_exists(kind, mode, state, features):
                        continue
                    for access in ("user_read", "user_write", "kernel_read", "kernel_write"):
                        if features in (0x80, ASYNC, 0x900) and access == "kernel_read":
                            continue
                        if only and access.startswith("user"):
                            continue
                        yield f"access/{kind}/{name}/f{features:x}{only}/{state}/{access}"


def _range_and_bad() -> Iterator[str]:
    for kind in FIVE:
        for what in ranges.OPERATIONS:
            moving, continuing = what.startswith("move"), what.startswith("continue")
            if (continuing and kind == "anon") or (moving and kind != "anon"):
                continue
            for number, obstacle in enumerate(ranges.OBSTACLES):
                if (obstacle == "hole" and not continuing) or (number >= 5 and not moving):
                    continue
                if (what == "copy_src_unmapped" and number) or (what == "writeprotect" and number > 1):
                    continue
                for page in range(4):
                    only_first = (obstacle == "none" and what != "copy_src_unmapped") or number == 7
                    if not (page and only_first):
                        yield f"range/{kind}/{what}/{obstacle}@{page}"
    for name, argument in ranges.ARGUMENTS.items():
        for what in ranges.BAD_OPERATIONS:
            if not argument.source or what in ("copy", "move"):
                yield f"bad/{name}/{what}"


def _vmop() -> Iterator[str]:
    from userfault.model.oracle.memory import Memory

    calls = [*vmops.FORKS, *vmops._calls(Memory("anon", 6))]
    on_files = ("punch_hole_fd", "ftruncate_0", "fallocate_fd")
    for kind in FIVE:
        for mode in (1, 2, 3, 4, 7):
            if mode & 4 and kind == "anon":
                continue
            for number, events in enumerate((0, 0x4E, 0x2, 0x4, 0x8, 0x40)):
                if number >= 2 and not (mode == 1 and kind in ("anon", "shmem_shared")):
                    continue
                for call in calls:
                    if not (call in on_files and kind == "anon"):
                        yield f"vmop/{kind}/{MODE_NAMES[mode]}/f{events | UNPOPULATED:x}/{call}"


def _changing() -> Iterator[str]:
    for kind in ("anon", "shmem_shared", "hugetlb_shared"):
        for event in vmops.EVENTS:
            if (event == "remove_madv_remove" and kind == "anon") or (
                event == "remove_free" and kind != "anon"
            ):
                continue
            yield from (f"mmap_changing/{kind}/{event}/{what}" for what in vmops.OPERATIONS)
    yield from (f"mmap_changing/mid_copy/{change}" for change in vmops.MID_COPY)
    yield from ("mmap_changing/counter_two_events", "mmap_changing/fault_read_before_event")
    for event in ("remove_dontneed", "remap", "unmap", "fork", "remove_free"):
        yield f"mmap_changing/close_releases/{event}"


def _wake() -> Iterator[str]:
    for case in wakes._PLAIN:
        yield case if "/" in case else f"wake/{case}"
    for case in ("copy_dontwake", "wp"):
        yield from (f"wake/{case}/{kind}" for kind in FIVE)
    for case in ("minor", "minor_then_punched", "missing_then_filled"):
        yield from (f"wake/{case}/{kind}" for kind in FILES)
    missing, wp, minor = "missing_waiter", "wp_waiter", "minor_waiter"
    waiters = (
        ("anon", 1, missing),
        ("anon", 3, missing),
        ("anon", 3, wp),
        ("anon", 2, wp),
        ("shmem_shared", 1, missing),
        ("shmem_shared", 2, wp),
        ("shmem_shared", 4, minor),
        ("shmem_shared", 5, minor),
        ("shmem_shared", 7, wp),
        ("shmem_shared", 6, minor),
        ("hugetlb_shared", 1, missing),
        ("hugetlb_shared", 2, wp),
        ("hugetlb_shared", 4, minor),
        ("hugetlb_shared", 7, minor),
        ("shmem_private", 4, minor),
        ("hugetlb_private", 4, minor),
    )
    for kind, mode, waiter in waiters:
        yield from (f"wake/{how}/{kind}/{MODE_NAMES[mode]}/{waiter}" for how in wakes.HOWS)


def _life() -> Iterator[str]:
    yield from (f"lifecycle/{case}" for case in lives._PLAIN)
    for case in lives._BY_MEMORY:
        yield from (f"lifecycle/{case}/{kind}" for kind in FIVE)
    for kind in ("anon", "anon_thp_4k", *FILES):
        for mode in (2, 3, 6, 7):
            if not (mode & 4 and kind not in FILES):
                yield f"wp_async/{kind}/{MODE_NAMES[mode]}"
    yield from ("wp_async/pagemap_scan_edge_cases", "wp_async/ext4_private", "wp_async/ext4_shared")
    yield "wp_async/thp_scan"


def _move() -> Iterator[str]:
    yield from (f"move/{case}" for case in moves.MOVES)
    yield from (f"move_thp/{case}" for case in moves.HUGE_MOVES)
    for kind in ("anon", "shmem"):
        for mode in (0, 1, 2, 3, 4, 7):
            if kind == "anon" and mode & 4:
                continue
            name = MODE_NAMES[mode] if mode else "unregistered"
            for holes in range(3):
                for wp in range(2):
                    if not ((wp or holes == 2) and not mode & 2):
                        yield f"thp/collapse/{kind}/{name}/h{holes}/w{wp}"
    yield from (f"thp/{case}" for case in moves.HUGE_CASES)
    yield from (f"hugetlb_pmd_share/{name}" for name in ("unregistered", *MODE_NAMES[1:]))


def _misc() -> Iterator[str]:
    for setting in (
        "anon/missing/none",
        "anon/wp/wp_present",
        "shmem_shared/minor/cache_only",
        "hugetlb_shared/missing/none",
        "anon/missing/none/user_mode_only",
        "anon/missing/none/sigbus",
    ):
        yield from (f"kaccess/{setting}/{access}" for access in kernel_accesses.ACCESSES)
    yield from (f"misc/{case}" for case in page_lives._PLAIN)
    for case in page_lives._BY_MEMORY:
        for kind in FIVE:
            if kind == "anon" and case in ("eof", "wp_alias_write"):
                continue
            if case == "two_registered_mappings" and not kind.endswith("_shared"):
                continue
            yield f"misc/{case}/{kind}"
