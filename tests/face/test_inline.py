"""fault="inline": the touching thread brings its own pages, whatever else the program does with SIGBUS."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import userfault
from conftest import RunChild
from userfault import MemoryStore

WORDS = 1 << 18
KINDS = [("4KiB", "4KiB"), ("64KiB", "4KiB"), ("2MiB", "4KiB"), ("2MiB", "2MiB")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    np.arange(WORDS, dtype=np.uint64).tofile(path)
    return path


BEGIN = """
import faulthandler, mmap, os, signal, sys, threading
import numpy as np
import userfault

path = sys.argv[1]

def opened(mode="r", **options):
    return userfault.open(path, mode, **{"block": "4KiB", "fault": "inline", **options})

def right(region, step=512, start=0):
    words = region.ndarray(np.uint64)[start::step]
    return bool((words == np.arange(start, len(region) // 8, step)).all())

def foreign_sigbus():
    "Touches a file beyond its end: a SIGBUS that is nobody's to answer."
    with open(path + ".short", "wb+") as file:
        file.truncate(8192)
        memory = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        memory[5000]
    print("lived on", flush=True)
"""


@pytest.mark.parametrize(("block", "pages"), KINDS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_several_threads_read_and_write_what_is_there(path: Path, mode: str, block: str, pages: str) -> None:
    try:
        region = userfault.open(path, mode, block=block, pages=pages, memory_limit="256KiB", fault="inline")
    except OSError as error:
        pytest.skip(f"needs pages of {pages}: {error}")
    with region:
        assert region.fault == "inline"
        words = region.ndarray(np.uint64)
        wrong: list[int] = []

        def walk(seed: int, words: np.ndarray[tuple[int], np.dtype[np.uint64]] = words) -> None:
            places = np.random.default_rng(seed).integers(0, WORDS // 8, 2000 if block != "2MiB" else 40)
            # Each thread has the words of its own remainder, so that nobody else changes what it compares.
            for place in (places * 8 + seed).tolist():
                if words[place] not in (place, place + 1):
                    wrong.append(place)
                if mode == "r+":
                    words[place] = place + 1

        threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert region.stats().faults_missing > 0
        expected = words.copy()
        del words, walk, thread, threads
    assert np.array_equal(np.fromfile(path, np.uint64), expected)


def test_many_threads_wait_for_one_block(path: Path) -> None:
    for _ in range(20):
        with userfault.open(path, block="2MiB", pages="4KiB", fault="inline") as region:
            words = region.ndarray(np.uint64)
            barrier = threading.Barrier(8)
            seen: list[int] = []

            def touch(
                place: int,
                words: np.ndarray[tuple[int], np.dtype[np.uint64]] = words,
                barrier: threading.Barrier = barrier,
                seen: list[int] = seen,
            ) -> None:
                barrier.wait()
                seen.append(int(words[place]) - place)

            threads = [threading.Thread(target=touch, args=(i * 512,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert seen == [0] * 8
            assert region.stats().bytes_read == 2 << 20
            del words, touch


def test_the_limit_holds_and_what_leaves_is_written_back(path: Path) -> None:
    with userfault.open(path, "r+", block="4KiB", memory_limit="512KiB", fault="inline") as region:
        words = region.ndarray(np.uint64)
        for _ in range(3):
            words += np.uint64(1)
        stats = region.stats()
        assert stats.resident + stats.resting <= 512 << 10
        assert stats.evictions >= 3 * (2 << 20) // 4096 - 128
        del words
    assert np.array_equal(np.fromfile(path, np.uint64), np.arange(WORDS, dtype=np.uint64) + np.uint64(3))


def test_only_what_was_written_is_written_back(path: Path) -> None:
    with userfault.open(path, "r+", block="64KiB", pages="4KiB", fault="inline") as region:
        words = region.ndarray(np.uint64)
        assert int(words.sum()) == WORDS * (WORDS - 1) // 2
        words[[0, 100_000]] = 7
        region.flush()
        assert region.stats().bytes_written == 2 * 4096
        del words


def test_pages_that_the_program_threw_away_come_again(path: Path) -> None:
    import ctypes
    import mmap

    madvise = ctypes.CDLL(None, use_errno=True).madvise
    with userfault.open(path, block="64KiB", fault="inline") as region:
        words = region.ndarray(np.uint64)
        for _ in range(3):
            assert int(words[10_000]) == 10_000
            assert madvise(ctypes.c_void_p(region.address), ctypes.c_size_t(1 << 20), mmap.MADV_DONTNEED) == 0
        del words


def test_system_calls_on_absent_memory_fail_and_pins_and_copies_are_the_cure(
    path: Path, tmp_path: Path
) -> None:
    data = path.read_bytes()
    with (
        userfault.open(path, "r+", block="4KiB", fault="inline") as region,
        (tmp_path / "out").open("wb+", 0) as file,
    ):
        assert not region.kernel_faults
        view = memoryview(region)
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EFAULT))):
            os.write(file.fileno(), view[:8192])
        with region.pin(0, 8192):
            assert os.write(file.fileno(), view[:8192]) == 8192
        assert region.pread(5000, 100_000) == data[100_000:105_000]
        assert region.pwrite(b"x" * 5000, 200_001) == 5000
        assert region.readinto(io.BytesIO(b"y" * 100), 300_000, 100) == 100
        assert bytes(view[200_001:205_001]) == b"x" * 5000
        assert bytes(view[300_000:300_101]) == b"y" * 100 + data[300_100:300_101]
        view.release()


def test_a_store_that_is_no_file_is_read_by_others_while_the_toucher_holds_the_interpreter(
    run_child: RunChild, path: Path
) -> None:
    done = run_child(
        BEGIN
        + """
store = userfault.MemoryStore(bytes(range(256)) * 4096)
with userfault.open(store, "r+", block="4KiB", memory_limit="64KiB", fault="inline") as region:
    view = memoryview(region)
    assert all(view[i] == i % 256 for i in range(0, len(view), 1001))
    view[70000] = 3
    view.release()
assert store.getvalue()[70000] == 3
print("whole")
""",
        str(path),
    )
    assert done.stdout == "whole\n"


def test_private_changes_work_too(path: Path) -> None:
    before = path.read_bytes()
    with userfault.open(path, "c", block="4KiB", memory_limit="256KiB", fault="inline") as region:
        words = region.ndarray(np.uint64)
        words *= np.uint64(3)
        assert np.array_equal(words, np.arange(WORDS, dtype=np.uint64) * np.uint64(3))
        del words
    assert path.read_bytes() == before


BEFORE = {
    "faulthandler": "faulthandler.enable()",
    "nobody": "faulthandler.disable()",
    "a Python handler": "faulthandler.disable(); signal.signal(signal.SIGBUS, lambda *args: print('seen'))",
}
AFTER = {
    "nothing": "",
    "faulthandler.enable": "faulthandler.enable()",
    "faulthandler.disable": "faulthandler.disable()",
    "faulthandler on and off": "faulthandler.enable(); faulthandler.disable()",
    "signal.signal": "signal.signal(signal.SIGBUS, lambda *args: print('seen'))",
    "the default": "signal.signal(signal.SIGBUS, signal.SIG_DFL)",
    "ignored": "signal.signal(signal.SIGBUS, signal.SIG_IGN)",
}
LOOKS = {
    "open": "opened().close()",
    "prefetch": "region.prefetch([(0, 1)])",
    "stats": "region.stats()",
    "userfault.stats": "userfault.stats()",
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("after", AFTER)
def test_whoever_takes_sigbus_loses_it_again_and_gets_what_is_not_ours(
    run_child: RunChild, path: Path, before: str, after: str
) -> None:
    done = run_child(
        BEGIN
        + f"""
{BEFORE[before]}
region = opened()
assert right(region)
for look in {list(LOOKS.values())}:
    region.evict()
    {AFTER[after] or "pass"}
    exec(look)
    assert right(region)
print("touched", flush=True)
foreign_sigbus()
""",
        str(path),
        check=False,
        timeout=30,
    )
    assert "touched" in done.stdout
    assert "lived on" not in done.stdout
    assert done.status == -signal.SIGBUS, done
    told = "Bus error" in done.stderr
    if (before, after) in {("faulthandler", "nothing"), ("nobody", "faulthandler.enable")}:
        assert told, done.stderr
    if after in ("faulthandler.disable", "the default") or (before, after) == ("nobody", "nothing"):
        assert not told, done.stderr


def test_a_signal_that_was_sent_reaches_the_handler_that_python_had(run_child: RunChild, path: Path) -> None:
    done = run_child(
        BEGIN
        + """
faulthandler.disable()
signal.signal(signal.SIGBUS, lambda *args: print("seen", flush=True))
region = opened()
os.kill(os.getpid(), signal.SIGBUS)
assert right(region)
signal.signal(signal.SIGBUS, signal.SIG_IGN)
region.stats()
os.kill(os.getpid(), signal.SIGBUS)
print("ignored", flush=True)
signal.signal(signal.SIGBUS, signal.SIG_DFL)
region.stats()
os.kill(os.getpid(), signal.SIGBUS)
print("lived on", flush=True)
""",
        str(path),
        check=False,
    )
    assert done.stdout == "seen\nignored\n"
    assert done.status == -signal.SIGBUS


def test_faulthandler_that_comes_and_goes_a_hundred_times_makes_no_ring(
    run_child: RunChild, path: Path
) -> None:
    done = run_child(
        BEGIN
        + """
region = opened()
for turn in range(100):
    faulthandler.disable() if turn % 2 else faulthandler.enable()
    region.stats()
    region.evict()
    assert right(region, 4096)
faulthandler.enable()
region.stats()
threads = [threading.Thread(target=foreign_sigbus) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""",
        str(path),
        check=False,
        timeout=60,
    )
    assert done.status == -signal.SIGBUS, done
    assert "Bus error" in done.stderr


UNDER_PYTEST = """
import faulthandler
import numpy as np, pytest, userfault

@pytest.fixture(scope="session")
def region(tmp_path_factory):
    path = tmp_path_factory.mktemp("inline") / "numbers"
    np.arange(1 << 18, dtype=np.uint64).tofile(path)
    with userfault.open(path, block="4KiB", memory_limit="256KiB", fault="inline") as region:
        yield region

@pytest.mark.parametrize("turn", range(3))
def test_touches(region, turn, capfd):
    words = region.ndarray(np.uint64)[turn::512]
    assert (words == np.arange(turn, 1 << 18, 512)).all()
    print("touched, with faulthandler" if faulthandler.is_enabled() else "touched, without it")
    del words
    assert capfd.readouterr().err == ""
"""


@pytest.mark.parametrize(
    "arguments", [[], ["-p", "no:faulthandler"], ["-s"], ["-o", "faulthandler_timeout=1"]]
)
def test_the_tests_of_a_program_touch_under_pytest(
    run_child: RunChild, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "test_program.py").write_text(UNDER_PYTEST)
    code = "import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    done = run_child(
        code, "-q", "-p", "no:cacheprovider", *arguments, str(tmp_path / "test_program.py"), timeout=100
    )
    assert "3 passed" in done.stdout, done.stdout


def test_until_somebody_looks_a_taken_handler_is_gone(run_child: RunChild, path: Path) -> None:
    done = run_child(
        BEGIN
        + """
faulthandler.disable()
region = opened()
faulthandler.enable()
region.ndarray("u1")[0]
print("lived on")
""",
        str(path),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "lived on" not in done.stdout


def test_a_thread_that_blocks_sigbus_is_told_where_it_can_be_and_killed_where_not(
    run_child: RunChild, path: Path
) -> None:
    done = run_child(
        BEGIN
        + """
region = opened()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
for call in opened, lambda: region.prefetch([(0, 1)]):
    try:
        call()
    except ValueError as error:
        print(error)
region.stats()
region.stats()
assert region.pread(8, 800) == (100).to_bytes(8, "little")
sys.stdout.flush()
region.ndarray("u1")[1_000_000]
print("lived on")
""",
        str(path),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("SIGBUS is blocked in this thread" in line for line in lines)
    assert done.stderr.count("SIGBUS is blocked in this thread") == 1


def test_threads_of_32_kib_of_stack_are_enough(run_child: RunChild, path: Path) -> None:
    done = run_child(
        BEGIN
        + """
import ctypes
threading.stack_size(32768)
region = opened("r+", memory_limit="64KiB")
words = region.ndarray(np.uint64)
# A plain copy in C: NumPy itself wants more stack than this.
copy = ctypes.CDLL(None).memcpy
copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
into = bytearray(len(region))
target = (ctypes.c_char * len(into)).from_buffer(into)
def run(number):
    for start in range(number * 4096, len(into), 4 * 4096):
        copy(ctypes.addressof(target) + start, region.address + start, 4096)
threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert (np.frombuffer(into, np.uint64) == np.arange(len(into) // 8)).all()
print("whole")
""",
        str(path),
    )
    assert done.stdout == "whole\n"


def test_a_child_of_a_fork_in_a_thread_gets_sigsegv_and_opens_its_own(
    run_child: RunChild, path: Path
) -> None:
    done = run_child(
        BEGIN
        + """
faulthandler.disable()
import random, warnings
warnings.simplefilter("ignore")
region = opened(memory_limit="256KiB")
words = region.ndarray(np.uint64)
stop = threading.Event()
def touch():
    while not stop.is_set():
        place = random.randrange(len(words))
        assert words[place] == place
touchers = [threading.Thread(target=touch) for _ in range(3)]
[thread.start() for thread in touchers]
def fork(what):
    pid = os.fork()
    if pid == 0:
        try:
            what()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]
def own():
    with opened() as mine:
        assert right(mine)
        os.kill(os.getpid(), 0)
    os._exit(7)
def foreign():
    with opened() as mine:
        assert right(mine)
        foreign_sigbus()
ends = []
def forks():
    for _ in range(5):
        ends.append(fork(lambda: words[5]))
        ends.append(fork(own) >> 8)
        ends.append(fork(foreign))
forker = threading.Thread(target=forks)
forker.start(); forker.join()
stop.set()
[thread.join() for thread in touchers]
assert right(region)
print(ends)
""",
        str(path),
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == str([int(signal.SIGSEGV), 7, int(signal.SIGBUS)] * 5)


def test_a_process_that_is_started_while_pages_are_touched_starts(run_child: RunChild, path: Path) -> None:
    done = run_child(
        BEGIN
        + """
import subprocess
region = opened(memory_limit="256KiB")
stop = threading.Event()
def touch():
    while not stop.is_set():
        assert right(region, 513)
thread = threading.Thread(target=touch)
thread.start()
for _ in range(10):
    assert subprocess.run(["true"]).returncode == 0
stop.set(); thread.join()
print("started")
""",
        str(path),
    )
    assert done.stdout == "started\n"


def test_a_block_that_cannot_be_read_is_sigbus_with_a_word_why_and_can_be_healed(
    run_child: RunChild, path: Path
) -> None:
    program = (
        BEGIN
        + """
from userfault.testing import FaultyStore, fail
store = FaultyStore(userfault.FileStore(path), [fail("read", count=1)])
region = userfault.open(store, block="4KiB", fault="inline")
words = region.ndarray(np.uint64)
"""
    )
    died = run_child(program + "words[5]", str(path), check=False)
    assert died.status == -signal.SIGBUS
    assert "4096 bytes at offset 0 could not be read" in died.stderr
    assert "Bus error" in died.stderr
    healed = run_child(
        program
        + """
try:
    region.prefetch([(0, 1)], wait=True)
except userfault.PoisonedError:
    pass
assert len(region.errors) == 1
assert region.heal(0, 4096) == 4096
assert words[5] == 5
print("healed")
""",
        str(path),
    )
    assert healed.stdout == "healed\n"


def test_a_truncated_file_is_sigbus_and_not_zeros(run_child: RunChild, path: Path) -> None:
    done = run_child(
        BEGIN
        + "\nregion = opened()\nos.truncate(path, 8192)\nregion.ndarray('u1')[100_000]\nprint('lived on')",
        str(path),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    assert "was truncated while it was open" in done.stderr


def test_a_closed_region_is_sigsegv_also_for_a_thread_that_waits_for_a_page(
    run_child: RunChild, path: Path
) -> None:
    touched = run_child(
        BEGIN
        + """
array = userfault.memmap(path, np.uint64, "r")
region = opened()
words = region.ndarray(np.uint64)
region._close_under_arrays()
words[5]
""",
        str(path),
        check=False,
    )
    assert touched.status == -signal.SIGSEGV
    waited = run_child(
        BEGIN
        + """
import time
from userfault.testing import FaultyStore, hang
store = FaultyStore(userfault.FileStore(path), [hang("read")])
region = userfault.open(store, block="4KiB", fault="inline", retry_for=1.0)
words = region.ndarray(np.uint64)
thread = threading.Thread(target=lambda: np.add(words[:5], 1))
thread.start()
while not store.hung:
    time.sleep(0.001)
region._abandon()
time.sleep(10)
""",
        str(path),
        check=False,
        timeout=30,
    )
    assert waited.status in (-signal.SIGSEGV, -signal.SIGBUS), waited


def test_a_plain_user_needs_no_privilege(run_child: RunChild, path: Path) -> None:
    path.chmod(0o644)
    done = run_child(
        BEGIN
        + """
import ctypes
descriptor = os.open(path, os.O_RDONLY)
userfault.open, userfault.stats, userfault.Region
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    # Who has changed its identity may not look at itself before it says so.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
path = f"/proc/self/fd/{descriptor}"
with opened(memory_limit="64KiB") as region:
    assert right(region)
print("whole")
""",
        str(path),
    )
    assert done.stdout == "whole\n"


def test_a_way_that_does_not_exist_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="one of threads, inline"):
        userfault.open(path, fault="magic")  # type: ignore[arg-type]


def test_pickling_keeps_the_way(path: Path) -> None:
    import pickle

    with userfault.open(path, fault="inline") as region, pickle.loads(pickle.dumps(region)) as copy:
        assert copy.fault == "inline"
        assert right_words(copy)
    with userfault.open(MemoryStore(4096)) as region:
        assert region.fault == "threads"


def right_words(region: userfault.Region) -> bool:
    return bool((region.ndarray(np.uint64)[::512] == np.arange(0, WORDS, 512)).all())
