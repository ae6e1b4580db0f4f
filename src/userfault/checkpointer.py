"""Saving arrays again and again, while the program goes on writing them.

::

    with userfault.Checkpointer("checkpoints", {"weights": weights}) as ck:
        for step in range(steps):
            train(weights)
            point = ck.save(step)        # returns at the cut; the rest happens in the background
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import math
import operator
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

from userfault import _native
from userfault.saved_array import described
from userfault.sizes import Size, parse_size

__all__ = ["Checkpointer", "Point"]

_TICK = 0.05
"""Seconds between two looks at points under way, for their callbacks."""


_LAST_STEP = (1 << 63) - 1


class Point:
    """A point on its way to the disk, as `Checkpointer.save` returns it; like a `concurrent.futures.Future`.

    It can be awaited. Callbacks run on a thread of their own, for which nothing waits.
    """

    def __init__(self, point: _native.SavedPoint, progress: Callable[[int, int], object] | None) -> None:
        self._point = point
        self._progress = progress
        self._told = (-1, -1)
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Point], object]] = []
        self._finished = False
        if progress is not None:
            _notifier.follow(self)

    @property
    def step(self) -> int:
        """The number that the point has."""
        return self._point.step

    @property
    def stall(self) -> float:
        """How long save() kept its caller at the cut, in seconds."""
        return self._point.stall

    @property
    def method(self) -> dict[str, str]:
        """How each array was followed.

        "tracked": the kernel notes writes; what the drain had not yet copied was copied at the cut.
        "guarded": protected at the cut, and each block saved before its first write. "copied": copied
        whole at the cut. A foreign array on transparent huge pages is "copied (its huge pages stay whole)"
        if copying it takes less than 3 ms by the speed that was measured when the Checkpointer was made,
        else "tracked (its huge pages are split)".
        """
        return dict(self._point.method)

    @property
    def extra_bytes(self) -> int:
        """Bytes of staging memory in use at most, as far as it is known."""
        return self._point.extra_bytes

    def done(self) -> bool:
        """True once the point is finished or has failed."""
        return self._point.done()

    def result(self, timeout: float | None = None) -> int:
        """Waits until the point is finished, at most `timeout` seconds; returns its step.

        Raises TimeoutError if it is not done by then, else what made it fail.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.step

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `result`, but returns what made the point fail, or None.

        Raises TimeoutError if it is not done after `timeout` seconds.
        """
        done, error = self._point.wait(timeout)
        if not done:
            raise TimeoutError(f"the point of step {self.step} is not finished after {timeout} s")
        return error

    def add_done_callback(self, callback: Callable[[Point], object]) -> None:
        """Calls `callback(point)` once the point is done, on another thread."""
        with self._lock:
            self._callbacks.append(callback)
        _notifier.follow(self)

    def __await__(self) -> Generator[Any, None, int]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        def arrived(_: Point) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(arrived)
        yield from future
        return self.result(0)

    def _look(self) -> bool:
        """Tells whoever wants to know how things stand; True if there is nothing more to tell."""
        done = self.done()
        now = self._point.progress()
        if self._progress is not None and now != self._told:
            self._told = now
            _call(self._progress, *now)
        if not done:
            return False
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback, self)
        return True

    def __repr__(self) -> str:
        if not self.done():
            state = "under way"
        else:
            error = self.exception(0)
            state = "finished" if error is None else f"failed: {error}"
        return f"<userfault.Point of step {self.step}, {state}>"


def _call(function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except Exception:
        # As concurrent.futures: the thread goes on, and somebody hears of it.
        sys.excepthook(*sys.exc_info())


class _Notifier:
    """The thread that calls back. Nothing ever waits for it but the end of the interpreter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process = 0

    def follow(self, point: Point) -> None:
        with self._lock:
            if self._thread is None or self._process != os.getpid():
                self._new = queue.SimpleQueue()
                self._process = os.getpid()
                self._thread = threading.Thread(target=self._run, name="userfault-callbacks", daemon=True)
                self._thread.start()
            self._new.put(point)

    def _run(self) -> None:
        following: list[Point] = []
        while True:
            try:
                point = self._new.get(timeout=_TICK if following else None)
            except queue.Empty:
                pass
            else:
                if point is None:
                    return
                if point not in following:
                    following.append(point)
            following = [point for point in following if not point._look()]

    def after_fork(self) -> None:
        """In the child: a lock that somebody held is nobody's to release."""
        self._lock = threading.Lock()
        self._thread = None

    def stop(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None or self._process != os.getpid():
                return
            self._new.put(None)
        thread.join(1.0)


_notifier = _Notifier()
os.register_at_fork(after_in_child=_notifier.after_fork)
_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


class Checkpointer(_native.Checkpointer):
    """Saves arrays into a directory, incrementally, without stopping the program for longer than the cut.

    - `directory`: made if need be; one Checkpointer at a time saves into it (InUseError). What a killed one
      has left is removed.
    - `arrays`: what to save, by name. Arrays of `userfault.zeros(track=True)` and the like, NumPy arrays,
      bytearrays and any other writable C-contiguous buffer, and torch tensors on the CPU. Arrays that share
      their memory are saved once. Foreign memory is tracked in place if it is private anonymous memory of
      1 MiB and more, and copied at every cut if it is smaller; its buffer is held until `close`.
    - `always_copy`: names of arrays that are copied at every cut, whatever they are made of: file mappings,
      and memory that devices write (registered io_uring buffers, RDMA, cudaHostRegister), which the kernel
      cannot track.
    - `max_to_keep`: finished points beyond so many are pruned, oldest first.
    - `compress`: "lz4" or "zstd", or None.
    - `durable`: a point is finished when it is on the disk. False leaves that to the kernel: a point may be
      lost by a crash of the machine, not by one of the program.
    - `max_rate`: bytes a second that are written at most, a number or text such as "200MB".
    - `staging`: bytes of memory for what was copied aside. When it is full a cut takes longer (tracked and
      copied arrays), or writers of guarded arrays wait.
    - `drain`: "auto" copies in the background between points, so that little is left at the cut; "off"
      leaves everything to the cut.
    - `timeout`: a save that writes nothing for so many seconds has failed.

    The cut is one instant for the thread that calls save(). Other threads that write meanwhile get into it
    with some of their writes, as with fork(): quiesce them, by `pause`.

    A context manager that closes itself. After fork() the child cannot use it (RuntimeError); saves go on in
    the parent. When the interpreter exits, saves under way are finished first.

    Raises ValueError for arrays that cannot be tracked, with the reason; TypeError for what has no memory;
    InUseError; OSError if the directory cannot be written; CorruptError if it holds a damaged manifest.
    """

    _directory: str
    _process: int
    _held: list[object]
    _max_to_keep: int | None
    _closed: bool

    def __new__(
        cls,
        directory: str | os.PathLike[str],
        arrays: Mapping[str, Any],
        *,
        always_copy: Iterable[str] = (),
        max_to_keep: int | None = None,
        compress: Literal["lz4", "zstd"] | None = None,
        durable: bool = True,
        max_rate: Size | None = None,
        staging: Size = "256MiB",
        drain: Literal["auto", "off"] = "auto",
        timeout: float = 60.0,
    ) -> Checkpointer:
        _check_names(arrays)
        if isinstance(always_copy, str):
            raise TypeError(f"always_copy is {always_copy!r}: give a list of names")
        # The program may go elsewhere while it saves.
        directory = os.path.abspath(directory)
        copied = set(always_copy)
        unknown = copied - arrays.keys()
        if unknown:
            raise ValueError(f"always_copy names arrays that are not there: {', '.join(sorted(unknown))}")
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}: at least the last point is kept")
        if compress not in (None, "lz4", "zstd"):
            raise ValueError(f'compress is {compress!r}: it must be None, "lz4" or "zstd"')
        if drain not in ("auto", "off"):
            raise ValueError(f'drain is {drain!r}: it must be "auto" or "off"')
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"timeout is {timeout}: it is a number of seconds above 0")
        rate = None if max_rate is None else parse_size(max_rate, "max_rate")
        if rate == 0:
            raise ValueError("max_rate is 0: nothing would ever be written")
        found = {name: described(name, array) for name, array in arrays.items()}
        self = super().__new__(
            cls,
            directory,
            [
                (name, json.dumps(each.description), each.address, each.nbytes, name in copied)
                for name, each in found.items()
            ],
            max_to_keep=max_to_keep,
            compress=compress,
            durable=durable,
            max_rate=None if rate is None else float(rate),
            staging=parse_size(staging, "staging"),
            drain=drain == "auto",
            timeout=timeout,
        )
        self._directory = directory
        self._process = os.getpid()
        self._held = [each.owner for each in found.values()]
        self._max_to_keep = max_to_keep
        self._closed = False
        _open.add(self)
        return self

    def save(
        self,
        step: int | None = None,
        *,
        meta: Any = None,
        pause: Callable[[], AbstractContextManager[object]] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Point:
        """Takes a point and returns at the cut; it is written in the background.

        `step` is a number above those of all earlier points, one more than the last by default. `meta` is
        kept with the point: anything that JSON can say. `pause` is called, and the context manager it
        returns entered around the cut: it stops other writers. `progress(done, total)` is told, on another
        thread, how many bytes have been looked at.

        Raises what made an earlier save fail, if nobody has been told by this method or `wait` yet;
        ValueError for a step that is not above the last, and once closed; TypeError if `meta` cannot be
        written as JSON, or if `step` is no integer.
        """
        text = json.dumps(meta)
        if step is not None:
            step = operator.index(step)
            if not 0 <= step <= _LAST_STEP:
                raise ValueError(f"step is {step}: it is a number from 0 to 2**63 - 1")
        with pause() if pause is not None else contextlib.nullcontext():
            point = self._save(step, text)
        return Point(point, progress)

    def steps(self) -> list[int]:
        """The finished points' steps, oldest first."""
        return [step for step, _ in self._points()]

    def latest_step(self) -> int | None:
        """The last finished point's step; None if there is none."""
        steps = self.steps()
        return steps[-1] if steps else None

    def wait(self, timeout: float | None = None) -> None:
        """Waits until all points are finished, at most `timeout` seconds.

        Raises TimeoutError, and what made a save fail since somebody was told.
        """
        if not self._wait(timeout):
            raise TimeoutError(f"points are still being saved after {timeout} s")

    def verify(self) -> list[str]:
        """Reads every byte of all finished points; returns a line for each thing that is wrong.

        Raises OSError if the directory cannot be read.
        """
        from userfault.verifying import verify

        self.wait()
        return [str(damage) for damage in verify(self._directory).damage]

    def prune(self, keep: int | None = None) -> None:
        """Drops all but the newest `keep` points (`max_to_keep` by default) and gives back their space.

        Points that somebody has open for a lazy restore keep their bytes until they are closed. Raises
        ValueError if there is no such number.
        """
        number = self._max_to_keep if keep is None else keep
        if number is None or number < 1:
            raise ValueError(f"keep is {number}: say how many points are kept, at least 1")
        self._prune(number)
        self.wait()

    def close(self) -> None:
        """Finishes what is under way and lets go of the arrays. Closing again does nothing.

        Raises what made a save fail since somebody was told.
        """
        if self._closed or self._process != os.getpid():
            # A forked child has a copy of the arrays and none of the threads: there is nothing to finish.
            return
        self._closed = True
        _open.discard(self)
        # Nothing new is taken from here on, also if other threads go on asking.
        self._close(0.0)
        try:
            self._wait(None)
        finally:
            # A disk that does not answer keeps its thread, and with it the arrays' buffers.
            if self._close(2.0):
                self._held.clear()
            else:
                _never_released.append(self._held)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            # It must not hide the exception that is already on its way.
            if kind is None:
                raise

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            with contextlib.suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        if self._process != os.getpid():
            state = "of the parent process"
        else:
            state = "closed" if self._closed else f"last finished step {self.latest_step()}"
        return f"<userfault.Checkpointer {self._directory!r}, {state}>"


def _check_names(arrays: object) -> None:
    """Raises ValueError if there is nothing, and TypeError if it has no names, or names that are no text."""
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays is a {type(arrays).__name__}: give a dictionary of arrays by name")
    if not arrays:
        raise ValueError("there is nothing to save: arrays is empty")
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(f"the name {name!r} of an array is no str")
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"the name {name!r} of an array is no text: it has half a surrogate pair")


_never_released: list[list[object]] = []


@atexit.register
def _finish() -> None:
    for checkpointer in list(_open):
        try:
            checkpointer.close()
        except Exception as error:
            print(f"userfault: a point could not be finished at exit: {error}", file=sys.stderr)
    _notifier.stop()
