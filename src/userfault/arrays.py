"""Arrays without a file: larger than memory, at home in a scratch file that has no name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex, TypeAlias, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from userfault import _native
from userfault.opening import Options, private_region
from userfault.region import LARGEST_REGION, Region, as_shape, bytes_of, mappable
from userfault.sizes import Size, in_words, parse_size

__all__ = ["Arena", "empty", "full", "zeros"]

Shape: TypeAlias = SupportsIndex | Iterable[SupportsIndex]
Folder: TypeAlias = str | os.PathLike[str]

_ALIGNMENT = 64
"""Arrays of an arena begin at a multiple of so many bytes: a cache line, and the widest vector load."""

_FILL = 1 << 20
"""Elements that full() writes at a time."""


def zeros(
    shape: Shape,
    dtype: DTypeLike = float,
    order: Literal["C", "F"] = "C",
    *,
    scratch: Folder | None = None,
    pages: Literal["auto", "4KiB", "2MiB"] = "auto",
    memory_limit: Size | None = None,
    track: bool = False,
) -> NDArray[Any]:
    """An array of zeros that may be larger than memory; as numpy.zeros.

    What has been written leaves memory for a file without a name in the folder `scratch` (the temporary
    folder by default) when memory is short; the file ends with the array, or with the process. `pages` and
    `memory_limit` (bytes or text) are those of `userfault.open`. While the folder's disk is full, nothing
    that was written leaves memory, and a touch that needs room waits: a line on stderr says so after a
    second, and after 90 the touch ends with SIGBUS. Nothing is lost.

    A forked child cannot use the array: its memory is SIGSEGV there.

    With `track=True` the array stays in memory, and a `userfault.Checkpointer` knows what was written to
    it. It counts against the memory limit from the beginning, and MemoryError says that it does not fit;
    `scratch` and `memory_limit` make no sense then. On small pages the kernel notes writes. On huge ones
    ("2MiB", and "auto" from 64 MiB on where the machine has them) a cut takes a fraction of a millisecond
    a GiB, and the first write to each 2 MiB afterwards waits until they are saved. A forked child has a
    copy of its own, as of any array; only hugetlb pages it does not get.

    Raises ValueError for a type that holds Python objects, a negative shape, another order than "C" and "F",
    and for more bytes than an address space has; OSError if the folder takes no file of that size or this
    machine does not allow userfaultfd.
    """
    kind, sizes, nbytes = _checked(shape, dtype, order)
    _checked_pages(pages)
    if track:
        _checked_tracking(scratch, memory_limit)
    if nbytes == 0:
        return np.zeros(sizes, kind, order)
    if track:
        memory = _native.TrackedMemory(nbytes, pages)
        return np.ndarray(sizes, kind, cast("memoryview", memory), order=order)
    region = _region(nbytes, scratch, pages, memory_limit, name=f"array of {in_words(nbytes)}")
    return region.ndarray(kind, sizes, order)


def empty(
    shape: Shape,
    dtype: DTypeLike = float,
    order: Literal["C", "F"] = "C",
    *,
    scratch: Folder | None = None,
    pages: Literal["auto", "4KiB", "2MiB"] = "auto",
    memory_limit: Size | None = None,
    track: bool = False,
) -> NDArray[Any]:
    """As `zeros`, of the same shape, for code that writes every element before it reads it.

    Elements that nobody has written are zeros.
    """
    return zeros(shape, dtype, order, scratch=scratch, pages=pages, memory_limit=memory_limit, track=track)


def full(
    shape: Shape,
    fill_value: Any,
    dtype: DTypeLike | None = None,
    order: Literal["C", "F"] = "C",
    *,
    scratch: Folder | None = None,
    pages: Literal["auto", "4KiB", "2MiB"] = "auto",
    memory_limit: Size | None = None,
    track: bool = False,
) -> NDArray[Any]:
    """As `zeros`, with every element set to `fill_value`, whose type it takes if `dtype` is None.

    All of the array is written, so all of it that does not fit into memory goes to the scratch file at once.
    Raises what `zeros` raises, and ValueError if the value has no such type.
    """
    kind = np.asarray(fill_value).dtype if dtype is None else np.dtype(dtype)
    array = zeros(shape, kind, order, scratch=scratch, pages=pages, memory_limit=memory_limit, track=track)
    if np.ndim(fill_value):
        array[...] = fill_value
        return array
    flat = array.reshape(-1, order=order)
    for start in range(0, flat.size, _FILL):
        flat[start : start + _FILL] = fill_value
    return array


def _checked(shape: Shape, dtype: DTypeLike, order: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Type, shape and size in bytes of an array, checked."""
    kind = mappable(np.dtype(dtype))
    sizes = as_shape(shape)
    if order not in ("C", "F"):
        raise ValueError(f"order is {order!r}: it must be 'C' or 'F'")
    return kind, sizes, bytes_of(sizes, kind)


def _checked_tracking(scratch: Folder | None, memory_limit: Size | None) -> None:
    if scratch is not None or memory_limit is not None:
        raise ValueError(
            "track=True keeps the array in memory: neither scratch nor memory_limit can be given with it"
        )


def _checked_pages(pages: str) -> None:
    if pages not in ("auto", "4KiB", "2MiB"):
        raise ValueError(f"pages is {pages!r}: it must be one of auto, 4KiB, 2MiB")


def _region(
    nbytes: int, scratch: Folder | None, pages: str, memory_limit: Size | None, *, name: str
) -> Region:
    options = Options(
        pages=pages, memory_limit=None if memory_limit is None else parse_size(memory_limit, "memory_limit")
    )
    return private_region(None, 0, nbytes, options, scratch, name=name)


class Arena:
    """Many small arrays on one region: one scratch file and a few mappings for all of them.

    `nbytes` (bytes or text such as "8GiB") is the room for all its arrays together; none of it is
    memory before it is touched. Arrays are laid one behind the other; what is dropped is not used again.
    The arena's memory lives until the arena and the last of its arrays are gone. `scratch` and `pages` are
    those of `userfault.zeros`, `name` is what messages call it. With `track=True` all of it stays in
    memory and is tracked for checkpoints, as `userfault.zeros` says.

    Raises ValueError for what is no size, and what `userfault.zeros` raises.
    """

    def __init__(
        self,
        nbytes: Size,
        *,
        scratch: Folder | None = None,
        pages: Literal["auto", "4KiB", "2MiB"] = "auto",
        name: str | None = None,
        track: bool = False,
    ) -> None:
        size = parse_size(nbytes, "nbytes")
        if size == 0:
            raise ValueError("nbytes is 0: an arena without room holds no array")
        self._name = name or f"arena of {in_words(size)}"
        self._memory: Region | _native.TrackedMemory
        if size > LARGEST_REGION:
            raise ValueError(f"nbytes is {size}, which does not fit into the address space")
        _checked_pages(pages)
        if track:
            _checked_tracking(scratch, None)
            self._memory = _native.TrackedMemory(size, pages)
        else:
            self._memory = _region(size, scratch, pages, None, name=self._name)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """The room for all arrays together, in bytes."""
        return len(self._memory)

    @property
    def used(self) -> int:
        """Bytes that arrays have taken, with the gaps between them."""
        return self._used

    def zeros(self, shape: Shape, dtype: DTypeLike = float, order: Literal["C", "F"] = "C") -> NDArray[Any]:
        """An array of zeros in the arena.

        Raises MemoryError if the rest of the arena is too small, ValueError for what `userfault.zeros` does
        not take.
        """
        kind, sizes, nbytes = _checked(shape, dtype, order)
        if nbytes == 0:
            return np.zeros(sizes, kind, order)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        room = len(self._memory)
        if start + nbytes > room:
            left = max(0, room - start)
            raise MemoryError(
                f"an array of {nbytes} bytes does not fit: {left} of the arena's {room} bytes are left; "
                "make a larger arena"
            )
        self._used = start + nbytes
        return np.ndarray(sizes, kind, cast("memoryview", self._memory), start, order=order)

    def empty(self, shape: Shape, dtype: DTypeLike = float, order: Literal["C", "F"] = "C") -> NDArray[Any]:
        """As `zeros`: elements that nobody has written are zeros."""
        return self.zeros(shape, dtype, order)

    def __repr__(self) -> str:
        return f"<userfault.Arena {self._name!r}, {self._used} of {len(self._memory)} bytes used>"
