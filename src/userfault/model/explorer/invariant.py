"""What must hold: after every step, or when nothing can run any more.

An invariant is a function of the world that says what is wrong in a sentence, or returns None.

    @always("a fill is accepted only when every event was read")
    def no_fill_inside_a_change(world): ...

    @at_the_end("every write reached the store")
    def nothing_lost(world): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from userfault.model.explorer.world import World

Check = Callable[[World], str | None]


@dataclass(frozen=True, slots=True)
class Invariant:
    """A name (what must hold, as a sentence), a check, and whether it is for every state or for ends only."""

    name: str
    check: Check
    only_at_the_end: bool = False


def always(name: str) -> Callable[[Check], Invariant]:
    """Must hold after every step. The check may look at `world.notes`, what that step changed."""
    return lambda check: Invariant(name, check)


def at_the_end(name: str) -> Callable[[Check], Invariant]:
    """Must hold whenever no thread can take a step."""
    return lambda check: Invariant(name, check, only_at_the_end=True)


@at_the_end("nobody sleeps for ever")
def nobody_hangs(world: World) -> str | None:
    """Every thread that is not a daemon has finished."""
    for thread in world.threads:
        if not thread.done and thread.name not in world.daemons:
            return f"{thread.name} cannot go on: {thread.what}"
    return None


@always("no thread dies of a signal or of an error it did not expect")
def nobody_dies(world: World) -> str | None:
    """No thread ended by a MemoryFault or an uncaught SystemCallError."""
    for thread in world.threads:
        if thread.fault is not None or thread.error is not None:
            return f"{thread.name}: {thread.fault or thread.error}"
    return None


def _never(_world: World) -> str | None:
    return None


nobody_spins: Final = Invariant("from every state there is a way to an end", _never)
"""Nobody runs in circles for ever. It is a property of the whole graph of states, so only the exhaustive
strategy can refute it for certain; a walk that does not end within its bound is reported as such."""
