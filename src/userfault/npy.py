"""`userfault.load` and `userfault.open_memmap`: .npy files as arrays that may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from userfault import _native
from userfault.errors import CorruptError
from userfault.mapped_array import as_options, checked_mode, memmap, over
from userfault.npy_header import Header, header_bytes, read_header
from userfault.opening import Options
from userfault.region import as_shape, bytes_of, mappable
from userfault.sizes import Size

__all__ = ["load", "open_memmap"]


def load(
    file: str | os.PathLike[str],
    mmap_mode: Literal["r", "r+", "c"] = "r",
    *,
    memory_limit: Size | None = None,
    block: Size | Literal["auto"] = "auto",
    scratch: str | os.PathLike[str] | None = None,
) -> memmap:
    """Opens an .npy file as a `memmap` of its shape and type, whatever its version of the format.

    As ``numpy.load(file, mmap_mode="r")``, but with `memory_limit` and `block`, in bytes or text (see
    `userfault.open`). Modes are "r", "r+" and "c", whose private changes go to the folder `scratch` when
    memory is short.

    Raises CorruptError (a ValueError) for what is no .npy file, or shorter than its header says; ValueError
    for arrays of Python objects and for other modes; OSErrors as open() does; InUseError.
    """
    if mmap_mode is None:
        raise ValueError("mmap_mode is None: to read the whole array into memory, use numpy.load")
    mode = checked_mode(mmap_mode)
    if mode == "w+":
        raise ValueError("mmap_mode is 'w+': to create an .npy file, use userfault.open_memmap")
    if scratch is not None and mode != "c":
        raise ValueError(f"scratch is for private changes, in mode 'c'; mmap_mode is {mmap_mode!r}")
    return _existing(file, mode, as_options(memory_limit, block), scratch)


def open_memmap(
    filename: str | os.PathLike[str],
    mode: str = "r+",
    dtype: DTypeLike | None = None,
    shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
    fortran_order: bool = False,
    version: tuple[int, int] | None = None,
    *,
    memory_limit: Size | None = None,
    block: Size | Literal["auto"] = "auto",
    scratch: str | os.PathLike[str] | None = None,
) -> memmap:
    """Opens or creates an .npy file as a `memmap`; as numpy.lib.format.open_memmap.

    Mode "w+" creates or empties the file for an array of `dtype` (default float64) and `shape`, which is
    needed; `fortran_order` and `version` of the format are for it alone (no version: the oldest that fits).
    The data begin at a page of the file, for the sake of direct I/O; every reader of .npy files can read
    it. Modes "r", "r+" and "c" take type and shape from the file; `scratch` is the folder for the private
    changes of mode "c". `memory_limit` and `block` are in bytes or text (see `userfault.open`).

    Raises ValueError, CorruptError, OSErrors and InUseError as `load` and `memmap` do.
    """
    short = checked_mode(mode)
    options = as_options(memory_limit, block)
    if scratch is not None and short != "c":
        raise ValueError(f"scratch is for private changes, in mode 'c'; mode is {mode!r}")
    if short != "w+":
        return _existing(filename, short, options, scratch)
    if shape is None:
        raise ValueError("mode 'w+' creates the file anew: give the shape")
    path, name = _named(filename)
    kind = mappable(np.dtype(dtype))
    # NumPy makes dimensions of a type like (float, 3), and the file must say what the array is.
    sizes = as_shape(shape) + kind.shape
    kind = kind.base
    bytes_of(sizes, kind)
    header = header_bytes(kind, sizes, bool(fortran_order), version)
    made = Header(kind, sizes, bool(fortran_order), version or (1, 0), len(header))
    store = _native.FileStore(path, "w", length=made.offset + made.nbytes)
    store.write(0, header)
    return over(
        store,
        short,
        made.offset,
        kind,
        sizes,
        "F" if made.fortran_order else "C",
        name=name,
        options=options,
    )


def _existing(
    file: str | os.PathLike[str],
    mode: str,
    options: Options,
    scratch: str | os.PathLike[str] | None,
) -> memmap:
    path, name = _named(file)
    store = _native.FileStore(path, "r" if mode == "c" else mode)
    size = len(store)
    header = read_header(lambda offset, n: store.read(offset, max(0, min(n, size - offset))), path)
    dtype = mappable(header.dtype)
    if header.offset + header.nbytes > size:
        raise CorruptError(
            f"{path} is shorter than its header says: an array of shape {header.shape} of {dtype} needs "
            f"{header.offset + header.nbytes} bytes, and there are {size}"
        )
    order: Literal["C", "F"] = "F" if header.fortran_order else "C"
    return over(
        store, mode, header.offset, dtype, header.shape, order, name=name, options=options, scratch=scratch
    )


def _named(file: str | os.PathLike[str]) -> tuple[str, str | Path]:
    if isinstance(file, str):
        return file, os.path.abspath(file)
    if isinstance(file, os.PathLike):
        return os.fspath(file), Path(file).resolve()
    raise ValueError("a path is needed: an open file cannot be mapped by its header")
