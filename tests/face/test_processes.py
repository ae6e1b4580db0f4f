"""Other processes: started by vfork, spawn and exec, forked, and ended, while pages are dirty."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from conftest import RunChild

LENGTH = 1_000_003


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(LENGTH))
    return path


def test_programs_that_are_started_inherit_nothing_and_disturb_nothing(path: Path) -> None:
    """subprocess uses vfork, os.posix_spawn the C library's way; both run while pages come and go."""
    listing = """
import os
for fd in os.listdir("/proc/self/fd"):
    try:
        link = os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        continue
    if "userfault" in link:
        print(link)
"""
    with userfault.open(path, "r+", block="4KiB", memory_limit="64KiB") as region:
        array = region.ndarray(np.uint8)
        stop = threading.Event()

        def sweep(part: np.ndarray[Any, Any]) -> None:
            while not stop.is_set():
                part += 1

        sweeper = threading.Thread(target=sweep, args=(array[::512],))
        sweeper.start()
        try:
            for _ in range(5):
                for close_fds in (True, False):
                    out = subprocess.run(
                        [sys.executable, "-S", "-c", listing],
                        close_fds=close_fds,
                        capture_output=True,
                        check=True,
                        text=True,
                    )
                    assert out.stdout == ""
                child = os.posix_spawn("/bin/true", ["true"], {})
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            sweeper.join()
        assert len(set(array[::512].tolist())) == 1
        del array


def test_exec_leaves_the_file_old_or_new_and_gives_the_lock_up(path: Path, run_child: RunChild) -> None:
    code = """
        import os, sys, userfault
        region = userfault.open(sys.argv[1], "r+", block="4KiB")
        view = memoryview(region)
        view[:100_000] = b"a" * 100_000
        region.flush(0, 50_000)
        program = "import sys, userfault; userfault.open(sys.argv[1], 'r+').close(); print('opened')"
        os.execv(sys.executable, [sys.executable, "-c", program, sys.argv[1]])
        """
    assert run_child(code.replace("\n        ", "\n"), str(path)).stdout == "opened\n"
    data = path.read_bytes()
    assert data[:50_000] == b"a" * 50_000, "what a flush covered is there"
    assert set(data[50_000:100_000]) <= {0, ord("a")}
    assert not any(data[100_000:])


def test_a_forked_child_that_ends_as_python_does_flushes_nothing_of_its_parents(
    path: Path, run_child: RunChild
) -> None:
    code = """
        import os, sys, userfault
        array = userfault.memmap(sys.argv[1])
        array[0] = 1
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert open(sys.argv[1], "rb").read(1) == b"\\0", "the child has flushed"
        array[1] = 2
        """
    done = run_child(code.replace("\n        ", "\n"), str(path))
    assert done.stderr == ""
    assert path.read_bytes()[:3] == b"\1\2\0"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_of_any_start_method_opens_the_file_itself(path: Path, method: str) -> None:
    with userfault.open(path, "r+") as region:
        memoryview(region)[5] = 9
        region.flush()
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            assert pool.apply(_first, (str(path),)) == [0, 0, 0, 0, 0, 9]


def _first(path: str) -> list[int]:
    with userfault.open(path) as region:
        return list(region.pread(6, 0))


def test_every_open_region_is_flushed_at_exit_even_if_another_cannot_be(
    path: Path, run_child: RunChild
) -> None:
    code = """
        import sys, userfault
        from userfault.testing import FaultyStore, fail
        broken = userfault.open(FaultyStore(userfault.MemoryStore(5000), [fail("write")]), "r+")
        memoryview(broken)[0] = 1
        arrays = [userfault.memmap(sys.argv[1] + str(i), mode="w+", shape=10) for i in range(3)]
        for array in arrays:
            array[:] = 7
        raise KeyboardInterrupt
        """
    done = run_child(code.replace("\n        ", "\n"), str(path), check=False)
    assert done.stderr.count("could not be flushed at exit") == 1
    for i in range(3):
        assert Path(str(path) + str(i)).read_bytes() == b"\7" * 10


def test_a_thread_that_waits_for_a_page_at_exit_does_not_keep_the_process(run_child: RunChild) -> None:
    code = """
        import os, sys, threading, time, userfault
        from userfault.testing import FaultyStore, hang
        store = FaultyStore(userfault.MemoryStore(1 << 20), [hang("read", offset=500_000, length=4096)])
        region = userfault.open(store, block="4KiB")
        # A system call waits without the interpreter lock.
        read, write = os.pipe()
        part = memoryview(region)[500_000:500_010]
        threading.Thread(target=os.write, args=(write, part), daemon=True).start()
        while not store.hung:
            time.sleep(0.01)
        print("exits", flush=True)
        """
    done = run_child(code.replace("\n        ", "\n"), timeout=40)
    assert done.stdout == "exits\n"
    assert done.seconds < 30
