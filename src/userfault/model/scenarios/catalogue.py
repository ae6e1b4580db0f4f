"""Scenarios by name: those of the package, and those in a file of yours."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

from userfault.model.explorer import Scenario, World, nobody_dies, nobody_hangs
from userfault.model.scenarios import engine, handlers, history


def catalogue() -> Iterator[tuple[str, str]]:
    """(name, what it is about) of every scenario that comes with the package."""
    for name in history.NAMES:
        yield f"history/{name}", history.scenario(name, True).about
    for name in handlers.NAMES:
        yield f"handlers/{name}", handlers.scenario(name, False).about
    for name in engine.SITUATIONS:
        yield f"engine/{name}", engine.scenario(name).about


def find(name: str, *, mended: bool = False, wrong: tuple[str, ...] = ()) -> Scenario:
    """A scenario by its name, or from a file.

    mended  of history/... and handlers/...: the mended twin
    wrong   of engine/...: the rules that are got wrong

    A file defines `scenario`, a Scenario, or `build`, a function that returns a World; then `invariants`
    may be a tuple, and without it nobody may hang or die. Raises ValueError or OSError if there is no such
    thing.
    """
    group, _, rest = name.partition("/")
    if group == "history" and rest in history.NAMES:
        return history.scenario(rest, not mended)
    if group == "handlers" and rest in handlers.NAMES:
        return handlers.scenario(rest, mended)
    if group == "engine" and rest in engine.SITUATIONS:
        unknown = [rule for rule in wrong if rule not in engine.RULES]
        if unknown:
            raise ValueError(f"no rule {unknown[0]!r}; there are {', '.join(engine.RULES)}")
        return engine.scenario(rest, wrong)
    path = Path(name)
    if path.suffix == ".py":
        return _from_file(path)
    raise ValueError(f"no scenario {name!r}: `userfault model scenarios` lists them, or give a file NAME.py")


def _from_file(path: Path) -> Scenario:
    found = runpy.run_path(str(path))
    scenario = found.get("scenario")
    if isinstance(scenario, Scenario):
        return scenario
    build: Callable[[], World] | None = found.get("build")
    if not callable(build):
        raise ValueError(f"{path} defines neither scenario nor build()")
    about = (build.__doc__ or path.name).strip().splitlines()[0].rstrip(".")
    invariants = tuple(found.get("invariants", (nobody_dies, nobody_hangs)))
    return Scenario(path.stem, about, build, invariants)
