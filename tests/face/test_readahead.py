"""Read-ahead: what a walk touches next is there before it is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import userfault

BLOCKS = 512


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("walks") / "file"
    np.arange(BLOCKS * 65536 // 8, dtype=np.uint64).tofile(path)
    return path


def faults_of_a_walk(file: Path, step: int, advice: str = "normal") -> int:
    with userfault.open(file, block="64KiB", memory_limit="16MiB") as region:
        region.advise(advice)  # type: ignore[arg-type]
        array = region.ndarray(np.uint64).reshape(BLOCKS, -1)
        walked = array[::step, 5]
        assert walked.tolist() == (np.arange(BLOCKS)[::step] * 8192 + 5).tolist()
        faults = region.stats().faults_missing
        del array, walked
    return faults


@pytest.mark.parametrize("step", [1, -1, 2, -3])
def test_a_walk_faults_on_few_of_its_blocks(file: Path, step: int) -> None:
    touched = len(range(0, BLOCKS, abs(step)))
    # A block that is still being read when it is touched counts as a fault too, so this is no exact number.
    assert faults_of_a_walk(file, step) < touched * 0.8


def test_without_read_ahead_every_block_faults(file: Path) -> None:
    assert faults_of_a_walk(file, 1, "random") == BLOCKS


def test_random_touches_read_little_more_than_they_touch(file: Path) -> None:
    with userfault.open(file, block="4KiB", memory_limit="4MiB") as region:
        array = region.ndarray(np.uint64)
        places = np.random.default_rng(3).integers(0, len(array), 2000)
        assert np.array_equal(array[places], places)
        assert region.stats().bytes_read < 2000 * 4096 * 1.2
        del array


def test_advice_that_is_none_is_refused(file: Path) -> None:
    with userfault.open(file) as region:
        with pytest.raises(ValueError, match="one of normal, sequential, random"):
            region.advise("sometimes")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="outside of the region"):
            region.advise("random", 0, 1 << 40)
