"""What a region must show, and what its store may hold, kept beside them in plain arrays.

A store lags behind its region: the engine writes back when it likes. So two promises are checked. The region
shows exactly what was written last. And each byte of the store is one that the region held at some time since
the two were known to be equal; after a flush that returned it is the last one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Expectation"]

Bytes = NDArray[np.uint8]


class Expectation:
    """The bytes of a store and of one region over a part of it.

    `stored` are the bytes that the store holds now; `begin` and `length` say which of them the region shows,
    in bytes. `reaches_store` is False for a region whose writes are private.
    """

    def __init__(self, stored: bytes, begin: int, length: int, *, reaches_store: bool) -> None:
        self.begin = begin
        self.length = length
        self.reaches_store = reaches_store
        self._base = np.frombuffer(stored, np.uint8).copy()
        self.shown = self._base[begin : begin + length].copy()
        """What the region must show now, one element a byte."""
        self._written: list[tuple[int, Bytes]] = []

    def write(self, offset: int, data: bytes) -> None:
        """Notes that `data` was written at `offset` (bytes of the region)."""
        new = np.frombuffer(data, np.uint8)
        self.shown[offset : offset + len(new)] = new
        if self.reaches_store and len(new):
            self._written.append((self.begin + offset, new.copy()))

    def check_shown(self, offset: int, found: bytes | Bytes) -> None:
        """Raises AssertionError unless `found` is what the region must show at `offset` (bytes)."""
        found = np.frombuffer(found, np.uint8) if isinstance(found, bytes) else found
        _same("the region", found, self.shown[offset : offset + len(found)], offset)

    def check_stored(self, stored: bytes) -> None:
        """Raises AssertionError if the store holds a byte that the region never held."""
        found = np.frombuffer(stored, np.uint8)
        assert len(found) == len(self._base), "the store changed its length"
        possible = found == self._base
        for start, data in self._written:
            possible[start : start + len(data)] |= found[start : start + len(data)] == data
        if not possible.all():
            wrong = np.flatnonzero(~possible)
            raise AssertionError(
                f"the store holds {found[wrong[0]]:#04x} at byte {wrong[0]}, which was never written there "
                f"({len(wrong)} such bytes, the last at {wrong[-1]})"
            )

    def check_flushed(self, stored: bytes, offset: int, length: int) -> None:
        """Raises AssertionError unless `length` bytes of the region at `offset` have reached the store."""
        self.check_stored(stored)
        if self.reaches_store:
            found = np.frombuffer(stored, np.uint8)[self.begin + offset : self.begin + offset + length]
            _same("the store after a flush", found, self.shown[offset : offset + length], self.begin + offset)
            if (offset, length) == (0, self.length):
                self._base[self.begin : self.begin + self.length] = self.shown
                self._written.clear()


def _same(what: str, found: Bytes, expected: Bytes, offset: int) -> None:
    assert len(found) == len(expected), f"{what} has {len(found)} bytes of {len(expected)}"
    differ = np.flatnonzero(found != expected)
    if len(differ):
        first, last = int(differ[0]), int(differ[-1])
        raise AssertionError(
            f"{what} differs in {len(differ)} bytes from {offset + first} to {offset + last}: "
            f"{found[first]:#04x} where {expected[first]:#04x} was written"
        )
