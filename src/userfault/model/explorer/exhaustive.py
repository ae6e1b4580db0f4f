"""Every interleaving up to a bound, each state once, shortest schedules first.

Two interleavings that lead to the same state have the same future, so a state that was met before is not
looked at again (`fingerprint`). That is what makes exhausting possible: the schedules of a scenario grow
exponentially with its length, its states much more slowly (see `docs/explanation/exploring.md` for figures).
Breadth first, so the first violation that is found is one with the fewest steps.

A state is its schedule: to take another branch, the schedule is replayed in a fresh world. The world in which
a state was first reached is kept for its first branch while there is room, so a step in a straight line costs
no replay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from userfault.model.explorer.counterexample import Counterexample, replay, step_or_raise
from userfault.model.explorer.invariant import Invariant, nobody_spins
from userfault.model.explorer.report import Exploration
from userfault.model.explorer.world import World, begin
from userfault.model.fingerprint import fingerprint
from userfault.model.thread import Thread

_LIVE_WORLDS_AT_MOST: Final = 3000
_RAISED: Final = "the programs raise nothing"


@dataclass(slots=True)
class _Graph:
    """The states met, by number, in the order they were met: 0 is the beginning."""

    numbers: dict[int, int] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    choice: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    edges: list[tuple[int, int, int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, print_: int, parent: int, choice: int, depth: int) -> tuple[int, bool]:
        known = self.numbers.get(print_)
        if known is not None:
            return known, False
        number = self.numbers[print_] = len(self.parent)
        self.parent.append(parent)
        self.choice.append(choice)
        self.depth.append(depth)
        return number, True

    def schedule(self, state: int) -> tuple[int, ...]:
        steps = []
        while state:
            steps.append(self.choice[state])
            state = self.parent[state]
        return tuple(reversed(steps))


def exhaust(
    build: Callable[[], World], invariants: Sequence[Invariant], *, max_steps: int, max_states: int
) -> Exploration:
    """Look at every state within `max_steps` steps; stops at the first violation, or at `max_states`."""
    began = time.perf_counter()
    graph = _Graph()
    world = begin(build)
    graph.add(_print(world), 0, 0, 0)
    wrong = broken(world, invariants)
    found = Counterexample(*wrong, (), build) if wrong else None
    live: dict[int, World] = {0: world}
    waiting = deque([0])
    complete = True
    while waiting and found is None:
        state = waiting.popleft()
        if graph.depth[state] >= max_steps or len(graph.parent) >= max_states:
            complete = False
            break
        found = _expand(build, graph, state, live, waiting, invariants)
    if found is None and complete and nobody_spins in invariants:
        found = _circle(build, graph)
    return Exploration(
        strategy="exhaustive",
        found=found,
        exhausted=complete and found is None,
        states=len(graph.parent),
        steps=len(graph.edges),
        longest=max(graph.depth),
        schedules=_schedules(graph) if complete and found is None else None,
        seconds=time.perf_counter() - began,
    )


def _print(world: World) -> int:
    return fingerprint(world.kernel, world.books)


def _expand(
    build: Callable[[], World],
    graph: _Graph,
    state: int,
    live: dict[int, World],
    waiting: deque[int],
    invariants: Sequence[Invariant],
) -> Counterexample | None:
    schedule = graph.schedule(state)
    world: World | None = live.pop(state, None) or replay(build, schedule)
    assert world is not None
    choices = [thread.tid for thread in world.runnable()]
    if not choices:
        graph.ends.append(state)
        return None
    for tid in choices:
        if world is None:
            world = replay(build, schedule)
        thread = next(thread for thread in world.threads if thread.tid == tid)
        wrong = step_and_look(world, thread, invariants)
        if wrong:
            return Counterexample(*wrong, (*schedule, tid), build)
        number, new = graph.add(_print(world), state, tid, graph.depth[state] + 1)
        graph.edges.append((state, number, tid))
        if new:
            waiting.append(number)
            if len(live) < _LIVE_WORLDS_AT_MOST:
                live[number] = world
        world = None
    return None


def step_and_look(world: World, thread: Thread, invariants: Sequence[Invariant]) -> tuple[str, str] | None:
    """Take a step; the invariant that it broke, by name, and what is wrong."""
    raised = step_or_raise(world, thread)
    return (_RAISED, f"{thread.name} {raised}") if raised else broken(world, invariants)


def broken(world: World, invariants: Sequence[Invariant]) -> tuple[str, str] | None:
    """The first invariant that does not hold: its name, and what is wrong."""
    at_end = not world.runnable()
    for invariant in invariants:
        if invariant.only_at_the_end and not at_end:
            continue
        wrong = invariant.check(world)
        if wrong is not None:
            return invariant.name, wrong
    return None


def _circle(build: Callable[[], World], graph: _Graph) -> Counterexample | None:
    """A state from which no schedule leads to an end: somebody runs in circles, whoever is let run."""
    before: dict[int, list[int]] = {}
    after: dict[int, list[tuple[int, int]]] = {}
    for source, target, tid in graph.edges:
        before.setdefault(target, []).append(source)
        after.setdefault(source, []).append((target, tid))
    good = set(graph.ends)
    waiting = list(good)
    while waiting:
        for source in before.get(waiting.pop(), ()):
            if source not in good:
                good.add(source)
                waiting.append(source)
    lost = next((state for state in range(len(graph.parent)) if state not in good), None)
    if lost is None:
        return None
    schedule, lap = _lap(lost, after)
    return Counterexample(
        nobody_spins.name,
        "no schedule leads to an end any more",
        (*graph.schedule(lost), *schedule),
        build,
        lap=lap,
    )


def _lap(lost: int, after: dict[int, list[tuple[int, int]]]) -> tuple[list[int], int]:
    """The shortest way from a lost state back to a state on that way: (choices, length of the circle)."""
    way: dict[int, tuple[int, int]] = {lost: (-1, -1)}
    waiting = deque([lost])
    while waiting:
        state = waiting.popleft()
        for target, tid in after[state]:
            path = _path(way, state)
            states = [step for step, _ in path]
            if target in states:
                choices = [choice for _, choice in path if choice >= 0] + [tid]
                return choices, len(states) - states.index(target)
            if target not in way:
                way[target] = (state, tid)
                waiting.append(target)
    raise AssertionError("a state without an end has a circle")


def _path(way: dict[int, tuple[int, int]], state: int) -> list[tuple[int, int]]:
    path = []
    while state != -1:
        before, choice = way[state]
        path.append((state, choice))
        state = before
    return path[::-1]


def _schedules(graph: _Graph) -> int | None:
    """How many schedules the states stand for; None: infinitely many (somebody can run in circles)."""
    incoming = [0] * len(graph.parent)
    after: dict[int, list[int]] = {}
    for source, target, _ in graph.edges:
        incoming[target] += 1
        after.setdefault(source, []).append(target)
    ways = [0] * len(graph.parent)
    ways[0] = 1
    ready = [0] if not incoming[0] else []
    done = 0
    while ready:
        state = ready.pop()
        done += 1
        for target in after.get(state, ()):
            ways[target] += ways[state]
            incoming[target] -= 1
            if not incoming[target]:
                ready.append(target)
    return sum(ways[end] for end in graph.ends) if done == len(ways) else None
