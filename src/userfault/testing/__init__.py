"""Things for tests of programs that use userfault, and of userfault itself."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userfault.testing.faulty_store import Fault, FaultyStore, delay, fail, hang, shorten
    from userfault.testing.rehearsals import Rehearsal, rehearsal
    from userfault.testing.simulation import SimulatedProcess, simulated_process

__all__ = [
    "Fault",
    "FaultyStore",
    "Rehearsal",
    "SimulatedProcess",
    "delay",
    "fail",
    "hang",
    "rehearsal",
    "shorten",
    "simulated_process",
]

_REHEARSAL = ("Rehearsal", "rehearsal")
_SIMULATION = ("SimulatedProcess", "simulated_process")


def __getattr__(name: str) -> object:
    # Late, so that what needs no compiled part (control groups, huge pages) works without it.
    if name in _REHEARSAL:
        return getattr(import_module("userfault.testing.rehearsals"), name)
    if name in _SIMULATION:
        return getattr(import_module("userfault.testing.simulation"), name)
    if name in __all__:
        return getattr(import_module("userfault.testing.faulty_store"), name)
    raise AttributeError(f"module 'userfault.testing' has no attribute {name!r}")
