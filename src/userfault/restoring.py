"""Getting arrays back: at once however large they are, and their bytes when they are touched.

::

    with userfault.restore("checkpoints") as state:
        print(state.step, state.meta)
        weights = state["weights"]      # an ndarray, usable before it is loaded
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from userfault import _native, working_set
from userfault.errors import CorruptError
from userfault.opening import Options, private_region, region_over
from userfault.region import Region
from userfault.saved_array import Shape, described

__all__ = ["State", "restore"]

_FILL = 16 << 20
"""Bytes that the background fill asks for at a time."""


class State(Mapping[str, NDArray[Any]]):
    """The arrays of a point, by name; made by `restore`. A context manager that closes itself."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        point: _native.OpenPoint,
        arrays: dict[str, NDArray[Any]],
        regions: dict[int, Region],
    ) -> None:
        self._directory = directory
        self._point: _native.OpenPoint | None = point
        self._arrays = arrays
        self._regions = regions
        self._known = working_set.read(directory, point.step, point.time) if regions else None
        self._touched: dict[int, working_set.Ranges] = {data: [] for data in regions}
        self._looked_at = dict.fromkeys(regions, 0)
        self._stop = threading.Event()
        self._filler: threading.Thread | None = None
        self.step = point.step
        """The point's number."""
        self.time = point.time
        """When the cut was, in seconds since 1970."""
        self.meta: Any = _parsed(point.meta)
        """What the program kept with the point."""

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def fill(self, *, wait: bool = False) -> None:
        """Brings in everything in the background, as far as the memory limit allows; restore() begins it.

        What an earlier restore of the point touched first comes first. With `wait` it returns when that is
        done. Raises PoisonedError if `wait` and a block cannot be had.
        """
        if wait:
            for region in self._regions.values():
                region.prefetch([(0, len(region))], wait=True)
        elif self._filler is None and self._regions:
            self._filler = threading.Thread(target=self._fill, name="userfault-fill", daemon=True)
            self._filler.start()

    def _fill(self) -> None:
        # A block that cannot be had is told to whoever touches it; a region that is closed ends the fill.
        with contextlib.suppress(Exception):
            for data, region in self._regions.items():
                first = (self._known or {}).get(data, [])
                for start, length in first:
                    for part in range(start, min(start + length, len(region)), _FILL):
                        if self._stop.is_set():
                            return
                        end = min(part + _FILL, start + length, len(region))
                        region.prefetch([(part, end - part)], wait=True)
            for data, region in self._regions.items():
                for start in range(0, len(region), _FILL):
                    if self._stop.is_set():
                        return
                    length = min(_FILL, len(region) - start)
                    self._look(data, start, length)
                    region.prefetch([(start, length)], wait=True)

    def _look(self, data: int, start: int, length: int) -> None:
        """Notes what is there already: it was touched before we came to it."""
        if self._known is None:
            region = self._regions[data]
            self._touched[data] += working_set.runs(region.resident(start, length), region.block, start)
            self._looked_at[data] = start + length

    def _keep_working_set(self) -> None:
        if self._known is not None:
            return
        for data, region in self._regions.items():
            start = self._looked_at[data]
            if start < len(region):
                self._look(data, start, len(region) - start)
        if any(self._touched.values()):
            working_set.write(self._directory, self.step, self.time, self._touched)
            self._known = self._touched

    def close(self) -> None:
        """Gives the memory of a lazy restore up. Closing again does nothing.

        Raises BufferError while somebody holds one of its arrays.
        """
        self._stop.set()
        if self._filler is not None and self._filler is not threading.current_thread():
            self._filler.join()
        self._keep_working_set()
        held, self._arrays = self._arrays, {}
        # Dropped here, so that only what others hold counts.
        shapes = set(held)
        held.clear()
        del shapes
        for region in self._regions.values():
            region.close()
        self._regions = {}
        # Its files are anybody's to prune from here on.
        self._point = None

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(BufferError):
            # Arrays outlive the state as any array does; the memory goes with the last of them.
            self.close()

    def __repr__(self) -> str:
        return f"<userfault.State of step {self.step}: {', '.join(self._arrays)}>"


def restore(
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    names: Iterable[str] | None = None,
    lazy: bool = True,
    mode: Literal["r", "c"] = "c",
    into: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> State:
    """Opens a point: the latest, or that of `step`.

    - `names`: only these arrays.
    - `lazy`: arrays whose bytes are read, and checked, when they are touched; the rest follows in the
      background. What the first restore of a point touched before the background came to it is kept
      beside the point and fetched first by the next one. False reads all of it now, with all processors,
      into ordinary NumPy arrays.
    - `mode`: "c" for lazy arrays that may be written, privately; "r" for read-only ones.
    - `into`: existing arrays by name, of the same number of bytes, that are filled now.
    - `progress(done, total)` is told of bytes as they are read, without `lazy`.

    A block that is not what was saved is never handed out: eagerly it raises StoreError, lazily its touch
    is SIGBUS and a line on stderr says which it is. Arrays are by name in the result; tensors of types that
    NumPy does not have come as their bytes.

    Raises FileNotFoundError if there is no such point, KeyError for a name that it does not have, ValueError
    or TypeError for arguments that make no sense, CorruptError if its index is damaged.
    """
    # The program may go elsewhere while the point is open.
    directory = os.path.abspath(directory)
    if mode not in ("r", "c"):
        raise ValueError(f'mode is {mode!r}: it must be "r" or "c"')
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}: give a list of names")
    point = _native.OpenPoint(directory, step)
    known = {name: (description, data) for name, description, data in point.arrays()}
    wanted = list(known) if names is None else list(names)
    targets = dict(into or {})
    if names is None and into is not None:
        wanted = list(targets)
    for name in [*wanted, *targets]:
        if name not in known:
            raise KeyError(f"the point of step {point.step} has no array {name!r}; it has {', '.join(known)}")
    stores: dict[int, _native.ArrayStore] = {}
    shapes: dict[str, Shape] = {}
    for name in wanted:
        description, data = known[name]
        if data not in stores:
            stores[data] = point.store(data)
        shapes[name] = Shape.of(name, _parsed(description), stores[data].nbytes)
    reading = not lazy or into is not None
    arrays: dict[str, NDArray[Any]] = {}
    regions: dict[int, Region] = {}
    opened: dict[int, Region | NDArray[np.uint8]] = {}
    total = sum(stores[data].nbytes for data in {known[name][1] for name in wanted})
    done = 0
    for name in wanted:
        data = known[name][1]
        store, shape = stores[data], shapes[name]
        if name in targets:
            target = _target(name, targets[name], shape.nbytes)
            done = _read(store, target, done, total, progress)
            arrays[name] = targets[name]
            continue
        if shape.nbytes == 0:
            arrays[name] = np.empty(shape.shape, shape.dtype)
            continue
        if reading:
            if data not in opened:
                whole: NDArray[np.uint8] = np.empty(store.nbytes, np.uint8)
                done = _read(store, whole, done, total, progress)
                opened[data] = whole
            arrays[name] = cast("NDArray[Any]", opened[data]).view(shape.dtype).reshape(shape.shape)
            continue
        if data not in opened:
            opened[data] = _region(store, mode)
            regions[data] = cast(Region, opened[data])
        # What was tracked began somewhere in a page, and so it does again.
        arrays[name] = cast(Region, opened[data]).ndarray(shape.dtype, shape.shape, "C", store.lead)
    state = State(directory, point, arrays, regions)
    state.fill()
    return state


def _region(store: _native.ArrayStore, mode: str) -> Region:
    if mode == "r":
        return region_over(store, "r", 0, None, Options(), owned=False)
    return private_region(store, 0, None, Options(), None)


def _read(
    store: _native.ArrayStore,
    into: NDArray[np.uint8],
    done: int,
    total: int,
    progress: Callable[[int, int], object] | None,
) -> int:
    threads = len(os.sched_getaffinity(0))
    step = into.nbytes if progress is None else 64 << 20
    for start in range(0, into.nbytes, max(step, 1)):
        part = into[start : start + step]
        store.read_into(part, start, threads)
        done += part.nbytes
        if progress is not None:
            progress(done, total)
    return done


def _target(name: str, array: Any, nbytes: int) -> NDArray[np.uint8]:
    if isinstance(array, np.ndarray) and array.flags.c_contiguous and array.flags.writeable:
        flat = array.reshape(-1).view(np.uint8)
    elif type(array).__module__.partition(".")[0] == "torch":
        import ctypes

        found = described(name, array)
        memory = (ctypes.c_uint8 * found.nbytes).from_address(found.address)
        flat = np.frombuffer(memoryview(memory).cast("B"), np.uint8)[: array.numel() * array.element_size()]
    else:
        view = memoryview(array)
        if view.readonly or not view.c_contiguous:
            raise ValueError(f"into[{name!r}] must be writable and C-contiguous")
        flat = np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.zeros(0, np.uint8)
    if flat.nbytes != nbytes:
        raise ValueError(f"into[{name!r}] has {flat.nbytes} bytes, the saved array {nbytes}")
    return flat


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CorruptError(f"{text[:80]!r} is no JSON: {error}") from error
