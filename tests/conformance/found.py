"""What the differential test found: programs on which the model and the kernel once differed, shrunk.

Each was a mistake of the model and is mended; what the kernel does there is said in a line. ODDITIES are
those among them where the kernel does what nobody would expect of it; the model does the same.
"""

from __future__ import annotations

from typing import Final

from conformance.differential import Program

ALL: Final = 0x4E
"""Every event."""

FOUND: Final = {
    "mremap onto itself": (
        "places that overlap are EINVAL",
        Program("hugetlb", 1, 0, [("mremap", 0, 1, 0, 0, 0)]),
    ),
    "a table between two mappings": (
        "a page table goes with the last mapping that had a part of it, not with one that had all of it",
        Program("thp", 1, 0, [("nohugepage", 0, 1), ("load", 0, 0), ("mmap", 0, 2)]),
    ),
    "mremap over several mappings": (
        "since 6.17 one mremap moves several mappings, but a registered one only alone",
        Program("anon", 0, 0, [("protect", 1, 1, 1), ("mremap", 0, 3, 4, 0, 0)]),
    ),
    "populating stops at a hole": (
        "MADV_POPULATE_READ goes no further than the first hole",
        Program("anon", 1, 0, [("mmap", 5, 1), ("populate_read", 4, 2)]),
    ),
    "a table is moved without entries": (
        "mremap makes the page table of the new place, also where the old one is empty",
        Program("anon", 1, 0, [("load", 0, 0), ("mremap", 0, 1, 4, 0, 0)]),
    ),
    "advice that changes nothing": (
        "madvise and mprotect that change no flag cut no mapping, and so no huge page",
        Program("thp", 1, 0, [("load", 0, 0), ("close",), ("dofork", 0, 1), ("protect", 0, 1, 3)]),
    ),
    "a hole takes the zero page along": (
        "a punch takes the zero page out of a private mapping, but no page that was written",
        Program("shmem-private", 1, 0, [("zeropage", 0, 1, 0), ("copy", 1, 1, 9, 0), ("punch", 0, 2)]),
    ),
    "fork copies empty tables": (
        "fork makes the page tables of the child also where the parent's are empty",
        Program("hugetlb", 3, 2, [("load", 0, 0), ("fork",)]),
    ),
    "MADV_FREE leaves huge pages alone": (
        "MADV_FREE of a part of the huge zero page, or of a huge page that a fork shares, does nothing",
        Program("thp", 1, 0, [("fork",), ("child", ("load", 0, 0)), ("child", ("free", 0, 1))]),
    ),
    "mappings whose pages came apart stay apart": (
        "neighbours that are alike do not merge if each had private pages before (anon_vma); so a COPY over "
        "both is ENOENT",
        Program(
            "anon",
            0,
            0,
            [
                ("protect", 1, 1, 1),
                ("store", 0, 0, 1),
                ("store", 0, 2, 1),
                ("protect", 1, 1, 3),
                ("dontneed", 0, 4),
                ("register", 0, 4, 1),
                ("copy", 0, 4, 9, 0),
            ],
        ),
    ),
    "nothing collapses where no table is": (
        "MADV_COLLAPSE is EINVAL where nothing was ever touched; an empty page table is enough",
        Program("thp", 0, 0, [("collapse", 2, 2), ("load", 0, 2), ("dontneed", 2, 1), ("collapse", 2, 2)]),
    ),
}

ODDITIES: Final = {
    "mremap unregisters neighbours": (
        "without EVENT_REMAP the new place is taken out of the registration. If it merged with what lies "
        "behind it (here pages 2 and 3), that is unregistered too, though nobody touched it",
        Program("anon", 1, 0, [("mremap", 0, 1, 1, 0, 0)]),
    ),
}
