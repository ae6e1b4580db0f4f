"""What /proc/PID/smaps says of each mapping, as far as userfaultfd and its users look at it (show_smap).

um uw ui   registered for MISSING, WP, MINOR (the last since 5.13)
wf dc      MADV_WIPEONFORK, MADV_DONTFORK
hg nh      MADV_HUGEPAGE, MADV_NOHUGEPAGE
lo mg      mlock, MADV_MERGEABLE
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.vma import Vma


class Mapping(NamedTuple):
    """One mapping: [start, end) in bytes, permissions as in "rw-p", and the flags above that are set."""

    start: int
    end: int
    permissions: str
    flags: tuple[str, ...]


def smaps(mm: AddressSpace) -> list[Mapping]:
    """Every mapping of an address space, in the order of their addresses."""
    return [Mapping(vma.start, vma.end, _permissions(vma), _flags(vma)) for vma in mm.vmas]


def _permissions(vma: Vma) -> str:
    letters = zip("rwx", (vma.read, vma.write, vma.execute), strict=True)
    return "".join(letter if has else "-" for letter, has in letters) + "ps"[vma.shared]


def _flags(vma: Vma) -> tuple[str, ...]:
    flags = (
        ("um", vma.modes.missing),
        ("uw", vma.modes.wp),
        ("ui", vma.modes.minor),
        ("wf", vma.wipeonfork),
        ("dc", vma.dontfork),
        ("hg", vma.hugepage is True),
        ("nh", vma.hugepage is False),
        ("lo", vma.locked),
        ("mg", vma.mergeable),
    )
    return tuple(name for name, has in flags if has)
