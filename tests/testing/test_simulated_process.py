"""A simulated process: handlers are tested without a kernel, and the test decides who runs."""

from __future__ import annotations

import pytest

from userfault import abi
from userfault.model import Deadlock, MemoryFault, Userfaultfd
from userfault.model.errnos import EAGAIN, EEXIST, EPERM
from userfault.testing import simulated_process

PAGE = 4096
MISSING = abi.UFFDIO_REGISTER_MODE_MISSING
WP = abi.UFFDIO_REGISTER_MODE_WP


def serve(uffd: Userfaultfd, data: bytes) -> int:
    """A small handler: answers what waits, by copying `data` into each page; returns how many."""
    messages = uffd.read_messages()
    for message in messages:
        if isinstance(message, abi.Pagefault):
            uffd.copy(message.address, data.ljust(PAGE, b"\0"))
    return len(messages)


def test_a_reader_waits_for_the_handler_and_gets_its_bytes() -> None:
    with simulated_process() as p:
        memory = p.map(4 * PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, MISSING).check()
        reader = p.read(memory.address + PAGE, 5)
        assert reader.waiting is not None
        assert "sleep until the fault" in reader.waiting
        assert serve(uffd, b"hello") == 1
        assert reader.result() == b"hello"


def test_a_read_that_waits_lets_the_others_run() -> None:
    with simulated_process(automatic=False) as p:
        memory = p.map(PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, MISSING).check()
        p.read(memory.address)
        (message,) = uffd.read_messages(wait=True)
        assert isinstance(message, abi.Pagefault)
        assert message.address == memory.address


def test_waiting_for_what_nobody_will_send_is_a_deadlock_and_not_a_hang() -> None:
    with simulated_process() as p, pytest.raises(Deadlock, match="nobody else can run"):
        p.userfaultfd().read_messages(wait=True)


def test_a_planned_failure_reaches_the_handler() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, MISSING).check()
        p.fail_next(uffd, "copy", EAGAIN, times=2)
        reader = p.read(memory.address)
        assert uffd.copy(memory.address, bytes(PAGE)) == abi.Outcome(0, EAGAIN)
        assert uffd.copy(memory.address, bytes(PAGE)).event_pending
        assert not reader.done
        assert uffd.copy(memory.address, bytes(PAGE)) == abi.Outcome(PAGE, 0)
        assert reader.result() == b"\0"


def test_an_event_that_is_unread_refuses_every_fill() -> None:
    with simulated_process() as p:
        memory = p.map(2 * PAGE)
        uffd = p.userfaultfd(abi.UFFD_FEATURE_EVENT_REMOVE)
        uffd.register(memory.address, memory.length, MISSING).check()
        dropper = p.madvise(memory.address, PAGE, "DONTNEED")
        assert uffd.copy(memory.address + PAGE, bytes(PAGE)).event_pending
        assert uffd.read_messages() == [abi.Remove(memory.address, memory.address + PAGE)]
        dropper.result()
        assert uffd.copy(memory.address + PAGE, bytes(PAGE)).ok


def test_a_write_to_a_protected_page_is_reported_once_and_released() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE)
        p.poke(memory.address, b"before")
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, WP).check()
        uffd.writeprotect(memory.address, PAGE, abi.UFFDIO_WRITEPROTECT_MODE_WP).check()
        writer = p.write(memory.address, b"after!")
        (message,) = uffd.read_messages()
        assert isinstance(message, abi.Pagefault)
        assert message.flags == abi.UFFD_PAGEFAULT_FLAG_WRITE | abi.UFFD_PAGEFAULT_FLAG_WP
        assert p.peek(memory.address, 6) == b"before"
        uffd.writeprotect(memory.address, PAGE, 0).check()
        writer.result()
        assert p.peek(memory.address, 6) == b"after!"


def test_a_minor_fault_is_answered_through_the_view() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE, kind="shmem")
        assert memory.file is not None
        view = p.map(PAGE, file=memory.file)
        p.poke(view.address, b"cached")
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, abi.UFFDIO_REGISTER_MODE_MINOR).check()
        reader = p.read(memory.address, 6)
        (message,) = uffd.read_messages()
        assert isinstance(message, abi.Pagefault)
        assert message.flags == abi.UFFD_PAGEFAULT_FLAG_MINOR
        assert uffd.continue_(memory.address, PAGE) == abi.Outcome(PAGE, 0)
        assert uffd.continue_(memory.address, PAGE).errno == EEXIST
        assert reader.result() == b"cached"


def test_a_forked_child_is_served_through_the_descriptor_in_the_message() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE)
        uffd = p.userfaultfd(abi.UFFD_FEATURE_EVENT_FORK)
        uffd.register(memory.address, memory.length, MISSING).check()
        forked = p.fork(lambda t: t.load(memory.address, 3))
        (message,) = uffd.read_messages()
        assert isinstance(message, abi.Fork)
        p.settle()
        child = forked.result()
        theirs = p.take(message.ufd)
        assert serve(theirs, b"for") == 1
        assert child.main.result == b"for"
        assert uffd.read_messages() == []


def test_poison_is_the_signal_that_the_touching_thread_gets() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, MISSING).check()
        reader = p.read(memory.address)
        uffd.poison(memory.address, PAGE).check()
        with pytest.raises(MemoryFault, match="SIGBUS"):
            reader.result()


def test_closing_lets_sleepers_go_on_into_zeros() -> None:
    with simulated_process() as p:
        memory = p.map(PAGE)
        with p.userfaultfd() as uffd:
            uffd.register(memory.address, memory.length, MISSING).check()
            reader = p.read(memory.address, 4)
        assert reader.result() == bytes(4)
        with pytest.raises(ValueError, match="closed"):
            uffd.fileno()


def test_the_test_decides_who_runs() -> None:
    with simulated_process(automatic=False, trace=True) as p:
        memory = p.map(PAGE)
        uffd = p.userfaultfd()
        uffd.register(memory.address, memory.length, MISSING).check()
        reader = p.read(memory.address)
        while not uffd.readable:
            p.step(reader)
        # The message is in the queue, and the reader does not sleep yet: a fill now must not be lost.
        uffd.copy(memory.address, b"x" * PAGE).check()
        p.settle()
        assert reader.result() == b"x"
        assert not any("sleep" in line.what for line in p.scheduler.trace or ())


def test_time_passes_only_when_the_test_says_so() -> None:
    with simulated_process() as p:
        said: list[tuple[float, str]] = []
        p.after(2.0, lambda: said.append((p.clock(), "second")))
        p.after(0.5, lambda: said.append((p.clock(), "first")))
        p.advance(1.0)
        assert said == [(0.5, "first")]
        p.advance(1.5)
        assert said == [(0.5, "first"), (2.0, "second")]
        assert p.clock() == 2.5


def test_without_privileges_only_user_faults_are_to_be_had() -> None:
    with simulated_process(privileged=False) as p:
        assert not p.userfaultfd().kernel_faults
        with pytest.raises(OSError, match=r"EPERM|EACCES") as refused:
            p.userfaultfd(kernel_faults=True)
        assert refused.value.errno in (EPERM, 13)


def test_an_older_kernel_lacks_what_it_lacked() -> None:
    with simulated_process("6.1") as p:
        with pytest.raises(OSError, match="POISON"):
            p.userfaultfd(abi.UFFD_FEATURE_POISON)
        assert p.userfaultfd(prefer=abi.UFFD_FEATURE_POISON).features == 0


def test_the_class_opens_in_the_process_whose_block_is_open() -> None:
    with simulated_process() as p, Userfaultfd() as uffd:
        assert uffd.context.mm is p.process.mm
    with pytest.raises(RuntimeError, match="simulated_process"):
        Userfaultfd()
