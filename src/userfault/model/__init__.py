"""The executable model: userfaultfd's rules in pure Python, checked against real kernels.

Begin with the package's README.md: where each rule is, the states, and how steps and schedules work.

    Kernel        the machine, of a version, perhaps with a defect
    Process       an address space, threads, descriptors; `process.run(...)` sets a scene
    SystemCalls   what a thread can do; programs are generator functions that take one
    Scheduler     decides who takes the next step, records and replays schedules
    fingerprint   tells states apart
    explore       runs a scenario's interleavings and finds the one that breaks an invariant
"""

from userfault.model.access import MemoryFault
from userfault.model.errnos import SystemCallError
from userfault.model.explorer import (
    Counterexample,
    Exploration,
    Invariant,
    Pct,
    RandomWalks,
    Scenario,
    World,
    always,
    at_the_end,
    explore,
    nobody_dies,
    nobody_hangs,
    nobody_spins,
)
from userfault.model.fingerprint import fingerprint
from userfault.model.kernel import Kernel
from userfault.model.process import Process
from userfault.model.scheduler import Scheduler, TraceLine
from userfault.model.step import Op, Sleep
from userfault.model.system_calls import SystemCalls
from userfault.model.thread import Deadlock, Thread
from userfault.model.userfaultfd import Scan, Userfaultfd

__all__ = [
    "Counterexample",
    "Deadlock",
    "Exploration",
    "Invariant",
    "Kernel",
    "MemoryFault",
    "Op",
    "Pct",
    "Process",
    "RandomWalks",
    "Scan",
    "Scenario",
    "Scheduler",
    "Sleep",
    "SystemCallError",
    "SystemCalls",
    "Thread",
    "TraceLine",
    "Userfaultfd",
    "World",
    "always",
    "at_the_end",
    "explore",
    "fingerprint",
    "nobody_dies",
    "nobody_hangs",
    "nobody_spins",
]
