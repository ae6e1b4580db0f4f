"""A store that fails, delays, shortens and hangs calls by plan, for tests of what a program does then.

    store = FaultyStore(FileStore("data.bin"), [fail("read", offset=1 << 20, length=4096, count=1)])
    region = userfault.open(store)

A call passes the plan's faults in their order. Delays add up; the first fault of another kind that catches
the call decides. A fault that is spent (`count`) catches nothing more.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from userfault import _native

__all__ = ["Call", "CallName", "Fault", "FaultyStore", "delay", "fail", "hang", "shorten"]

CallName: TypeAlias = Literal["read", "write", "punch", "sync"]
"""The kinds of calls that the engine makes on a store."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of a plan; made by fail(), delay(), shorten() and hang()."""

    call: CallName
    """The kind of call that is caught."""
    action: Literal["fail", "delay", "shorten", "hang"]
    """What happens to it."""
    offset: int = 0
    """Where the bytes of the store begin that a call must touch to be caught."""
    length: int | None = None
    """How many bytes these are; None: to the end. A sync touches every byte."""
    skip: int = 0
    """So many calls are let through first."""
    count: int | None = None
    """So many calls are caught; None: all."""
    errno: int = errnos.EIO
    """What fail and shorten answer."""
    seconds: float = 0.0
    """How long delay takes."""
    nbytes: int | None = None
    """How many bytes shorten reads or writes before its error; None: half."""

    def _line(self) -> tuple[str, str, int, float, int | None, int, int | None, int, int | None]:
        end = None if self.length is None else self.offset + self.length
        return (
            self.call,
            self.action,
            self.errno,
            self.seconds,
            self.nbytes,
            self.offset,
            end,
            self.skip,
            self.count,
        )


@dataclass(frozen=True)
class Call:
    """A call that came back."""

    name: str
    """read, write, punch or sync."""
    offset: int
    """Its first byte in the store."""
    length: int
    """How many bytes it was for."""
    errno: int
    """0 if it succeeded."""


def fail(
    call: CallName,
    *,
    errno: int = errnos.EIO,
    offset: int = 0,
    length: int | None = None,
    skip: int = 0,
    count: int | None = None,
) -> Fault:
    """The call fails with `errno` and does nothing. Offset and length are bytes of the store."""
    return Fault(call=call, action="fail", errno=errno, offset=offset, length=length, skip=skip, count=count)


def delay(
    call: CallName,
    seconds: float,
    *,
    offset: int = 0,
    length: int | None = None,
    skip: int = 0,
    count: int | None = None,
) -> Fault:
    """The call takes so many seconds longer. Offset and length are bytes of the store."""
    return Fault(
        call=call, action="delay", seconds=seconds, offset=offset, length=length, skip=skip, count=count
    )


def shorten(
    call: CallName,
    nbytes: int | None = None,
    *,
    errno: int = errnos.EIO,
    offset: int = 0,
    length: int | None = None,
    skip: int = 0,
    count: int | None = None,
) -> Fault:
    """Only the first `nbytes` bytes (None: half) are read or written; then the call fails with `errno`."""
    return Fault(
        call=call,
        action="shorten",
        nbytes=nbytes,
        errno=errno,
        offset=offset,
        length=length,
        skip=skip,
        count=count,
    )


def hang(
    call: CallName, *, offset: int = 0, length: int | None = None, skip: int = 0, count: int | None = None
) -> Fault:
    """The call does not come back until FaultyStore.release(); then it does what it was asked.

    Offset and length are bytes of the store.
    """
    return Fault(call=call, action="hang", offset=offset, length=length, skip=skip, count=count)


class FaultyStore(_native.FaultyStore):
    """Wraps `store` and spoils its calls by `plan`, a sequence of faults.

    Its name, length and lock are those of the store that it wraps. A region on it counts as a region on that
    store: there can be one writer.
    """

    def __new__(cls, store: _native.Store, plan: Sequence[Fault] = ()) -> FaultyStore:
        self = super().__new__(cls, store, [fault._line() for fault in plan])
        assert isinstance(self, FaultyStore)
        return self

    def __init__(self, store: _native.Store, plan: Sequence[Fault] = ()) -> None:
        self._store = store
        self._plan = tuple(plan)

    @property
    def store(self) -> _native.Store:
        """The store that is wrapped."""
        return self._store

    @property
    def plan(self) -> tuple[Fault, ...]:
        """The faults as they were set. Setting it starts all counts anew; calls that hang go on hanging."""
        return self._plan

    @plan.setter
    def plan(self, plan: Sequence[Fault]) -> None:
        self.set_plan([fault._line() for fault in plan])
        self._plan = tuple(plan)

    def calls(self, name: CallName | None = None) -> list[Call]:
        """The calls that came back so far, oldest first (the last 65,536); with `name`, those of one kind."""
        return [Call(*call) for call in self.finished_calls() if name is None or call[0] == name]

    def __repr__(self) -> str:
        faults = ", ".join(
            f"{fault.action} {fault.call}"
            + (f" {os.strerror(fault.errno)}" if fault.action == "fail" else "")
            for fault in self._plan
        )
        return f"<FaultyStore over {self._store!r}: {faults or 'no faults'}>"
