"""Regions and the calls that copy in and out of them: pread, pwrite, readinto, pin, read(2) and write(2)."""

from __future__ import annotations

import io
import mmap
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import userfault
from userfault import MemoryStore, StoreError
from userfault.testing import FaultyStore, fail

LENGTH = 1_000_003
NOISE = np.random.default_rng(2).integers(0, 256, LENGTH, dtype=np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(NOISE)
    return path


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_pread_pwrite_and_the_memory_agree_with_a_bytearray(path: Path, data: st.DataObject) -> None:
    path.write_bytes(NOISE)
    model = bytearray(NOISE)
    with userfault.open(path, "r+", block="16KiB", memory_limit="64KiB") as region:
        view = memoryview(region)
        for _ in range(20):
            offset = data.draw(st.integers(0, LENGTH))
            n = data.draw(st.integers(0, min(100_000, LENGTH - offset)))
            match data.draw(st.sampled_from(["pread", "pwrite", "touch", "flush", "evict"])):
                case "pread":
                    assert region.pread(n, offset) == model[offset : offset + n]
                case "pwrite":
                    new = os.urandom(n)
                    assert region.pwrite(new, offset) == n
                    model[offset : offset + n] = new
                case "touch":
                    view[offset : offset + n] = model[offset : offset + n] = bytes(n)
                case "flush":
                    region.flush(offset, n)
                case "evict":
                    region.evict(offset, n)
        assert view == model
        view.release()
    assert path.read_bytes() == model


def test_ranges_outside_of_the_region_are_refused(path: Path) -> None:
    with userfault.open(path, "r+") as region:
        for call in (
            lambda: region.pread(1, LENGTH),
            lambda: region.pread(LENGTH + 1, 0),
            lambda: region.pwrite(b"x", LENGTH),
            lambda: region.flush(0, LENGTH + 1),
            lambda: region.flush(LENGTH + 1),
            lambda: region.pin(5, LENGTH),
            lambda: region.prefetch([(0, 1), (LENGTH, 1)]),
            lambda: region.evict(LENGTH, 1),
            lambda: region.heal(LENGTH, 1),
            lambda: region.resident(LENGTH, 1),
            lambda: region.readinto(io.BytesIO(b"xx"), LENGTH - 1, 2),
        ):
            with pytest.raises(ValueError, match="outside of the region"):
                call()
        with pytest.raises(OverflowError):
            region.pread(-1, 0)
        assert region.pread(0, LENGTH) == b""


def test_pwrite_takes_any_array_and_the_region_itself(path: Path) -> None:
    with userfault.open(path, "r+") as region:
        numbers = np.arange(12, dtype="<i4").reshape(3, 4)
        assert region.pwrite(numbers, 5) == 48
        assert region.pread(48, 5) == numbers.tobytes()
        assert region.pwrite(numbers.T, 5) == 48
        assert region.pread(48, 5) == numbers.T.tobytes()
        assert region.pwrite(numbers[:, ::2], 5) == 24
        view = memoryview(region)
        assert region.pwrite(view[100:200], 50_000) == 100
        assert region.pread(100, 50_000) == NOISE[100:200]
        assert region.pwrite(b"", 3) == 0
        view.release()


def test_two_regions_are_copied_into_each_other_under_one_small_limit(path: Path) -> None:
    other = path.with_name("other.bin")
    other.write_bytes(NOISE[::-1])
    old = userfault.set_memory_limit("64KiB")
    try:
        with (
            userfault.open(path, "r+", block="4KiB") as a,
            userfault.open(other, "r+", block="4KiB") as b,
        ):
            views = memoryview(a), memoryview(b)
            threads = [
                threading.Thread(target=a.pwrite, args=(views[1], 0)),
                threading.Thread(target=b.pwrite, args=(views[0], 0)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
            for view in views:
                view.release()
    finally:
        userfault.set_memory_limit(old)


def test_a_read_only_region_refuses_to_be_written(path: Path) -> None:
    with userfault.open(path) as region:
        with pytest.raises(io.UnsupportedOperation, match="read-only"):
            region.pwrite(b"x", 0)
        with pytest.raises(io.UnsupportedOperation, match="read-only"):
            region.readinto(io.BytesIO(b"x"), 0, 1)
        with pytest.raises(io.UnsupportedOperation):
            region.pin(write=True)
        with pytest.raises(TypeError):
            memoryview(region)[0] = 1
        region.flush()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * 1000)
    return path


@pytest.mark.parametrize("buffering", [0, -1])
def test_readinto_reads_from_where_a_file_stands_and_leaves_it_behind(
    path: Path, source: Path, buffering: int
) -> None:
    with userfault.open(path, "r+", memory_limit="64KiB") as region, source.open("rb", buffering) as file:
        assert file.read(3) == b"\0\1\2"
        assert region.readinto(file, 10, 200_000) == 200_000
        assert region.pread(200_000, 10) == source.read_bytes()[3:200_003]
        assert file.read(2) == source.read_bytes()[200_003:200_005]
        assert region.readinto(file, 0, 900_000) == 256_000 - 200_005
        assert region.readinto(file, 0, 10) == 0


def test_readinto_takes_descriptors_pipes_sockets_and_objects(path: Path, source: Path) -> None:
    with userfault.open(path, "r+") as region:
        fd = os.open(source, os.O_RDONLY)
        assert region.readinto(fd, 0, 10) == 10
        os.close(fd)
        read, write = os.pipe()
        threading.Thread(target=lambda: (os.write(write, b"a" * 100_000), os.close(write))).start()
        with os.fdopen(read, "rb") as pipe:
            assert region.readinto(pipe, 0, 200_000) == 100_000
        ours, theirs = socket.socketpair()
        theirs.sendall(b"hello")
        theirs.close()
        assert region.readinto(ours.fileno(), 7, 100) == 5
        ours.close()
        assert region.readinto(io.BytesIO(b"world"), 12, 100) == 5
        assert region.pread(10, 7) == b"helloworld"


def test_readinto_of_a_file_that_cannot_be_read_raises(path: Path, tmp_path: Path) -> None:
    with userfault.open(path, "r+") as region, (tmp_path / "w").open("wb") as file:
        with pytest.raises(OSError, match=r"Bad file descriptor|not readable"):
            region.readinto(file, 0, 10)
        with pytest.raises(OSError, match="Bad file descriptor"):
            region.readinto(9999, 0, 10)


def test_a_pin_keeps_blocks_in_memory(path: Path) -> None:
    with userfault.open(path, "r+", block="4KiB", memory_limit="128KiB") as region:
        with region.pin(5000, 10_000) as pin:
            assert (pin.offset, pin.length) == (4096, 12_288)
            bytes(memoryview(region)[100_000:])
            region.evict()
            assert region.resident()[:6] == b"\0\1\1\1\0\0"
            assert region.stats().pinned == 12_288
        assert pin.released
        pin.release()
        region.evict()
        assert not any(region.resident())


def test_more_pinned_than_the_limit_is_memory_error_and_pins_nothing(path: Path) -> None:
    with userfault.open(path, "r+", block="4KiB", memory_limit="128KiB") as region:
        with pytest.raises(MemoryError, match="limit"):
            region.pin()
        assert region.stats().pinned == 0
        with region.pin(0, 4096):
            pass


def test_a_dropped_pin_is_released(path: Path) -> None:
    with userfault.open(path, block="4KiB") as region:
        region.pin(0, 4096)
        assert region.stats().pinned == 0


def test_a_device_may_write_inside_a_writing_pin(path: Path, source: Path) -> None:
    """O_DIRECT writes behind every page table."""
    try:
        direct = os.open(source, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"this file system has no direct I/O: {error}")
    with userfault.open(path, "r+", memory_limit="256KiB", block="16KiB") as region:
        view = memoryview(region)
        with region.pin(0, 131_072, write=True) as pin:
            assert pin.write
            part = view[: 16 * mmap.PAGESIZE]
            assert os.preadv(direct, [part], 0) == len(part)
            region.flush()
            part.release()
        region.evict()
        assert bytes(view[:65_536]) == source.read_bytes()[:65_536]
        view.release()
    os.close(direct)
    assert path.read_bytes()[:65_536] == source.read_bytes()[:65_536]


def test_system_calls_on_absent_memory_work_where_the_machine_allows_them(path: Path, source: Path) -> None:
    with userfault.open(path, "r+", block="4KiB", memory_limit="32KiB") as region:
        if not region.kernel_faults:
            pytest.skip("this process may not answer the kernel's faults")
        with memoryview(region) as view, source.open("rb", 0) as file:
            assert os.pwrite(os.open("/dev/null", os.O_WRONLY), view, 0) == LENGTH
            assert file.readinto(view[1000:]) == 256_000
            assert view[1000:257_000] == source.read_bytes()
            out = source.with_name("out")
            with out.open("wb", 0) as target:
                assert target.write(view) == LENGTH
            assert out.read_bytes() == bytes(view)


def test_a_prefetch_returns_at_once_or_when_all_is_there(path: Path) -> None:
    store = FaultyStore(MemoryStore(64 * 4096), [])
    with userfault.open(store, block="4KiB") as region:
        ticket = region.prefetch([(0, 4096), (8192, 8192)])
        ticket.result()
        assert ticket.done()
        assert region.resident(0, 5 * 4096) == b"\1\0\1\1\0"
        assert region.prefetch([(20 * 4096, 4096)], wait=True).done()
        assert region.resident(20 * 4096, 1) == b"\1"
        store.plan = [fail("read")]
        with pytest.raises((userfault.PoisonedError, StoreError)):
            region.prefetch([(30 * 4096, 1)], wait=True)


def test_a_prefetch_of_a_slow_store_does_not_wait(path: Path) -> None:
    from userfault.testing import hang

    store = FaultyStore(MemoryStore(b"x" * 64 * 4096), [hang("read")])
    with userfault.open(store, block="4KiB") as region:
        ticket = region.prefetch([(0, len(region))])
        assert not ticket.done()
        store.release()
        ticket.result()
        assert region.resident() == b"\1" * 64


def test_a_prefetch_beyond_the_limit_brings_what_fits(path: Path) -> None:
    with userfault.open(path, block="4KiB", memory_limit="64KiB") as region:
        region.prefetch([(0, LENGTH)], wait=True)
        assert 0 < sum(region.resident()) * 4096 <= 65_536
        assert region.stats().limit == 65_536
