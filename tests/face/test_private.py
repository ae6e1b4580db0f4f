"""Private changes: mode "c", and arrays without a file."""

from __future__ import annotations

import pickle
from pathlib import Path

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


def test_pickling_refuses_private_changes_and_sends_what_has_none(numbers: Path) -> None:
    array = userfault.memmap(numbers, np.uint32, "c")
    copy = pickle.loads(pickle.dumps(array))
    assert copy.mode == "c"
    assert copy[77] == 77
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


def test_a_folder_that_takes_no_file_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="scratch file"):
        userfault.zeros(1000, scratch="/nowhere/at/all")
