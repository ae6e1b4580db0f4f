"""Small programs that run on any conformance backend, so that two of them can be compared step by step.

    from conformance.differential import Program, run
    from conformance.model import ModelBackend
    for line in run(ModelBackend(), Program("anon", 1, 0, [("store", 0, 1), ("copy", 1, 1, 0)])):
        print(line)

The memory. An area of four pages (0 to 3), and as much room for mremap to move pages to (4 to 7), where
nothing is mapped. What is called a page is what lies between two of `edges`: one page of the memory, but for
"thp" one small page, the rest of its huge page, and the same again. Files on disk are full when the program
begins.

The threads. Two that touch memory (0 and 1), and one, "caller", that makes system calls; each is busy until
its last step has ended. Whoever makes userfaultfd's calls is never busy. After a `fork` there is a child with
one thread, that does what ("child", step) says, and with a userfaultfd of its own if a fork message brought
it.

The messages. They are read after every step, until a step "deaf" leaves them where they are; then a step
"read" reads one. `run` writes down everything that can be seen after a step; see `Line`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from conformance.backend import Area, Backend, Entry, Kind, Process, Running, Thread
from userfault import abi
from userfault.abi import Fork, Message, Pagefault, PageRegion, Remap, Remove, Unmap

PAGES = 4
THREADS = 2
SMALL = 4096
MOMENT = 0.003
"""Seconds after which a kernel that is as expected is looked at once more."""

Step = tuple[Any, ...]

ADVICE = {
    "dontneed": 4,
    "free": 8,
    "remove": 9,
    "dontfork": 10,
    "dofork": 11,
    "hugepage": 14,
    "nohugepage": 15,
    "wipeonfork": 18,
    "cold": 20,
    "pageout": 21,
    "populate_read": 22,
    "populate_write": 23,
    "collapse": 25,
    "guard_install": 102,
    "guard_remove": 103,
}
"""Steps that are a madvise(2) of a range, and their numbers."""

CATEGORIES = {
    abi.PAGE_IS_WPALLOWED: "wpallowed",
    abi.PAGE_IS_WRITTEN: "written",
    abi.PAGE_IS_FILE: "file",
    abi.PAGE_IS_PRESENT: "present",
    abi.PAGE_IS_SWAPPED: "swapped",
    abi.PAGE_IS_PFNZERO: "zero",
    abi.PAGE_IS_HUGE: "huge",
    abi.PAGE_IS_GUARD: "guard",
}

SPOTS = tuple(thread * 64 + spot for thread in range(THREADS + 1) for spot in (7, 16))
"""Where the threads write: each has a byte of its own for stores and one for system calls, so that what a
page holds does not depend on who came first. The last ones are the child's."""


class Program(NamedTuple):
    """kind of memory, mode of its registration, features of the handshake, steps as (name, numbers...)."""

    kind: str
    mode: int
    features: int
    steps: Sequence[Step]


class Observer(Protocol):
    """What only this test wants to do and know, beyond a Backend: the same on a kernel and on the model."""

    def begin(self, process: Any) -> None:
        """Make ready whatever cannot be made while a thread of the process is held up in fork(3)."""

    def vmas(self, process: Any) -> list[tuple[int, int, str]]:
        """(start, end, permissions and modes) of every mapping."""

    def content(self, process: Any, address: int, length: int) -> bytes | None:
        """What a present page holds, read without a fault."""

    def scan(self, process: Any, start: int, end: int, flags: int, any_of: int) -> list[PageRegion] | int:
        """PAGEMAP_SCAN for all categories: the regions, or the errno."""

    def waiting(self, uffd: Any) -> tuple[int, int, bool]:
        """Faults that were not read, faults that were not answered, and whether a message can be read."""

    def close(self, uffd: Any) -> None:
        """Closes every copy of the descriptor."""

    def thread_id(self, thread: Any) -> int: ...
    def system_call_reads(self, thread: Any, address: int) -> Running[int]:
        """A system call that copies 8 bytes from there: its errno."""

    def system_call_writes(self, thread: Any, address: int) -> Running[int]:
        """A system call that copies 8 zeros to there: its errno."""

    def munmap(self, thread: Any, start: int, length: int) -> Running[int]: ...
    def mmap(self, thread: Any, area: Area, start: int, length: int, offset: int) -> Running[int]:
        """Maps a part of the area's file, or zeros, over what is there."""

    def mremap(
        self, thread: Any, start: int, old: int, new: int, to: int, dontunmap: bool
    ) -> Running[int]: ...
    def pwrite(self, process: Any, area: Area, offset: int, data: bytes) -> int:
        """Writes into the area's file: the errno."""

    def punch(self, process: Any, area: Area, offset: int, length: int) -> int:
        """Makes a hole in the area's file: the errno."""

    def truncate(self, process: Any, area: Area, size: int) -> int:
        """Sets the size of the area's file: the errno."""


class Side:
    """A process of the program: the parent, or its child. `threads` by name."""

    def __init__(self, process: Process, uffd: Any, threads: dict[Any, Thread]) -> None:
        self.process = process
        self.uffd = uffd
        self.threads = threads
        self.running: dict[Any, Any] = {}


class Machine:
    """A program under way on a backend."""

    def __init__(self, backend: Backend, observer: Observer, program: Program) -> None:
        self.backend = backend
        self.observer = observer
        self.program = program
        process = backend.process()
        kind = Kind(program.kind)
        self.area: Area = process.area(kind, 1024 if kind is Kind.THP else PAGES)
        page = self.area.page
        half = self.area.length // 2
        self.edges = (
            [0, page, half, half + page, 2 * half] if kind is Kind.THP else [page * n for n in range(5)]
        )
        if kind in (Kind.FILE, Kind.FILE_PRIVATE):
            for offset in self.edges[:-1]:  # page by page, so that none of them shares a folio
                observer.pwrite(process, self.area, offset, b"\xf0" * page)
        uffd = process.userfaultfd(program.features)
        names = [*range(THREADS), "caller"]
        observer.begin(process)
        self.parent = Side(process, uffd, {name: process.thread() for name in names})
        self.child: Side | None = None
        self.childs_uffd: int | None = None
        self.room = process.room(self.area.length, 2 << 20)
        caller = self.parent.threads["caller"]
        assert observer.munmap(caller, self.room, self.area.length).result() == 0
        if kind is Kind.THP:
            assert caller.madvise(self.area.start, self.area.length, ADVICE["hugepage"]).result() == 0
        self.registered = uffd.register(self.area.start, self.area.length, program.mode)
        self.deaf = False
        self.ended: list[Any] = []
        self.read: list[Any] = []

    # Places

    def at(self, page: int) -> int:
        """The address of a page; 8 is the end of the room."""
        if page < PAGES:
            return self.area.start + self.edges[page]
        return self.room + self.edges[page - PAGES]

    def range(self, page: int, count: int) -> tuple[int, int]:
        """(start, length) of pages that lie side by side."""
        base = self.at(page)
        first = page % PAGES
        return base, self.edges[min(first + count, PAGES)] - self.edges[first]

    def place(self, address: int) -> str:
        """An address in words that are the same on every backend."""
        for name, start in (("area", self.area.start), ("room", self.room)):
            if start <= address <= start + self.area.length:
                return f"{name}+{address - start:#x}"
        return "elsewhere"

    # Steps

    def do(self, step: Step) -> Any:
        """Take a step: what it answered, or None for what only begins."""
        if step[0] == "child":
            return "no child" if self.child is None else self._do(self.child, step[1])
        return self._do(self.parent, step)

    def _do(self, side: Side, step: Step) -> Any:
        name, *numbers = step
        if name in ADVICE:
            page, count = numbers
            start, length = self.range(page, count)
            return self._begin(side, "caller", lambda t: t.madvise(start, length, ADVICE[name]))
        operation: Callable[..., Any] = getattr(self, f"_{name}")
        return operation(side, *numbers)

    def _begin(self, side: Side, name: Any, operation: Callable[[Any], Any]) -> str | None:
        """A thread begins something; the child has one thread for everything."""
        if side is self.child:
            name = "child"
        if name in side.running:
            return "busy"
        side.running[name] = operation(side.threads[name])
        return None

    def _spot(self, side: Side, thread: int, page: int, spot: int) -> int:
        return self.at(page) + SPOTS[2 * (THREADS if side is self.child else thread) + spot]

    def _load(self, side: Side, thread: int, page: int) -> str | None:
        return self._begin(side, thread, lambda t: t.load(self._spot(side, thread, page, 0)))

    def _store(self, side: Side, thread: int, page: int, value: int) -> str | None:
        return self._begin(side, thread, lambda t: t.store(self._spot(side, thread, page, 0), value))

    def _call_reads(self, side: Side, thread: int, page: int) -> str | None:
        at = self._spot(side, thread, page, 1)
        return self._begin(side, thread, lambda t: self.observer.system_call_reads(t, at))

    def _call_writes(self, side: Side, thread: int, page: int) -> str | None:
        at = self._spot(side, thread, page, 1)
        return self._begin(side, thread, lambda t: self.observer.system_call_writes(t, at))

    def _together(self, side: Side, *steps: Step) -> list[Any]:
        """Several steps begin before anybody looks what came of the first."""
        return [self._do(side, step) for step in steps]

    def _copy(self, side: Side, page: int, count: int, value: int, mode: int) -> Any:
        start, length = self.range(page, count)
        return self._ask(side, lambda uffd: uffd.copy(start, bytes((value,)) * length, mode=mode))

    def _zeropage(self, side: Side, page: int, count: int, mode: int) -> Any:
        return self._ask(side, lambda uffd: uffd.zeropage(*self.range(page, count), mode))

    def _continue(self, side: Side, page: int, count: int, mode: int) -> Any:
        return self._ask(side, lambda uffd: uffd.continue_(*self.range(page, count), mode))

    def _poison(self, side: Side, page: int, count: int) -> Any:
        return self._ask(side, lambda uffd: uffd.poison(*self.range(page, count)))

    def _move(self, side: Side, to: int, from_: int, mode: int) -> Any:
        if side is self.child:
            return "not by a child"
        length = self.range(to, 1)[1]
        return self._ask(side, lambda uffd: uffd.move(self.at(to), self.at(from_), length, mode))

    def _writeprotect(self, side: Side, page: int, count: int, mode: int) -> Any:
        return self._ask(side, lambda uffd: uffd.writeprotect(*self.range(page, count), mode))

    def _wake(self, side: Side, page: int, count: int) -> Any:
        return self._ask(side, lambda uffd: uffd.wake(*self.range(page, count)))

    def _register(self, side: Side, page: int, count: int, mode: int) -> Any:
        return self._ask(side, lambda uffd: uffd.register(*self.range(page, count), mode))

    def _unregister(self, side: Side, page: int, count: int) -> Any:
        return self._ask(side, lambda uffd: uffd.unregister(*self.range(page, count)))

    def _close(self, side: Side) -> Any:
        return self._ask(side, lambda uffd: self.observer.close(uffd))

    def _ask(self, side: Side, call: Callable[[Any], Any]) -> Any:
        if side.uffd is None or side.uffd.closed:
            return "no userfaultfd"
        answer = call(side.uffd)
        return tuple(answer) if isinstance(answer, tuple) else answer

    def _protect(self, side: Side, page: int, count: int, protection: int) -> str | None:
        start, length = self.range(page, count)
        return self._begin(side, "caller", lambda t: t.mprotect(start, length, protection))

    def _munmap(self, side: Side, page: int, count: int) -> str | None:
        start, length = self.range(page, count)
        return self._begin(side, "caller", lambda t: self.observer.munmap(t, start, length))

    def _mmap(self, side: Side, page: int, count: int) -> str | None:
        start, length = self.range(page, count)
        offset = self.edges[page % PAGES]
        return self._begin(side, "caller", lambda t: self.observer.mmap(t, self.area, start, length, offset))

    def _mremap(self, side: Side, page: int, count: int, to: int, new: int, dontunmap: int) -> str | None:
        start, length = self.range(page, count)
        grown = self.range(to, new)[1] if new else length
        return self._begin(
            side,
            "caller",
            lambda t: self.observer.mremap(t, start, length, grown, self.at(to), bool(dontunmap)),
        )

    def _fork(self, side: Side) -> str | None:
        if side is self.child or self.child is not None:
            return "one child only"
        return self._begin(side, "caller", lambda t: t.fork())

    def _pwrite(self, side: Side, page: int, value: int) -> Any:
        if self.program.kind in ("anon", "thp"):
            return "no file"
        offset = self.edges[page % PAGES] + 300
        return self.observer.pwrite(side.process, self.area, offset, bytes((value,)))

    def _punch(self, side: Side, page: int, count: int) -> Any:
        if self.program.kind in ("anon", "thp"):
            return "no file"
        return self.observer.punch(
            side.process, self.area, self.edges[page % PAGES], self.range(page, count)[1]
        )

    def _truncate(self, side: Side, pages: int) -> Any:
        if self.program.kind in ("anon", "thp"):
            return "no file"
        return self.observer.truncate(side.process, self.area, self.edges[pages])

    def _scan(self, side: Side, page: int, count: int, flags: int, any_of: int) -> Any:
        start, length = self.range(page, count)
        found = self.observer.scan(side.process, start, start + length, flags, any_of)
        if isinstance(found, int):
            return found
        return [(self.place(region.start), self.place(region.end), region.categories) for region in found]

    def _deaf(self, side: Side) -> None:
        self.deaf = not self.deaf

    def _read(self, side: Side) -> Any:
        return self._ask(side, lambda uffd: [self._told(side, message) for message in uffd.read_messages(1)])

    # What is seen

    def look(self) -> None:
        """See who has ended, and read what messages there are, until nothing more comes of it."""
        before = -1
        while before != len(self.ended) + len(self.read):
            before = len(self.ended) + len(self.read)
            self._look()

    def _look(self) -> None:
        for side in (self.parent, self.child):
            if side is None:
                continue
            for name, running in list(side.running.items()):
                if running.finished():
                    del side.running[name]
                    self.ended.append((name, self._result(running.result())))
            if not self.deaf and side.uffd is not None and not side.uffd.closed:
                self.read += [self._told(side, message) for message in side.uffd.read_messages()]
        if self.child is not None and self.child.uffd is None and self.childs_uffd is not None:
            self.child.uffd = self.child.process.adopt(self.childs_uffd, self.program.features)
            self.childs_uffd = None

    def _result(self, result: Any) -> Any:
        if isinstance(result, int):
            return result
        if hasattr(result, "cures"):
            return result.signal or result.value
        self.child = Side(result, None, {"child": result.main})
        return "a child"

    def _told(self, side: Side, message: Message) -> Any:
        match message:
            case Pagefault(flags, address, thread_id):
                who = [
                    name
                    for name, thread in side.threads.items()
                    if self.observer.thread_id(thread) == thread_id
                ]
                return "fault", flags, self.place(address), who[0] if who else thread_id
            case Fork(ufd):
                self.childs_uffd = ufd
                return ("fork",)
            case Remap(from_, to, length):
                return "remap", self.place(from_), self.place(to), length
            case Remove(start, end) | Unmap(start, end):
                return type(message).__name__.lower(), self.place(start), self.place(end)
        raise AssertionError(message)

    def quick(self) -> tuple[Any, ...]:
        """Who ended and what came since the step began, in no order, for they race; and who waits."""
        waiting = [
            self.observer.waiting(side.uffd)
            for side in (self.parent, self.child)
            if side is not None and side.uffd is not None and not side.uffd.closed
        ]
        return sorted(self.ended, key=repr), sorted(self.read, key=repr), waiting

    def pages(self) -> list[str]:
        """Every page of every process, in words."""
        return [
            f"{who}{page}: {text}"
            for who, side in (("", self.parent), ("child's ", self.child))
            if side is not None
            for page, text in enumerate(self._pages(side))
        ]

    def _pages(self, side: Side) -> Iterator[str]:
        vmas = self.observer.vmas(side.process)
        for base in (0, PAGES):
            start, length = self.range(base, PAGES)
            scanned = self.observer.scan(side.process, start, start + length, 0, 0)
            assert not isinstance(scanned, int), scanned
            for page in range(base, base + PAGES):
                address = self.at(page)
                vma = next((text for low, high, text in vmas if low <= address < high), "unmapped")
                found = next(
                    (region.categories for region in scanned if region.start <= address < region.end), 0
                )
                yield " ".join([vma, *self._entry(side, address, found)])

    def _entry(self, side: Side, address: int, categories: int) -> Iterator[str]:
        entry: Entry = side.process.entry(address)
        yield "|".join(word for bit, word in CATEGORIES.items() if categories & bit)
        yield "".join(
            word for has, word in ((entry.present, "P"), (entry.swapped, "S"), (entry.uffd_wp, "W")) if has
        )
        if entry.present:
            content = self.observer.content(side.process, address, 304)
            if content is not None:
                yield bytes(content[spot] for spot in (*SPOTS, 0, 300)).hex()


class Line(NamedTuple):
    """What was seen after one step.

    answer    what the step answered, None for what only begins, "busy" if its thread was
    ended     (thread, errno or byte or signal) of each thread that ended
    messages  what was read
    waiting   for each userfaultfd: faults not read, faults not answered, a message can be read
    pages     mapping, PAGEMAP_SCAN, pagemap, and the bytes that the threads write, of each page
    """

    step: Step
    answer: Any
    ended: list[Any]
    messages: list[Any]
    waiting: list[Any]
    pages: list[str]


def run(
    backend: Any, program: Program, expected: Sequence[Sequence[Line]] = (), *, patience: float = 0.3
) -> list[Line]:
    """Run a program. `expected`: what another backend may see, in one order of its threads or another; a real
    kernel gets a moment to come to one of them, at most `patience` seconds a step. It ends after the first
    step that none of them has."""
    machine = Machine(backend, backend.observer, program)
    seen: list[Line] = []
    goals = list(expected)
    for number, step in enumerate([("begin",), *program.steps]):
        machine.ended, machine.read = [], []
        answer = tuple(machine.registered) if number == 0 else machine.do(step)
        goals = [goal for goal in goals if number < len(goal)]
        _come_to(machine, step, [goal[number] for goal in goals], patience)
        ended, messages, waiting = machine.quick()
        line = Line(step, answer, ended, messages, waiting, machine.pages())
        seen.append(line)
        goals = [goal for goal in goals if goal[number] == line]
        if expected and not goals:
            break
    return seen


def _come_to(machine: Machine, step: Step, goals: Sequence[Line], patience: float) -> None:
    machine.look()
    if not goals:
        return
    deadline = time.monotonic() + patience
    wanted = [(goal.ended, goal.messages, goal.waiting) for goal in goals]
    while machine.quick() not in wanted and time.monotonic() < deadline:
        time.sleep(0.0005)
        machine.look()
    if "pageout" in step:
        _page_out_again(machine, step, goals, deadline)
    time.sleep(MOMENT)
    machine.look()


def _page_out_again(machine: Machine, step: Step, goals: Sequence[Line], deadline: float) -> None:
    """A page that was touched a moment ago waits in a list of its processor; asking again helps."""
    ended = list(machine.ended)
    while machine.pages() not in [goal.pages for goal in goals] and time.monotonic() < deadline:
        machine.backend.another_processor(machine.parent.process)  # type: ignore[attr-defined]
        if machine.do(step) is not None:
            return
        while not machine.parent.running["caller"].finished() and time.monotonic() < deadline:
            time.sleep(0.0005)
        machine.look()
        machine.ended = ended


def difference(model: Sequence[Line], kernel: Sequence[Line]) -> str | None:
    """The first step after which two backends differ, in words; None: they agree."""
    for number, (ours, theirs) in enumerate(zip(model, kernel, strict=False)):
        if ours != theirs:
            return "\n".join([f"after step {number}, {ours.step!r}:", *_fields(ours, theirs)])
    return None


def _fields(ours: Line, theirs: Line) -> Iterator[str]:
    for name, mine, other in zip(Line._fields, ours, theirs, strict=True):
        if mine == other:
            continue
        if name == "pages":
            for page, real in zip(mine, other, strict=False):
                if page != real:
                    yield f"    model  {page}\n    kernel {real}"
        else:
            yield f"    {name}: model {mine!r}, kernel {other!r}"


def depends_on_order(program: Program) -> bool:
    """The program lets several threads run at once, so that more than one outcome is right."""
    return any(step[0] == "together" for step in program.steps)


def as_script(program: Program) -> str:
    """The program as a script that runs on either side: python SCRIPT model, python SCRIPT kernel."""
    return "\n".join(
        [
            "# PYTHONPATH=tests python THIS model|kernel",
            "import sys",
            "",
            "from conformance.differential import Program",
            "from conformance.sides import show",
            "",
            "program = Program(",
            f"    {program.kind!r}, {program.mode}, {program.features:#x},",
            "    [",
            *(f"        {step!r}," for step in program.steps),
            "    ],",
            ")",
            "show(program, sys.argv[1])",
        ]
    )
