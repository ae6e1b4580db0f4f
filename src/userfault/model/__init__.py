"""The executable model: userfaultfd's rules in pure Python, checked against real kernels.

Begin with the package's README.md: where each rule is, the states, and how steps and schedules work.

    Kernel        the machine, of a version, perhaps with a defect
    Process       an address space, threads, descriptors; `process.run(...)` sets a scene
    SystemCalls   what a thread can do; programs are generator functions that take one
    Scheduler     decides who takes the next step, records and replays schedules
    fingerprint   tells states apart
"""

from userfault.model.access import MemoryFault
from userfault.model.errnos import SystemCallError
from userfault.model.fingerprint import fingerprint
from userfault.model.kernel import Kernel
from userfault.model.process import Process
from userfault.model.scheduler import Scheduler, TraceLine
from userfault.model.step import Op, Sleep
from userfault.model.system_calls import SystemCalls
from userfault.model.thread import Deadlock, Thread

__all__ = [
    "Deadlock",
    "Kernel",
    "MemoryFault",
    "Op",
    "Process",
    "Scheduler",
    "Sleep",
    "SystemCallError",
    "SystemCalls",
    "Thread",
    "TraceLine",
    "fingerprint",
]
