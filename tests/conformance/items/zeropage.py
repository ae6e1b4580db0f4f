"""`zeropage`: pages of zeros."""

from __future__ import annotations

import errno

from conformance.backend import Backend, Kind
from conformance.checklist import item
from conformance.setting import MISSING, done, load, setting
from userfault import abi

SMALL = (Kind.ANON, Kind.SHMEM, Kind.SHMEM_PRIVATE)


@item("zeropage.supported", *SMALL)
def zeropage_fills_one_page_with_zeros(backend: Backend, kind: Kind) -> None:
    process, uffd, area = setting(backend, kind, MISSING)
    mask = done(uffd.register(area.start, area.length, MISSING))
    assert mask & 1 << abi._UFFDIO_ZEROPAGE
    assert uffd.zeropage(area.start, area.page) == (area.page, 0)
    assert set(process.main.read(area.start, area.page).result()) == {0}


@item("zeropage.hugetlb", Kind.HUGETLB, Kind.HUGETLB_PRIVATE)
def hugetlb_has_no_zeropage(backend: Backend, kind: Kind) -> None:
    _, uffd, area = setting(backend, kind, MISSING)
    mask = done(uffd.register(area.start, area.length, MISSING))
    assert not mask & 1 << abi._UFFDIO_ZEROPAGE
    argument = abi.uffdio_zeropage(abi.uffdio_range(area.start, area.page), 0, 0)
    assert backend.ioctl(uffd, abi.UFFDIO_ZEROPAGE, argument) == errno.EINVAL
    assert argument.zeropage == -errno.EINVAL


@item("zeropage.repeat", *SMALL)
def a_second_zeropage_finds_the_page(backend: Backend, kind: Kind) -> None:
    process, uffd, area = setting(backend, kind, MISSING)
    done(uffd.zeropage(area.start, area.page))
    again = area.start
    if area.alias is not None:
        # The other mapping has no page yet, but the file has.
        done(uffd.register(area.alias, area.length, MISSING))
        again = area.alias
    argument = abi.uffdio_zeropage(abi.uffdio_range(again, area.page), 0, 0)
    assert backend.ioctl(uffd, abi.UFFDIO_ZEROPAGE, argument) == errno.EEXIST
    assert argument.zeropage == -errno.EEXIST
    assert load(process, area.start) == 0
