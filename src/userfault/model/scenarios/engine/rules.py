"""The rules of the engine that can be got wrong, each with the hazard that it is there for.

The tags are those of `docs/explanation/hazards.md`: experiments that lost data, or hung. A wrong rule is
switched on by name; the situation named here is the one in which the explorer finds what it leads to.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Rule(NamedTuple):
    """tag: of the hazard. wrong: what the wrong rule does. right: what the engine does. situation: where the
    difference shows."""

    tag: str
    wrong: str
    right: str
    situation: str


RULES: Final = {
    "remapped_is_clean": Rule(
        "C1",
        "a minor fault on a block that the table calls mapped just maps it again",
        "its evidence is gone with the entries, so it is dirty from here on",
        "stranger_unmaps",
    ),
    "asks_for_written": Rule(
        "C2",
        "after the zap, a page is dirty if the scan calls it written",
        "a page is clean only if the scan finds a write-protect marker in its place",
        "evict_huge",
    ),
    "scans_without_owning": Rule(
        "C3",
        "a flush scans and protects without owning the block",
        "only mapped blocks held in state Cleaning are scanned so",
        "flush_and_evict",
    ),
    "maps_what_is_owned": Rule(
        "C4",
        "a fault on a block that is being evicted maps it",
        "it waits, and the owner wakes it at the end",
        "evict",
    ),
    "continues_over_neighbours": Rule(
        "C7",
        "mapping a block maps its neighbour in the same call",
        "only pages of blocks that one owns are mapped; poison is a state of the table",
        "poisoned_neighbour",
    ),
    "claims_under_missing_alone": Rule(
        "C8",
        "memory that is filled through the view is registered for missing faults alone",
        "it is registered for minor faults too, so a claimed page asks until it is whole",
        "view_fill",
    ),
    "stale_message_is_evidence": Rule(
        "C9",
        "a minor fault on a block that is mapped always means that somebody unmapped it",
        "if its page is present the message is stale: wake, and nothing else",
        "two_readers",
    ),
    "one_dirty_map": Rule(
        "D1",
        "the flush and the checkpoint share one dirty bit a page",
        "every consumer has a map of its own and clears only that",
        "flush_and_cut",
    ),
    "clears_at_the_end": Rule(
        "D2",
        "a write-back clears the dirty bits when it is done, and pwrite does not wait for it",
        "the bits are taken out before the data is read, and pwrite owns the block",
        "pwrite_and_flush",
    ),
    "dirty_by_block": Rule(
        "D3",
        "which pages of a dirty block to write is what the latest scan says",
        "dirty maps are by page, and a failed write-back puts its bits back",
        "store_fails_once",
    ),
    "partial_is_done": Rule(
        "R1",
        "EAGAIN with some bytes done ends the fill",
        "the rest is tried again to learn its errno, and the whole block is woken at the end",
        "page_there_already",
    ),
    "room_for_one_block": Rule(
        "R2",
        "the limit leaves room for one block",
        "there is room for every block that one instruction can touch",
        "straddling_load",
    ),
    "lifts_outside_the_lock": Rule(
        "W1",
        "a first write sets its bit under the table's lock, and lifts the protection afterwards",
        "both happen while the table is locked",
        "first_write_and_flush",
    ),
    "protects_before_taking": Rule(
        "W2",
        "a write-back protects the pages, then takes their dirty bits",
        "the bits are taken first, then the pages are protected, then they are read",
        "first_write_and_flush",
    ),
    "mapped_is_clean": Rule(
        "W3",
        "without CONTINUE_MODE_WP a page is mapped, then protected, and stays as clean as it was",
        "once it is protected it is compared with what it held; if it differs it is dirty",
        "mapped_writable",
    ),
}
