"""Several threads on one region at once, each the only writer of its own cells.

The region is an array of 8-byte counters, and counter i belongs to thread i modulo THREADS. So neighbours in
every page and block have different writers, and yet each thread knows exactly what its counters hold: it adds
to them through the memory, by pwrite, by readinto and by read(2), and no addition may be lost, whatever the
others do to the same blocks: flush, evict, prefetch, pin, unmap, change the limit, or let the store fail.
Counters of others are only known to grow.

What each thread does is drawn by Hypothesis, so that a failure shrinks to few operations; how the threads
interleave is the machine's affair.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar, Literal, cast

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

import userfault
from userfault import MemoryStore, StoreError
from userfault.testing import FaultyStore, delay, fail, shorten

THREADS = 4
_CELL = 8
_MADV_DONTNEED = 4

_PLACES = st.integers(0, (1 << 32) - 1)
_COUNTS = st.sampled_from([1, 5, 512, 3000, 1 << 20])
_OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("add", "add", "add", "check", "pwrite", "readinto", "read(2)", "pread", "write(2)"),
                *("flush", "evict", "evict", "prefetch", "advise", "pin", "unmap", "limit", "fail"),
            ]
        ),
        _PLACES,
        _COUNTS,
    ),
    min_size=1,
    max_size=25,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ThreadsMachine(RuleBasedStateMachine):
    """One region; each step runs a program on every thread at once."""

    blocks: ClassVar[Sequence[int]] = (4096, 16_384, 65_536)
    pages: ClassVar[Literal["auto", "4KiB", "2MiB"]] = "4KiB"
    fault: ClassVar[Literal["threads", "inline"]] = "threads"
    largest: ClassVar[int] = 400_000

    def __init__(self) -> None:
        super().__init__()
        self.old_limit = userfault.set_memory_limit(64 << 20)
        self.region: userfault.Region | None = None

    @initialize(less=_PLACES, block=_PLACES, limit=st.sampled_from([1, 6, 20]))
    def begin(self, less: int, block: int, limit: int) -> None:
        size = max(THREADS * _CELL, self.largest - less % self.largest)
        self.memory = MemoryStore(size)
        self.store = FaultyStore(self.memory)
        self.counts = np.zeros(size // _CELL, np.uint64)
        self.open(block, limit)

    @precondition(lambda self: self.region is None)
    @rule(block=_PLACES, limit=st.sampled_from([1, 6, 20]))
    def open(self, block: int, limit: int) -> None:
        size = self.blocks[block % len(self.blocks)]
        self.region = userfault.open(
            self.store,
            "r+",
            block=size,
            pages=self.pages,
            memory_limit=limit * size,
            fault=self.fault,
        )
        self.cells: NDArray[np.uint64] = self.region.ndarray(np.uint64, len(self.counts))

    @precondition(lambda self: self.region is not None)
    @rule(programs=st.lists(_OPERATIONS, min_size=2, max_size=THREADS))
    def together(self, programs: list[list[tuple[str, int, int]]]) -> None:
        """Every thread runs its program; then every counter is what its owner made it."""
        errors: list[BaseException] = []
        start = threading.Barrier(len(programs))

        def run(thread: _Owner, program: list[tuple[str, int, int]]) -> None:
            try:
                start.wait()
                for name, place, count in program:
                    thread.do(name, place, count)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(_Owner(self, index), program))
            for index, program in enumerate(programs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert np.array_equal(self.cells, self.counts)

    @precondition(lambda self: self.region is not None)
    @rule()
    def close(self) -> None:
        self.finish()

    def finish(self) -> None:
        """Closes the region; whatever failed before, the store then has every count."""
        assert self.region is not None
        del self.cells
        self.store.plan = ()
        for _ in range(3):
            with contextlib.suppress(StoreError):
                self.region.close()
                break
        assert self.region.closed
        self.region = None
        stored = np.frombuffer(self.memory.getvalue(), np.uint64, len(self.counts))
        assert np.array_equal(stored, self.counts)

    def teardown(self) -> None:
        try:
            if self.region is not None:
                self.finish()
        finally:
            userfault.set_memory_limit(self.old_limit)


class _Owner:
    """One thread: what it may do, and what it has seen of the others."""

    def __init__(self, machine: ThreadsMachine, index: int) -> None:
        assert machine.region is not None
        self.machine, self.index = machine, index
        self.region = machine.region
        self.seen = machine.counts.copy()

    def do(self, name: str, place: int, count: int) -> None:
        first = place % len(self.machine.counts)
        last = min(first + count, len(self.machine.counts))
        offset, length = first * _CELL, (last - first) * _CELL
        if name == "add":
            own = self.own(first, last)
            self.machine.cells[own] += np.uint64(1)
            self.machine.counts[own] += np.uint64(1)
        elif name in ("pwrite", "readinto", "read(2)"):
            self.add_by_call(name, first, min(last, first + 8 * THREADS))
        elif name == "check":
            self.check(first, self.machine.cells[first:last].copy())
        elif name == "pread":
            self.check(first, np.frombuffer(self.region.pread(length, offset), np.uint64))
        elif name == "write(2)" and self.region.kernel_faults:
            with tempfile.TemporaryFile(buffering=0) as file:
                file.write(self.machine.cells[first:last].data)
                file.seek(0)
                self.check(first, np.frombuffer(file.read(), np.uint64))
        elif name == "write(2)":
            # Here a system call on absent memory is EFAULT.
            self.check(first, self.machine.cells[first:last].copy())
        elif name == "unmap":
            self.unmap(offset, length)
        elif name == "limit":
            userfault.set_memory_limit(1 + place % (1 << 20))
        elif name == "fail":
            faults = [
                fail("write", count=1),
                shorten("write", place % 5000, count=2),
                fail("sync", count=1),
                delay("write", 0.002, count=4),
                delay("read", 0.002, count=4),
            ]
            self.machine.store.plan = [faults[place % len(faults)]]
        else:
            self.manage(name, offset, length)

    def own(self, first: int, last: int) -> slice:
        return slice(first + (self.index - first) % THREADS, last, THREADS)

    def add_by_call(self, name: str, first: int, last: int) -> None:
        for cell in range(*self.own(first, last).indices(len(self.machine.counts))):
            value = self.machine.counts[cell] + np.uint64(1)
            data = value.tobytes()
            if name == "pwrite":
                self.region.pwrite(data, cell * _CELL)
            elif name == "readinto":
                self.region.readinto(cast("IO[bytes]", io.BytesIO(data)), cell * _CELL, _CELL)
            elif self.region.kernel_faults:
                read, write = os.pipe()
                os.write(write, data)
                part = memoryview(cast("bytes", self.region))[cell * _CELL : (cell + 1) * _CELL]
                assert os.readv(read, [part]) == _CELL
                part.release()
                os.close(read)
                os.close(write)
            else:
                continue
            self.machine.counts[cell] = value

    def check(self, first: int, found: NDArray[np.uint64]) -> None:
        last = first + len(found)
        own = self.own(first, last)
        assert np.array_equal(found[own.start - first :: THREADS], self.machine.counts[own])
        assert (found >= self.seen[first:last]).all(), "a counter went back"
        self.seen[first:last] = found

    def manage(self, name: str, offset: int, length: int) -> None:
        calls: dict[str, Callable[[], Any]] = {
            "flush": lambda: self.region.flush(offset, length),
            "evict": lambda: self.region.evict(offset, length),
            "prefetch": lambda: self.region.prefetch([(offset, length)], wait=bool(length % 3)),
            "advise": lambda: self.region.advise("sequential" if length % 2 else "random", offset, length),
            "pin": lambda: self.region.pin(offset, length, write=True).release(),
        }
        try:
            calls[name]()
        except MemoryError:
            assert name == "pin"
        except StoreError:
            assert any(call.errno for call in self.machine.store.calls())

    def unmap(self, offset: int, length: int) -> None:
        """What a program may do to its own memory: the pages stay in memory, their evidence goes."""
        page = 2 << 20 if self.region.pages == "2MiB hugetlb" else 4096
        begin, end = offset // page * page, (offset + length) // page * page
        if begin < end:
            assert _libc.madvise(self.region.address + begin, end - begin, _MADV_DONTNEED) == 0
