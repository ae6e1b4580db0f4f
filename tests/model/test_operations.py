"""Every operation that a thread of the model can do, one test each: it exists, and does what it is for.

What each does in every state of every kind of memory is measured elsewhere (`test_oracle.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import pytest

from userfault import abi
from userfault.model import Kernel, MemoryFault, Op, Process, SystemCallError, SystemCalls, Thread
from userfault.model.descriptor import POLLERR, POLLIN
from userfault.model.errnos import EACCES, EAGAIN, EBADF, ESRCH
from userfault.model.pagemap import Scan

T = TypeVar("T")

PAGE, HUGE = 4096, 2 << 20
HERE, THERE, SOURCE = 0x100000000000, 0x200000000000, 0x300000000000
MISSING, WP, MINOR = 1, 2, 4


class Scene:
    """A process with memory at HERE, a page of b"s" at SOURCE, and a userfaultfd."""

    def __init__(
        self, features: int = 0, *, pages: int = 4, shared: bool = False, version: str = "6.18"
    ) -> None:
        self.kernel = Kernel(version)
        self.process: Process = self.kernel.process("app")
        self.t = self.process.calls
        self.length = pages * PAGE
        self.file_fd = self.run(self.t.memfd_create(self.length))
        self.file = self.t.file(self.file_fd)
        self.run(self.t.mmap(HERE, self.length, shared=shared, file=self.file if shared else None))
        self.run(self.t.mmap(SOURCE, HUGE))
        self.run(self.t.fill(SOURCE, PAGE, ord("s")))
        self.fd = self.run(self.t.userfaultfd(features))

    def run(self, operation: Op[T]) -> T:
        return self.process.run(operation)

    def register(self, mode: int = MISSING) -> None:
        assert self.run(self.t.register(self.fd, HERE, self.length, mode)).ok

    def start(self, program: Callable[[SystemCalls], Op[object]]) -> Thread:
        """A thread that goes on until it ends or sleeps."""
        thread = self.process.spawn("other", program)
        while thread.runnable:
            thread.step()
        return thread

    def messages(self) -> list[abi.Message]:
        return self.run(self.t.read_messages(self.fd))

    def present(self, address: int = HERE) -> bool:
        return self.run(self.t.pagemap(address)).present


OPERATIONS: Final[dict[str, Callable[[], None]]] = {}


def operation(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def enter(check: Callable[[], None]) -> Callable[[], None]:
        assert name not in OPERATIONS
        OPERATIONS[name] = check
        return check

    return enter


# Mappings


@operation("mmap")
def _mmap() -> None:
    s = Scene()
    assert s.run(s.t.load(HERE)) == b"\0"
    with pytest.raises(MemoryFault, match="SEGV_MAPERR"):
        s.run(s.t.load(THERE))


@operation("munmap")
def _munmap() -> None:
    s = Scene(abi.UFFD_FEATURE_EVENT_UNMAP)
    s.register()
    s.start(lambda t: t.munmap(HERE, PAGE))
    assert s.messages() == [abi.Unmap(HERE, HERE + PAGE)]


@operation("mremap")
def _mremap() -> None:
    s = Scene(abi.UFFD_FEATURE_EVENT_REMAP)
    s.run(s.t.store(HERE, b"x"))
    s.register()
    mover = s.start(lambda t: t.mremap(HERE, s.length, s.length, THERE))
    assert s.messages() == [abi.Remap(HERE, THERE, s.length)]
    while mover.runnable:
        mover.step()
    assert s.run(s.t.load(THERE)) == b"x"


@operation("mprotect")
def _mprotect() -> None:
    s = Scene()
    s.run(s.t.mprotect(HERE, PAGE, 1))
    with pytest.raises(MemoryFault, match="SEGV_ACCERR"):
        s.run(s.t.store(HERE, b"x"))


# madvise


@operation("madvise DONTNEED")
def _dontneed() -> None:
    s = Scene()
    s.run(s.t.store(HERE, b"x"))
    s.run(s.t.madvise(HERE, PAGE, "DONTNEED"))
    assert s.run(s.t.load(HERE)) == b"\0"


@operation("madvise REMOVE")
def _remove() -> None:
    s = Scene(shared=True)
    s.run(s.t.store(HERE, b"x"))
    s.run(s.t.madvise(HERE, PAGE, "REMOVE"))
    assert not s.file.cached(0)


@operation("madvise FREE")
def _free() -> None:
    s = Scene()
    s.run(s.t.store(HERE, b"x"))
    s.run(s.t.madvise(HERE, PAGE, "FREE"))
    assert s.present()  # until memory is short


@operation("madvise PAGEOUT")
def _pageout() -> None:
    s = Scene()
    s.run(s.t.store(HERE, b"x"))
    s.run(s.t.madvise(HERE, PAGE, "PAGEOUT"))
    assert s.run(s.t.pagemap(HERE)).swap
    assert s.run(s.t.load(HERE)) == b"x"


@operation("madvise COLLAPSE")
def _collapse() -> None:
    s = Scene(pages=512)
    s.run(s.t.fill(HERE, HUGE, 7))
    assert s.process.mm.table.pte_table(HERE) is not None
    s.run(s.t.madvise(HERE, HUGE, "COLLAPSE"))
    assert s.process.mm.table.pte_table(HERE) is None
    assert s.run(s.t.load(HERE + HUGE - 1)) == b"\7"


@operation("madvise POPULATE_READ")
def _populate_read() -> None:
    s = Scene()
    s.register()
    s.start(lambda t: t.madvise(HERE, PAGE, "POPULATE_READ"))
    assert s.messages() == [abi.Pagefault(0, HERE)]


@operation("madvise POPULATE_WRITE")
def _populate_write() -> None:
    s = Scene()
    s.register()
    s.start(lambda t: t.madvise(HERE, PAGE, "POPULATE_WRITE"))
    assert s.messages() == [abi.Pagefault(abi.UFFD_PAGEFAULT_FLAG_WRITE, HERE)]


@operation("madvise DONTFORK")
def _dontfork() -> None:
    s = Scene()
    s.run(s.t.madvise(HERE, s.length, "DONTFORK"))
    child = s.run(s.t.fork(lambda t: t.step("idle")))
    assert child.mm.find(HERE) is None


@operation("madvise HUGEPAGE")
def _hugepage() -> None:
    s = Scene(pages=512)
    s.run(s.t.madvise(HERE, HUGE, "HUGEPAGE"))
    s.run(s.t.store(HERE, b"x"))
    assert s.present(HERE + HUGE - PAGE)


@operation("madvise GUARD_INSTALL")
def _guard_install() -> None:
    s = Scene()
    s.run(s.t.madvise(HERE, PAGE, "GUARD_INSTALL"))
    with pytest.raises(MemoryFault, match="SIGSEGV"):
        s.run(s.t.load(HERE))


@operation("madvise GUARD_REMOVE")
def _guard_remove() -> None:
    s = Scene()
    s.run(s.t.madvise(HERE, PAGE, "GUARD_INSTALL"))
    s.run(s.t.madvise(HERE, PAGE, "GUARD_REMOVE"))
    assert s.run(s.t.load(HERE)) == b"\0"


# Processes


@operation("fork")
def _fork() -> None:
    s = Scene(abi.UFFD_FEATURE_EVENT_FORK)
    s.register()
    s.start(lambda t: t.fork(lambda child: child.step("idle")))
    (message,) = s.messages()
    assert isinstance(message, abi.Fork)
    assert s.t.context(message.ufd).has(abi.UFFD_FEATURE_EVENT_FORK)


@operation("exec")
def _exec() -> None:
    s = Scene()
    s.run(s.t.execve())
    assert s.process.mm.vmas == []
    with pytest.raises(SystemCallError, match="EBADF"):
        s.run(s.t.read_messages(s.fd))


@operation("exit")
def _exit() -> None:
    s = Scene()
    s.register()
    manager = s.kernel.process("manager")
    theirs = s.run(s.t.send_descriptor(s.fd, manager))
    waiter = s.start(lambda t: t.load(HERE))
    s.run(s.t.exit())
    while waiter.runnable:
        waiter.step()
    assert waiter.done
    assert waiter.result is None
    assert manager.run(manager.calls.zeropage(theirs, HERE, PAGE)).errno == ESRCH


# Touching memory


@operation("user read")
def _read() -> None:
    s = Scene()
    s.register()
    reader = s.start(lambda t: t.load(HERE))
    assert reader.asleep
    assert s.messages() == [abi.Pagefault(0, HERE)]


@operation("user write")
def _write() -> None:
    s = Scene()
    s.register()
    s.start(lambda t: t.store(HERE, b"x"))
    assert s.messages() == [abi.Pagefault(abi.UFFD_PAGEFAULT_FLAG_WRITE, HERE)]


@operation("user atomic")
def _atomic() -> None:
    s = Scene()
    assert s.run(s.t.atomic(HERE, 1, lambda byte: bytes((byte[0] + 1,)))) == b"\0"
    assert s.run(s.t.compare_exchange(HERE, b"\1", b"\5"))
    assert not s.run(s.t.compare_exchange(HERE, b"\1", b"\7"))
    assert s.run(s.t.load(HERE)) == b"\5"
    s.run(s.t.madvise(HERE, PAGE, "DONTNEED"))
    s.register()
    s.start(lambda t: t.compare_exchange(HERE, b"q", b"x"))
    assert s.messages() == [abi.Pagefault(abi.UFFD_PAGEFAULT_FLAG_WRITE, HERE)]


@operation("system call that reads memory")
def _call_reads() -> None:
    s = Scene(abi.UFFD_FEATURE_SIGBUS)
    s.register()
    with pytest.raises(SystemCallError, match="EFAULT"):
        s.run(s.t.write_from(HERE, 8))


@operation("system call that writes memory")
def _call_writes() -> None:
    s = Scene()
    s.register()
    caller = s.start(lambda t: t.read_into(HERE, b"data"))
    assert caller.asleep
    s.run(s.t.copy(s.fd, HERE, SOURCE, PAGE))
    while caller.runnable:
        caller.step()
    assert s.run(s.t.load(HERE, 5)) == b"datas"


# userfaultfd


@operation("userfaultfd(2)")
def _userfaultfd() -> None:
    s = Scene()
    other = s.kernel.process("user", privileged=False)
    with pytest.raises(SystemCallError, match="EPERM"):
        other.run(other.calls.userfaultfd())
    assert other.run(other.calls.userfaultfd(user_mode_only=True)) > s.file_fd - 1


@operation("/dev/userfaultfd")
def _device() -> None:
    s = Scene()
    fd = s.run(s.t.userfaultfd(device=True))
    assert not s.t.context(fd).user_mode_only
    other = s.kernel.process("user", privileged=False)
    with pytest.raises(SystemCallError) as refused:
        other.run(other.calls.userfaultfd(device=True))
    assert refused.value.errno == EACCES
    old = Scene(version="5.17")
    with pytest.raises(SystemCallError, match="ENOENT"):
        old.run(old.t.userfaultfd(device=True))


@operation("UFFDIO_REGISTER")
def _register() -> None:
    s = Scene()
    outcome = s.run(s.t.register(s.fd, HERE, PAGE, MISSING | WP))
    assert outcome.done & 1 << abi._UFFDIO_COPY
    first = next(mapping for mapping in s.run(s.t.smaps()) if mapping.start == HERE)
    assert first.end == HERE + PAGE
    assert first.flags == ("um", "uw")


@operation("UFFDIO_UNREGISTER")
def _unregister() -> None:
    s = Scene()
    s.register()
    waiter = s.start(lambda t: t.load(HERE))
    assert s.run(s.t.unregister(s.fd, HERE, s.length)).ok
    assert waiter.runnable


@operation("UFFDIO_WAKE")
def _wake() -> None:
    s = Scene()
    s.register()
    waiter = s.start(lambda t: t.load(HERE))
    s.run(s.t.wake(s.fd, HERE + PAGE, PAGE))
    assert waiter.asleep
    s.run(s.t.wake(s.fd, HERE, PAGE))
    assert waiter.runnable


@operation("UFFDIO_COPY")
def _copy() -> None:
    s = Scene()
    s.register()
    assert s.run(s.t.copy(s.fd, HERE, SOURCE, PAGE)) == abi.Outcome(PAGE, 0)
    assert s.run(s.t.load(HERE)) == b"s"


@operation("UFFDIO_ZEROPAGE")
def _zeropage() -> None:
    s = Scene()
    s.register()
    assert s.run(s.t.zeropage(s.fd, HERE, PAGE)).ok
    assert s.run(s.t.load(HERE)) == b"\0"


@operation("UFFDIO_CONTINUE")
def _continue() -> None:
    s = Scene(shared=True)
    s.file.write(0, b"cached")
    s.register(MINOR)
    assert s.run(s.t.continue_(s.fd, HERE, PAGE)).ok
    assert s.run(s.t.load(HERE, 6)) == b"cached"


@operation("UFFDIO_POISON")
def _poison() -> None:
    s = Scene()
    s.register()
    assert s.run(s.t.poison(s.fd, HERE, PAGE)).ok
    with pytest.raises(MemoryFault, match="SIGBUS"):
        s.run(s.t.load(HERE))


@operation("UFFDIO_MOVE")
def _move() -> None:
    s = Scene()
    s.register()
    assert s.run(s.t.move(s.fd, HERE, SOURCE, PAGE)).ok
    assert (s.present(HERE), s.present(SOURCE)) == (True, False)


@operation("UFFDIO_WRITEPROTECT")
def _writeprotect() -> None:
    s = Scene()
    s.run(s.t.store(HERE, b"x"))
    s.register(WP)
    assert s.run(s.t.writeprotect(s.fd, HERE, PAGE, 1)).ok
    s.start(lambda t: t.store(HERE, b"y"))
    assert s.messages() == [abi.Pagefault(abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP, HERE)]


@operation("read of the descriptor")
def _read_descriptor() -> None:
    s = Scene()
    with pytest.raises(SystemCallError) as refused:
        s.messages()
    assert refused.value.errno == EAGAIN


@operation("poll of the descriptor")
def _poll() -> None:
    s = Scene()
    s.register()
    assert s.run(s.t.poll(s.fd, wait=False)) == 0
    s.start(lambda t: t.load(HERE))
    assert s.run(s.t.poll(s.fd)) == POLLIN
    blocking = s.run(s.t.userfaultfd(nonblock=False))
    assert s.run(s.t.poll(blocking)) == POLLERR


@operation("close")
def _close() -> None:
    s = Scene()
    s.register()
    waiter = s.start(lambda t: t.load(HERE))
    s.run(s.t.close(s.fd))
    while waiter.runnable:
        waiter.step()
    assert waiter.result == b"\0"


@operation("dup")
def _dup() -> None:
    s = Scene()
    s.register()
    copy = s.run(s.t.dup(s.fd))
    waiter = s.start(lambda t: t.load(HERE))
    s.run(s.t.close(s.fd))
    assert waiter.asleep  # the other descriptor still holds the userfaultfd
    assert s.run(s.t.zeropage(copy, HERE, PAGE)).ok


@operation("passing the descriptor")
def _pass() -> None:
    s = Scene()
    s.register()
    manager = s.kernel.process("manager")
    theirs = s.run(s.t.send_descriptor(s.fd, manager))
    s.start(lambda t: t.load(HERE))
    assert manager.run(manager.calls.read_messages(theirs)) == [abi.Pagefault(0, HERE)]
    with pytest.raises(SystemCallError) as refused:
        manager.run(manager.calls.dup(theirs + 1))
    assert refused.value.errno == EBADF


# Page tables from outside


@operation("PAGEMAP_SCAN")
def _scan() -> None:
    s = Scene(abi.UFFD_FEATURE_WP_ASYNC)
    s.register(WP)
    s.run(s.t.store(HERE + PAGE, b"x"))
    scan = Scan(HERE, HERE + s.length, abi.PM_SCAN_WP_MATCHING, abi.PAGE_IS_WRITTEN | abi.PAGE_IS_PRESENT)
    found = s.run(s.t.pagemap_scan(scan._replace(return_mask=abi.PAGE_IS_WRITTEN)))
    assert found.regions == [abi.PageRegion(HERE + PAGE, HERE + 2 * PAGE, abi.PAGE_IS_WRITTEN)]
    assert s.run(s.t.pagemap_scan(scan)).regions == []


@operation("pagemap")
def _pagemap() -> None:
    s = Scene()
    s.run(s.t.store(HERE, b"x"))
    s.register(WP)
    s.run(s.t.writeprotect(s.fd, HERE, PAGE, 1))
    entry = s.run(s.t.pagemap(HERE))
    assert (entry.present, entry.uffd_wp, entry.file) == (True, True, False)


@operation("smaps flags")
def _smaps() -> None:
    s = Scene(shared=True)
    s.register(MISSING | WP | MINOR)
    (mapping,) = (mapping for mapping in s.run(s.t.smaps()) if mapping.start == HERE)
    assert (mapping.permissions, mapping.flags) == ("rw-s", ("um", "uw", "ui"))


@operation("fallocate punch")
def _punch() -> None:
    s = Scene(abi.UFFD_FEATURE_EVENT_REMOVE, shared=True)
    s.run(s.t.store(HERE, b"x"))
    s.register()
    s.run(s.t.punch_hole(s.file_fd, 0, PAGE))
    assert not s.present()
    assert s.run(s.t.poll(s.fd, wait=False)) == 0  # no event tells of it


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_thread_can(name: str) -> None:
    OPERATIONS[name]()


@pytest.mark.parametrize("version", ["5.17", "6.1", "6.12", "6.18"])
def test_each_version_takes_the_ioctls_that_it_had(version: str) -> None:
    s = Scene(version=version)
    s.register()
    poison = s.run(s.t.poison(s.fd, HERE, PAGE)).errno
    move = s.run(s.t.move(s.fd, HERE + PAGE, SOURCE, PAGE)).errno
    assert (poison == 0) == (s.kernel.version >= (6, 6))
    assert (move == 0) == (s.kernel.version >= (6, 8))


def test_a_killed_thread_does_not_come_back_to_user_space() -> None:
    s = Scene(abi.UFFD_FEATURE_EVENT_REMOVE)
    s.register()
    said: list[str] = []

    def program(t: SystemCalls) -> Op[None]:
        yield from t.madvise(HERE, PAGE, "DONTNEED")
        said.append("I live")

    thread = s.start(program)
    assert thread.asleep
    thread.kill()
    while thread.runnable:
        thread.step()
    assert thread.done
    assert said == []


def test_a_killed_thread_ends_at_its_next_step() -> None:
    s = Scene()
    thread = s.process.spawn("other", lambda t: t.step("one"))
    thread.step()
    thread.kill()
    thread.step()
    assert thread.done
