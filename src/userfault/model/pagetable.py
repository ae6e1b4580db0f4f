"""Page tables: what an address maps to, as three levels that can be shared, huge, or absent.

    PageTable --PUD index, 1 GiB--> PmdTable --PMD index, 2 MiB--> PteTable --PTE index, 4 KiB--> entry
                                       |                     `---> entry (huge page, huge marker)
                                       `-- hugetlb mappings of one file may share it (H1)

An entry is one of

    None      none: nothing is known here (a key that is absent)
    Present   maps a page; `uffd_wp` is the write-protect bit of userfaultfd
    Swap      the page is in a swap slot; uffd_wp survives there
    Marker    no page, but something to remember (pte_marker, Linux 5.19): a write-protection to be kept
              for the page that will come, a poison (6.6), or a guard (6.13)

Entries are values: to change one, put another in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, final

from userfault.model.layout import HUGE_PAGE, PAGE, PUD_SPAN
from userfault.model.page import Page, SwapSlot


@final
class Present(NamedTuple):
    """A mapped page. `write`: the processor lets a write through."""

    page: Page
    write: bool
    uffd_wp: bool = False


@final
class Swap(NamedTuple):
    """An anonymous page in swap."""

    slot: SwapSlot
    uffd_wp: bool = False


@final
class Marker(NamedTuple):
    """An entry without a page (pte_marker)."""

    uffd_wp: bool = False
    poison: bool = False
    guard: bool = False


WP_MARKER: Final = Marker(uffd_wp=True)
POISON_MARKER: Final = Marker(poison=True)
GUARD_MARKER: Final = Marker(guard=True)

Entry = Present | Swap | Marker


@final
class PteTable:
    """512 entries of 4 KiB."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}


class PmdTable:
    """512 entries of 2 MiB, each a table or a huge entry.

    sharers: number of page tables this table hangs in (hugetlb mappings of one file, huge_pmd_share).
    """

    __slots__ = ("entries", "sharers")

    def __init__(self) -> None:
        self.entries: dict[int, PteTable | Entry] = {}
        self.sharers = 1


class PageTable:
    """The page table of one address space. Addresses are bytes."""

    __slots__ = ("pmds",)

    def __init__(self) -> None:
        self.pmds: dict[int, PmdTable] = {}

    # The middle level: hugetlb pages and transparent huge pages.

    def pmd_table(self, address: int) -> PmdTable | None:
        """The middle-level table that covers the address, if there is one."""
        return self.pmds.get(address // PUD_SPAN)

    def pmd_table_alloc(self, address: int) -> PmdTable:
        """The same, made if absent."""
        table = self.pmds.get(address // PUD_SPAN)
        if table is None:
            table = self.pmds[address // PUD_SPAN] = PmdTable()
        return table

    def pmd(self, address: int) -> PteTable | Entry | None:
        """The middle-level entry of the address."""
        table = self.pmds.get(address // PUD_SPAN)
        return None if table is None else table.entries.get((address // HUGE_PAGE) & 511)

    def set_pmd(self, address: int, entry: PteTable | Entry | None) -> None:
        """Put (or with None remove) the middle-level entry of the address, and count the mapping of its
        page."""
        table = self.pmd_table_alloc(address)
        key = (address // HUGE_PAGE) & 511
        _count(table.entries.get(key), -1)
        _count(entry, +1)
        if entry is None:
            table.entries.pop(key, None)
        else:
            table.entries[key] = entry

    # The last level: pages of 4 KiB.

    def pte_table(self, address: int) -> PteTable | None:
        """The last-level table that covers the address, if there is one."""
        entry = self.pmd(address)
        return entry if type(entry) is PteTable else None

    def pte_table_alloc(self, address: int) -> PteTable:
        """The same, made if the middle-level entry is none. That entry must not be a huge page."""
        table = self.pmd_table_alloc(address)
        key = (address // HUGE_PAGE) & 511
        entry = table.entries.get(key)
        if entry is None:
            entry = table.entries[key] = PteTable()
        assert type(entry) is PteTable, "a huge entry is split before a table takes its place"
        return entry

    def pte(self, address: int) -> Entry | None:
        """The last-level entry of the address; None also where there is no table or a huge entry."""
        table = self.pte_table(address)
        return None if table is None else table.entries.get((address // PAGE) & 511)

    def set_pte(self, address: int, entry: Entry | None) -> None:
        """Put (or with None remove) the last-level entry of the address, and count the mapping of its
        page."""
        table = self.pte_table_alloc(address)
        key = (address // PAGE) & 511
        _count(table.entries.get(key), -1)
        _count(entry, +1)
        if entry is None:
            table.entries.pop(key, None)
        else:
            table.entries[key] = entry

    def entry(self, address: int) -> Entry | None:
        """The entry that the processor finds: a huge one, or the last-level one."""
        entry = self.pmd(address)
        if type(entry) is PteTable:
            return entry.entries.get((address // PAGE) & 511)
        return entry

    def tables(self, start: int, end: int) -> Iterator[tuple[int, int, PteTable | Entry]]:
        """(from, to, middle-level entry) for each one in [start, end) that is not none, in address order."""
        at = start
        while at < end:
            table = self.pmds.get(at // PUD_SPAN)
            if table is None:
                at = (at // PUD_SPAN + 1) * PUD_SPAN
                continue
            upto = min((at // HUGE_PAGE + 1) * HUGE_PAGE, end)
            entry = table.entries.get((at // HUGE_PAGE) & 511)
            if entry is not None:
                yield at, upto, entry
            at = upto

    def ptes(self, start: int, end: int) -> Iterator[tuple[int, Entry]]:
        """(address, entry) of each last-level entry in [start, end) that is not none, in address order."""
        for low, high, table in self.tables(start, end):
            if type(table) is PteTable:
                entries = table.entries
                if not entries:
                    continue
                for at in range(low, high, PAGE):
                    entry = entries.get((at // PAGE) & 511)
                    if entry is not None:
                        yield at, entry


def _count(entry: PteTable | Entry | None, by: int) -> None:
    if type(entry) is Present:
        entry.page.mapcount += by
