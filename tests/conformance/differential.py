"""Small programs that run on any conformance backend, so that two of them can be compared step by step.

    from conformance.differential import Program, run
    from conformance.model import ModelBackend
    for line in run(ModelBackend(), Program("anon", 1, 0, [("store", 0, 1), ("copy", 1, 1, 0)])):
        print(line)

A program has four pages of memory, two threads that touch them, and a userfaultfd. After every step
everything that can be seen is written down: what the call answered, which messages came, which thread ended
with what, and what pagemap says of each page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from conformance.backend import MADV_DONTNEED, MADV_REMOVE, Area, Backend, Kind, Process
from userfault.abi import Pagefault

PAGES = 4
THREADS = 2
PATIENCE = 0.5
"""Seconds that a kernel has to come to what is expected of it."""
MOMENT = 0.003
"""Seconds after which a kernel that is as expected is looked at once more."""

Step = tuple[Any, ...]


class Program(NamedTuple):
    """kind of memory, mode of its registration, features of the handshake, steps as (name, numbers...)."""

    kind: str
    mode: int
    features: int
    steps: Sequence[Step]


class Machine:
    """A program under way on a backend."""

    def __init__(self, backend: Backend, program: Program) -> None:
        self.process: Process = backend.process()
        self.area: Area = self.process.area(Kind(program.kind), PAGES)
        self.uffd = self.process.userfaultfd(program.features)
        self.registered = self.uffd.register(self.area.start, self.area.length, program.mode)
        self.threads = [self.process.thread() for _ in range(THREADS)]
        self.running: dict[int, Any] = {}
        self.ended: list[Any] = []
        self.read: list[Any] = []

    def at(self, page: int) -> int:
        return self.area.start + page * self.area.page

    def do(self, step: Step) -> Any:
        """Take a step; what it answered, or None for what only begins."""
        name, *numbers = step
        operation: Callable[..., Any] = getattr(self, f"_{name}")
        return operation(*numbers)

    def _load(self, thread: int, page: int) -> str | None:
        if thread in self.running:
            return "busy"
        self.running[thread] = self.threads[thread].load(self.at(page) + 7)
        return None

    def _store(self, thread: int, page: int, value: int) -> str | None:
        if thread in self.running:
            return "busy"
        self.running[thread] = self.threads[thread].store(self.at(page) + 7, value)
        return None

    def _copy(self, page: int, count: int, value: int, mode: int) -> Any:
        return self.uffd.copy(self.at(page), bytes((value,)) * self.area.page * count, mode=mode)

    def _zeropage(self, page: int, count: int, mode: int) -> Any:
        return self.uffd.zeropage(self.at(page), count * self.area.page, mode)

    def _continue(self, page: int, count: int, mode: int) -> Any:
        return self.uffd.continue_(self.at(page), count * self.area.page, mode)

    def _poison(self, page: int, count: int) -> Any:
        return self.uffd.poison(self.at(page), count * self.area.page)

    def _move(self, to: int, from_: int, mode: int) -> Any:
        return self.uffd.move(self.at(to), self.at(from_), self.area.page, mode)

    def _writeprotect(self, page: int, count: int, mode: int) -> Any:
        return self.uffd.writeprotect(self.at(page), count * self.area.page, mode)

    def _wake(self, page: int, count: int) -> Any:
        return self.uffd.wake(self.at(page), count * self.area.page)

    def _register(self, page: int, count: int, mode: int) -> Any:
        return self.uffd.register(self.at(page), count * self.area.page, mode)

    def _unregister(self, page: int, count: int) -> Any:
        return self.uffd.unregister(self.at(page), count * self.area.page)

    def _dontneed(self, page: int, count: int) -> Any:
        return self.process.main.madvise(self.at(page), count * self.area.page, MADV_DONTNEED).result()

    def _remove(self, page: int, count: int) -> Any:
        return self.process.main.madvise(self.at(page), count * self.area.page, MADV_REMOVE).result()

    def _protect(self, page: int, count: int, protection: int) -> Any:
        return self.process.main.mprotect(self.at(page), count * self.area.page, protection).result()

    def look(self) -> None:
        """See who has ended, and read what messages there are."""
        for thread, running in list(self.running.items()):
            if running.finished():
                del self.running[thread]
                access = running.result()
                self.ended.append((thread, access.signal, access.value))
        for message in self.uffd.read_messages():
            assert isinstance(message, Pagefault)
            self.read.append((message.flags, (message.address - self.area.start) // self.area.page))

    def seen(self) -> tuple[Any, ...]:
        """Everything since the step began; threads and messages in no order, for they race."""
        entries = [tuple(self.process.entry(self.at(page))) for page in range(PAGES)]
        return sorted(self.ended, key=repr), sorted(self.read), entries


class Line(NamedTuple):
    """What was seen after one step."""

    step: Step
    answer: Any
    ended: list[Any]
    messages: list[Any]
    entries: list[tuple[bool, bool, bool]]


def run(backend: Backend, program: Program, expected: Sequence[Line] = ()) -> Iterator[Line]:
    """Run a program. `expected`: what another backend saw; a real kernel gets a moment to come to it."""
    machine = Machine(backend, program)
    for number, step in enumerate([("begin",), *program.steps]):
        machine.ended, machine.read = [], []
        answer = machine.registered if number == 0 else machine.do(step)
        goal = expected[number] if number < len(expected) else None
        _come_to(machine, goal)
        ended, messages, entries = machine.seen()
        yield Line(step, None if answer is None else _plain(answer), ended, messages, entries)


def _plain(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, tuple) else answer


def _come_to(machine: Machine, goal: Line | None) -> None:
    machine.look()
    if goal is None:
        return
    deadline = time.monotonic() + PATIENCE
    wanted = (goal.ended, goal.messages)
    while machine.seen()[:2] != wanted and time.monotonic() < deadline:
        time.sleep(0.0005)
        machine.look()
    time.sleep(MOMENT)
    machine.look()


def difference(model: Sequence[Line], kernel: Sequence[Line]) -> str | None:
    """The first step after which two backends differ, in words; None: they agree."""
    for number, (ours, theirs) in enumerate(zip(model, kernel, strict=True)):
        if ours != theirs:
            fields = [
                f"    {name}: model {mine!r}, kernel {other!r}"
                for name, mine, other in zip(Line._fields, ours, theirs, strict=True)
                if mine != other
            ]
            return "\n".join([f"after step {number}, {ours.step!r}:", *fields])
    return None


def as_script(program: Program) -> str:
    """The program as a script that runs on either backend."""
    return "\n".join(
        [
            "from conformance.differential import Program, run",
            "from conformance.model import ModelBackend",
            "",
            "program = Program(",
            f"    {program.kind!r}, {program.mode}, {program.features:#x},",
            "    [",
            *(f"        {step!r}," for step in program.steps),
            "    ],",
            ")",
            "for line in run(ModelBackend(), program):",
            "    print(line)",
        ]
    )
