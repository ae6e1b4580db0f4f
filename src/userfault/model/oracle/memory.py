"""The memory regions that the probe measures with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from userfault.model.layout import HUGE_PAGE, PAGE

if TYPE_CHECKING:
    from userfault.model.pagecache import File

DST: Final = 0x100000000000
ALIAS: Final = 0x100200000000
SRC: Final = 0x100400000000
DST2: Final = 0x100600000000
MSRC: Final = 0x100800000000
RTO: Final = 0x100A00000000

KINDS: Final = (
    "anon",
    "anon_thp_4k",
    "anon_thp_2m",
    "shmem_shared",
    "shmem_private",
    "hugetlb_shared",
    "hugetlb_private",
)

MODE_NAMES: Final = (
    "none",
    "missing",
    "wp",
    "missing+wp",
    "minor",
    "missing+minor",
    "wp+minor",
    "missing+wp+minor",
)


class Memory:
    """struct mem: a region at DST (and for files its alias). Sizes in bytes.

    page_size   what one fill fills; target_offset, target_length: the page or pages under test
    """

    def __init__(self, kind: str, pages: int = 4) -> None:
        self.kind = kind
        self.huge = kind.startswith("hugetlb")
        self.thp = kind.startswith("anon_thp")
        self.fileish = kind.startswith(("shmem", "hugetlb"))
        self.shared = kind.endswith("_shared")
        self.page_size = HUGE_PAGE if self.huge else PAGE
        self.pages = pages
        self.length = 2 * HUGE_PAGE if self.thp else pages * self.page_size
        self.file: File | None = None
        whole = kind == "anon_thp_2m"
        self.target_offset = 0 if whole else self.page_size
        self.target_length = HUGE_PAGE if whole else self.page_size


def mode_number(name: str) -> int:
    """'missing+wp' as register modes."""
    return MODE_NAMES.index(name)
