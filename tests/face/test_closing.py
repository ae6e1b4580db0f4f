"""When a region ends: close, with, garbage, exit, fork."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from conftest import RunChild
from userfault import MemoryStore, StoreError
from userfault.testing import FaultyStore, fail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(100_000))
    return path


def test_close_is_refused_while_arrays_or_views_live_and_changes_nothing(path: Path) -> None:
    region = userfault.open(path, "r+")
    array = region.ndarray("u1")
    part = array[5:10]
    view = memoryview(region)
    del array
    with pytest.raises(BufferError, match="2 arrays or memoryviews"):
        region.close()
    part[0] = 1
    view.release()
    with pytest.raises(BufferError, match="1 array"):
        region.close()
    del part
    region.close()
    assert path.read_bytes()[5] == 1


def bytes_in_memory() -> int:
    """What the shared memory of all regions of this process takes, mapped or not."""
    taken = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "(deleted)" in os.readlink(link):
                taken += link.stat().st_blocks * 512
    return taken


@pytest.mark.parametrize("block", ["64KiB", "2MiB"])
def test_a_closed_region_holds_no_memory_as_long_as_somebody_holds_it(block: str) -> None:
    before = bytes_in_memory()
    with userfault.open(MemoryStore(8 << 20), "r+", block=block) as region:
        region.ndarray("u1")[:] = 1
        assert bytes_in_memory() >= before + (8 << 20)
    assert region.closed
    assert bytes_in_memory() == before


def test_a_closed_region_answers_like_a_closed_file(path: Path) -> None:
    region = userfault.open(path, "r+")
    region.close()
    region.close()
    assert region.closed
    assert "closed" in repr(region)
    for call in (
        region.flush,
        lambda: region.pread(1, 0),
        lambda: region.pwrite(b"x", 0),
        lambda: region.prefetch([(0, 1)]),
        region.pin,
        region.evict,
        region.resident,
        lambda: region.heal(0, 1),
        lambda: memoryview(region),
        lambda: region.ndarray("u1"),
        region.__enter__,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert region.stats().resident == 0
    assert region.errors == []


def test_the_with_statement_closes(path: Path) -> None:
    with userfault.open(path, "r+") as region:
        memoryview(region)[0] = 9
    assert region.closed
    assert path.read_bytes()[0] == 9


def test_an_exception_in_the_body_is_not_hidden_by_living_arrays(path: Path) -> None:
    region = userfault.open(path, "r+")
    array = region.ndarray("u1")

    def body(array: np.ndarray[Any, Any]) -> None:
        with region:
            array[0] = 9
            raise KeyError

    with pytest.raises(KeyError):
        body(array)
    assert not region.closed
    assert path.read_bytes()[0] == 9, "what was written is flushed all the same"
    del array
    region.close()


def test_arrays_that_outlive_the_with_block_are_an_error(path: Path) -> None:
    with pytest.raises(BufferError), userfault.open(path) as region:
        array = region.ndarray("u1")
    assert array[0] == 0
    del array
    region.close()


def test_a_region_that_nobody_holds_is_flushed_and_gives_its_lock_up(path: Path) -> None:
    region = userfault.open(path, "r+")
    array = region.ndarray("u1")
    del region
    array[3] = 7
    del array
    gc.collect()
    assert path.read_bytes()[3] == 7
    userfault.open(path, "r+").close()


def test_what_cannot_be_written_when_a_region_is_dropped_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: seen.append(args.exc_value))
    region = userfault.open(FaultyStore(MemoryStore(5000), [fail("write")]), "r+")
    memoryview(region)[0] = 1
    del region
    gc.collect()
    assert [type(error) for error in seen] == [StoreError]


def test_a_close_that_cannot_write_leaves_everything_as_it_was() -> None:
    memory = MemoryStore(5000)
    region = userfault.open(FaultyStore(memory, [fail("write", count=3)]), "r+")
    memoryview(region)[0] = 1
    failed = 0
    while not region.closed:
        with contextlib.suppress(StoreError):
            region.close()
            break
        failed += 1
        assert memoryview(region)[0] == 1
    assert 1 <= failed <= 3
    assert region.closed
    assert memory.getvalue()[0] == 1


def test_open_regions_are_flushed_at_exit(path: Path, run_child: RunChild) -> None:
    run_child(
        """
        import sys, userfault
        region = userfault.open(sys.argv[1], "r+")
        keep = region.ndarray("u1")
        keep[5] = 42
        array = userfault.memmap(sys.argv[2], mode="w+", shape=10)
        array[:] = 1
        sys.exit(0)
        """.replace("\n        ", "\n"),
        str(path),
        str(path) + "2",
    )
    assert path.read_bytes()[5] == 42
    assert Path(str(path) + "2").read_bytes() == b"\1" * 10


def test_an_exit_that_cannot_flush_says_so_on_one_line(run_child: RunChild) -> None:
    done = run_child(
        """
        import userfault
        from userfault.testing import FaultyStore, fail
        region = userfault.open(FaultyStore(userfault.MemoryStore(5000), [fail("write")]), "r+")
        memoryview(region)[0] = 1
        """.replace("\n        ", "\n"),
    )
    lines = [line for line in done.stderr.splitlines() if "could not be flushed at exit" in line]
    assert len(lines) == 1
    assert "memory (5000 bytes)" in lines[0]


def test_an_unhandled_exception_flushes_too(path: Path, run_child: RunChild) -> None:
    code = "import sys, userfault\na = userfault.memmap(sys.argv[1])\na[0] = 9\nraise SystemError"
    assert run_child(code, str(path), check=False).status == 1
    assert path.read_bytes()[0] == 9


def test_exit_with_a_thread_that_still_touches_does_not_crash(path: Path, run_child: RunChild) -> None:
    code = """
        import sys, threading, userfault
        a = userfault.memmap(sys.argv[1], memory_limit="16KiB", block="4KiB")
        def touch():
            while True:
                a[:] += 1
        threading.Thread(target=touch, daemon=True).start()
        """
    for _ in range(3):
        run_child(code.replace("\n        ", "\n"), str(path))


def test_os_exit_flushes_nothing_and_ends_at_once(path: Path, run_child: RunChild) -> None:
    code = "import os, sys, userfault\na = userfault.memmap(sys.argv[1])\na[0] = 9\nos._exit(3)"
    assert run_child(code, str(path), check=False).status == 3
    assert path.read_bytes()[0] == 0


def test_a_touch_after_memmap_close_is_sigsegv(path: Path, run_child: RunChild) -> None:
    code = """import sys, userfault
a = userfault.memmap(sys.argv[1])
a[0] = 9
view = a[5:]
a.close()
view[0]
"""
    done = run_child(code, str(path), check=False)
    assert done.status == -signal.SIGSEGV
    assert 'File "<string>", line 6' in done.stderr
    assert path.read_bytes()[0] == 9


def test_a_forked_child_cannot_use_the_region_and_does_no_harm(path: Path) -> None:
    region = userfault.open(path, "r+")
    array = region.ndarray("u1")
    array[0] = 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answers = []
        for call in (region.flush, lambda: region.pread(1, 0), region.evict):
            try:
                call()
                answers.append("no error")
            except RuntimeError:
                answers.append("RuntimeError")
            except BaseException as error:
                answers.append(repr(error))
        try:
            del array
            region.close()
            del region
        except BaseException as error:
            answers.append(repr(error))
        os.write(write, " ".join(answers).encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 1000) == b"RuntimeError RuntimeError RuntimeError"
    os.close(read)
    array[1] = 2
    del array
    region.close()
    assert path.read_bytes()[:2] == b"\1\2"


def test_a_forked_child_that_touches_the_memory_gets_sigsegv(path: Path, run_child: RunChild) -> None:
    code = """
        import os, sys, userfault
        a = userfault.memmap(sys.argv[1])
        child = os.fork()
        if child == 0:
            a[0]
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == 11, status
        assert a[0] == 0
        """
    run_child(code.replace("\n        ", "\n"), str(path))


def test_a_forked_child_can_open_the_file_itself(path: Path) -> None:
    region = userfault.open(path)
    child = os.fork()
    if child == 0:
        with userfault.open(path) as own:
            os._exit(int(bytes(memoryview(own)[:10]) != bytes(10)))
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(memoryview(region)[:10]) == bytes(10)
    region.close()


def test_many_regions_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(np.arange(256, dtype=np.uint8).tobytes() * 1024)
    userfault.open(path).close()
    descriptors, maps = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("\n")
    for _ in range(300):
        with userfault.open(path, "r+") as region:
            assert memoryview(region)[255] == 255
    del region
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert Path("/proc/self/maps").read_text().count("\n") <= maps + 20
