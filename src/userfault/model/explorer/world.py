"""What is explored: a machine set up in one way, with threads that have programs.

A scenario is a function that builds a fresh `World`, the same each time. The explorer calls it often: once
for every schedule that it tries. Everything that decides what happens must be inside: the kernel, the local
variables of the programs, and `books`, the scenario's own plain data (what a handler has written down, what
an invariant compares with). A program must not keep anything elsewhere, or two different states would look
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from userfault.model.kernel import Kernel

if TYPE_CHECKING:
    from userfault.model.explorer.invariant import Invariant
    from userfault.model.thread import Thread


@dataclass(slots=True)
class World:
    """A machine in some state.

    kernel    the machine; its threads have been given their programs
    books     plain data of the scenario's own: programs write it, invariants read it
    daemons   names of threads that may sleep when all is over (a handler that waits for the next message)
    places    names of addresses, for traces: {"A": 0x10000000}; each stands for the 4 KiB page there
    notes     what the step just taken changed, in words (the rules of the model say it)
    """

    kernel: Kernel
    books: Any = None
    daemons: frozenset[str] = frozenset()
    places: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def threads(self) -> list[Thread]:
        """Every thread, in the order they were made."""
        return self.kernel.threads

    def thread(self, name: str) -> Thread:
        """The thread of that name. Raises KeyError."""
        for thread in self.kernel.threads:
            if thread.name == name:
                return thread
        raise KeyError(name)

    def runnable(self) -> list[Thread]:
        """The threads that can take a step."""
        return [thread for thread in self.kernel.threads if thread.runnable]

    def step(self, thread: Thread) -> None:
        """Let one thread take its next step; `notes` then says what changed."""
        self.kernel.notes = self.notes = []
        thread.step()
        self.kernel.notes = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named situation: how to build it, what must hold, and a sentence that says what it is about.

    steps   no execution of it is longer than this many steps, unless it runs in circles
    """

    name: str
    about: str
    build: Callable[[], World]
    invariants: tuple[Invariant, ...]
    steps: int = 200


def begin(build: Callable[[], World]) -> World:
    """A fresh world whose threads stand before their first operation.

    What a program does before its first yield belongs to the set-up: it may look at its arguments, not at
    what others change. So the first step of each thread is taken here, in the order they were made.
    """
    world = build()
    for thread in world.threads:
        if thread.runnable and thread.next == "start":
            world.step(thread)
    return world
