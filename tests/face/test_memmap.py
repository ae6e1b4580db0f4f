"""userfault.memmap behaves like numpy.memmap, and better where it says so."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import userfault
from userfault import InUseError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(np.arange(10_000, dtype="<i4").tobytes())
    return path


SAME = [
    {"dtype": "<i4"},
    {"dtype": "<i4", "mode": "r"},
    {"dtype": "<i4", "mode": "r", "offset": 128},
    {"dtype": "<i4", "mode": "r+", "shape": (100, 100)},
    {"dtype": "<i4", "mode": "r", "shape": (100, 100), "order": "F"},
    {"dtype": "<i4", "mode": "r", "shape": 7, "offset": 4},
    {"mode": "readonly"},
    {"mode": "readwrite", "dtype": [("a", "<u2"), ("b", "S2")]},
    {"dtype": "<f8", "mode": "w+", "shape": (3, 4)},
    {"dtype": "<f8", "mode": "write", "shape": (3, 4), "offset": 100},
    {"dtype": "u1", "mode": "r+", "shape": 50_000},
    {"dtype": "<i4", "mode": "r", "shape": ()},
]


@pytest.mark.parametrize("arguments", SAME, ids=str)
def test_the_array_is_the_one_that_numpy_would_make(path: Path, arguments: dict[str, Any]) -> None:
    twin = path.with_name("twin.bin")
    twin.write_bytes(path.read_bytes())
    theirs = np.memmap(twin, **arguments)
    ours = userfault.memmap(path, **arguments)
    assert (ours.shape, ours.dtype, ours.strides) == (theirs.shape, theirs.dtype, theirs.strides)
    assert (ours.flags.writeable, ours.flags.f_contiguous) == (
        theirs.flags.writeable,
        theirs.flags.f_contiguous,
    )
    assert (ours.mode, ours.offset) == (theirs.mode, theirs.offset)
    assert ours.tobytes() == theirs.tobytes()
    if ours.flags.writeable:
        ours.reshape(-1)[0] = theirs.reshape(-1)[0] = np.ones(1, ours.dtype)[0]
    ours.flush()
    theirs.flush()
    assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "<i4", "mode": "w+"},
        {"dtype": "<i4", "mode": "rw"},
        {"dtype": "<i4", "mode": "r", "shape": 10_001},
        {"dtype": "<i4", "mode": "r", "offset": 39_999},
        {"dtype": "<i4", "mode": "r", "offset": -4},
        {"dtype": [("a", "<i4"), ("b", "<i8")]},
    ],
    ids=str,
)
def test_what_numpy_refuses_is_refused_and_the_file_stays(path: Path, arguments: dict[str, Any]) -> None:
    before = path.read_bytes()
    with pytest.raises((ValueError, OverflowError, OSError)):
        np.memmap(path, **arguments)
    with pytest.raises(ValueError):  # noqa: PT011 - each has a text of its own
        userfault.memmap(path, **arguments)
    assert path.read_bytes() == before


def test_a_shape_may_be_any_sequence_of_integers(path: Path) -> None:
    assert userfault.memmap(path, "<i4", "r", shape=[3, np.int8(5)]).shape == (3, 5)
    assert userfault.memmap(path, "<i4", "r", shape=np.int64(3)).shape == (3,)


def test_python_objects_and_odd_arguments_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="Python objects"):
        userfault.memmap(path, dtype="O")
    with pytest.raises(ValueError, match="order"):
        userfault.memmap(path, order="K")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory_limit"):
        userfault.memmap(path, memory_limit="some")


def test_the_file_name_is_absolute_and_keeps_its_type(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert userfault.memmap("data.bin", mode="r").filename == str(path)
    assert userfault.memmap(Path("data.bin"), mode="r").filename == path.resolve()


def test_an_open_file_may_be_given(path: Path) -> None:
    with path.open("rb") as file:
        array = userfault.memmap(file, dtype="<i4", mode="r")
    assert array.filename == str(path)
    assert array[123] == 123
    with tempfile.TemporaryFile() as nameless:
        nameless.write(bytes(100))
        nameless.flush()
        array = userfault.memmap(nameless, mode="r+")
        array[5] = 7
        array.flush()
        nameless.seek(5)
        assert nameless.read(1) == b"\7"
        assert array.filename is None


def test_an_array_without_elements_has_no_memory(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4", mode="r+", shape=(0, 5))
    assert array.shape == (0, 5)
    array.flush()
    array.close()


def test_views_belong_to_the_file(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4")
    for view in (array[5:10], array.reshape(100, 100), array.T, array.view("u1"), array[None], array[::-2]):
        assert type(view) is userfault.memmap
        assert (view.filename, view.mode, view.offset) == (array.filename, "r+", 0)
        assert np.shares_memory(view, array)
    array[5:10][0] = -1
    array[7:8].flush()
    assert np.fromfile(path, "<i4")[5] == -1


RESULTS = {
    "sum of arrays": lambda a: a + a,
    "comparison": lambda a: a == a,
    "ufunc": np.sqrt,
    "reduction over an axis": lambda a: a.reshape(100, 100).sum(axis=0),
    "mean": lambda a: a.reshape(100, 100).mean(axis=1),
    "copy": lambda a: a.copy(),
    "astype": lambda a: a.astype("f8"),
    "fancy index": lambda a: a[[1, 2, 3]],
    "mask": lambda a: a[a > 5],
    "sort": np.sort,
    "take": lambda a: a.take([1, 2]),
    "concatenate": lambda a: np.concatenate([a, a]),
    "where": lambda a: np.where(a > 3, a, 0),
    "dot": lambda a: a.reshape(100, 100) @ a.reshape(100, 100),
    "cumsum": lambda a: a.cumsum(),
    "repeat": lambda a: a.repeat(2),
    "flatten": lambda a: a.flatten(),
    "transposed reshape": lambda a: a.reshape(100, 100).T.reshape(-1),
    "clip": lambda a: a.clip(0, 5),
    "round": lambda a: a.astype("f8").round().astype("i4"),
    "negative": lambda a: -a,
    "broadcast product": lambda a: np.multiply.outer(a[:3], a[:3]),
    "argsort": lambda a: a.argsort(),
    "two results": lambda a: np.divmod(a, 7)[1],
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_plain_arrays(path: Path, name: str) -> None:
    array = userfault.memmap(path, dtype="<i4", mode="r")
    result = RESULTS[name](array)
    assert type(result) is np.ndarray
    assert (result == RESULTS[name](np.arange(10_000, dtype="<i4"))).all()
    assert not np.shares_memory(result, array)


def test_a_single_number_is_a_scalar(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4", mode="r")
    for value in (array.sum(), array[3], array.max(), np.add.reduce(array), array.mean()):
        assert not isinstance(value, np.ndarray)


def test_work_in_place_stays_in_the_file(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4")
    same = array
    same += 1
    assert same is array
    assert type(np.add(array, 1, out=array)) is userfault.memmap
    array[::-1].sort()
    array.close()
    assert np.fromfile(path, "<i4").tolist() == list(range(10_001, 1, -1))


def test_nothing_of_what_numpy_inherits_is_a_file_by_mistake(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4", mode="r")
    copy = np.array(array, subok=True)
    assert copy.filename is None
    assert copy.mode is None
    copy.flush()
    copy.close()
    copy[0] = 5
    assert array[0] == 0


def test_flush_is_there_when_another_program_reads(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4")
    array[:] = 5
    array.flush()
    assert (np.fromfile(path, "<i4") == 5).all()


def test_close_gives_the_lock_up_even_under_views(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4")
    view = array[5:]
    with pytest.raises(InUseError):
        userfault.memmap(path)
    array[0] = 1
    array.close()
    array.close()
    again = userfault.memmap(path, dtype="<i4")
    assert again[0] == 1
    assert view.shape == (9_995,)


def test_dropping_the_array_writes_and_unlocks(path: Path) -> None:
    array = userfault.memmap(path, dtype="<i4")
    array[0] = 77
    del array
    assert userfault.memmap(path, dtype="<i4")[0] == 77


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(offset=st.integers(0, 39_000), count=st.integers(1, 200), limit=st.sampled_from([None, "16KiB"]))
def test_any_offset_reads_and_writes_its_own_bytes(
    path: Path, offset: int, count: int, limit: str | None
) -> None:
    path.write_bytes(np.arange(10_000, dtype="<i4").tobytes())
    array = userfault.memmap(path, "u1", "r+", offset, count, memory_limit=limit, block="4KiB")
    expected = bytearray(path.read_bytes())
    assert array.tobytes() == expected[offset : offset + count]
    array += 1
    expected[offset : offset + count] = (
        (np.frombuffer(expected, "u1", count, offset) + 1).astype("u1").tobytes()
    )
    array.close()
    assert path.read_bytes() == expected


def test_an_array_larger_than_its_limit_stays_within_it(tmp_path: Path) -> None:
    array = userfault.memmap(tmp_path / "big", "u8", "w+", shape=4 << 20, memory_limit="4MiB", block="64KiB")
    array[:] = np.arange(4 << 20)
    assert int(array.sum()) == (4 << 20) * ((4 << 20) - 1) // 2
    region = array._region
    assert region is not None
    stats = region.stats()
    assert stats.resident + stats.resting <= 4 << 20
    assert stats.evictions > 0
