"""A schedule that breaks an invariant, as a trace that a person can read and a machine can replay.

10  T1: acknowledge the event                      | uffd1: mmap_changing = 0
 ^  ^   ^                                            ^
 |  |   what it did                                  what that changed or returned
 |  who
 step
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from userfault import abi
from userfault.model.explorer.world import World, begin
from userfault.model.layout import PAGE
from userfault.model.scheduler import ending
from userfault.model.thread import Thread

_NUMBER = re.compile(r"0x[0-9a-f]+|\b\d{6,}\b")
_SLEPT = re.compile(r"^(sleep until|wait for) ")
_FAULT = re.compile(r"Pagefault\(flags=(?P<flags>\d+), address=(?P<address>\d+), ptid=\d+\)")


@dataclass(frozen=True, slots=True)
class Line:
    """One step of a trace: `who` did `what`; `changed` is what that changed and returned; `asleep` names the
    threads that could not take a step after it."""

    who: str
    what: str
    changed: tuple[str, ...]
    asleep: frozenset[str]

    def __str__(self) -> str:
        return f"{self.who}: {self.what}" + (f"  -> {'; '.join(self.changed)}" if self.changed else "")


@dataclass(frozen=True, slots=True)
class Counterexample:
    """How an invariant is broken.

    invariant   the name of what does not hold
    wrong       what is wrong, in the state that the schedule leads to
    schedule    thread ids, one a step, after the programs were started
    lap         None, or the length of the schedule's tail that can be repeated for ever
    build       builds the world to replay it in
    """

    invariant: str
    wrong: str
    schedule: tuple[int, ...]
    build: Callable[[], World]
    lap: int | None = None

    def replay(self) -> World:
        """The world in which the invariant is broken. Raises ValueError if the scenario has changed."""
        return replay(self.build, self.schedule)

    def lines(self) -> list[Line]:
        """The trace: one line a step."""
        return trace(self.build, self.schedule)

    def title(self) -> str:
        """What is broken and how, in a line."""
        return f"{self.invariant}: {self.wrong_in_words()}"

    def wrong_in_words(self) -> str:
        """What is wrong, with the scenario's names for addresses."""
        return readable(begin(self.build), self.wrong)

    def to_svg(self) -> str:
        """The trace as a sequence chart."""
        from userfault.model.explorer.chart import to_svg

        return to_svg(self)

    def to_html(self) -> str:
        """A page with the chart and the trace."""
        from userfault.model.explorer.chart import to_html

        return to_html(self)

    def __str__(self) -> str:
        lines = self.lines()
        loop_from = len(lines) - self.lap if self.lap else -1
        width = max((len(line.who) for line in lines), default=0)
        what_width = min(max((len(line.what) for line in lines), default=0), 70)
        text = [f"broken: {self.invariant}", f"here:   {self.wrong_in_words()}", ""]
        for number, line in enumerate(lines, 1):
            if number - 1 == loop_from:
                text.append("      from here on, for ever:")
            row = f"{number:4}  {line.who:{width}}  {line.what:{what_width}}"
            text.append((row + "  | " + "; ".join(line.changed)) if line.changed else row.rstrip())
        return "\n".join(text)


def step_or_raise(world: World, thread: Thread) -> str | None:
    """Take a step. A program's own mistake is a violation like others: what it raised, or None."""
    try:
        world.step(thread)
    except Exception as error:
        return f"raised {error!r}"
    return None


def replay(build: Callable[[], World], schedule: Iterable[int]) -> World:
    """Take the steps of a schedule in a fresh world. Raises ValueError if a thread cannot take its step."""
    world = begin(build)
    for number, tid in enumerate(schedule):
        step_or_raise(world, _thread(world, tid, number))
    return world


def trace(build: Callable[[], World], schedule: Sequence[int]) -> list[Line]:
    """Replay and write down every step."""
    world = begin(build)
    lines = []
    for number, tid in enumerate(schedule):
        thread = _thread(world, tid, number)
        what = readable(world, _what(thread))
        raised = step_or_raise(world, thread)
        changed = (*world.notes, *([raised] if raised else ending(thread)))
        asleep = frozenset(other.name for other in world.threads if other.asleep)
        lines.append(Line(thread.name, what, tuple(readable(world, change) for change in changed), asleep))
    return lines


def _thread(world: World, tid: int, number: int) -> Thread:
    for thread in world.threads:
        if thread.tid == tid and thread.runnable:
            return thread
    raise ValueError(f"thread {tid} cannot take step {number}")


def _what(thread: Thread) -> str:
    """The step in words. A step that ends a sleep is told from the sleep itself."""
    if isinstance(thread.next, str):
        return thread.next
    return _SLEPT.sub("goes on: ", thread.what)


def readable(world: World, text: str) -> str:
    """With the scenario's names in place of addresses, and messages in words."""

    def named(match: re.Match[str]) -> str:
        address = int(match.group(), 0)
        for name, start in world.places.items():
            if start <= address < start + PAGE:
                return name if address == start else f"{name}+{address - start:#x}"
        return hex(address) if address >= PAGE else match.group()

    return _NUMBER.sub(named, _FAULT.sub(_fault_in_words, text))


def _fault_in_words(match: re.Match[str]) -> str:
    flags = int(match["flags"])
    if flags & abi.UFFD_PAGEFAULT_FLAG_WP:
        kind = "write-protect fault"
    elif flags & abi.UFFD_PAGEFAULT_FLAG_MINOR:
        kind = "minor fault"
    else:
        kind = "missing fault"
    return f"{kind} ({'write' if flags & abi.UFFD_PAGEFAULT_FLAG_WRITE else 'read'}) at {match['address']}"
