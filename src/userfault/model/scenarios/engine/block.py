"""The life of a block, as the engine has it in `crates/engine/src/block.rs`: pure functions, the same tables.

    Absent --fault--> Filling --> Resident --evict--> Evicting --> Resting --evict--> Evicting --> Absent
                                     ^                                |
                                     +------------- minor fault ------+

Filling, Evicting, Cleaning, Writing and Poisoning have one owner; a fault on such a block waits (but for a
first write during a write-back), and only the owner maps it and wakes. A test compares these tables with the
Rust source.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final


class State(enum.Enum):
    """Where a block is, or what its owner is doing to it."""

    ABSENT = "Absent"
    RESIDENT = "Resident"
    RESTING = "Resting"
    POISONED = "Poisoned"
    FILLING = "Filling"
    EVICTING = "Evicting"
    CLEANING = "Cleaning"
    WRITING = "Writing"
    POISONING = "Poisoning"

    @property
    def exclusive(self) -> bool:
        """Somebody owns the block."""
        return self in _EXCLUSIVE


_EXCLUSIVE: Final = frozenset((State.FILLING, State.EVICTING, State.CLEANING, State.WRITING, State.POISONING))


class Purpose(enum.Enum):
    """Why somebody wants to own a block."""

    FILL = "Fill"
    MAP = "Map"
    REFILL = "Refill"
    EVICT = "Evict"
    CLEAN = "Clean"
    WRITE = "Write"
    HEAL = "Heal"


CLAIMS: Final = {
    (Purpose.FILL, State.ABSENT): State.FILLING,
    (Purpose.MAP, State.RESTING): State.FILLING,
    (Purpose.REFILL, State.RESIDENT): State.FILLING,
    (Purpose.HEAL, State.POISONED): State.FILLING,
    (Purpose.EVICT, State.RESIDENT): State.EVICTING,
    (Purpose.EVICT, State.RESTING): State.EVICTING,
    (Purpose.CLEAN, State.RESIDENT): State.CLEANING,
    (Purpose.CLEAN, State.RESTING): State.CLEANING,
    (Purpose.WRITE, State.ABSENT): State.WRITING,
    (Purpose.WRITE, State.RESIDENT): State.WRITING,
    (Purpose.WRITE, State.RESTING): State.WRITING,
}
"""The exclusive state that a purpose leads to; what is not here does not apply."""


class Fault(enum.Enum):
    """What the kernel reported."""

    MISSING = "Missing"
    MINOR = "Minor"
    WRITE_PROTECT = "WriteProtect"


class Answer(enum.Enum):
    """What a fault asks of the engine."""

    WAIT = "Wait"
    FILL = "Fill"
    MAP = "Map"
    MAP_DIRTY = "MapDirty"
    REFILL = "Refill"
    POISON = "Poison"
    WAKE = "Wake"
    UNPROTECT = "Unprotect"


def answer(state: State, fault: Fault, present: Callable[[], bool]) -> Answer:
    """Answers a fault. `present`: the page is mapped now; asked only where it matters."""
    if state is State.CLEANING and fault is Fault.WRITE_PROTECT:
        return Answer.UNPROTECT
    if state.exclusive:
        return Answer.WAIT
    if state is not State.RESIDENT:
        return {
            State.ABSENT: Answer.FILL,
            State.POISONED: Answer.POISON,
            State.RESTING: Answer.MAP,
        }[state]
    if fault is Fault.WRITE_PROTECT:
        return Answer.UNPROTECT
    if present():
        return Answer.WAKE
    return Answer.MAP_DIRTY if fault is Fault.MINOR else Answer.REFILL
