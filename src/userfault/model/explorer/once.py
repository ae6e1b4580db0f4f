"""One execution of a scenario, to look at."""

from __future__ import annotations

import random

from userfault.model.explorer.counterexample import Counterexample, trace
from userfault.model.explorer.exhaustive import step_and_look
from userfault.model.explorer.world import Scenario, begin


def run_once(scenario: Scenario, seed: int | None = None) -> tuple[str, bool]:
    """Run a scenario once and return its trace as text, and whether all invariants held.

    seed None: the threads take turns. It stops at the first violation, or after `scenario.steps` steps.
    """
    draw = random.Random(seed)
    world = begin(scenario.build)
    schedule: list[int] = []
    while len(schedule) < scenario.steps:
        runnable = world.runnable()
        if not runnable:
            break
        thread = runnable[len(schedule) % len(runnable)] if seed is None else draw.choice(runnable)
        schedule.append(thread.tid)
        wrong = step_and_look(world, thread, scenario.invariants)
        if wrong:
            return str(Counterexample(*wrong, tuple(schedule), scenario.build)), False
    lines = [f"{number:4}  {line}" for number, line in enumerate(trace(scenario.build, schedule), 1)]
    ended = "nothing can run any more" if not world.runnable() else f"stopped after {len(schedule)} steps"
    return "\n".join([*lines, ended]), True
