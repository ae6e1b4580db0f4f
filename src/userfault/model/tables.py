"""What happens when: the answers of the model for one kind of memory, registration and page state, as tables.

Every cell is an experiment: a fresh machine, the page brought into the state, one access or one operation,
and what could be seen. The experiments are those that were run on real kernels (`oracle/sections/op.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from userfault import abi
from userfault.model.oracle.memory import KINDS, MODE_NAMES
from userfault.model.oracle.probe import Probe
from userfault.model.oracle.sections import op

MEMORY: Final = tuple(kind for kind in KINDS if not kind.startswith("anon_thp"))
"""Kinds of memory, as they are called in tables."""
MODES: Final = tuple(mode for mode in MODE_NAMES if mode != "none")
"""What a range can be registered for."""
STATES: Final = op.STATES
"""States of a page before something happens to it."""

_ACCESSES: Final = {
    "user_read": "a read",
    "user_write": "a write",
    "kernel_read": "a system call that reads it",
    "kernel_write": "a system call that writes it",
}
_OPERATIONS: Final = {
    "copy": "COPY",
    "copy_wp": "COPY, protected",
    "zeropage": "ZEROPAGE",
    "continue": "CONTINUE",
    "continue_wp": "CONTINUE, protected",
    "poison": "POISON",
    "writeprotect": "WRITEPROTECT, protect",
    "unwriteprotect": "WRITEPROTECT, unprotect",
    "move_dst": "MOVE to it",
    "move_src": "MOVE from it",
}
_MARKERS: Final = abi.UFFD_FEATURE_WP_UNPOPULATED | abi.UFFD_FEATURE_WP_ASYNC
_IMPOSSIBLE: Final = {
    "anon": ("present_pagecache", "cache_only", "wp_present_pagecache", "wp_marker_cache"),
    "hugetlb_shared": ("zeropage", "wp_zeropage", "swapped", "wp_swapped"),
    "hugetlb_private": ("zeropage", "wp_zeropage", "swapped", "wp_swapped"),
    "shmem_shared": ("zeropage", "wp_zeropage"),
    "shmem_private": (),
}


class Row(NamedTuple):
    """what: done to the page. asks: the messages that come, in words. answer: what it returned.
    page: the page's entry afterwards."""

    what: str
    asks: str
    answer: str
    page: str


def possible(memory: str, mode: str, state: str) -> bool:
    """A page of that memory can be in that state under that registration."""
    if memory == "anon" and "minor" in mode:
        return False
    if state.startswith("wp_") and "wp" not in mode.split("+"):
        return False
    return state not in _IMPOSSIBLE[memory]


def what_happens(
    memory: str, mode: str, state: str, *, features: int = 0, version: str = "6.18"
) -> list[Row]:
    """One table: every access and every operation on one page.

    memory, mode, state   see MEMORY, MODES, STATES
    features              `abi.UFFD_FEATURE_` bits of the handshake

    Raises ValueError for an unknown name, or a state that such memory cannot have.
    """
    for word, known in ((memory, MEMORY), (mode, MODES), (state, STATES)):
        if word not in known:
            raise ValueError(f"{word!r} is none of {', '.join(known)}")
    if not possible(memory, mode, state):
        raise ValueError(f"no page of {memory} memory registered for {mode} can be {state}")
    if memory == "anon" and state == "wp_marker_none" and not features & _MARKERS:
        raise ValueError(
            "anonymous memory has markers only with WP_UNPOPULATED (0x2000) or WP_ASYNC (0x8000)"
        )
    rows = []
    for kind, names in (("access", _ACCESSES), ("op", _OPERATIONS)):
        for name, what in names.items():
            seen = _experiment(kind, [memory, mode, f"f{features:x}", state, name], version)
            rows.append(Row(what, _asked(seen), _answered(seen), _entry(seen)))
    return rows


def as_text(rows: Iterable[Row]) -> str:
    """The table with columns side by side."""
    table = [("what", "asks the handler", "answer", "the page afterwards"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def _experiment(kind: str, parts: list[str], version: str) -> dict[str, Any]:
    probe = Probe(version, swap=True)
    op.run(probe, kind, parts)
    return probe.seen


_ASKED: Final = {
    "": "missing, read",
    "W": "missing, write",
    "WP": "write-protect",
    "M": "minor, read",
    "WM": "minor, write",
}


def _asked(seen: dict[str, Any]) -> str:
    """The faults that came, in their order; operations send none."""
    return ", then ".join(_ASKED[message["fl"]] for message in seen.get("messages", ())) or "-"


def _answered(seen: dict[str, Any]) -> str:
    """The errno, or the signal that the access got."""
    result = seen["result"]
    how = result.get("r", "done")
    return str(result["errno"] if how == "done" else how)


def _entry(seen: dict[str, Any]) -> str:
    page = seen["post"][0]
    entry = str(page["pte"])
    if entry == "none" and "SWAPPED" in page["scan"]:
        entry = "marker:poison"  # of hugetlb: pagemap shows nothing there, PAGEMAP_SCAN does
    words = {
        "none": "not mapped",
        "marker:uffd_wp": "write-protect marker",
        "marker:poison": "poison marker",
        "nonpresent_wp": "write-protect marker",
        "swap": "in swap",
        "present": "mapped",
    }.get(entry, entry)
    protected = entry in ("present", "swap") and page["wp"]
    return words + (", protected" if protected else "") + _cached(page)


def _cached(page: dict[str, Any]) -> str:
    return ", cached" if page.get("cache") and page["pte"] not in ("present",) else ""
