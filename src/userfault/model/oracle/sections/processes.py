"""Child processes of a probe."""

from __future__ import annotations

from typing import Any

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
