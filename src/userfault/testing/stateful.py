"""A Hypothesis state machine that drives a region over a store, and compares it with plain bytes.

It is for people who write stores, and for this package's own tests. A subclass says which store::

    from hypothesis.stateful import run_state_machine_as_test
    from userfault.testing.stateful import RegionStateMachine

    class MyStoreMachine(RegionStateMachine):
        def make_store(self, contents):
            self.my = MyStore(contents)
            return self.my

        def stored(self):
            return self.my.everything()

    run_state_machine_as_test(MyStoreMachine)

The machine opens regions in every mode that a store has, over any part of it, with blocks of several sizes
and limits from the smallest up. It reads and writes through arrays, memoryviews, system calls, `pread`,
`pwrite` and `readinto`; flushes, evicts, prefetches, advises, pins, changes the limit, closes and reopens;
and lets the store fail, come short and be slow. What must hold at every step is in `expectation`:

- The region shows what was written last, whatever the store does.
- The store never holds a byte that was never written there; after a flush or close that returned it holds
  the last ones. Bytes beside the region, and those under private changes, stay as they were.
- A write-back that failed loses nothing, and the next flush, evict or close raises StoreError.
- A read that failed is PoisonedError or StoreError in a call, until `heal` brings the block back.
- What is pinned stays in memory. Without errors the limit holds.

It needs Hypothesis and NumPy. What can hang is the touch of a page, which no exception ends: run a machine in
a process of its own, with a time limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Literal, cast

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import userfault
from userfault import MemoryStore, Pin, PoisonedError, Region, Store, StoreError
from userfault.testing.expectation import Expectation
from userfault.testing.faulty_store import Fault, FaultyStore, delay, fail, shorten

__all__ = ["RegionStateMachine"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_PLACES = st.integers(0, (1 << 32) - 1)
_LENGTHS = st.sampled_from([1, 8, 511, 4095, 4096, 4097, 20_000, 70_000, 1 << 32])
_BYTES = st.integers(0, 255)
_ERRNO = st.sampled_from([errno.EIO, errno.ENOSPC, errno.EDQUOT])
_COUNT = st.integers(1, 3)

_FAULTS: st.SearchStrategy[Fault] = st.one_of(
    st.builds(lambda count, number: fail("write", count=count, errno=number), _COUNT, _ERRNO),
    st.builds(lambda count, nbytes: shorten("write", nbytes, count=count), _COUNT, st.integers(0, 9000)),
    st.builds(lambda count: fail("sync", count=count), _COUNT),
    st.builds(lambda count: fail("read", count=count), _COUNT),
    st.builds(lambda count, nbytes: shorten("read", nbytes, count=count), _COUNT, st.integers(0, 9000)),
    st.builds(lambda count: delay("read", 0.005, count=count), _COUNT),
    st.builds(lambda count: delay("write", 0.005, count=count), _COUNT),
)


@dataclass(frozen=True)
class _Held:
    pin: Pin
    first: int
    last: int
    """Blocks, both included."""


class RegionStateMachine(RuleBasedStateMachine):
    """One region at a time over one store, driven by one thread, beside its `Expectation`."""

    blocks: ClassVar[Sequence[int]] = (4096, 16_384, 65_536)
    """Sizes of blocks to choose from, in bytes."""
    pages: ClassVar[Literal["auto", "4KiB", "2MiB"]] = "4KiB"
    """Which pages the regions live on."""
    fault: ClassVar[Literal["threads", "inline"]] = "threads"
    """Who answers their faults."""
    largest: ClassVar[int] = 400_000
    """The most bytes of a store."""

    def __init__(self) -> None:
        super().__init__()
        self.old_limit = userfault.set_memory_limit(64 << 20)
        self.region: Region | None = None
        self.view: memoryview | None = None
        self.pins: list[_Held | None] = []
        """None where the pin could not be had."""
        self.reported = 0
        """Failed writes and syncs of the store that have been raised, as the store counts them."""
        self.told_lately = False
        """True if the last flush raised: a write-back that failed beside it may still be told by the next."""

    # What a subclass says.

    def make_store(self, contents: bytes) -> Store:
        """Makes the store that is tested, a writable one that holds `contents`; a MemoryStore by default."""
        self._memory = MemoryStore(contents)
        return self._memory

    def stored(self) -> bytes:
        """Everything that the store holds now, read beside the region."""
        return self._memory.getvalue()

    # Beginning and end.

    @initialize(less=st.one_of(st.integers(0, 10_000), _PLACES), seed=_BYTES)
    def _begin(self, less: int, seed: int) -> None:
        size = self.largest - less % self.largest
        contents = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()
        self.store = FaultyStore(self.make_store(contents))

    def teardown(self) -> None:
        try:
            if self.region is not None:
                self._end()
        finally:
            userfault.set_memory_limit(self.old_limit)

    def _end(self) -> None:
        """Closes the region with a store that works again, and checks what it holds."""
        region, expected = self._open()
        self._heal_all()
        self._let_go()
        for _ in range(3):
            try:
                region.close()
                break
            except StoreError:
                self._raised()
        assert region.closed, "a close without errors raised three times"
        expected.check_flushed(self.stored(), 0, expected.length)
        self.region = None

    def _let_go(self) -> None:
        for held in self.pins:
            if held is not None:
                held.pin.release()
        self.pins.clear()
        if self.view is not None:
            self.view.release()
            self.view = None

    def _open(self) -> tuple[Region, Expectation]:
        assert self.region is not None
        return self.region, self.expected

    def _range(self, place: int, length: int) -> tuple[int, int]:
        region, _ = self._open()
        offset = place % len(region)
        return offset, min(length, len(region) - offset)

    # What went wrong in the store.

    def _failures(self, *names: str) -> int:
        return sum(1 for call in self.store.calls() if call.errno and call.name in names)

    def _unreported(self) -> int:
        return self._failures("write", "sync") - self.reported

    def _raised(self) -> None:
        """A call raised StoreError: there must be a reason, and it counts as told."""
        due = self._unreported() > 0 or self.told_lately
        assert due, "StoreError, but the store has not failed since the last one"
        self.reported = self._failures("write", "sync")
        self.told_lately = True

    def _heal_all(self) -> None:
        region, _ = self._open()
        self.store.plan = ()
        region.heal(0, len(region))
        assert region.errors == []

    def _may_touch(self) -> bool:
        """False while a touch could be SIGBUS: reads may fail for good, or have."""
        region, _ = self._open()
        if region.errors:
            return False
        return self.retries or not any(
            fault.call == "read" and fault.action in ("fail", "shorten") for fault in self.store.plan
        )

    def _touchable(self) -> memoryview:
        """The region's memory, after everything that could make a touch fail has been put right."""
        region, _ = self._open()
        if not self._may_touch():
            self._heal_all()
        if self.view is None:
            self.view = memoryview(cast("bytes", region))
        return self.view

    @contextlib.contextmanager
    def _reads_may_fail(self) -> Iterator[None]:
        before = self._failures("read")
        had = bool(self._open()[0].errors)
        try:
            yield
        except (PoisonedError, StoreError):
            if not had and self._failures("read") == before:
                raise

    # Rules.

    @precondition(lambda self: self.region is None)
    @rule(
        mode=st.sampled_from(["r", "r+", "r+", "c"]),
        begin=st.one_of(st.just(0), st.integers(0, 9000), _PLACES),
        length=st.one_of(st.none(), st.none(), _PLACES),
        block=_PLACES,
        limit=st.sampled_from([1, 5, 20, None]),
        on_error=st.sampled_from(["retry", "auto", "poison"]),
    )
    def open(
        self, mode: str, begin: int, length: int | None, block: int, limit: int | None, on_error: Any
    ) -> None:
        """Opens a region over any part of the store; `limit` counts blocks."""
        self.store.plan = ()
        size = self.blocks[block % len(self.blocks)]
        begin %= len(self.store)
        rest = len(self.store) - begin
        options: dict[str, Any] = {
            "offset": begin,
            "length": None if length is None else 1 + length % rest,
            "block": size,
            "pages": self.pages,
            "fault": self.fault,
            "memory_limit": None if limit is None else limit * size,
            "on_error": on_error,
        }
        self._opened(userfault.open(self.store, mode, **options))
        self.retries = on_error == "retry"

    def _opened(self, region: Region) -> None:
        self.region = region
        self.retries = self.told_lately = False
        self.reported = self._failures("write", "sync")
        self.expected = Expectation(
            self.stored(), region.offset, len(region), reaches_store=region.mode != "c"
        )

    @precondition(lambda self: self.region is not None)
    @rule(plan=st.lists(_FAULTS, max_size=2))
    def plan(self, plan: list[Fault]) -> None:
        """From now on the store fails, comes short or is slow, a few times."""
        self.store.plan = plan

    @precondition(lambda self: self.region is not None)
    @rule(place=_PLACES, length=_LENGTHS, way=st.sampled_from(["array", "memoryview", "pread", "write(2)"]))
    def read(self, place: int, length: int, way: str) -> None:
        """Reads a range of bytes in one of the ways there are."""
        region, expected = self._open()
        offset, length = self._range(place, length)
        if way == "pread" or (way == "write(2)" and not region.kernel_faults):
            with self._reads_may_fail():
                expected.check_shown(offset, region.pread(length, offset))
            return
        view = self._touchable()[offset : offset + length]
        try:
            if way == "array":
                expected.check_shown(offset, np.frombuffer(view, np.uint8).copy())
            elif way == "memoryview":
                expected.check_shown(offset, bytes(view))
            else:
                with tempfile.TemporaryFile(buffering=0) as file:
                    assert file.write(view) == length
                    file.seek(0)
                    expected.check_shown(offset, file.read())
        finally:
            view.release()

    @precondition(lambda self: self.region is not None and self.region.writable)
    @rule(
        place=_PLACES,
        length=_LENGTHS,
        value=_BYTES,
        way=st.sampled_from(
            ["array", "strided", "memoryview", "pwrite", "readinto", "readinto object", "read(2)", "itself"]
        ),
    )
    def write(self, place: int, length: int, value: int, way: str) -> None:
        """Writes a range of bytes in one of the ways there are."""
        region, expected = self._open()
        offset, length = self._range(place, length)
        data = ((np.arange(length) * 7 + value) % 251).astype(np.uint8).tobytes()
        by_call = ("pwrite", "readinto", "readinto object")
        if way in by_call or (way == "read(2)" and not region.kernel_faults):
            self._write_by_call(offset, data, way)
            return
        if way == "itself":
            # The source lies in the region too, and may be absent.
            source, length = self._range(place >> 7, length)
            data = expected.shown[source : source + length].tobytes()
            target = self._touchable()[source : source + length]
            try:
                self._write_by_call(min(offset, len(region) - length), target, way)
            finally:
                target.release()
            return
        view = self._touchable()[offset : offset + length]
        try:
            if way == "memoryview":
                view[:] = data
            elif way == "read(2)":
                with tempfile.TemporaryFile(buffering=0) as file:
                    file.write(data)
                    file.seek(0)
                    assert file.readinto(view) == length
            else:
                array = np.frombuffer(view, np.uint8)
                new = np.frombuffer(data, np.uint8)
                if way == "array":
                    array[:] = new
                else:
                    data = expected.shown[offset : offset + length].tobytes()
                    mixed = np.frombuffer(data, np.uint8).copy()
                    mixed[::977] = new[::977]
                    array[::977] = new[::977]
                    data = mixed.tobytes()
                del array
        finally:
            view.release()
        expected.write(offset, data)

    def _write_by_call(self, offset: int, data: bytes | memoryview, way: str) -> None:
        region, expected = self._open()
        plain = bytes(data) if isinstance(data, bytes) else None
        if plain is None:
            address = np.frombuffer(data, np.uint8).__array_interface__["data"][0] - region.address
            plain = expected.shown[address : address + len(data)].tobytes()
        # Whatever of it gets into the region, the store may be given.
        done = 0
        before = expected.shown.copy()
        try:
            with self._reads_may_fail():
                if way == "readinto":
                    with tempfile.TemporaryFile() as file:
                        file.write(plain)
                        file.seek(0)
                        done = region.readinto(file, offset, len(plain))
                elif way == "readinto object":
                    done = region.readinto(cast("IO[bytes]", io.BytesIO(plain)), offset, len(plain))
                else:
                    done = region.pwrite(data, offset)
        finally:
            if done != len(plain):
                done = self._how_much(offset, plain, before)
        expected.write(offset, plain[:done])

    def _how_much(self, offset: int, data: bytes, before: np.ndarray[Any, Any]) -> int:
        """How much of a write that failed is in the region: whole blocks from its beginning, no more."""
        region, _ = self._open()
        self._heal_all()
        found = np.frombuffer(region.pread(len(data), offset), np.uint8)
        new, old = np.frombuffer(data, np.uint8), before[offset : offset + len(data)]
        differs = np.flatnonzero(found != new)
        done = int(differs[0]) if len(differs) else len(data)
        if done < len(data):
            done = max(0, done - (offset + done) % region.block)
        assert np.array_equal(found[done:], old[done:]), "a write that failed left something behind"
        return done

    @precondition(lambda self: self.region is not None)
    @rule(place=_PLACES, length=_LENGTHS, whole=st.booleans())
    def flush(self, place: int, length: int, whole: bool) -> None:
        """After a flush that returned, the store has the bytes that were written."""
        region, expected = self._open()
        offset, length = (0, len(region)) if whole else self._range(place, length)
        due = whole and self._unreported() > 0 and region.mode == "r+"
        try:
            region.flush(offset, length)
        except StoreError:
            self._raised()
            expected.check_stored(self.stored())
            return
        assert not due, "a write-back failed, and the next flush did not say so"
        self.told_lately = self.told_lately and not whole
        expected.check_flushed(self.stored(), offset, length)

    @precondition(
        lambda self: self.region is not None and self.region.mode == "r+" and self.region.store is self.store
    )
    @rule(place=_PLACES, number=_ERRNO, what=st.sampled_from(["write", "sync"]))
    def refuse(self, place: int, number: int, what: Literal["write", "sync"]) -> None:
        """The store takes nothing any more, until it does again: every flush says so, and nothing is lost."""
        region, expected = self._open()
        offset, length = self._range(place, 8)
        # What is written must fit into memory beside what cannot leave it: one block.
        self._write_by_call(offset, bytes(length), "pwrite")
        self.store.plan = [fail(what, errno=number)]
        for _ in range(2):
            try:
                region.flush()
            except StoreError as error:
                told = error
                self._raised()
            else:
                raise AssertionError("a store that takes nothing was flushed")
            assert told.errno == number, told
            expected.check_shown(offset, region.pread(length, offset))
            expected.check_stored(self.stored())
        self.store.plan = ()

    @precondition(lambda self: self.region is not None and self.region.mode != "r")
    @rule(place=_PLACES, length=_LENGTHS)
    def unmap(self, place: int, length: int) -> None:
        """What a program may do to its own memory: pages are unmapped, and stay in memory.

        Raises OSError if the kernel refuses.
        """
        region, _ = self._open()
        offset, length = self._range(place, length)
        page = (2 << 20) if region.pages == "2MiB hugetlb" else mmap.PAGESIZE
        begin, end = offset // page * page, (offset + length) // page * page
        if begin < end and _libc.madvise(region.address + begin, end - begin, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")

    @precondition(lambda self: self.region is not None)
    @rule(place=_PLACES, length=_LENGTHS)
    def evict(self, place: int, length: int) -> None:
        """Writes back and releases a range of bytes; what cannot be written stays."""
        region, expected = self._open()
        offset, length = self._range(place, length)
        try:
            region.evict(offset, length)
        except StoreError:
            self._raised()
        expected.check_stored(self.stored())

    @precondition(lambda self: self.region is not None)
    @rule(ranges=st.lists(st.tuples(_PLACES, _LENGTHS), max_size=4), wait=st.booleans())
    def prefetch(self, ranges: list[tuple[int, int]], wait: bool) -> None:
        """Brings ranges in, or what the limit holds of them."""
        region, _ = self._open()
        with self._reads_may_fail():
            if wait and self._may_touch():
                region.prefetch([self._range(*each) for each in ranges], wait=True)
                return
            ticket = region.prefetch([self._range(*each) for each in ranges])
            # What fails behind our back would make a later touch SIGBUS.
            while not self._may_touch() and not ticket.done():
                time.sleep(0.001)
            if ticket.done():
                ticket.result()

    @precondition(lambda self: self.region is not None)
    @rule(advice=st.sampled_from(["normal", "sequential", "random"]), place=_PLACES, length=_LENGTHS)
    def advise(self, advice: Literal["normal", "sequential", "random"], place: int, length: int) -> None:
        """Says how a range of bytes will be touched."""
        region, _ = self._open()
        region.advise(advice, *self._range(place, length))

    @precondition(lambda self: self.region is not None and len(self.pins) < 3)
    @rule(place=_PLACES, length=_LENGTHS, write=st.booleans())
    def pin(self, place: int, length: int, write: bool) -> None:
        """Pins a range of bytes, unless the limit does not leave it."""
        region, _ = self._open()
        offset, length = self._range(place, length)
        self.pins.append(None)
        with self._reads_may_fail():
            try:
                pin = region.pin(offset, length, write=write and region.writable)
            except MemoryError:
                assert region.stats().pinned == self._pinned()
                return
            last = (pin.offset + pin.length - 1) // region.block
            self.pins[-1] = _Held(pin, pin.offset // region.block, last)

    @precondition(lambda self: self.pins)
    @rule(which=_BYTES)
    def unpin(self, which: int) -> None:
        """Lets a pin go."""
        held = self.pins.pop(which % len(self.pins))
        if held is not None:
            held.pin.release()

    @precondition(lambda self: self.region is not None)
    @rule(place=_PLACES, length=_LENGTHS)
    def heal(self, place: int, length: int) -> None:
        """Tries blocks again that were given up."""
        region, _ = self._open()
        with self._reads_may_fail():
            region.heal(*self._range(place, length))

    @rule(limit=st.sampled_from([1, 100_000, 300_000, 1 << 20, 1 << 30]))
    def limit(self, limit: int) -> None:
        """Changes the limit of the process, in bytes."""
        userfault.set_memory_limit(limit)

    @precondition(lambda self: self.region is not None)
    @rule()
    def close(self) -> None:
        """Closes the region; it refuses under arrays, and stays open with its data if it cannot write."""
        region, expected = self._open()
        if self.view is not None:
            try:
                region.close()
            except BufferError:
                assert not region.closed
            else:
                raise AssertionError("a region was closed under a memoryview")
        self._let_go()
        while not region.closed:
            due = self._unreported() > 0 and region.mode == "r+"
            try:
                region.close()
            except StoreError:
                self._raised()
                assert not region.closed
                expected.check_stored(self.stored())
                due = False
            assert not due, "a write-back failed, and close did not say so"
        expected.check_flushed(self.stored(), 0, expected.length)
        self.region = None

    # What always holds.

    def _pinned(self) -> int:
        region, _ = self._open()
        blocks = {block for held in filter(None, self.pins) for block in range(held.first, held.last + 1)}
        return len(blocks) * region.block

    @invariant()
    def pins_hold(self) -> None:
        """What is pinned is in memory, and counted."""
        if self.region is None:
            return
        for held in filter(None, self.pins):
            start = held.first * self.region.block
            stop = min((held.last + 1) * self.region.block, len(self.region))
            assert set(self.region.resident(start, stop - start)) == {1}
        assert self.region.stats().pinned == self._pinned()

    @invariant()
    def a_reader_writes_nothing(self) -> None:
        """What a region may not write stays as it was."""
        region = self.region
        # Large stores are looked at by the rules alone.
        if region is not None and region.mode in ("r", "c") and len(self.store) <= 1 << 20:
            self.expected.check_stored(self.stored())
