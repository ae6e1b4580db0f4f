"""A file, or any other store, as memory."""

from __future__ import annotations

import atexit
import math
import operator
import os
import sys
import weakref
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, SupportsIndex, cast

from userfault import _native
from userfault.prefetching import future_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

__all__ = ["BlockError", "Region"]

LARGEST_REGION = 1 << 46
"""Bytes; more do not fit beside their view into an address space of 47 bits."""

_CHUNK = 8 << 20
"""Bytes that readinto() asks of a file object at a time, if it has no descriptor."""


@dataclass(frozen=True)
class BlockError:
    """A block that could not be had and was given up; touching it is SIGBUS until it is healed."""

    offset: int
    """Where it begins in the region, in bytes."""
    length: int
    """Its length in bytes."""
    errno: int
    """The store's error number."""
    message: str
    """What happened."""
    time: float
    """When it was given up, in seconds since 1970 as time.time() counts them."""


class Region(_native.Region):
    """Memory whose bytes live in a store and come when they are touched; made by `userfault.open`.

    It exports the buffer protocol: ``memoryview(region)``, ``numpy.frombuffer(region)`` and `ndarray` are the
    memory itself. It is a context manager that closes itself. Offsets and lengths are in bytes of the region.

    Closing: `close` flushes, and refuses with BufferError while arrays or memoryviews of the region live. A
    region that is dropped without close() is flushed and closed too; so is, by an exit handler, every
    writable region still open when the interpreter exits. What cannot be written then is told on stderr,
    and lost. A process that ends in another way (a signal, os._exit) writes nothing back: what was not
    flushed may be lost.

    After fork() the child cannot use the region: its calls raise RuntimeError, its memory is SIGSEGV. It can
    open the file itself.

    Pickling flushes and sends path, range and mode; the other process opens the file again. Modes w, w-, x
    and a travel as r+, which never truncates; c travels as c, and refuses with TypeError once there are
    private changes. A copy that could write raises InUseError there while this one lives, unless both are
    opened with locking=False.
    """

    _reopen: dict[str, Any]
    _mode: str
    _below: _native.Store | None = None
    """What private changes lie over."""

    @property
    def mode(self) -> str:
        """The mode it was opened with."""
        return self._mode

    @property
    def offset(self) -> int:
        """Where the region begins in the store, in bytes."""
        offset: int = self._reopen["offset"]
        return offset

    @property
    def errors(self) -> list[BlockError]:
        """The blocks that were given up and not healed, in the order of the store."""
        return sorted((BlockError(*error) for error in self._block_errors()), key=lambda e: e.offset)

    def ndarray(
        self,
        dtype: DTypeLike,
        shape: SupportsIndex | tuple[SupportsIndex, ...] | None = None,
        order: Literal["C", "F"] = "C",
        offset: int = 0,
    ) -> NDArray[Any]:
        """A plain numpy.ndarray over the memory from `offset` (bytes) on.

        No shape means one dimension, to the end of the region. The array is read-only if the region is, and
        keeps the region from being closed. Raises ValueError if the region is too short for the shape, ends
        in the middle of an element, or if the type holds Python objects.
        """
        import numpy as np

        dtype = mappable(np.dtype(dtype))
        if not 0 <= offset <= len(self):
            raise ValueError(f"offset {offset} lies outside of the region of {len(self)} bytes")
        if shape is None:
            count, rest = divmod(len(self) - offset, dtype.itemsize)
            if rest:
                raise ValueError(
                    f"{len(self) - offset} bytes are no whole number of elements of {dtype.itemsize} bytes"
                )
            shape = (count,)
        else:
            shape = as_shape(shape)
            needed = bytes_of(shape, dtype)
            if needed > len(self) - offset:
                raise ValueError(
                    f"an array of shape {shape} of {dtype} takes {needed} bytes; from offset {offset} on the "
                    f"region has {len(self) - offset}"
                )
        return np.ndarray(shape, dtype, as_bytes(self), offset, order=order)

    def prefetch(self, ranges: Iterable[tuple[int, int]], *, wait: bool = False) -> Future[None]:
        """Brings ranges in before they are touched: pairs of offset and length, in bytes.

        Returns a `concurrent.futures.Future` at once, or with wait=True when all of it is there. Its result
        is None, or PoisonedError for the first block that could not be had. It cannot be cancelled. What the
        memory limit cannot hold is left out. Raises ValueError for a range outside of the region;
        PoisonedError if wait=True and a block cannot be had.
        """
        ticket = self._prefetch([(offset, length) for offset, length in ranges], wait=wait)
        return future_of(ticket)

    def pwrite(self, data: bytes | bytearray | memoryview | NDArray[Any], offset: int) -> int:
        """Writes any buffer of bytes at `offset` without touching the memory; returns how many bytes.

        An error is an exception here and not SIGBUS, and no system call meets absent memory. Blocks that
        are overwritten whole are not read before. The data may lie in a region itself; an array of any
        shape is written in C order. Raises ValueError outside of the region, io.UnsupportedOperation if it
        is read-only, StoreError or PoisonedError if bytes beside the data cannot be had.
        """
        view = memoryview(cast("bytes", data))
        return self._pwrite(view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes(), offset)

    def readinto(self, file: IO[bytes] | int, offset: int, n: int) -> int:
        """Reads up to `n` bytes of a file to `offset`, from where the file stands; returns how many it had.

        `file` is a file object or a descriptor. Less than `n` means the end of the file. The memory is not
        touched, so it works where system calls on absent memory do not. Raises OSError if the file cannot be
        read, and whatever `pwrite` raises.
        """
        if isinstance(file, int):
            return self._read_from(file, offset, n)
        fd = _descriptor(file)
        if fd is None:
            return self._read_object(file, offset, n)
        # What a buffered reader has read ahead is given back first: the descriptor then stands where it does.
        seekable = file.seekable()
        if seekable:
            os.lseek(fd, file.tell(), os.SEEK_SET)
        done = self._read_from(fd, offset, n)
        if seekable:
            file.seek(os.lseek(fd, 0, os.SEEK_CUR))
        return done

    def _read_object(self, file: IO[bytes], offset: int, n: int) -> int:
        done = 0
        while done < n:
            data = file.read(min(_CHUNK, n - done))
            if not data:
                break
            done += self._pwrite(data, offset + done)
        return done

    def __enter__(self) -> Region:
        if self.closed:
            raise ValueError("I/O operation on closed region")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BufferError:
            # The frames of an exception hold arrays; it must not hide behind a complaint about them.
            if kind is None:
                raise
            self.flush()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopened, self._description()

    def _description(self) -> tuple[str, str, dict[str, Any]]:
        """Path, mode and options with which another process opens the same bytes; flushes what is dirty."""
        if self.closed:
            raise ValueError("a closed region cannot be pickled")
        store = self.store
        if isinstance(store, _native.OverlayStore):
            self._write_out()
            if store.changed:
                raise TypeError(
                    f"{self.name} has private changes, which would be lost: another process sees the file "
                    "alone. Copy the array, or write it to a file first"
                )
            below = self._below
            if isinstance(below, _native.FileStore):
                return str(Path(below.path).absolute()), "c", self._reopen
        if not isinstance(store, _native.FileStore):
            raise TypeError(
                f"a region of a {type(store).__name__} cannot be pickled: another process cannot open its "
                "store. Regions of files can."
            )
        mode = "r"
        if self.writable:
            self.flush()
            mode = "r+"
        return str(Path(store.path).absolute()), mode, self._reopen

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode {self._mode!r}"
        return f"<userfault.Region {self.name!r}, {len(self)} bytes, {state}>"


def _reopened(path: str, mode: str, options: dict[str, Any]) -> Region:
    from userfault.opening import open

    return open(path, mode, **options)


def _descriptor(file: IO[bytes]) -> int | None:
    try:
        return file.fileno()
    except (AttributeError, OSError):
        return None


def mappable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the type if its elements are bytes that can live in a file.

    Raises ValueError for Python objects, which are addresses of one process, and for elements of 0 bytes.
    """
    if dtype.hasobject:
        raise ValueError(f"an array of {dtype} holds Python objects, which cannot live in a file")
    if dtype.itemsize == 0:
        raise ValueError(f"the elements of {dtype!r} have no size; name one, for instance 'S10'")
    return dtype


def as_bytes(region: Region) -> NDArray[np.uint8]:
    """A flat array of the region's bytes, which keeps the region's buffer as long as it lives."""
    import numpy as np

    # A region has the buffer protocol, but a type checker can know that of compiled classes from 3.12 on.
    return np.frombuffer(cast("memoryview", region), np.uint8)


def as_shape(shape: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    """A shape as a tuple of integers; one integer is one dimension. Raises ValueError for negative ones."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    numbers = tuple(operator.index(size) for size in sizes)
    if any(number < 0 for number in numbers):
        raise ValueError(f"shape is {numbers}: it has a negative dimension")
    return numbers


def bytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array. Raises ValueError if no address space has so many."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > LARGEST_REGION:
        raise ValueError(
            f"an array of shape {shape} of {dtype} takes {nbytes} bytes, which do not fit into the address "
            "space"
        )
    return nbytes


_open: weakref.WeakSet[Region] = weakref.WeakSet()


def at_exit(region: Region) -> None:
    """Has the region flushed when the interpreter exits, if it is still open then."""
    _open.add(region)


@atexit.register
def _flush_open_regions() -> None:
    for region in list(_open):
        if region.closed or not region.writable:
            continue
        try:
            region.flush()
        except Exception as error:  # whatever it is, the other regions are to be flushed too
            print(f"userfault: {region.name} could not be flushed at exit: {error}", file=sys.stderr)
    _native.write_out_trace()
