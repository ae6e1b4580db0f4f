"""`userfault.memmap`: numpy.memmap's interface on user-space paging.

It is an ndarray subclass of its own and not one of numpy.memmap, because programs such as joblib recognise
those and open their files again behind our back, as plain mmaps.
"""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from userfault import _native
from userfault.opening import Options, checked_block, private_region, region_over
from userfault.region import Region, as_bytes, as_shape, bytes_of, mappable
from userfault.sizes import Size, parse_size

__all__ = ["memmap"]

FileName: TypeAlias = str | os.PathLike[str] | IO[bytes]

_MODES = {
    "r": "r",
    "readonly": "r",
    "r+": "r+",
    "readwrite": "r+",
    "w+": "w+",
    "write": "w+",
    "c": "c",
    "copyonwrite": "c",
}


class memmap(np.ndarray[Any, Any]):
    """An array whose elements live in a file and come when they are touched.

    As numpy.memmap: `filename`, `dtype`, `mode`, `offset` (bytes), `shape` and `order` mean the same, and
    attributes `filename`, `offset` and `mode` keep them. `filename` may be an open file with a name. Modes
    are "r" (the file exists, the array is read-only), "r+" (the file exists, and is made longer if the
    shape needs it), "w+" (the file is created or emptied; `shape` is needed) and "c" (what is written is
    private to this array and never reaches the file; it goes to the folder `scratch` when memory is short).
    No shape means one dimension, to the end of the file.

    `memory_limit` and `block` are those of `userfault.open`, as is everything else that is not said here:
    what an I/O error does, who may write a file that is open, what happens at exit and after fork().

    Views are memmaps; the results of arithmetic, copies and everything else that is not the file are plain
    arrays. Pickling, also of a view, flushes and sends path, range and mode, and the other process opens the
    file again; w+ travels as r+. A copy that could write raises InUseError there while this array lives: send
    an array of mode "r", or use userfault.open(..., locking=False).ndarray().

    Raises ValueError for a mode, offset or shape that makes no sense, for a file that is too short, and for
    elements that are Python objects; OSErrors as open() does; InUseError if somebody else writes the file.
    """

    __array_priority__ = -100.0

    filename: str | Path | None
    """The file's absolute path, a Path if a Path was given; None for what does not live in a file."""
    offset: int | None
    """Where the array begins in the file, in bytes; for a view, where the array that it is a view of does."""
    mode: str | None
    """The mode that the array was opened with."""
    _region: Region | None

    def __new__(
        cls,
        filename: FileName,
        dtype: DTypeLike = np.uint8,
        mode: str = "r+",
        offset: SupportsIndex = 0,
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        order: Literal["C", "F"] = "C",
        *,
        memory_limit: Size | None = None,
        block: Size | Literal["auto"] = "auto",
        scratch: str | os.PathLike[str] | None = None,
    ) -> memmap:
        path, name = _path_of(filename)
        kind = mappable(np.dtype(dtype))
        start = operator.index(offset)
        if start < 0:
            raise ValueError(f"offset is {start}: it is a number of bytes from the beginning")
        mode = checked_mode(mode)
        if order not in ("C", "F"):
            raise ValueError(f"order is {order!r}: it must be 'C' or 'F'")
        sizes = None if shape is None else as_shape(shape)
        if mode == "w+" and sizes is None:
            raise ValueError("mode 'w+' creates the file anew: give the shape")
        options = as_options(memory_limit, block)
        if scratch is not None and mode != "c":
            raise ValueError(f"scratch is for private changes, in mode 'c'; mode is {mode!r}")
        store = _open_file(path, mode, None if sizes is None else start + bytes_of(sizes, kind))
        if sizes is None:
            count, rest = divmod(len(store) - start, kind.itemsize)
            if count < 0 or rest:
                raise ValueError(
                    f"{store.name} has {len(store)} bytes; from offset {start} on these are no whole number "
                    f"of elements of {kind.itemsize} bytes"
                )
            sizes = (count,)
        return over(
            store, mode, start, kind, sizes, order, name=name, options=options, scratch=scratch, cls=cls
        )

    def __array_finalize__(self, obj: NDArray[Any] | None) -> None:
        if isinstance(obj, memmap) and obj._region is not None and np.may_share_memory(self, obj):
            self._region, self.filename, self.offset, self.mode = (
                obj._region,
                obj.filename,
                obj.offset,
                obj.mode,
            )
        else:
            self._region = self.filename = self.offset = self.mode = None

    def __array_wrap__(
        self,
        array: NDArray[Any],
        context: tuple[Any, ...] | None = None,
        return_scalar: bool = False,
    ) -> Any:
        if array is self:
            return array
        return array[()] if return_scalar or array.shape == () else _plain(np.asarray(array))

    def __getitem__(self, index: Any) -> Any:
        return _plain(super().__getitem__(index))

    @property
    def region(self) -> Region:
        """The region that the array lives in: for advice, prefetches, pins and figures.

        Raises ValueError for an array that lives in ordinary memory.
        """
        if self._region is None:
            raise ValueError("this array does not live in a file: it has no region")
        return self._region

    def flush(self) -> None:
        """Writes what was changed in the file's whole array back; returns when it is durable.

        Raises StoreError, also for an error that the background write-back met since the last flush; the data
        is still in memory and is written again by the next flush.
        """
        if self._region is not None and self._region.writable and not self._region.closed:
            self._region.flush()

    def close(self) -> None:
        """Flushes and gives the memory up, also under views: touching one of them afterwards is SIGSEGV.

        The file's lock is given up too. Closing again does nothing. Raises StoreError if something cannot be
        written; then everything is as before, and the data still there.
        """
        if self._region is not None:
            self._region._close_under_arrays()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if self._region is None:
            return np.asarray(self).__reduce_ex__(protocol)
        if self.filename is None:
            raise TypeError(
                "an array of a file without a name cannot be pickled: another process cannot open it"
            )
        path, mode, options = self._region._description()
        low, first, high = _bounds(self)
        begin = self._region.offset + low - self._region.address
        view = (self.dtype, self.shape, self.strides, first - low)
        limits = Options(memory_limit=options["memory_limit"], block=self._region.block)
        return _reopened_view, (
            path,
            mode,
            begin,
            high - low,
            view,
            limits,
            self.filename,
            self.offset,
            options.get("scratch"),
        )

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)


def _plain(result: Any) -> Any:
    """The result itself if it is part of a file, else as a plain array."""
    if type(result) is memmap and result._region is None:
        return result.view(np.ndarray)
    return result


def _copying(name: str) -> Callable[..., Any]:
    """A method of ndarray whose result is a plain array unless it lies in the file."""
    method = getattr(np.ndarray, name)

    def plain(self: memmap, /, *args: Any, **kwargs: Any) -> Any:
        return _plain(method(self, *args, **kwargs))

    plain.__name__ = plain.__qualname__ = name
    plain.__doc__ = method.__doc__
    return plain


_COPYING = (
    "argpartition argsort astype byteswap choose compress conj conjugate copy cumprod cumsum dot flatten "
    "ravel repeat reshape round searchsorted take"
)
for _name in _COPYING.split():
    setattr(memmap, _name, _copying(_name))


def over(
    store: _native.FileStore,
    mode: str,
    offset: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    order: Literal["C", "F"],
    *,
    name: str | Path | None,
    options: Options,
    scratch: str | os.PathLike[str] | None = None,
    cls: type[memmap] = memmap,
) -> memmap:
    """A memmap of the given shape over an open file, from `offset` (bytes) on.

    Raises ValueError if the file is too short.
    """
    nbytes = bytes_of(shape, dtype)
    if offset + nbytes > len(store):
        raise ValueError(
            f"an array of shape {shape} of {dtype} at offset {offset} ends at byte {offset + nbytes}; "
            f"{store.name} has {len(store)} bytes"
        )
    if nbytes == 0:
        # There is no memory to page, as in an empty list.
        nothing: Any = b"" if mode == "r" else bytearray()
        array = np.ndarray.__new__(cls, shape, dtype, nothing, order=order)
        array._region = None
    else:
        region, inside = _region(store, mode, offset, nbytes, options, scratch)
        array = np.ndarray.__new__(cls, shape, dtype, as_bytes(region), inside, order=order)
        array._region = region
    array.filename, array.offset, array.mode = name, offset, mode
    return array


def _region(
    store: _native.FileStore,
    mode: str,
    offset: int,
    nbytes: int,
    options: Options,
    scratch: str | os.PathLike[str] | None = None,
) -> tuple[Region, int]:
    """A region over the range, and where the range begins in it.

    The region begins at a page of the file, as a mapping of the kernel would: then blocks are aligned in the
    file, which direct I/O needs, whatever stands before the array.
    """
    inside = offset % mmap.PAGESIZE
    if mode == "c":
        return private_region(store, offset - inside, inside + nbytes, options, scratch), inside
    mode = "r" if mode == "r" else "r+"
    region = region_over(store, mode, offset - inside, inside + nbytes, options, owned=True)
    return region, inside


def _reopened_view(
    path: str,
    mode: str,
    begin: int,
    nbytes: int,
    view: tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...], int],
    options: Options,
    filename: str | Path,
    offset: int,
    scratch: str | os.PathLike[str] | None = None,
) -> memmap:
    dtype, shape, strides, first = view
    region, inside = _region(_open_file(path, mode, None), mode, begin, nbytes, options, scratch)
    array = np.ndarray.__new__(memmap, shape, dtype, as_bytes(region), inside + first, strides)
    array._region = region
    array.filename, array.offset, array.mode = filename, offset, mode
    return array


def checked_mode(mode: str) -> str:
    """A mode of numpy.memmap in its short form; raises ValueError for any other."""
    short = _MODES.get(mode)
    if short is None:
        raise ValueError(f"mode is {mode!r}: it must be one of r, r+, w+, c")
    return short


def as_options(memory_limit: Size | None, block: Size | Literal["auto"]) -> Options:
    """The options of an array's region, checked; sizes in bytes or text."""
    return Options(
        block=None if block == "auto" else checked_block(block),
        memory_limit=None if memory_limit is None else parse_size(memory_limit, "memory_limit"),
    )


def _bounds(array: NDArray[Any]) -> tuple[int, int, int]:
    """Addresses: the lowest byte of an array that is not empty, its first element, and the end."""
    first: int = array.__array_interface__["data"][0]
    low = high = first
    for size, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (size - 1) * stride
        else:
            high += (size - 1) * stride
    return low, first, high + array.itemsize


def _path_of(filename: FileName) -> tuple[str, str | Path | None]:
    """A path that leads to the file, and the name to remember."""
    if isinstance(filename, str):
        return filename, os.path.abspath(filename)
    if isinstance(filename, os.PathLike):
        return os.fspath(filename), Path(filename).resolve()
    if not hasattr(filename, "fileno"):
        raise TypeError(f"a path or an open file is needed, not {type(filename).__name__}")
    fd = filename.fileno()
    name = getattr(filename, "name", None)
    if isinstance(name, str):
        try:
            if os.path.samestat(os.stat(name), os.fstat(fd)):
                return name, os.path.abspath(name)
        except OSError:
            pass
    return f"/proc/self/fd/{fd}", None


def _open_file(path: str, mode: str, end: int | None) -> _native.FileStore:
    if mode in ("r", "c"):
        return _native.FileStore(path, "r")
    return _native.FileStore(path, "w" if mode == "w+" else "r+", length=end)
