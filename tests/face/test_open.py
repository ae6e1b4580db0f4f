"""userfault.open: modes, ranges, sizes, and what is refused."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import userfault
from conftest import RunChild
from userfault import FileStore, InUseError, MemoryStore, StoreError, ZeroStore

NOISE = np.random.default_rng(1).integers(0, 256, 1_000_003, dtype=np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(NOISE)
    return path


def test_a_region_is_the_file(path: Path) -> None:
    with userfault.open(path) as region:
        assert len(region) == len(NOISE)
        assert bytes(region) == NOISE
        assert region.mode == "r"
        assert region.name == str(path)
        assert repr(region) == f"<userfault.Region {str(path)!r}, {len(NOISE)} bytes, mode 'r'>"


@pytest.mark.parametrize("limit", [None, "64KiB"])
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(offset=st.integers(0, len(NOISE) - 1), data=st.data(), power=st.integers(12, 22))
def test_any_range_in_blocks_of_any_size_is_that_part_of_the_file(
    path: Path, limit: str | None, offset: int, data: st.DataObject, power: int
) -> None:
    length = data.draw(st.integers(1, len(NOISE) - offset))
    with userfault.open(path, offset=offset, length=length, block=1 << power, memory_limit=limit) as region:
        assert bytes(region) == NOISE[offset : offset + length]
        assert (region.offset, len(region), region.block) == (offset, length, 1 << power)


def test_what_is_written_is_in_the_file_and_its_length_stays(path: Path) -> None:
    offset, length = 4_567, 300_001
    with userfault.open(path, "r+", offset=offset, length=length) as region:
        array = region.ndarray(np.uint8)
        array[:] = 7
        del array
    assert path.read_bytes() == NOISE[:offset] + b"\7" * length + NOISE[offset + length :]


def test_the_bytes_after_the_end_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with userfault.open(path, "r+") as region:
        memoryview(region)[1] = ord("X")
    assert path.read_bytes() == b"aXc"


@pytest.mark.parametrize(
    ("mode", "existing", "after"),
    [
        ("r", None, FileNotFoundError),
        ("r", b"0123456789", b"0123456789"),
        ("r", b"0123", ValueError),
        ("r+", None, FileNotFoundError),
        ("r+", b"0123456789", b"X123456789"),
        ("r+", b"0123", ValueError),
        ("w", None, b"X" + bytes(7)),
        ("w", b"0123456789", b"X" + bytes(7)),
        ("w-", None, b"X" + bytes(7)),
        ("w-", b"0123456789", FileExistsError),
        ("x", None, b"X" + bytes(7)),
        ("x", b"0123456789", FileExistsError),
        ("a", None, b"X" + bytes(7)),
        ("a", b"0123", b"X123" + bytes(4)),
        ("a", b"0123456789", b"X123456789"),
    ],
)
def test_modes(tmp_path: Path, mode: str, existing: bytes | None, after: bytes | type[Exception]) -> None:
    path = tmp_path / "data.bin"
    if existing is not None:
        path.write_bytes(existing)
    if isinstance(after, bytes):
        with userfault.open(path, mode, length=8) as region:
            view = memoryview(region)
            assert view.readonly == (mode == "r")
            if mode != "r":
                view[0] = ord("X")
            view.release()
        assert path.read_bytes() == after
    else:
        with pytest.raises(after):
            userfault.open(path, mode, length=8)
        assert (path.read_bytes() if path.exists() else None) == existing


def test_mode_a_makes_room_for_offset_and_length(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    userfault.open(path, "a", offset=100, length=50).close()
    assert path.stat().st_size == 150
    userfault.open(path, "a").close()
    assert path.stat().st_size == 150


@pytest.mark.parametrize("mode", ["w", "w-", "x"])
def test_modes_that_create_need_a_length(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ValueError, match="give its length"):
        userfault.open(tmp_path / "data.bin", mode)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "rw"}, "one of r, r\\+, w, w-, x, a"),
        ({"fault": "magic"}, "fault is 'magic'"),
        ({"readahead": "none"}, "readahead is 'none'"),
        ({"pages": "1GiB"}, "pages is '1GiB'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"retry_for": 0}, "retry_for is 0"),
        ({"retry_for": float("nan")}, "retry_for is nan"),
        ({"retry_for": 1e30}, "retry_for is 1e"),
        ({"offset": -1}, "offset is -1"),
        ({"offset": len(NOISE)}, "none of them at offset"),
        ({"length": 0}, "length is 0"),
        ({"length": -1}, "never negative"),
        ({"length": len(NOISE) + 1}, "has 1000003 bytes, not the 1000004"),
        ({"length": 1 << 60}, "do not fit into the address space"),
        ({"block": 5000}, "power of two from 4 KiB to 64 MiB"),
        ({"block": 2048}, "power of two"),
        ({"block": "128MiB"}, "power of two"),
        ({"block": "big"}, "block is 'big'"),
        ({"memory_limit": "much"}, "memory_limit is 'much'"),
        ({"memory_limit": 1 << 70}, "no machine has so many bytes"),
        ({"pages": "2MiB", "block": "64KiB"}, "never larger than its block"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        userfault.open(path, **arguments)


def test_what_is_refused_has_not_emptied_the_file(path: Path) -> None:
    for arguments in (
        {"block": 5},
        {"pages": "2MiB", "block": "4KiB"},
        {"retry_for": -1},
        {"memory_limit": "x"},
    ):
        with pytest.raises(ValueError, match=r"block|pages|retry_for|memory_limit"):
            userfault.open(path, "w", length=10, **arguments)
    assert path.read_bytes() == NOISE


def test_a_length_that_cannot_be_had_empties_no_file(path: Path, longest_file: int) -> None:
    for create, reason in (
        (partial(userfault.open, path, "w", length=2 * longest_file), "File too large"),
        (partial(userfault.memmap, path, "u1", "w+", shape=2 * longest_file), "File too large"),
        (partial(userfault.open_memmap, path, "w+", "u1", (2 * longest_file,)), "File too large"),
        (partial(userfault.memmap, path, "u8", "w+", shape=1 << 60), "address space"),
        (partial(userfault.open_memmap, path, "w+", "u8", (1 << 60,)), "address space"),
    ):
        with pytest.raises((OSError, ValueError), match=reason):
            cast("Callable[[], object]", create)()
        assert path.read_bytes() == NOISE


def test_a_path_with_a_nul_is_no_path() -> None:
    with pytest.raises(ValueError, match="NUL"):
        userfault.open("a\0b")


def test_a_closed_region_has_no_memory(path: Path) -> None:
    region = userfault.open(path, block="4KiB")
    assert region.pread(1, 0) == NOISE[:1]
    assert region.stats().resident > 0 or region.stats().resting > 0
    region.close()
    stats = region.stats()
    assert (stats.regions, stats.used, stats.resident, stats.resting) == (0, 0, 0, 0)
    assert stats.bytes_read > 0


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path, run_child: RunChild) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = "import sys, userfault\nuserfault.open(sys.argv[1])"
    done = run_child(code, str(tmp_path / "pipe"), timeout=30, check=False)
    assert "ValueError" in done.stderr
    assert "neither a regular file nor a block device" in done.stderr


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"is empty; give a length, and mode 'a'"):
        userfault.open(tmp_path / "empty")


@pytest.mark.parametrize("what", [None, 5, b"data.bin"])
def test_something_else_than_a_path_or_a_store_is_a_type_error(what: Any) -> None:
    with pytest.raises(TypeError, match="a path or a store is needed"):
        userfault.open(what)


def test_sizes_may_be_text(path: Path) -> None:
    with userfault.open(path, length="512KiB", block="16KiB", memory_limit="1MiB") as region:
        assert (len(region), region.block) == (512 << 10, 16 << 10)
        assert region.stats().limit == 1 << 20


@pytest.mark.parametrize("power", range(mmap.PAGESIZE.bit_length() - 1, 27))
def test_every_block_size_works(path: Path, power: int) -> None:
    with userfault.open(path, "r+", block=1 << power) as region:
        array = region.ndarray("u1")
        array[-1] ^= 255
        assert array[0] == NOISE[0]
        del array
    assert path.read_bytes() == NOISE[:-1] + bytes([NOISE[-1] ^ 255])


def test_huge_pages_are_used_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    try:
        region = userfault.open(path, "w", length="8MiB", pages="2MiB")
    except OSError as error:
        pytest.skip(f"no pages of 2 MiB here: {error}")
    with region:
        assert region.pages.startswith("2MiB")
        assert region.block == 2 << 20
        array = region.ndarray("u8")
        array[:] = np.arange(len(array))
        del array
    assert (np.fromfile(path, "u8") == np.arange(1 << 20)).all()
    with userfault.open(path, pages="4KiB", block="4MiB") as small:
        assert small.pages.startswith("4KiB")


def test_a_store_is_opened_like_a_file() -> None:
    store = MemoryStore(b"0123456789")
    with userfault.open(store, "r+", offset=2, length=5) as region:
        assert bytes(region) == b"23456"
        memoryview(region)[0] = ord("X")
    assert store.getvalue() == b"01X3456789"
    with userfault.open(ZeroStore(1 << 40)) as zeros:
        assert zeros.ndarray("u8")[1 << 36] == 0


def test_a_store_that_cannot_be_written_refuses_a_writable_region() -> None:
    with pytest.raises(OSError, match="read-only"):
        userfault.open(ZeroStore(100), "r+")


@pytest.mark.parametrize("mode", ["w", "x", "a"])
def test_a_store_exists_already(mode: str) -> None:
    with pytest.raises(ValueError, match="opened with 'r', 'r\\+' or 'c'"):
        userfault.open(MemoryStore(10), mode, length=10)


def test_a_store_has_one_writer_unless_locking_is_off(path: Path) -> None:
    for store in (MemoryStore(100), FileStore(path, "r+")):
        first = userfault.open(store, "r+")
        with pytest.raises(InUseError, match="locking=False"):
            userfault.open(store, "r+")
        userfault.open(store, "r+", locking=False).close()
        userfault.open(store, "r").close()
        first.close()
        userfault.open(store, "r+").close()


def test_a_file_has_one_writer_until_it_is_closed(path: Path) -> None:
    first = userfault.open(path, "r+")
    with pytest.raises(InUseError, match="locking=False") as caught:
        userfault.open(path, "w", length=1)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == NOISE
    first.close()
    userfault.open(path, "r+").close()


def test_a_reader_may_join_a_live_writer_and_sees_what_was_flushed_before_it_reads(path: Path) -> None:
    with userfault.open(path, "r+") as writer, userfault.open(path) as reader:
        memoryview(writer)[0:4] = b"ABCD"
        writer.flush()
        assert bytes(memoryview(reader)[0:4]) == b"ABCD"
        memoryview(writer)[0:4] = b"EFGH"
        writer.flush()
        # The reader has its block already; it sees the new bytes once the block was read again.
        assert bytes(memoryview(reader)[0:4]) == b"ABCD"
        reader.evict()
        assert bytes(memoryview(reader)[0:4]) == b"EFGH"


def test_a_locking_reader_and_a_writer_exclude_each_other(path: Path) -> None:
    with userfault.open(path, locking=True), pytest.raises(InUseError):
        userfault.open(path, "r+")
    with userfault.open(path, "r+"), pytest.raises(InUseError):
        userfault.open(path, locking=True)


def test_a_full_memory_store_behind_a_longer_region_is_refused() -> None:
    with pytest.raises(ValueError, match="has 10 bytes"):
        userfault.open(MemoryStore(10), "r+", length=11)


def test_arrays_of_any_shape_order_type_and_place(path: Path) -> None:
    with userfault.open(path) as region:
        plain = region.ndarray("<u4", (10, 20), offset=8)
        assert type(plain) is np.ndarray
        assert (plain == np.frombuffer(NOISE, "<u4", 200, 8).reshape(10, 20)).all()
        fortran = region.ndarray("<u4", (10, 20), "F", 8)
        assert (fortran == np.frombuffer(NOISE, "<u4", 200, 8).reshape(10, 20, order="F")).all()
        assert len(region.ndarray("u1", offset=3)) == len(NOISE) - 3
        assert region.ndarray("u1", 5).shape == (5,)
        assert not plain.flags.writeable
        for arguments, message in [
            (("u8",), "no whole number of elements"),
            (("u1", len(NOISE) + 1), "takes 1000004 bytes"),
            (("u1", None, "C", -1), "outside"),
            (("u1", (-1, 2)), "negative"),
            (("O", 1), "Python objects"),
            (("S", 1), "no size"),
        ]:
            with pytest.raises(ValueError, match=message):
                region.ndarray(*arguments)
        del plain, fortran


def test_a_store_error_names_the_file(path: Path) -> None:
    with userfault.open(path) as region:
        path.write_bytes(b"short")
        with pytest.raises((StoreError, userfault.PoisonedError), match="truncated"):
            region.pread(10, 500_000)
