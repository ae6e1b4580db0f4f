"""userfault.load and open_memmap: .npy files of every version, whole, broken and hostile."""

from __future__ import annotations

import io
import mmap
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import userfault
from userfault import CorruptError, InUseError
from userfault.npy_header import header_bytes, read_header

DTYPES = (
    hnp.scalar_dtypes()
    | hnp.array_dtypes(allow_subarrays=True)
    | st.just(np.dtype([("é", "<i4"), ("日本", "S3")]))
    | st.just(np.dtype({"names": ["a", "b"], "formats": ["<i2", "<f8"], "offsets": [0, 8], "itemsize": 24}))
).filter(lambda dtype: dtype.itemsize > 0 and not dtype.hasobject)
SHAPES = hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=6)


def npy(array: np.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.lib.format.write_array(file, array, version)
    return file.getvalue()


def reader(data: bytes) -> Any:
    return lambda offset, n: data[offset : offset + n]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=DTYPES, shape=SHAPES, fortran=st.booleans(), version=st.sampled_from([None, (1, 0), (2, 0), (3, 0)])
)
def test_what_numpy_wrote_is_read(
    tmp_path: Path,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    fortran: bool,
    version: tuple[int, int] | None,
) -> None:
    content = bytearray(b"\7") * (int(np.prod(shape)) * dtype.itemsize)
    array = np.ndarray(shape, dtype, content, order="F" if fortran else "C")
    try:
        data = npy(array, version)
    except (ValueError, UnicodeEncodeError):
        return  # NumPy cannot write this type in this version
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    loaded = userfault.load(path)
    theirs = np.load(io.BytesIO(data))
    assert (loaded.dtype, loaded.shape) == (theirs.dtype, theirs.shape)
    assert loaded.strides == theirs.strides or not loaded.size
    # Not the bytes: NumPy copies no padding between fields.
    assert repr(loaded.tolist()) == repr(theirs.tolist())
    assert loaded.offset == len(data) - array.nbytes
    assert loaded.filename == path
    assert not loaded.flags.writeable


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    dtype=DTYPES, shape=SHAPES, fortran=st.booleans(), version=st.sampled_from([None, (1, 0), (2, 0), (3, 0)])
)
def test_what_we_wrote_numpy_reads(
    tmp_path: Path,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    fortran: bool,
    version: tuple[int, int] | None,
) -> None:
    path = tmp_path / "a.npy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = userfault.open_memmap(path, "w+", dtype, shape, fortran, version)
    except ValueError:
        assert version in ((1, 0), (2, 0))
        assert any(ord(c) > 255 for c in repr(dtype))
        return
    if made.size:
        assert made._region is not None
        assert made.offset is not None
        made._region.pwrite(b"\5" * made.nbytes, made.offset - made._region.offset)
    assert made.offset is not None
    assert made.offset % mmap.PAGESIZE == 0
    assert made.mode == "w+"
    made.close()
    theirs = np.load(path)
    assert (theirs.dtype, theirs.shape) == (made.dtype, made.shape)
    fives = np.frombuffer(b"\5" * made.dtype.itemsize, made.dtype)[0]
    assert repr(theirs.tolist()) == repr(np.full(made.shape, fives, made.dtype).tolist())
    np.testing.assert_equal(np.load(path, mmap_mode="r").shape if theirs.size else shape, shape)


def test_mode_r_plus_writes_the_file_and_leaves_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10_000.0).reshape(100, 100))
    header = path.read_bytes()[:128]
    array = userfault.open_memmap(str(path), memory_limit="64KiB")
    array[:, 3] = -1
    array.close()
    assert path.read_bytes()[:128] == header
    loaded = np.load(path)
    assert (loaded[:, 3] == -1).all()
    assert (loaded[:, 4] == np.arange(4.0, 10_000, 100)).all()


def test_the_default_type_is_numpys(tmp_path: Path) -> None:
    assert userfault.open_memmap(tmp_path / "a.npy", "w+", shape=3).dtype == np.float64


def test_load_of_a_file_that_is_written_elsewhere_in_this_process_may_join(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    writer = userfault.open_memmap(path, "w+", shape=3)
    writer[:] = 4
    writer.flush()
    assert userfault.load(path).tolist() == [4, 4, 4]
    with pytest.raises(InUseError):
        userfault.load(path, "r+")


@pytest.mark.parametrize(
    ("mode", "message"),
    [("w+", "open_memmap"), (None, "numpy.load"), ("x", "one of")],
)
def test_load_knows_two_modes(tmp_path: Path, mode: Any, message: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3))
    with pytest.raises(ValueError, match=message):
        userfault.load(path, mode)


def test_creating_needs_a_shape_and_keeps_a_file_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="give the shape"):
        userfault.open_memmap(path, "w+")
    with pytest.raises(ValueError, match="Python objects"):
        userfault.open_memmap(path, "w+", dtype="O", shape=3)
    with pytest.raises(ValueError, match="version"):
        userfault.open_memmap(path, "w+", shape=3, version=(4, 0))
    with pytest.raises(ValueError, match="negative"):
        userfault.open_memmap(path, "w+", shape=(3, -1))
    assert path.read_bytes() == before


def test_an_open_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a path is needed"):
        userfault.load(io.BytesIO(npy(np.zeros(3))))  # type: ignore[arg-type]


def test_python_objects_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([None, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects, which cannot live in a file"):
        userfault.load(path)


GOOD = npy(np.arange(6, dtype="<i4").reshape(2, 3))


def edited(old: bytes, new: bytes) -> bytes:
    """The good file with a piece of its header replaced, and the padding kept right."""
    header, data = GOOD[10:128], GOOD[128:]
    text = header.rstrip(b" \n").replace(old, new)
    assert old in header
    return GOOD[:10] + text.ljust(117) + b"\n" + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\x93NUMP", "does not begin with"),
        (b"PK\x03\x04 and so on", "npz archive"),
        (b"\x80\x04K\x01.", "looks like a pickle"),
        (b"\x93NUMPY", "no .npy file"),
        (b"\x93NUMPY\x01", "no .npy file"),
        (b"\x93NUMPY\x04\x00" + GOOD[8:], "version 4.0"),
        (b"\x93NUMPY\x01\x01" + GOOD[8:], "version 1.1"),
        (GOOD[:9], "ends within its header"),
        (GOOD[:60], "ends within its header"),
        (GOOD[:-1], "shorter than its header says"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFFFFFF) + GOOD[10:], "claims a header"),
        (edited(b"(2, 3)", b"(2, -3)"), "its shape is"),
        (edited(b"(2, 3)", b"[2, 3]"), "its shape is"),
        (edited(b"(2, 3)", b"(2.0,)"), "its shape is"),
        (edited(b"(2, 3)", b"(True,)"), "its shape is"),
        (edited(b"(2, 3)", b"(1 << 9,)"), "no dictionary"),
        (edited(b"(2, 3)", b"(99999999999999999999999,)"), "shorter than its header says"),
        (edited(b"False", b"0"), "its fortran_order is 0"),
        (edited(b"'<i4'", b"'<i40000'"), "its type is"),
        (edited(b"'<i4'", b"5"), "its type is"),
        (edited(b"'descr'", b"'other'"), "must name descr"),
        (edited(b"{", b"["), "no dictionary"),
        (edited(b"(2, 3)", b"(((((" * 15), "no dictionary"),
    ],
)
def test_a_broken_file_is_named_and_told_what_is_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "broken.npy"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=message) as caught:
        userfault.load(path)
    assert isinstance(caught.value, ValueError)
    assert "broken.npy" in str(caught.value)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=400, deadline=None)
@given(st.data())
@example(None)
def test_hostile_headers_are_corrupt_or_read_but_never_anything_else(data: st.DataObject | None) -> None:
    if data is None:
        raw = GOOD
    else:
        raw = bytearray(GOOD)
        for _ in range(data.draw(st.integers(1, 6))):
            place = data.draw(st.integers(0, 127))
            raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        header = read_header(reader(bytes(raw)), "hostile")
    except CorruptError:
        return
    assert header.offset >= 10
    assert all(size >= 0 for size in header.shape)


def test_shapes_that_python_2_wrote_are_read() -> None:
    header = read_header(reader(edited(b"(2, 3)", b"(2L, 3L)")), "old")
    assert header.shape == (2, 3)


def test_a_header_that_needs_a_newer_version_gets_it() -> None:
    def version(fields: list[tuple[str, str]]) -> tuple[int, int]:
        return read_header(reader(header_bytes(np.dtype(fields), (1,), False, None)), "x").version

    assert version([("a", "<i4")]) == (1, 0)
    assert version([(f"field{i:05}", "<i4") for i in range(4000)]) == (2, 0)
    assert version([("日", "<i4")]) == (3, 0)


def test_blocks_and_scratch_are_chosen_as_for_memmap(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    made = userfault.open_memmap(path, "w+", float, (1000,), block="4KiB")
    assert made.region.block == 4096
    made[:] = 1
    made.close()
    assert userfault.load(path, block="16KiB").region.block == 16 << 10
    private = userfault.open_memmap(path, "c", scratch=tmp_path, block="8KiB")
    private[:] = 2
    assert (private.region.block, np.load(path).sum()) == (8 << 10, 1000)
    with pytest.raises(FileNotFoundError, match="scratch file"):
        userfault.open_memmap(path, "c", scratch=tmp_path / "nowhere")
    for mode in ("r", "r+", "w+"):
        with pytest.raises(ValueError, match="scratch is for private changes"):
            userfault.open_memmap(path, mode, float, (10,), scratch=tmp_path)
    assert np.load(path).shape == (1000,)
