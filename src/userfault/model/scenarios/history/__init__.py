"""The defects that the kernel had, or was spared, each as a scenario.

With the defect switched on, the explorer finds a schedule that breaks an invariant. With it off there is
none: every interleaving was looked at. The texts of the files tell each story; `DEFECTS` names the commits.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Final

from userfault.model.defects import DEFECTS
from userfault.model.explorer import Scenario

NAMES: Final = tuple(DEFECTS)
"""The defects, in the order of the history."""


def story(name: str) -> ModuleType:
    """The module of a defect: its text tells the story. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no defect {name!r}; there are {', '.join(NAMES)}")
    return import_module(f"userfault.model.scenarios.history.{name}")


def scenario(name: str, defective: bool) -> Scenario:
    """The scenario of a defect, with the defect on or off. Raises ValueError for an unknown name."""
    make: Callable[[bool], Scenario] = story(name).scenario
    return make(defective)
