"""Regions and the calls that copy in and out of them: pread, pwrite, readinto, pin, read(2) and write(2)."""

from __future__ import annotations

import io
import mmap
import os
import socket
import threading
from pathlib import Path
from typing import Any

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
            lambda: region.pread(-1, 0),
            lambda: region.pread(1, -1),
            lambda: region.pwrite(b"x", -1),
            lambda: region.flush(-1),
            lambda: region.evict(5, -3),
            lambda: region.prefetch([(-4096, 4096)]),
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


@pytest.mark.parametrize("way", ["pwrite", "plain copy", "memoryview"])
@pytest.mark.parametrize("block", ["4KiB", "64KiB"])
def test_two_regions_are_copied_into_each_other_under_one_small_limit(
    path: Path, way: str, block: str
) -> None:
    """Both ends of each copy are absent, and the other copy wants the same few blocks."""
    other = path.with_name("other.bin")
    other.write_bytes(NOISE[::-1])
    half = LENGTH // 2 + 77
    old = userfault.set_memory_limit(1)
    try:
        with (
            userfault.open(path, "r+", block=block) as a,
            userfault.open(other, "r+", block=block) as b,
        ):
            # a's first part goes to b, b's last part to a: no byte is both read and written.
            def copy(to: userfault.Region, source: userfault.Region, part: slice) -> None:
                if way == "pwrite":
                    with memoryview(source) as view:
                        to.pwrite(view[part], part.start)
                elif way == "plain copy":
                    to.ndarray("u1")[part] = source.ndarray("u1")[part]
                else:
                    with memoryview(to) as target, memoryview(source) as view:
                        target[part] = view[part]

            threads = [
                threading.Thread(target=copy, args=(b, a, slice(0, half))),
                threading.Thread(target=copy, args=(a, b, slice(half, LENGTH))),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(100)
                assert not thread.is_alive()
        expected = NOISE[:half] + NOISE[::-1][half:]
        assert path.read_bytes() == expected
        assert other.read_bytes() == expected
    finally:
        userfault.set_memory_limit(old)


def test_pwrite_of_a_part_of_the_region_over_another_part_is_a_plain_move(path: Path) -> None:
    """As memmove, however far apart they are, and however large."""
    length = 5_000_000
    source = np.random.default_rng(8).integers(0, 256, length, dtype=np.uint8)
    for begin, to in ((0, 1), (0, 70_000), (70_000, 0), (1, 0), (5000, 1_500_000), (1_500_000, 5000)):
        with userfault.open(
            MemoryStore(source.tobytes()), "r+", block="16KiB", memory_limit="256KiB"
        ) as region:
            expected = source.copy()
            n = length - max(begin, to)
            expected[to : to + n] = source[begin : begin + n]
            with memoryview(region) as view:
                assert region.pwrite(view[begin : begin + n], to) == n
                assert np.array_equal(np.frombuffer(view, "u1"), expected)


def test_pages_go_through_sockets_pipes_and_files_and_back(path: Path, source: Path) -> None:
    """send, recv_into, writev, readv, sendfile of the file behind it: each meets absent memory."""
    with userfault.open(path, "r+", block="4KiB", memory_limit="32KiB") as region:
        if not region.kernel_faults:
            pytest.skip("this process may not answer the kernel's faults")
        with memoryview(region) as view:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                sender = threading.Thread(target=ours.sendall, args=(view[:300_000],))
                sender.start()
                done = 0
                while done < 300_000:
                    done += theirs.recv_into(view[600_000 + done : 900_000])
                sender.join()
            assert view[600_000:900_000] == NOISE[:300_000]
            read, write = os.pipe()
            assert os.writev(write, [view[10:20], view[100_000:100_010], view[700_000:700_010]]) == 30
            assert os.readv(read, [view[950_000:950_010], view[400_000:400_020]]) == 30
            assert view[950_000:950_010] == NOISE[10:20]
            assert view[400_000:400_020] == NOISE[100_000:100_010] + NOISE[100_000:100_010]
            os.close(read)
            os.close(write)
            region.flush()
            with path.open("rb") as file, path.with_name("copy").open("wb") as copy:
                done = 0
                while done < LENGTH:
                    done += os.sendfile(copy.fileno(), file.fileno(), done, LENGTH - done)
            assert path.with_name("copy").read_bytes() == bytes(view)


def test_a_hundred_and_twenty_eight_threads_touch_at_once() -> None:
    length, threads = 512 << 10, 128
    with userfault.open(MemoryStore(length), "r+", block="4KiB", memory_limit=1) as region:
        array = region.ndarray(np.uint64)

        def work(own: np.ndarray[Any, Any], number: int) -> None:
            # Every thread in every block; NumPy lets go of the interpreter lock in between.
            for _ in range(2):
                own += np.uint64(number)

        running = [
            threading.Thread(target=work, args=(array[number::threads], number)) for number in range(threads)
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(100)
            assert not thread.is_alive()
        assert (array.reshape(-1, threads) == 2 * np.arange(threads, dtype=np.uint64)).all()
        del array, running


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
