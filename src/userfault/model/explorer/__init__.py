"""The explorer: does a protocol survive every interleaving?

    scenario    builds a fresh World: a machine, threads with programs, and books of the scenario's own
    invariant   what must hold after every step, or at the end
    explore     runs the interleavings: all of them, each state once (`exhaustive.py`), or walks (`walks.py`)
    result      an Exploration: exhausted, or a Counterexample: a shortest schedule, as a trace
                (`counterexample.py`) or a sequence chart (`chart.py`)

Scenarios that come with the package are in `userfault.model.scenarios`.
"""

from userfault.model.explorer.counterexample import Counterexample, Line
from userfault.model.explorer.explore import explore
from userfault.model.explorer.invariant import (
    Invariant,
    always,
    at_the_end,
    nobody_dies,
    nobody_hangs,
    nobody_spins,
)
from userfault.model.explorer.report import Exploration
from userfault.model.explorer.walks import Pct, RandomWalks
from userfault.model.explorer.world import Scenario, World

__all__ = [
    "Counterexample",
    "Exploration",
    "Invariant",
    "Line",
    "Pct",
    "RandomWalks",
    "Scenario",
    "World",
    "always",
    "at_the_end",
    "explore",
    "nobody_dies",
    "nobody_hangs",
    "nobody_spins",
]
