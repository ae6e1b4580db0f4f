"""Beyond the bound of exhaustion: walks at random, and PCT.

random   each step by a thread drawn among those that can run
PCT      "probabilistic concurrency testing": threads get random priorities, the highest one runs, and at
         `depth - 1` random steps the running thread falls to the bottom. A defect that needs `depth` ordering
         constraints among n threads and k steps is found by one walk with a probability of at least
         1 / (n * k ** (depth - 1)), which beats drawing each step when executions are long.

A violation's schedule is shortened before it is given back: pieces are left out as long as the same invariant
still breaks. The numbers come from a seed; the same seed gives the same walks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from userfault.model.explorer.counterexample import Counterexample
from userfault.model.explorer.exhaustive import step_and_look
from userfault.model.explorer.invariant import Invariant
from userfault.model.explorer.report import Exploration
from userfault.model.explorer.world import World, begin
from userfault.model.thread import Thread


@dataclass(frozen=True, slots=True)
class RandomWalks:
    """`walks` executions, each step by a thread drawn at random."""

    walks: int = 1000
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.walks} random walks, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Pct:
    """`walks` executions by random priorities with `depth` - 1 places where they change."""

    walks: int = 1000
    depth: int = 3
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.walks} walks of PCT, depth {self.depth}, seed {self.seed}"


def walk(
    build: Callable[[], World],
    invariants: Sequence[Invariant],
    strategy: RandomWalks | Pct,
    *,
    max_steps: int,
) -> Exploration:
    """Walk until a violation is found or all walks are made. A walk ends after `max_steps` steps."""
    began = time.perf_counter()
    draw = random.Random(strategy.seed)
    found: Counterexample | None = None
    steps = longest = walks = 0
    while walks < strategy.walks and found is None:
        walks += 1
        choose = _choice(draw, strategy, max_steps)
        found, length = _one(build, invariants, choose, max_steps)
        steps += length
        longest = max(longest, length)
    if found is not None:
        found = shortened(found, invariants)
    return Exploration(
        strategy=str(strategy),
        found=found,
        exhausted=False,
        states=0,
        steps=steps,
        longest=longest,
        schedules=None,
        seconds=time.perf_counter() - began,
        walks=walks,
    )


def _choice(
    draw: random.Random, strategy: RandomWalks | Pct, max_steps: int
) -> Callable[[list[Thread]], Thread]:
    if isinstance(strategy, Pct):
        return _by_priority(draw, strategy, max_steps)
    return lambda runnable: draw.choice(runnable)


def _by_priority(draw: random.Random, strategy: Pct, max_steps: int) -> Callable[[list[Thread]], Thread]:
    priority: dict[int, float] = {}
    changes = sorted(draw.randrange(max_steps) for _ in range(strategy.depth - 1))
    at = 0

    def choose(runnable: list[Thread]) -> Thread:
        nonlocal at
        for thread in runnable:
            priority.setdefault(thread.tid, 1 + draw.random())
        chosen = max(runnable, key=lambda thread: priority[thread.tid])
        if changes and at >= changes[0]:
            changes.pop(0)
            priority[chosen.tid] = -at
            chosen = max(runnable, key=lambda thread: priority[thread.tid])
        at += 1
        return chosen

    return choose


def _one(
    build: Callable[[], World],
    invariants: Sequence[Invariant],
    choose: Callable[[list[Thread]], Thread],
    max_steps: int,
) -> tuple[Counterexample | None, int]:
    world = begin(build)
    schedule: list[int] = []
    while len(schedule) < max_steps:
        runnable = world.runnable()
        if not runnable:
            break
        thread = choose(runnable)
        schedule.append(thread.tid)
        wrong = step_and_look(world, thread, invariants)
        if wrong:
            return Counterexample(*wrong, tuple(schedule), build), len(schedule)
    return None, len(schedule)


def shortened(found: Counterexample, invariants: Sequence[Invariant]) -> Counterexample:
    """The same violation with fewer steps: pieces of the schedule are left out, big ones first.

    A thread that cannot take its step any more loses it. Ends when no single step can be left out.
    """
    size = max(len(found.schedule) // 2, 1)
    while True:
        at, shorter = 0, False
        while at < len(found.schedule):
            candidate = found.schedule[:at] + found.schedule[at + size :]
            attempt = _attempt(found, candidate, invariants)
            if attempt is not None:
                found, shorter = attempt, True
            else:
                at += size
        if size > 1:
            size //= 2
        elif not shorter:
            return found


def _attempt(
    found: Counterexample, schedule: Sequence[int], invariants: Sequence[Invariant]
) -> Counterexample | None:
    world = begin(found.build)
    taken: list[int] = []
    for tid in schedule:
        thread = next((thread for thread in world.threads if thread.tid == tid and thread.runnable), None)
        if thread is None:
            continue
        taken.append(tid)
        wrong = step_and_look(world, thread, invariants)
        if wrong:
            same = wrong[0] == found.invariant and len(taken) < len(found.schedule)
            return Counterexample(*wrong, tuple(taken), found.build) if same else None
    return None
