"""`explore`: look for a schedule that breaks something."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from userfault.model.explorer.exhaustive import exhaust
from userfault.model.explorer.invariant import Invariant
from userfault.model.explorer.report import Exploration
from userfault.model.explorer.walks import Pct, RandomWalks, walk
from userfault.model.explorer.world import Scenario, World

STATES_AT_MOST: Final = 200_000

Strategy = RandomWalks | Pct | str


def explore(
    scenario: Scenario | Callable[[], World],
    invariants: Iterable[Invariant] | None = None,
    *,
    max_steps: int | None = None,
    strategy: Strategy = "exhaustive",
    max_states: int = STATES_AT_MOST,
) -> Exploration:
    """Run a scenario's interleavings and say whether an invariant can be broken.

    scenario     a Scenario, or a function that builds a fresh World
    invariants   what must hold; None: what the scenario says
    max_steps    bound on the length of an execution; None: what the scenario says
    strategy     "exhaustive": every interleaving, each state once; the counterexample is a shortest one.
                 "random", "random:WALKS", "random:WALKS:SEED", "pct", "pct:WALKS:DEPTH:SEED", or an object
                 RandomWalks or Pct: for scenarios that are too large to exhaust
    max_states   the exhaustive strategy gives up after so many states

    Raises ValueError for an unknown strategy.
    """
    if isinstance(scenario, Scenario):
        build = scenario.build
        invariants = scenario.invariants if invariants is None else invariants
        max_steps = scenario.steps if max_steps is None else max_steps
    else:
        build = scenario
    which = tuple(invariants or ())
    bound = 200 if max_steps is None else max_steps
    if isinstance(strategy, str):
        if strategy == "exhaustive":
            return exhaust(build, which, max_steps=bound, max_states=max_states)
        strategy = parse_strategy(strategy)
    return walk(build, which, strategy, max_steps=bound)


def parse_strategy(text: str) -> RandomWalks | Pct:
    """ "random:WALKS:SEED" or "pct:WALKS:DEPTH:SEED"; what is left out has its default. Raises ValueError."""
    kind, *numbers = text.split(":")
    try:
        values = [int(number) for number in numbers]
    except ValueError:
        values = [-1]
    if kind == "random" and len(values) <= 2 and min(values, default=0) >= 0:
        return RandomWalks(*values)
    if kind == "pct" and len(values) <= 3 and min(values, default=0) >= 0:
        return Pct(*values)
    raise ValueError(
        f"{text!r} is no strategy: exhaustive, random[:WALKS[:SEED]], pct[:WALKS[:DEPTH[:SEED]]]"
    )
