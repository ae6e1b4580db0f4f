"""Child processes of a probe, and the number that a message has in the interface."""

from __future__ import annotations

from typing import Any

from userfault import abi
from userfault.model.fork import fork
from userfault.model.oracle.probe import Probe
from userfault.model.process import Process
from userfault.model.step import Op, Sleep
from userfault.model.thread import Thread


class Pause(Sleep):
    """pause(2): sleeps until a signal."""

    interruptible = True

    def ready(self) -> bool:
        return False

    @property
    def what(self) -> str:
        return "pause"


def pause(thread: Thread) -> Op[Any]:
    """A child that only waits to be killed."""
    yield Pause()


def fork_idle(p: Probe) -> Process:
    """fork(), and the child pauses."""
    return p.call(fork(p.caller, pause))


def event_number(message: abi.Message) -> int:
    """UFFD_EVENT_..."""
    kinds = {abi.Pagefault: 0x12, abi.Fork: 0x13, abi.Remap: 0x14, abi.Remove: 0x15, abi.Unmap: 0x16}
    return kinds[type(message)]
