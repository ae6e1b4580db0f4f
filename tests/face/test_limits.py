"""The memory limit of the process, and the figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import userfault
from userfault import MemoryStore


@pytest.fixture(autouse=True)
def _same_limit_afterwards() -> Iterator[None]:
    old = userfault.set_memory_limit("auto")
    userfault.set_memory_limit(old)
    yield
    userfault.set_memory_limit("auto")


def test_a_limit_is_a_number_text_or_auto_and_the_old_one_comes_back() -> None:
    auto = userfault.set_memory_limit("256MiB")
    assert auto > 8 << 20
    assert userfault.stats().limit == 256 << 20
    assert userfault.set_memory_limit(1 << 30) == 256 << 20
    assert userfault.set_memory_limit("auto") == 1 << 30
    assert userfault.stats().limit > 8 << 20


@pytest.mark.parametrize("limit", ["", "many", -1, 0, "0 MiB"])
def test_what_is_no_limit_is_refused(limit: int | str) -> None:
    before = userfault.stats().limit
    with pytest.raises(ValueError):  # noqa: PT011 - each has a text of its own
        userfault.set_memory_limit(limit)
    assert userfault.stats().limit == before


def test_other_kinds_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        userfault.set_memory_limit(1.5)  # type: ignore[arg-type]


def test_the_limit_holds_for_all_regions_together_and_shrinks_at_once(tmp_path: Path) -> None:
    regions = [userfault.open(tmp_path / str(i), "w", length="8MiB", block="64KiB") for i in range(3)]
    for region in regions:
        region.ndarray("u1")[:] = 1
    assert userfault.stats().used >= 24 << 20
    userfault.set_memory_limit("4MiB")
    stats = userfault.stats()
    assert stats.resident + stats.resting <= 4 << 20
    for region in regions:
        assert (region.ndarray("u1") == 1).all()
        region.close()
    assert userfault.stats().regions == 0


def test_a_limit_below_four_blocks_still_runs() -> None:
    with userfault.open(MemoryStore(64 << 20), "r+", block="1MiB", memory_limit=1) as region:
        array = region.ndarray("u1")
        array[:] = 3
        assert int(array.sum(dtype="u8")) == 3 * len(array)
        assert region.stats().limit >= 4 << 20
        del array


def test_figures_count_what_happened() -> None:
    with userfault.open(MemoryStore(1 << 20), "r+", block="4KiB", memory_limit="64KiB") as region:
        before = region.stats()
        assert (before.faults_missing, before.bytes_read, before.evictions) == (0, 0, 0)
        array = region.ndarray("u1")
        array[:] = 1
        region.flush()
        stats = region.stats()
        assert 0 < stats.faults_missing <= 256
        assert stats.bytes_read >= 1 << 20
        assert stats.bytes_written >= 1 << 20
        assert stats.evictions >= 256 - 16
        assert 0 < stats.latency_p50 <= stats.latency_p99 <= stats.latency_max < 10
        assert stats.as_dict()["faults_missing"] == stats.faults_missing
        assert f"faults_missing={stats.faults_missing}" in repr(stats)
        del array


def test_the_process_counts_what_closed_regions_did() -> None:
    before = userfault.stats().bytes_read
    with userfault.open(MemoryStore(1 << 20)) as region:
        np.asarray(region.ndarray("u1")).sum()
    assert userfault.stats().bytes_read >= before + (1 << 20)


def test_blocks_that_were_evicted_by_hand_come_back_under_the_smallest_limit() -> None:
    """A stale place among the resting blocks once made a fill look for room in itself alone, for ever."""
    random = np.random.default_rng(4)
    with userfault.open(MemoryStore(1 << 20), block="16KiB", memory_limit="64KiB", retry_for=1) as region:
        for _ in range(500):
            offset, evicted = (int(n) for n in random.integers(0, (1 << 20) - 100_000, 2))
            region.evict(evicted, 50_000)
            assert region.pread(70_000, offset) == bytes(70_000)
