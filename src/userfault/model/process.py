"""A process: an address space, threads, and a table of descriptors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from userfault.model.errnos import EBADF, EMFILE, SystemCallError
from userfault.model.mm import AddressSpace
from userfault.model.thread import Thread

if TYPE_CHECKING:
    from userfault.model.kernel import Kernel
    from userfault.model.step import Op
    from userfault.model.system_calls import SystemCalls

T = TypeVar("T")


class OpenFile:
    """An open file description: what a descriptor points to, shared by dup, fork and passing it on.

    target   a Context (userfaultfd), a File, or a word for something else
    """

    __slots__ = ("nonblock", "readable", "references", "target", "writable")

    def __init__(
        self, target: Any, *, nonblock: bool = False, readable: bool = True, writable: bool = True
    ) -> None:
        self.target = target
        self.nonblock = nonblock
        self.readable = readable
        self.writable = writable
        self.references = 0


class Descriptors:
    """The descriptor table. `limit`: RLIMIT_NOFILE."""

    __slots__ = ("cloexec", "files", "limit")

    def __init__(self) -> None:
        self.files: dict[int, OpenFile] = {}
        self.cloexec: set[int] = set()
        self.limit = 1024

    def install(self, file: OpenFile, *, cloexec: bool = False) -> int:
        """The lowest free number now points to `file`. Raises SystemCallError EMFILE."""
        number = 3
        while number in self.files:
            number += 1
        if number >= self.limit:
            raise SystemCallError(EMFILE)
        self.files[number] = file
        file.references += 1
        if cloexec:
            self.cloexec.add(number)
        return number

    def get(self, number: int) -> OpenFile:
        """What the descriptor points to. Raises SystemCallError EBADF."""
        try:
            return self.files[number]
        except KeyError:
            raise SystemCallError(EBADF) from None

    def remove(self, number: int) -> OpenFile | None:
        """Forget a descriptor; returns the file if that was its last reference anywhere."""
        file = self.get(number)
        del self.files[number]
        self.cloexec.discard(number)
        file.references -= 1
        return file if file.references == 0 else None

    def copy(self) -> Descriptors:
        """The table of a forked child."""
        other = Descriptors()
        other.limit = self.limit
        other.cloexec = set(self.cloexec)
        other.files = dict(self.files)
        for file in self.files.values():
            file.references += 1
        return other


class Process:
    """A process. Its first thread is `main`; what its threads can do is in `SystemCalls`."""

    __slots__ = ("descriptors", "exited", "kernel", "mm", "name", "pid", "privileged", "threads")

    def __init__(
        self, kernel: Kernel, name: str, *, privileged: bool = True, mm: AddressSpace | None = None
    ) -> None:
        self.kernel = kernel
        self.name = name
        self.privileged = privileged
        self.pid = kernel.number()
        self.mm = AddressSpace(kernel, name) if mm is None else mm
        self.descriptors = Descriptors()
        self.threads: list[Thread] = []
        self.exited = False
        kernel.processes.append(self)
        main = Thread(self, self.pid, name)
        self.threads.append(main)

    @property
    def main(self) -> Thread:
        """The first thread."""
        return self.threads[0]

    def thread(self, name: str) -> Thread:
        """Another thread."""
        thread = Thread(self, self.kernel.number(), name)
        self.threads.append(thread)
        return thread

    def spawn(self, name: str, program: Callable[[SystemCalls], Op[Any]]) -> Thread:
        """Another thread, started with a program (a generator function that takes SystemCalls)."""
        from userfault.model.system_calls import SystemCalls

        thread = self.thread(name)
        return thread.start(program(SystemCalls(thread)))

    @property
    def calls(self) -> SystemCalls:
        """What the main thread can do; for `run`."""
        from userfault.model.system_calls import SystemCalls

        return SystemCalls(self.main)

    def run(self, operation: Op[T]) -> T:
        """Run an operation of the main thread to its end at once, to set a scene. Raises Deadlock if it would
        sleep, and whatever the operation raises."""
        return self.main.call(operation)

    def __repr__(self) -> str:
        return f"Process({self.name})"
