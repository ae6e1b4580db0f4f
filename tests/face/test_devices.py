"""Direct I/O on a region: a device writes behind every page table, and nobody sees it.

Inside of `pin(write=True)` nothing may be lost, whatever goes on beside it. Outside of it bytes may be lost,
as docs/how-to/system-calls-and-processes.md says; what holds there is that nothing hangs or crashes and that
no other byte changes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import userfault
from userfault import MemoryStore

MIB = 1 << 20
LENGTH = 16 * MIB
SOURCE = np.random.default_rng(3).integers(1, 256, LENGTH, dtype=np.uint8)


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "source"
    SOURCE.tofile(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"this file system has no direct I/O: {error}")
    yield fd
    os.close(fd)


def disturb(region: userfault.Region, stop: threading.Event) -> list[threading.Thread]:
    """Flushes, evicts and touches everything else, so that what may leave memory does."""

    def repeat(call: Callable[[], object]) -> None:
        while not stop.is_set():
            call()

    def touch() -> None:
        region.pread(LENGTH // 2, LENGTH // 2)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in (region.flush, region.evict, touch)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("block", ["4KiB", "64KiB", "2MiB"])
def test_nothing_that_a_device_writes_inside_of_a_writing_pin_is_lost(
    block: str, direct: int, hugepages: Callable[[int], None]
) -> None:
    memory = MemoryStore(LENGTH)
    piece = 2 * MIB
    with userfault.open(memory, "r+", block=block, memory_limit=12 * MIB) as region:
        if not region.kernel_faults and block == "2MiB":
            pytest.skip("this process may not answer the kernel's faults")
        view = memoryview(region)
        stop = threading.Event()
        threads = disturb(region, stop)
        try:
            for start in range(0, LENGTH // 2, piece):
                part = view[start : start + piece]
                with region.pin(start, piece, write=True):
                    for at in range(0, piece, 64 << 10):
                        done = os.preadv(direct, [part[at : at + (64 << 10)]], start + at)
                        assert done == 64 << 10
                part.release()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        region.flush()
        assert memory.getvalue()[: LENGTH // 2] == SOURCE[: LENGTH // 2].tobytes()
        assert not any(memory.getvalue()[LENGTH // 2 :])
        region.evict()
        assert bytes(view[: LENGTH // 2]) == SOURCE[: LENGTH // 2].tobytes()
        view.release()


def test_a_flush_inside_of_a_writing_pin_has_what_the_device_wrote_before_it(direct: int) -> None:
    memory = MemoryStore(LENGTH)
    with userfault.open(memory, "r+", block="64KiB", memory_limit=12 * MIB) as region:
        view = memoryview(region)
        with region.pin(0, MIB, write=True):
            for turn in range(8):
                begin = turn * MIB
                os.preadv(direct, [view[:MIB]], begin)
                region.flush()
                assert memory.getvalue()[:MIB] == SOURCE[begin : begin + MIB].tobytes()
        view.release()


def test_outside_of_a_pin_a_device_harms_nothing_else_and_nothing_hangs(direct: int) -> None:
    """Whether its bytes arrive is luck, and nothing here depends on it."""
    memory = MemoryStore(LENGTH)
    page = mmap.PAGESIZE
    with userfault.open(memory, "r+", block="16KiB", memory_limit=4 * MIB) as region:
        view = memoryview(region)
        stop = threading.Event()
        threads = disturb(region, stop)
        try:
            for start in range(0, LENGTH // 2, 8 * page):
                part = view[start : start + 4 * page]
                try:
                    assert 0 < os.preadv(direct, [part], start) <= 4 * page
                except OSError as error:
                    assert error.strerror == "Bad address"  # noqa: PT017 - or it may succeed
                finally:
                    part.release()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        region.flush()
        stored = np.frombuffer(memory.getvalue(), np.uint8)
        pages = stored.reshape(-1, page)
        pieces = np.arange(len(pages))
        aimed = (pieces % 8 < 4) & (pieces * page < LENGTH // 2)
        assert not pages[~aimed].any()
        # A page that left memory while the device was writing it may hold some of either.
        assert ((stored == SOURCE) | (stored == 0)).all(), "bytes that neither were there nor came"
        view.release()
