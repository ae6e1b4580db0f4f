"""A fault handler as people write it, rehearsed with the threads that it serves."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from userfault import abi
from userfault.model import Deadlock, MemoryFault
from userfault.testing import Rehearsal, rehearsal
from userfault.testing.rehearsals import StillRunning

if TYPE_CHECKING:
    from userfault.model import Userfaultfd

PAGE = 4096
MISSING = abi.UFFDIO_REGISTER_MODE_MISSING


def serve(uffd: Userfaultfd) -> None:
    """The smallest right handler: answers faults, keeps what was refused, wakes whatever happened."""
    while True:
        for message in uffd.read_messages(wait=True):
            if isinstance(message, abi.Pagefault):
                outcome = uffd.copy(message.address, b"d" * PAGE)
                while outcome.event_pending:
                    uffd.read_messages()
                    outcome = uffd.copy(message.address, b"d" * PAGE)
                uffd.wake(message.address, PAGE)


def registered(process: Rehearsal, pages: int = 4, features: int = 0) -> tuple[int, Userfaultfd]:
    memory = process.map(pages * PAGE)
    uffd = process.userfaultfd(features)
    uffd.register(memory, pages * PAGE, MISSING).check()
    return memory, uffd


@pytest.mark.parametrize("seed", range(20))
def test_a_handler_serves_many_readers_whoever_goes_first(seed: int) -> None:
    with rehearsal(seed=seed) as process:
        memory, uffd = registered(process)
        handler = process.start(serve, uffd)
        readers = [process.start(process.load, memory + n * PAGE, 2) for n in (0, 1, 1, 3)]
        process.run()
        assert [reader.result for reader in readers] == [b"dd"] * 4
        assert not handler.done
        assert "wait for a message" in (handler.waits_for or "")


@pytest.mark.parametrize("seed", range(20))
def test_it_survives_a_thread_that_throws_pages_away(seed: int) -> None:
    with rehearsal(seed=seed) as process:
        memory, uffd = registered(process, features=abi.UFFD_FEATURE_EVENT_REMOVE)
        process.start(serve, uffd)
        reader = process.start(process.load, memory)
        process.start(process.madvise, memory + PAGE, PAGE, "DONTNEED")
        process.run()
        assert reader.result == b"d"


def test_a_handler_that_forgets_eagain_is_caught_by_some_seed() -> None:
    def forgetful(uffd: Userfaultfd) -> None:
        while True:
            for message in uffd.read_messages(wait=True):
                if isinstance(message, abi.Pagefault):
                    uffd.copy(message.address, b"d" * PAGE)

    hung = []
    for seed in range(60):
        with rehearsal(seed=seed) as process:
            memory, uffd = registered(process, features=abi.UFFD_FEATURE_EVENT_REMOVE)
            process.start(forgetful, uffd)
            reader = process.start(process.load, memory)
            process.start(process.madvise, memory + PAGE, PAGE, "DONTNEED")
            process.run()
            hung.append(not reader.done)
    assert any(hung)
    assert not all(hung)


def trace_of(seed: int) -> list[str]:
    with rehearsal(seed=seed) as process:
        memory, uffd = registered(process)
        process.start(serve, uffd)
        for _ in range(3):
            process.start(process.load, memory)
        process.run()
        return [str(line) for line in process.trace]


def test_the_same_seed_is_the_same_execution() -> None:
    assert trace_of(3) == trace_of(3)
    assert len({tuple(trace_of(seed)) for seed in range(5)}) > 1


def test_calls_can_be_made_to_fail() -> None:
    with rehearsal() as process:
        memory, uffd = registered(process)
        process.fail("copy", errno.ENOMEM, times=2)
        process.fail("read_messages", errno.EIO)
        assert uffd.copy(memory, b"x" * PAGE) == abi.Outcome(0, errno.ENOMEM)
        with pytest.raises(OSError, match="output error") as raised:
            uffd.read_messages()
        assert raised.value.errno == errno.EIO
        assert uffd.copy(memory, b"x" * PAGE).errno == errno.ENOMEM
        assert uffd.copy(memory, b"x" * PAGE).ok
        assert process.failed == ["copy", "read_messages", "copy"]
        with pytest.raises(ValueError, match="no method"):
            process.fail("cope", errno.EIO)


def test_time_jumps_to_the_next_sleeper_and_no_further() -> None:
    with rehearsal() as process:
        woken: list[tuple[str, float]] = []

        def sleeper(name: str, seconds: float) -> None:
            process.sleep(seconds)
            woken.append((name, process.time()))

        process.start(sleeper, "late", 3600.0)
        process.start(sleeper, "early", 0.5)
        process.run(seconds=1)
        assert woken == [("early", 0.5)]
        assert process.time() == 1
        process.run()
        assert woken[1:] == [("late", 3600.0)]


def test_a_deadline_of_a_handler_can_be_tested_without_waiting() -> None:
    def with_deadline(uffd: Userfaultfd, process: Rehearsal) -> None:
        (message,) = uffd.read_messages(wait=True)
        assert isinstance(message, abi.Pagefault)
        deadline = process.time() + 30
        while process.time() < deadline:  # the source of its data does not answer
            process.sleep(1)
        uffd.poison(message.address, PAGE).check()

    with rehearsal() as process:
        memory, uffd = registered(process)
        process.start(with_deadline, uffd, process)
        reader = process.start(process.load, memory)
        process.run()
        with pytest.raises(MemoryFault, match="SIGBUS"):
            _ = reader.result
        assert 30 <= process.time() < 32


def test_two_threads_that_copy_bytes_at_once_do_not_mix_them() -> None:
    for seed in range(10):
        with rehearsal(seed=seed) as process:
            memory, uffd = registered(process)
            tasks = [process.start(uffd.copy, memory + n * PAGE, bytes((65 + n,)) * PAGE) for n in range(3)]
            process.run()
            assert all(task.result.ok for task in tasks)
            assert [process.load(memory + n * PAGE) for n in range(3)] == [b"A", b"B", b"C"]


def test_the_test_itself_cannot_hang() -> None:
    with rehearsal() as process:
        memory, _ = registered(process)
        with pytest.raises(Deadlock, match="nobody can change that"):
            process.load(memory)


def test_running_in_circles_is_told() -> None:
    def spin(process: Rehearsal) -> None:
        while True:
            process.system_call(lambda t: t.step("again"))

    with rehearsal(seed=5) as process:
        process.start(spin, process)
        with pytest.raises(StillRunning, match="seed 5"):
            process.run(steps=50)


def test_a_killed_thread_ends_where_it_sleeps() -> None:
    with rehearsal() as process:
        memory, _ = registered(process)
        reader = process.start(process.load, memory)
        process.run()
        assert not reader.done
        reader.kill()
        process.run()
        assert reader.done


def test_what_a_function_raises_reaches_the_test() -> None:
    def broken() -> None:
        raise LookupError("a mistake of the handler")

    with rehearsal() as process:
        process.start(broken)
        with pytest.raises(LookupError, match="mistake of the handler"):
            process.run()


def test_errors_are_those_of_the_operating_system() -> None:
    with rehearsal() as process:
        memory, uffd = registered(process)
        with pytest.raises(OSError, match="madvise") as raised:
            process.madvise(memory + 1, PAGE, "DONTNEED")
        assert raised.value.errno == errno.EINVAL
        with pytest.raises(ValueError, match="length"):
            uffd.copy(memory, memory)
        with pytest.raises(ValueError, match="3 bytes"):
            uffd.copy(memory, b"abc", PAGE)
        uffd.close()
        assert uffd.closed
        with pytest.raises(ValueError, match="closed"):
            uffd.wake(memory, PAGE)


def test_it_needs_no_compiled_part() -> None:
    code = (
        "import sys; sys.modules['userfault._native'] = None; sys.modules['numpy'] = None\n"
        "from userfault.testing import rehearsal\n"
        "with rehearsal() as p: print(p.load(p.map(4096)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "b'\\x00'\n", done.stderr
