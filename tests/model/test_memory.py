"""Rules of the model that no measured row shows: contents, huge folios, accounts."""

from __future__ import annotations

import pytest

from userfault import abi
from userfault.model import Kernel, MemoryFault, Process, SystemCallError
from userfault.model.content import ZERO, Content
from userfault.model.errnos import EFAULT, ENOMEM
from userfault.model.pagecache import File
from userfault.model.pagetable import Present

PAGE, HUGE = 4096, 2 << 20
HERE, THERE = 0x100000000000, 0x200000000000


def process(**options: object) -> Process:
    return Kernel(**options).process("test")  # type: ignore[arg-type]


def test_a_content_reads_what_was_written_however_it_is_kept() -> None:
    kept, plain = ZERO, bytearray(PAGE)
    for offset, data in ((5, b"abc"), (4000, b"z" * 96), (0, bytes(range(256))), (17, b"\xff")):
        kept = kept.write(offset, data, PAGE)
        plain[offset : offset + len(data)] = data
        assert kept.read(0, PAGE) == plain
        assert kept.part(16, 64).read(0, 64) == plain[16:80]
    assert kept.write(0, b"q" * PAGE, PAGE) == Content(ord("q"))


def huge_folio(p: Process) -> File:
    """A shmem file of 2 MiB, page i full of i, collapsed into one folio and mapped at HERE."""
    t = p.calls
    file = t.file(p.run(t.memfd_create(HUGE)))
    p.run(t.mmap(HERE, HUGE, shared=True, file=file))
    for page in range(512):
        p.run(t.store(HERE + page * PAGE, bytes((page & 255,))))
    p.run(t.madvise(HERE, HUGE, "COLLAPSE"))
    entry = p.mm.table.pmd(HERE)
    assert isinstance(entry, Present)
    assert entry.page.size == HUGE
    return file


def test_a_huge_folio_is_the_same_bytes_through_every_door() -> None:
    p = process()
    t, file = p.calls, huge_folio(p)
    assert p.run(t.load(HERE + 7 * PAGE)) == file.read(7 * PAGE, 1) == b"\x07"
    file.write(9 * PAGE, b"z")
    assert p.run(t.load(HERE + 9 * PAGE)) == b"z"


def test_a_mapping_that_does_not_fit_splits_the_folio() -> None:
    p = process()
    t, file = p.calls, huge_folio(p)
    p.run(t.mmap(THERE + PAGE, HUGE, shared=True, file=file))
    assert p.run(t.load(THERE + PAGE + 7 * PAGE)) == b"\x07"
    assert file.huge_folios == set()
    p.run(t.store(THERE + PAGE + 9 * PAGE, b"y"))
    assert p.run(t.load(HERE + 9 * PAGE)) == b"y"


def test_a_hole_in_a_huge_folio_keeps_its_neighbours() -> None:
    p = process()
    t, file = p.calls, huge_folio(p)
    fd = next(iter(p.descriptors.files))
    p.run(t.punch_hole(fd, 3 * PAGE, 2 * PAGE))
    assert [p.run(t.load(HERE + page * PAGE))[0] for page in (2, 3, 4, 5)] == [2, 0, 0, 5]
    assert file.charged == len(file.pages)


def test_a_private_copy_of_a_part_of_a_huge_folio_is_that_part() -> None:
    p = process()
    t, file = p.calls, huge_folio(p)
    p.run(t.mmap(THERE, HUGE, file=file))
    p.run(t.store(THERE + 8 * PAGE + 1, b"!"))
    assert p.run(t.load(THERE + 8 * PAGE, 2)) == b"\x08!"
    assert file.read(8 * PAGE, 2) == b"\x08\0"


def test_an_empty_pool_of_huge_pages_is_sigbus_for_a_touch_and_enomem_for_a_fill() -> None:
    p = process(hugetlb_pages=1)
    t = p.calls
    p.run(t.mmap(HERE, 2 * HUGE, hugetlb=True, shared=True))
    p.run(t.mmap(THERE, HUGE))
    p.run(t.fill(THERE, HUGE, 7))
    p.run(t.store(HERE, b"x"))
    with pytest.raises(MemoryFault, match="SIGBUS"):
        p.run(t.load(HERE + HUGE))
    fd = p.run(t.userfaultfd())
    p.run(t.register(fd, HERE, 2 * HUGE, abi.UFFDIO_REGISTER_MODE_MISSING))
    assert p.run(t.copy(fd, HERE + HUGE, THERE, HUGE)) == abi.Outcome(0, ENOMEM)


def test_system_calls_meet_poison_as_efault_and_the_processor_as_a_signal() -> None:
    p = process()
    t = p.calls
    p.run(t.mmap(HERE, PAGE))
    fd = p.run(t.userfaultfd())
    p.run(t.register(fd, HERE, PAGE, abi.UFFDIO_REGISTER_MODE_MISSING))
    assert p.run(t.poison(fd, HERE, PAGE)).ok
    with pytest.raises(MemoryFault, match="BUS_ADRERR"):
        p.run(t.load(HERE))
    with pytest.raises(SystemCallError) as refused:
        p.run(t.write_from(HERE, 1))
    assert refused.value.errno == EFAULT


def test_a_private_huge_page_goes_back_to_the_pool_with_its_last_mapping() -> None:
    p = process(hugetlb_pages=4)
    t = p.calls
    p.run(t.mmap(HERE, 2 * HUGE, hugetlb=True))
    p.run(t.store(HERE, b"a"))
    p.run(t.store(HERE + HUGE, b"b"))
    assert p.kernel.hugetlb.free == 2
    p.run(t.madvise(HERE, HUGE, "DONTNEED"))
    assert p.kernel.hugetlb.free == 3
    p.run(t.munmap(HERE, 2 * HUGE))
    assert p.kernel.hugetlb.free == 4


def test_a_write_to_a_swapped_out_protected_shmem_page_asks_about_the_protection() -> None:
    """The question of the package: what does a write to a swapped-out, write-protected shmem page do?"""
    p = process()
    t = p.calls
    file = t.file(p.run(t.memfd_create(PAGE)))
    p.run(t.mmap(HERE, PAGE, shared=True, file=file))
    p.run(t.store(HERE, b"old"))
    fd = p.run(t.userfaultfd())
    p.run(t.register(fd, HERE, PAGE, abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP))
    p.run(t.writeprotect(fd, HERE, PAGE, abi.UFFDIO_WRITEPROTECT_MODE_WP))
    p.run(t.madvise(HERE, PAGE, "PAGEOUT"))
    writer = p.spawn("writer", lambda t: t.store(HERE, b"new"))
    while writer.runnable:
        writer.step()
    (message,) = p.run(t.read_messages(fd))
    # Not MISSING: the cache holds the page (in swap). The marker brings its protection back: WP.
    assert message == abi.Pagefault(abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP, HERE)
    assert p.run(t.load(HERE, 3)) == b"old"


def test_a_copy_whose_source_cannot_be_read_leaves_the_table_it_made() -> None:
    """So the next touch of the range is not huge any more, and PAGEMAP_SCAN sees a hugetlb hole."""
    p = process()
    t = p.calls
    p.run(t.mmap(HERE, HUGE))
    p.run(t.madvise(HERE, HUGE, "HUGEPAGE"))
    fd = p.run(t.userfaultfd())
    p.run(t.register(fd, HERE, HUGE, abi.UFFDIO_REGISTER_MODE_MISSING))
    assert p.run(t.copy(fd, HERE, THERE, PAGE)) == abi.Outcome(0, EFAULT)
    p.run(t.unregister(fd, HERE, HUGE))
    p.run(t.store(HERE, b"x"))
    assert p.mm.table.pte_table(HERE) is not None
