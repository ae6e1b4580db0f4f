"""A thread: runs one operation after another, one step at a time.

    new --start--> runnable <-> asleep --> done (result, or the signal that killed it)

`next` is what the thread yielded last: the label of its next step, or what it sleeps on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from userfault.model.access import Killed, MemoryFault
from userfault.model.errnos import SystemCallError
from userfault.model.step import Op, Sleep

if TYPE_CHECKING:
    from userfault.model.process import Process

T = TypeVar("T")


class Deadlock(Exception):
    """An operation that had to finish sleeps, and nothing that can run would wake it."""


class Thread:
    """A thread of a process.

    result   what the operation returned
    fault    the MemoryFault that it died of (a signal nobody handled)
    error    the SystemCallError it did not catch
    """

    __slots__ = (
        "error",
        "fault",
        "handlers",
        "killed",
        "name",
        "next",
        "process",
        "program",
        "result",
        "signals",
        "tid",
    )

    def __init__(self, process: Process, tid: int, name: str) -> None:
        self.process = process
        self.tid = tid
        self.name = name
        self.program: Generator[str | Sleep, None, Any] | None = None
        self.next: str | Sleep = "not started"
        self.result: Any = None
        self.fault: MemoryFault | None = None
        self.error: SystemCallError | None = None
        self.signals: list[str] = []  # pending ones, each with a handler
        self.handlers: dict[str, Callable[[], None]] = {}
        self.killed = False

    @property
    def done(self) -> bool:
        """It has nothing to do: finished, dead, or not started."""
        return self.program is None

    @property
    def asleep(self) -> bool:
        """It waits for something that has not happened."""
        return self.program is not None and not self.runnable

    @property
    def runnable(self) -> bool:
        """It can take a step now."""
        if self.program is None:
            return False
        sleep = self.next
        if isinstance(sleep, str):
            return True
        return (
            sleep.ready() or (self.killed and sleep.killable) or (bool(self.signals) and sleep.interruptible)
        )

    @property
    def state(self) -> str:
        """The letter /proc shows: R, S (sleeping) or D (waiting without listening to signals)."""
        if self.program is None or self.runnable or isinstance(self.next, str):
            return "R"
        return self.next.state

    @property
    def what(self) -> str:
        """The next step, or what it sleeps on, in words."""
        return self.next if isinstance(self.next, str) else self.next.what

    def start(self, operation: Op[Any]) -> Thread:
        """Give the thread something to do; it takes no step yet. Returns the thread."""
        assert self.program is None, f"{self.name} is busy"
        self.result = self.fault = self.error = None
        self.program = operation
        self.next = "start"
        return self

    def step(self) -> None:
        """Run to the next yield, or to the end."""
        assert self.program is not None
        try:
            self.next = next(self.program)
        except StopIteration as stop:
            self.result = stop.value
            self._end()
        except MemoryFault as fault:
            self.fault = fault
            self._end()
        except SystemCallError as error:
            self.error = error
            self._end()
        except Killed:
            self._end()

    def _end(self) -> None:
        self.program = None
        self.next = "finished"

    def abandon(self) -> None:
        """Forget what it was doing, as if it had never begun."""
        self._end()

    def signal(self, name: str) -> None:
        """Send a signal that has a handler (pthread_kill)."""
        self.signals.append(name)

    def kill(self) -> None:
        """Send a signal that ends the thread as soon as it may be ended."""
        self.killed = True

    def handle_signals(self) -> None:
        """Run the handlers of pending signals (on the way back to user space)."""
        while self.signals:
            handler = self.handlers.get(self.signals.pop(0))
            if handler is not None:
                handler()

    def call(self, operation: Op[T]) -> T:
        """Run an operation on this thread to its end, with no other thread in between.

        Raises Deadlock if it has to sleep: use the scheduler then. For setting a scene, and for the quick
        operations of a test that drives everything itself.
        """
        while True:
            try:
                waits = next(operation)
            except StopIteration as stop:
                result: T = stop.value
                return result
            if isinstance(waits, Sleep) and not waits.ready():
                operation.close()
                raise Deadlock(f"{self.name} would {waits.what}")

    def __repr__(self) -> str:
        return f"Thread({self.name}: {self.what})"
