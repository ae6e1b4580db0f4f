"""`userfault.Userfaultfd` on the running kernel: one method, one ioctl, exact results."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import selectors
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("userfault._native", reason="the compiled part is not built")

from userfault import Userfaultfd, abi
from userfault.userfaultfd import Scan, offered_features

PAGE = mmap.PAGESIZE
MISSING, WP = abi.UFFDIO_REGISTER_MODE_MISSING, abi.UFFDIO_REGISTER_MODE_WP
libc = ctypes.CDLL(None, use_errno=True)


class Memory:
    """Private anonymous memory whose address is known. Its missing pages must not be touched from here."""

    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.length = pages * PAGE
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def page(self, n: int) -> int:
        return self.start + n * PAGE


def needs(features: int) -> None:
    lacking = abi.feature_names(features & ~offered_features())
    if lacking:
        pytest.skip(f"this kernel lacks {', '.join(lacking)}")


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with Userfaultfd(prefer=(1 << 17) - 1 & ~(abi.UFFD_FEATURE_SIGBUS | abi.UFFD_FEATURE_WP_ASYNC)) as uffd:
        yield uffd


@pytest.fixture
def memory(uffd: Userfaultfd) -> Memory:
    memory = Memory(8)
    uffd.register(memory.start, memory.length, MISSING | WP).check()
    return memory


def test_a_fill_tells_how_far_it_came_and_the_next_one_why_it_stopped(
    uffd: Userfaultfd, memory: Memory
) -> None:
    assert uffd.copy(memory.page(3), b"3" * PAGE) == (PAGE, 0)
    assert uffd.copy(memory.start, b"0" * 8 * PAGE) == (3 * PAGE, errno.EAGAIN)
    assert uffd.copy(memory.page(3), b"0" * 5 * PAGE) == abi.Outcome(done=0, errno=errno.EEXIST)
    assert memory.map[2 * PAGE : 2 * PAGE + 2] == b"00"
    assert memory.map[3 * PAGE : 3 * PAGE + 2] == b"33"


def test_every_call_answers_with_an_outcome(uffd: Userfaultfd, memory: Memory) -> None:
    needs(abi.UFFD_FEATURE_POISON | abi.UFFD_FEATURE_MOVE)
    source = Memory(1)
    source.map[:3] = b"abc"
    answers = {
        "zeropage": uffd.zeropage(memory.page(0), PAGE),
        "move": uffd.move(memory.page(1), source.start, PAGE),
        "poison": uffd.poison(memory.page(2), PAGE),
        "continue_": uffd.continue_(memory.page(3), PAGE),
        "writeprotect": uffd.writeprotect(memory.start, memory.length, abi.UFFDIO_WRITEPROTECT_MODE_WP),
        "wake": uffd.wake(memory.start, memory.length),
        "unregister": uffd.unregister(memory.start, memory.length),
        "register": uffd.register(memory.start, memory.length, 0),
    }
    assert answers == {
        "zeropage": (PAGE, 0),
        "move": (PAGE, 0),
        "poison": (PAGE, 0),
        "continue_": (0, errno.EINVAL),
        "writeprotect": (memory.length, 0),
        "wake": (memory.length, 0),
        "unregister": (memory.length, 0),
        "register": (0, errno.EINVAL),
    }
    assert all(isinstance(answer, abi.Outcome) for answer in answers.values())
    assert memory.map[PAGE : PAGE + 3] == b"abc"
    assert source.map[:3] == bytes(3)


def test_copy_takes_addresses_and_contiguous_buffers_that_are_long_enough(
    uffd: Userfaultfd, memory: Memory
) -> None:
    source = Memory(1)
    source.map[:] = b"s" * PAGE
    assert uffd.copy(memory.page(0), source.start, PAGE) == (PAGE, 0)
    assert uffd.copy(memory.page(1), memoryview(bytearray(b"m" * 2 * PAGE))[PAGE:]) == (PAGE, 0)
    assert uffd.copy(memory.page(2), bytes(3 * PAGE), PAGE) == (PAGE, 0)
    with pytest.raises(ValueError, match="needs a contiguous source"):
        uffd.copy(memory.page(3), bytes(PAGE), 2 * PAGE)
    with pytest.raises(ValueError, match="needs a contiguous source"):
        uffd.copy(memory.page(3), memoryview(bytes(2 * PAGE))[::2])
    with pytest.raises(ValueError, match="needs a length"):
        uffd.copy(memory.page(3), source.start)
    assert memory.map[0:1] + memory.map[PAGE : PAGE + 1] == b"sm"


def test_messages_come_with_every_field_and_a_selector_sees_them() -> None:
    memory = Memory(4)
    with Userfaultfd(abi.UFFD_FEATURE_EVENT_REMOVE) as uffd, selectors.DefaultSelector() as selector:
        uffd.register(memory.start, memory.length, MISSING).check()
        selector.register(uffd, selectors.EVENT_READ)
        assert uffd.read_messages() == []
        assert selector.select(0) == []
        # The call gives the interpreter lock up, and sleeps until its event is read.
        arguments = (ctypes.c_void_p(memory.start), ctypes.c_size_t(memory.length), 4)
        thread = threading.Thread(target=libc.madvise, args=arguments)
        thread.start()
        assert [key.fileobj for key, _ in selector.select(30)] == [uffd]
        assert uffd.zeropage(memory.start, PAGE).event_pending
        assert uffd.read_messages() == [abi.Remove(memory.start, memory.start + memory.length)]
        thread.join(30)
        assert uffd.zeropage(memory.start, PAGE) == (PAGE, 0)


@pytest.mark.parametrize("nonblocking", [True, False])
def test_other_threads_run_while_one_waits_for_a_message(nonblocking: bool) -> None:
    memory = Memory(4)
    found: list[abi.Message] = []
    with Userfaultfd(abi.UFFD_FEATURE_EVENT_REMOVE, nonblocking=nonblocking) as uffd:
        uffd.register(memory.start, memory.length, MISSING).check()
        reader = threading.Thread(target=lambda: found.extend(uffd.read_messages(wait=True)), daemon=True)
        reader.start()
        reader.join(0.05)
        assert reader.is_alive(), "there is nothing to read yet"
        assert libc.madvise(ctypes.c_void_p(memory.start), ctypes.c_size_t(PAGE), 4) == 0
        reader.join(30)
        assert found == [abi.Remove(memory.start, memory.start + PAGE)]


def test_it_is_a_context_manager_and_closed_twice_without_harm() -> None:
    with Userfaultfd() as uffd:
        fd = uffd.fileno()
        assert os.stat(fd)
        assert not uffd.closed
    assert uffd.closed
    uffd.close()
    assert repr(uffd) == "<Userfaultfd closed>"
    with pytest.raises(ValueError, match="closed userfaultfd"):
        uffd.fileno()
    with pytest.raises(ValueError, match="closed userfaultfd"):
        uffd.wake(0, PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.stat(fd)


def test_a_descriptor_can_be_given_away_and_taken_over() -> None:
    first = Userfaultfd(abi.UFFD_FEATURE_THREAD_ID)
    fd = first.detach()
    assert first.closed
    with Userfaultfd.from_fd(fd, abi.UFFD_FEATURE_THREAD_ID) as second:
        memory = Memory(1)
        assert second.register(memory.start, PAGE, MISSING).ok
    with pytest.raises(OSError, match="Bad file descriptor"):
        Userfaultfd.from_fd(fd)


def test_the_menu_is_what_the_kernel_offers_and_features_what_was_asked_for() -> None:
    with Userfaultfd(abi.UFFD_FEATURE_THREAD_ID, prefer=1 << 50) as uffd:
        assert uffd.features == abi.UFFD_FEATURE_THREAD_ID
        assert uffd.offered == offered_features()
        assert uffd.offered & uffd.features == uffd.features
        assert uffd.ioctls & 1 << abi._UFFDIO_REGISTER
    with pytest.raises(OSError, match="lacks bit 50") as refused:
        Userfaultfd(1 << 50)
    assert refused.value.errno == errno.EINVAL


def tracked(pages: int) -> tuple[Memory, Userfaultfd]:
    """Memory under WP_ASYNC with every page there, all protected."""
    needs(abi.UFFD_FEATURE_WP_ASYNC)
    memory = Memory(pages)
    memory.map[:] = b"x" * memory.length
    uffd = Userfaultfd(abi.UFFD_FEATURE_WP_ASYNC)
    uffd.register(memory.start, memory.length, WP).check()
    uffd.writeprotect(memory.start, memory.length, abi.UFFDIO_WRITEPROTECT_MODE_WP).check()
    return memory, uffd


def written(uffd: Userfaultfd, start: int, end: int, flags: int = 0, max_pages: int = 0) -> Scan:
    return uffd.pagemap_scan(
        start,
        end,
        flags=flags,
        category_anyof_mask=abi.PAGE_IS_WRITTEN,
        return_mask=abi.PAGE_IS_WRITTEN,
        max_pages=max_pages,
    )


def test_a_scan_goes_to_the_end_however_many_regions_there_are() -> None:
    memory, uffd = tracked(2000)
    touched = list(range(0, 2000, 2))
    for n in touched:
        memory.map[n * PAGE] = 1
    end = memory.start + memory.length
    with uffd:
        scan = written(uffd, memory.start, end, abi.PM_SCAN_CHECK_WPASYNC)
        assert [region.start for region in scan.regions] == [memory.page(n) for n in touched]
        assert {region.categories for region in scan.regions} == {abi.PAGE_IS_WRITTEN}
        assert scan.walk_end == end
        some = written(uffd, memory.start, end, max_pages=700)
        assert [region.start for region in some.regions] == [memory.page(n) for n in touched[:700]]
        # It stops at the next page that would match.
        assert some.walk_end == memory.page(touched[700])
        rest = written(uffd, some.walk_end, end)
        assert some.regions + rest.regions == scan.regions


def test_a_scan_without_a_vector_protects_and_reports_nothing() -> None:
    memory, uffd = tracked(20)
    memory.map[5 * PAGE] = 1
    end = memory.start + memory.length
    with uffd:
        flags = abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC
        mask = abi.PAGE_IS_WRITTEN
        scan = uffd.pagemap_scan(
            memory.start, end, flags=flags, category_anyof_mask=mask, return_mask=mask, vector=False
        )
        assert scan == ([], end)
        assert written(uffd, memory.start, end).regions == []


def test_a_scan_with_a_category_turned_round_finds_the_others() -> None:
    memory, uffd = tracked(8)
    memory.map[5 * PAGE] = 1
    with uffd:
        clean = uffd.pagemap_scan(
            memory.start,
            memory.start + memory.length,
            category_inverted=abi.PAGE_IS_WRITTEN,
            category_mask=abi.PAGE_IS_WRITTEN | abi.PAGE_IS_PRESENT,
            return_mask=abi.PAGE_IS_PRESENT,
        )
    assert [(r.start, r.end) for r in clean.regions] == [
        (memory.page(0), memory.page(5)),
        (memory.page(6), memory.page(8)),
    ]


def test_memory_that_is_not_tracked_is_an_error_when_the_scan_is_told_to_check(
    uffd: Userfaultfd, memory: Memory
) -> None:
    needs(abi.UFFD_FEATURE_WP_ASYNC)
    flags = abi.PM_SCAN_WP_MATCHING | abi.PM_SCAN_CHECK_WPASYNC
    with pytest.raises(PermissionError):
        written(uffd, memory.start, memory.start + memory.length, flags)
