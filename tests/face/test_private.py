"""Private changes: mode "c", and arrays without a file."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import userfault


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    np.arange(1 << 20, dtype=np.uint32).tofile(path)
    return path


@pytest.mark.parametrize("block", ["4KiB", "64KiB", "2MiB"])
def test_what_is_written_in_mode_c_is_read_back_and_never_reaches_the_file(numbers: Path, block: str) -> None:
    before = numbers.read_bytes()
    expected = np.fromfile(numbers, np.uint32)
    with userfault.open(numbers, "c", block=block, memory_limit="1MiB") as region:
        array = region.ndarray(np.uint32)
        for step in (1, 3, 7):
            array[::step] += step
            expected[::step] += step
        assert np.array_equal(array, expected)
        region.flush()
        del array
    assert numbers.read_bytes() == before


def test_a_private_region_begins_and_ends_anywhere(numbers: Path) -> None:
    before = numbers.read_bytes()
    with userfault.open(
        numbers, "c", offset=1001, length=300_007, block="4KiB", memory_limit="64KiB"
    ) as region:
        array = region.ndarray(np.uint8)
        assert array.tobytes() == before[1001 : 1001 + 300_007]
        array[:] = 7
        assert np.all(array == 7)
        assert region.offset == 1001
        del array
    assert numbers.read_bytes() == before


def test_memmap_and_load_have_mode_c(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10_000.0))
    array = userfault.load(path, "c", scratch=tmp_path)
    array[:] = -1
    assert array.mode == "c"
    assert np.load(path)[5] == 5
    mapped = userfault.memmap(path, np.uint8, "c")
    mapped[0] = 0
    assert path.read_bytes()[0] == 0x93
    with pytest.raises(ValueError, match="scratch is for private changes"):
        userfault.load(path, "r", scratch=tmp_path)


def test_pickling_refuses_private_changes_and_sends_what_has_none(numbers: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    array = userfault.memmap(numbers, np.uint32, "c")
    copy = pickle.loads(pickle.dumps(array))
    assert copy.mode == "c"
    assert copy[77] == 77
    # The folder for private changes travels too.
    elsewhere = pickle.dumps(userfault.memmap(numbers, np.uint32, "c", scratch=tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="scratch file"):
        pickle.loads(elsewhere)
    array[5] = 1
    with pytest.raises(TypeError, match="private changes"):
        pickle.dumps(array)


def test_an_array_without_a_file_may_be_larger_than_its_memory(tmp_path: Path) -> None:
    array = userfault.zeros((2048, 2048), np.float64, memory_limit="8MiB", scratch=tmp_path)
    assert array.shape == (2048, 2048)
    assert not array[100].any()
    values = np.random.default_rng(1).random((2048, 2048))
    array[:] = values
    array.sort(axis=1)
    values.sort(axis=1)
    assert np.array_equal(array, values)
    assert list(tmp_path.iterdir()) == []


def test_full_fills_and_takes_the_type_of_its_value() -> None:
    assert np.all(userfault.full((3, 5), 7) == 7)
    assert userfault.full(4, 7).dtype == np.asarray(7).dtype
    assert userfault.full((2, 3), [1.5, 2, 3]).tolist() == [[1.5, 2, 3]] * 2
    assert userfault.empty((0, 3)).shape == (0, 3)


def test_an_arena_holds_ten_thousand_arrays_and_outlives_itself() -> None:
    arena = userfault.Arena("64MiB", name="many")
    before = len(Path("/proc/self/maps").read_text().splitlines())
    arrays = [arena.zeros(700, np.float64) for _ in range(10_000)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before < 50
    del arena
    assert all(np.all(array == number) for number, array in enumerate(arrays))


def test_a_full_arena_says_how_much_is_left() -> None:
    arena = userfault.Arena(8192)
    arena.zeros(5000, np.uint8)
    with pytest.raises(MemoryError, match="3136 of the arena's 8192 bytes are left"):
        arena.zeros(4000, np.uint8)
    assert arena.used == 5000


def test_a_folder_that_takes_no_file_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="takes no scratch file of 8000 bytes") as caught:
        userfault.zeros(1000, scratch="/nowhere/at/all")
    assert caught.value.filename == "/nowhere/at/all"
    with pytest.raises(ValueError, match="NUL"):
        userfault.zeros(1000, scratch="a\0b")
    assert not userfault.zeros(1000, scratch=os.fsencode(tmp_path)).any()  # type: ignore[arg-type]


def test_a_length_that_the_file_system_does_not_take_names_the_folder(
    tmp_path: Path, longest_file: int
) -> None:
    with pytest.raises(OSError, match=f"scratch file of {8 * longest_file} bytes: File too large") as caught:
        userfault.zeros(longest_file, scratch=tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path))


Make = Callable[..., Any]


@pytest.mark.parametrize("make", [userfault.zeros, userfault.empty, partial(userfault.full, fill_value=7)])
@pytest.mark.parametrize("shape", [0, 5, (), (3, 0, 2), (3, 4), np.int64(6)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("track", [False, True])
def test_shapes_types_and_orders_are_those_of_numpy(make: Make, shape: Any, order: Any, track: bool) -> None:
    for dtype in (">f4", "S3", "M8[ns]", [("a", ">i2"), ("b", "f8", (2,))], ("f4", (2,)), np.longdouble):
        array = make(shape, dtype=dtype, order=order, track=track)
        like = np.full(shape, 7, dtype, order) if isinstance(make, partial) else np.zeros(shape, dtype, order)
        assert (array.shape, array.dtype) == (like.shape, like.dtype)
        assert type(array) is np.ndarray
        assert np.array_equal(array, like)
        if not np.dtype(dtype).shape:
            assert array.flags.f_contiguous == like.flags.f_contiguous
            assert array.flags.c_contiguous == like.flags.c_contiguous


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": -1}, ValueError, "negative dimension"),
        ({"shape": (3, -1)}, ValueError, "negative dimension"),
        ({"shape": 3.0}, TypeError, "integer"),
        ({"shape": 1 << 44}, ValueError, "do not fit into the address space"),
        ({"shape": 1 << 62}, ValueError, "do not fit into the address space"),
        ({"shape": (1 << 40, 1 << 40)}, ValueError, "do not fit into the address space"),
        ({"shape": (3, 3), "order": "K"}, ValueError, "order is 'K'"),
        ({"shape": 0, "order": None}, ValueError, "order is None"),
        ({"shape": 3, "dtype": object}, ValueError, "Python objects"),
        ({"shape": 3, "dtype": "S"}, ValueError, "no size"),
        ({"shape": 3, "pages": "8KiB"}, ValueError, "pages is '8KiB'"),
        ({"shape": 0, "pages": "8KiB"}, ValueError, "pages is '8KiB'"),
        ({"shape": 3, "memory_limit": "much"}, ValueError, "memory_limit is 'much'"),
        ({"shape": 3, "memory_limit": -1}, ValueError, "never negative"),
        ({"shape": 3, "track": True, "memory_limit": "1GiB"}, ValueError, "neither scratch nor memory_limit"),
        ({"shape": 3, "track": True, "scratch": "."}, ValueError, "neither scratch nor memory_limit"),
        ({"shape": 0, "track": True, "scratch": "."}, ValueError, "neither scratch nor memory_limit"),
        ({"shape": 1 << 40, "track": True}, MemoryError, "the limit leaves"),
        ({"shape": 1 << 62, "track": True}, ValueError, "do not fit into the address space"),
    ],
)
def test_arrays_that_make_no_sense_are_refused_with_a_reason(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    for make in (userfault.zeros, userfault.empty, partial(userfault.full, fill_value=7)):
        with pytest.raises(error, match=message):
            cast("Make", make)(**{"dtype": float, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"nbytes": 0}, ValueError, "an arena without room"),
        ({"nbytes": 1 << 47}, ValueError, "does not fit into the address space"),
        ({"nbytes": "1MiB", "track": True, "scratch": "."}, ValueError, "neither scratch nor memory_limit"),
        ({"nbytes": "1TiB", "track": True}, MemoryError, "the limit leaves"),
        ({"nbytes": "1MiB", "pages": "8KiB"}, ValueError, "pages is '8KiB'"),
        ({"nbytes": "1MiB", "pages": "8KiB", "track": True}, ValueError, "pages is '8KiB'"),
    ],
)
def test_arenas_that_make_no_sense_are_refused_with_a_reason(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        userfault.Arena(**arguments)


def test_an_arena_takes_what_zeros_takes_and_refuses_what_it_refuses() -> None:
    arena = userfault.Arena("1MiB", track=True, name="mine")
    assert "'mine'" in repr(arena)
    assert arena.zeros((2, 3), ">f4", "F").flags.f_contiguous
    assert arena.empty((), "i4").shape == ()
    assert arena.empty((0, 5)).shape == (0, 5)
    for arguments in ({"shape": -1}, {"shape": 3, "dtype": object}, {"shape": 3, "order": "K"}):
        with pytest.raises(ValueError, match=r"negative|objects|order"):
            arena.zeros(**arguments)  # type: ignore[arg-type]


def test_the_memory_of_an_arena_goes_with_the_last_of_its_arrays() -> None:
    before = userfault.stats().regions
    arena = userfault.Arena("1MiB")
    first, last = arena.zeros(100), arena.zeros(100)
    last[:] = 3
    del arena, first
    assert userfault.stats().regions == before + 1
    assert last.sum() == 300
    del last
    assert userfault.stats().regions == before
