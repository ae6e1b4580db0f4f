"""Regions and arrays in the worker processes that people use: spawned ones, joblib's and dask's.

They travel by path: a worker opens the file itself, under a limit of its own, and reads what it touches.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault

ROWS, COLUMNS = 512, 4096


@pytest.fixture
def table(tmp_path: Path) -> Iterator[userfault.memmap]:
    path = tmp_path / "table.f8"
    np.arange(ROWS * COLUMNS, dtype=np.float64).tofile(path)
    array = userfault.memmap(path, np.float64, "r", shape=(ROWS, COLUMNS), memory_limit="2MiB", block="64KiB")
    yield array
    array.close()


def row_sum(array: Any, row: int) -> tuple[float, str, int]:
    """What a worker says: the sum, the kind of array that it got, and how many bytes it read for it."""
    read = array.region.stats().bytes_read if isinstance(array, userfault.memmap) else -1
    return float(array[row].sum()), type(array).__name__, read


def region_sum(region: userfault.Region, offset: int, count: int) -> float:
    return float(region.ndarray(np.float64, count, offset=offset).sum())


def region_rows(region: userfault.Region, row: int, count: int) -> np.ndarray[Any, Any]:
    return region.ndarray(np.float64, (count, COLUMNS), offset=row * COLUMNS * 8)


def scaled(path: str, row: int, by: float) -> None:
    """Writes one row. Workers that write at once say locking=False, and keep out of each other's pages."""
    with userfault.open(path, "r+", locking=False, block="4KiB") as region:
        values = region.ndarray(np.float64, (ROWS, COLUMNS))
        values[row] *= by
        del values


def expected(row: int) -> float:
    return float(np.arange(row * COLUMNS, (row + 1) * COLUMNS, dtype=np.float64).sum())


def check(answers: list[tuple[float, str, int]], rows: list[int]) -> None:
    assert [answer[0] for answer in answers] == [expected(row) for row in rows]
    assert {answer[1] for answer in answers} == {"memmap"}
    # Nobody was sent the array's bytes, or read all of them.
    assert all(0 <= answer[2] < ROWS * COLUMNS * 8 // 2 for answer in answers)


def test_spawned_processes(table: userfault.memmap) -> None:
    rows = [3, 77, 300, 511]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        check(list(pool.map(row_sum, [table] * len(rows), rows)), rows)
        region = table.region
        sums = pool.map(region_sum, [region] * 2, [0, 10 * COLUMNS * 8], [COLUMNS] * 2)
        assert list(sums) == [expected(0), expected(10)]


def test_joblib_workers(table: userfault.memmap) -> None:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    rows = [1, 5, 200, 400]
    # Larger than max_nbytes: joblib would write an ordinary array to a file of its own.
    with joblib.parallel_config(backend="loky", n_jobs=2, max_nbytes="1M"):
        check(joblib.Parallel()(joblib.delayed(row_sum)(table, row) for row in rows), rows)


def test_joblib_workers_that_write(table: userfault.memmap, tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    path = str(tmp_path / "table.f8")
    joblib.Parallel(n_jobs=2)(joblib.delayed(scaled)(path, row, 2.0) for row in range(8))
    after = np.fromfile(path, np.float64).reshape(ROWS, COLUMNS)
    assert [after[row].sum() for row in range(8)] == [2 * expected(row) for row in range(8)]
    assert after[8].sum() == expected(8)


@pytest.mark.time_limit(240)
def test_dask_workers(table: userfault.memmap, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    dask = pytest.importorskip("dask", reason="dask[distributed] is not installed")
    array = pytest.importorskip("dask.array", reason="dask[distributed] is not installed")
    rows = [2, 8, 123, 450]
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=str(tmp_path / "dask"),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        check(client.gather([client.submit(row_sum, table, row) for row in rows]), rows)
        # Chunks of a dask array that are made where they are needed, out of the region.
        region = table.region
        parts = [
            array.from_delayed(dask.delayed(region_rows)(region, row, 64), (64, COLUMNS), np.float64)
            for row in range(0, ROWS, 64)
        ]
        whole = array.concatenate(parts)
        assert float(whole.sum().compute()) == float(np.arange(ROWS * COLUMNS, dtype=np.float64).sum())
