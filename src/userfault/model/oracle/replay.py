"""Running one row's scenario."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from userfault.model.oracle.compare import differences
from userfault.model.oracle.probe import Died, Probe
from userfault.model.oracle.sections import (
    Unsupported,
    handshakes,
    kernel_accesses,
    lives,
    moves,
    op,
    page_lives,
    ranges,
    tracking,
    vmops,
    wakes,
)

SECTIONS: Final[dict[str, Callable[[Probe, str, list[str]], None]]] = {
    "op": op.run,
    "access": op.run,
    "api": handshakes.run,
    "register": handshakes.run_register,
    "reregister": handshakes.run_reregister,
    "register_vma": handshakes.run_register_vma,
    "range": ranges.run,
    "vmop": vmops.run,
    "lifecycle": lives.run,
    "wp_async": tracking.run,
    "move": moves.run,
    "move_thp": moves.run,
    "thp": moves.run,
    "hugetlb_pmd_share": moves.run,
    "misc": page_lives.run,
    "kaccess": kernel_accesses.run,
    "wake": wakes.run,
    "read": wakes.run,
    "poll": wakes.run,
    "mmap_changing": vmops.run_changing,
    "bad": ranges.run,
}
"""Scenarios by the first word of a row's id."""


def replay(row_id: str, version: str) -> dict[str, Any] | None:
    """What the model shows for a case; None: unsupported."""
    name, *parts = row_id.split("/")
    run = SECTIONS.get(name)
    if run is None:
        return None
    probe = Probe(version, swap="swapped" in row_id)
    try:
        run(probe, name, parts)
        probe.see("outcome", "ok")
    except Died:
        probe.see("outcome", "exit:99")
    except Unsupported:
        return None
    return probe.seen


def disagreements(row: dict[str, Any], version: str, *, strict: bool = False) -> list[str] | None:
    """How the model differs from a measured row; empty: it agrees; None: unsupported."""
    try:
        shown = replay(row["id"], version)
    except Exception as error:
        return [f"the model failed: {type(error).__name__}: {error}"]
    return None if shown is None else differences(row, shown, strict=strict)
