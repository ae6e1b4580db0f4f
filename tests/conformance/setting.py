"""What most items begin with: memory under a userfaultfd, and some pages in it."""

from __future__ import annotations

from typing import NamedTuple

from conformance.backend import Area, Backend, Kind, Process, Userfaultfd
from userfault import abi
from userfault.abi import Message, Outcome, Pagefault

MISSING, WP, MINOR = (
    abi.UFFDIO_REGISTER_MODE_MISSING,
    abi.UFFDIO_REGISTER_MODE_WP,
    abi.UFFDIO_REGISTER_MODE_MINOR,
)
PROTECT = abi.UFFDIO_WRITEPROTECT_MODE_WP


class Setting(NamedTuple):
    """A process, its userfaultfd, and an area."""

    process: Process
    uffd: Userfaultfd
    area: Area


def pages_of(kind: Kind) -> int:
    """How many pages an item uses: few of the huge ones."""
    return 4 if kind.hugetlb else 16


def setting(
    backend: Backend,
    kind: Kind,
    mode: int,
    features: int = 0,
    *,
    pages: int | None = None,
    filled: bool = False,
) -> Setting:
    """Memory registered with `mode`; `filled`: page n holds the byte n + 1, and is mapped."""
    process = backend.process()
    area = process.area(kind, pages or pages_of(kind))
    if filled:
        for n, address in enumerate(area.pages):
            store(process, address, n % 255 + 1)
    uffd = process.userfaultfd(features)
    done(uffd.register(area.start, area.length, mode))
    return Setting(process, uffd, area)


def store(process: Process, address: int, value: int) -> None:
    """A store that meets no fault."""
    assert process.main.store(address, value).result().signal is None


def load(process: Process, address: int) -> int:
    """A load that meets no fault."""
    access = process.main.load(address).result()
    assert access.signal is None
    return access.value


def done(outcome: Outcome) -> int:
    """The call did all it was asked to."""
    assert outcome.errno == 0, outcome
    return outcome.done


def content(area: Area, value: int) -> bytes:
    """A page of one byte."""
    return bytes([value]) * area.page


def fault(message: Message) -> Pagefault:
    """The message is a fault."""
    assert isinstance(message, Pagefault), message
    return message


def page_at(area: Area, address: int) -> int:
    """The page of the area that holds an address. The address of a hugetlb fault may lie inside the page."""
    return area.start + (address - area.start) // area.page * area.page


def zap(process: Process, area: Area, start: int, length: int) -> None:
    """Takes pages away as far as the kind allows: also from the file, where it is shared."""
    from conformance.backend import MADV_DONTNEED, MADV_REMOVE

    advice = MADV_REMOVE if area.kind.shared else MADV_DONTNEED
    assert process.main.madvise(start, length, advice).result() == 0
