"""Mistakes of fault handlers, each with the mended handler beside it.

The explorer finds what each mistake leads to, and that the mended handler survives every interleaving. The
files are short: each holds both handlers and the situation that tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Final

from userfault.model.explorer import Scenario

NAMES: Final = (
    "forgets_eagain",
    "fills_late",
    "forgets_to_wake",
    "retries_while_readable",
    "closes_too_early",
    "serves_itself",
    "reads_into_served_memory",
    "trusts_the_order",
    "allocates_in_fork",
)


def story(name: str) -> ModuleType:
    """The module of a mistake: its text tells the story. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"no handler {name!r}; there are {', '.join(NAMES)}")
    return import_module(f"userfault.model.scenarios.handlers.{name}")


def scenario(name: str, mended: bool) -> Scenario:
    """The scenario of a mistake, with the mistaken or the mended handler. Raises ValueError for an unknown
    name."""
    make: Callable[[bool], Scenario] = story(name).scenario
    return make(mended)
