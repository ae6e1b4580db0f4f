"""Regions and arrays travel to other processes by path."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import userfault
from conftest import RunChild
from userfault import InUseError, MemoryStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(np.arange(100_000, dtype="<i4").tobytes())
    return path


@pytest.fixture
def spawned() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def described(array: np.ndarray[Any, Any]) -> tuple[str, int, bool]:
    return type(array).__name__, int(array.sum()), array.flags.writeable


def region_sum(region: userfault.Region) -> int:
    return int(region.ndarray("<i4").sum())


def written(data: bytes) -> str | None:
    array: userfault.memmap = pickle.loads(data)
    array[0] = 123
    array.flush()
    return array.mode


def test_a_region_is_opened_again_by_path_range_and_mode(path: Path) -> None:
    with userfault.open(path, offset=400, length="40KiB", block="8KiB", memory_limit="1MiB") as region:
        copy = again(region)
        assert bytes(copy) == bytes(region)
        assert (copy.name, copy.offset, copy.mode, copy.block) == (str(path), 400, "r", 8192)
        assert copy.stats().limit == 1 << 20
        copy.close()


def test_a_relative_path_travels_as_an_absolute_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with userfault.open("data.bin") as region:
        data = pickle.dumps(region)
    monkeypatch.chdir("/")
    with pickle.loads(data) as copy:
        assert len(copy) == 400_000


def test_pickling_flushes_first(path: Path) -> None:
    with userfault.open(path, "r+") as region:
        memoryview(region)[0] = 99
        pickle.dumps(region)
        assert path.read_bytes()[0] == 99


@pytest.mark.parametrize("mode", ["w", "w-", "x", "a"])
def test_modes_that_create_travel_as_r_plus_and_never_truncate(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "new.bin"
    region = userfault.open(path, mode, length=5000)
    memoryview(region)[:3] = b"abc"
    data = pickle.dumps(region)
    region.close()
    with pickle.loads(data) as copy:
        assert copy.mode == "r+"
        assert bytes(memoryview(copy)[:4]) == b"abc\0"


def test_a_second_writer_is_refused_and_told_of_locking(path: Path) -> None:
    with userfault.open(path, "r+") as region, pytest.raises(InUseError, match="locking=False"):
        again(region)
    with userfault.open(path, "r+", locking=False) as region:
        copy = again(region)
        memoryview(copy)[0] = 5
        copy.close()
    assert path.read_bytes()[0] == 5


def test_a_closed_region_and_one_without_a_file_are_not_sent(path: Path) -> None:
    region = userfault.open(path)
    region.close()
    with pytest.raises(ValueError, match="closed"):
        pickle.dumps(region)
    with userfault.open(MemoryStore(100)) as region, pytest.raises(TypeError, match="MemoryStore"):
        pickle.dumps(region)


VIEWS: dict[str, Any] = {
    "whole": np.s_[:],
    "part": np.s_[100:200],
    "steps": np.s_[5:50_000:7],
    "backward": np.s_[::-3],
    "one": np.s_[7:8],
    "none": np.s_[5:5],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_travels_as_the_same_view(path: Path, name: str) -> None:
    array = userfault.memmap(path, "<i4", "r", memory_limit="1MiB")
    view = array[VIEWS[name]]
    copy = again(view)
    assert (copy.shape, copy.dtype) == (view.shape, view.dtype)
    assert (np.asarray(copy) == np.asarray(view)).all()
    if view.size:
        assert type(copy) is userfault.memmap
        assert (copy.strides, copy.filename, copy.mode) == (view.strides, path, "r")
        assert len(pickle.dumps(view)) < 1000, "the elements themselves do not travel"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_views_of_views_of_any_shape(path: Path, data: st.DataObject) -> None:
    array = userfault.memmap(
        path, "<i4", "r", offset=40, shape=(20, 30, 40), order=data.draw(st.sampled_from("CF"))
    )
    steps = st.sampled_from([-3, -1, 1, 2])
    view = array[tuple(slice(data.draw(st.integers(0, 9)), None, data.draw(steps)) for _ in range(3))]
    view = view.transpose(data.draw(st.permutations(range(3))))
    copy = again(view)
    assert (np.asarray(copy) == np.asarray(view)).all()
    assert copy.shape == view.shape


def test_w_plus_travels_as_r_plus(tmp_path: Path) -> None:
    array = userfault.memmap(tmp_path / "new", "u1", "w+", shape=10)
    array[:] = 3
    data = pickle.dumps(array)
    array.close()
    copy = pickle.loads(data)
    assert copy.mode == "r+"
    assert copy.tolist() == [3] * 10


def test_a_writable_array_that_lives_refuses_its_copy(path: Path) -> None:
    array = userfault.memmap(path, "<i4", "r+")
    with pytest.raises(InUseError, match="locking=False"):
        again(array[5:])


def test_results_travel_as_plain_arrays(path: Path) -> None:
    array = userfault.memmap(path, "<i4", "r")
    for value in (array + 1, array.copy(), np.array(array, subok=True)):
        copy = again(value)
        assert type(copy) is np.ndarray
        assert (copy == np.asarray(value)).all()


def test_an_array_of_a_nameless_file_is_not_sent(path: Path) -> None:
    file = path.open("rb")
    path.unlink()
    array = userfault.memmap(file, "<i4", "r")
    with pytest.raises(TypeError, match="without a name"):
        pickle.dumps(array)


def test_spawned_workers_open_the_file_themselves(path: Path, spawned: ProcessPoolExecutor) -> None:
    array = userfault.memmap(path, "<i4", "r")
    whole = sum(range(100_000))
    assert spawned.submit(described, array).result(60) == ("memmap", whole, False)
    assert spawned.submit(described, array[:10]).result(60) == ("memmap", 45, False)
    assert spawned.submit(described, array + 1).result(60) == ("ndarray", whole + 100_000, True)
    with userfault.open(path) as region:
        assert spawned.submit(region_sum, region).result(60) == whole


def test_a_spawned_worker_writes_what_nobody_else_has_open(path: Path, spawned: ProcessPoolExecutor) -> None:
    array = userfault.memmap(path, "<i4", "r+")
    data = pickle.dumps(array)
    # As bytes, so that the error is the task's: a pool whose worker cannot unpickle its arguments is broken.
    with pytest.raises(InUseError, match="locking=False"):
        spawned.submit(pickle.loads, data).result(60)
    array.close()
    assert spawned.submit(written, data).result(60) == "r+"
    assert userfault.memmap(path, "<i4", "r")[0] == 123


def test_a_reader_in_another_process_joins_a_live_writer(path: Path, run_child: RunChild) -> None:
    writer = userfault.memmap(path, "<i4", "r+")
    writer[0] = 77
    writer.flush()
    code = "import sys, userfault; print(userfault.memmap(sys.argv[1], '<i4', 'r')[0])"
    assert run_child(code, str(path)).stdout.strip() == "77"
