"""What a program sees when a store fails: under a touch, at a flush, in a call."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

import userfault
from conftest import RunChild
from userfault import MemoryStore, PoisonedError, StoreError
from userfault.testing import FaultyStore, delay, fail, hang, shorten

BLOCK = 4096


def code(text: str) -> str:
    return "import faulthandler, sys, time, userfault\nfrom userfault.testing import *\n" + "\n".join(
        line.removeprefix("        ") for line in text.splitlines()
    )


def test_a_touch_that_fails_is_sigbus_with_the_cause_and_the_line(run_child: RunChild) -> None:
    done = run_child(
        code("""
        store = FaultyStore(userfault.MemoryStore(100_000), [fail("read", offset=8192, length=4096)])
        region = userfault.open(store, block="4KiB")
        view = memoryview(region)
        assert view[0] == 0
        print("alive", flush=True)
        view[9000]
        print("not reached")
        """),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    assert done.stdout == "alive\n"
    told = [line for line in done.stderr.splitlines() if "Input/output error" in line]
    assert len(told) == 1
    assert "memory (100000 bytes)" in told[0]
    assert "8192" in told[0]
    assert "Bus error" in done.stderr
    assert 'File "<string>", line 9' in done.stderr


def test_a_block_that_was_given_up_is_listed_and_heals(tmp_path: Path) -> None:
    memory = MemoryStore(bytes(BLOCK) + b"x" * BLOCK)
    store = FaultyStore(memory, [fail("read", errno=errno.ENXIO, offset=BLOCK, length=1)])
    with userfault.open(store, block=BLOCK) as region:
        before = time.time()
        assert region.pread(BLOCK, 0) == bytes(BLOCK)
        with pytest.raises(PoisonedError) as caught:
            region.pread(1, BLOCK + 5)
        assert (caught.value.offset, caught.value.length) == (BLOCK, BLOCK)
        assert "heal(4096, 4096)" in str(caught.value)
        (error,) = region.errors
        assert (error.offset, error.length, error.errno) == (BLOCK, BLOCK, errno.ENXIO)
        assert "No such device or address" in error.message
        assert before - 1 < error.time < time.time() + 1
        assert region.resident() == b"\1\3"
        assert region.stats().errors == 1
        with pytest.raises((StoreError, PoisonedError)):
            region.heal(0, 2 * BLOCK)
        store.plan = ()
        assert region.heal(0, 2 * BLOCK) == BLOCK
        assert region.errors == []
        assert region.pread(1, BLOCK) == b"x"
        assert region.heal(0, 2 * BLOCK) == 0


def test_other_blocks_live_on_beside_a_poisoned_one() -> None:
    store = FaultyStore(MemoryStore(10 * BLOCK), [fail("read", offset=BLOCK, length=1)])
    with userfault.open(store, "r+", block=BLOCK) as region:
        with pytest.raises(PoisonedError):
            region.pread(1, BLOCK)
        for block in (0, 2, 9):
            region.pwrite(b"ok", block * BLOCK)
            assert region.pread(2, block * BLOCK) == b"ok"


def test_retry_tries_again_until_the_store_is_well() -> None:
    store = FaultyStore(MemoryStore(b"x" * BLOCK), [fail("read", count=3)])
    with userfault.open(store, on_error="retry", retry_for=20) as region:
        assert memoryview(region)[0] == ord("x")
        assert len(store.calls("read")) >= 4
        assert region.errors == []


def test_retry_gives_up_in_the_end() -> None:
    store = FaultyStore(MemoryStore(BLOCK), [fail("read")])
    with userfault.open(store, on_error="retry", retry_for=0.3) as region:
        begin = time.monotonic()
        with pytest.raises(PoisonedError):
            region.pread(1, 0)
        assert 0.2 < time.monotonic() - begin < 5
        assert len(store.calls("read")) >= 2


def test_auto_does_not_retry_what_is_local() -> None:
    store = FaultyStore(MemoryStore(BLOCK), [fail("read")])
    with userfault.open(store, retry_for=20) as region:
        begin = time.monotonic()
        with pytest.raises(PoisonedError):
            region.pread(1, 0)
        assert time.monotonic() - begin < 5


def test_a_read_that_does_not_come_back_counts_as_failed() -> None:
    store = FaultyStore(MemoryStore(b"x" * 4 * BLOCK), [hang("read", offset=0, length=1)])
    with userfault.open(store, block=BLOCK, retry_for=0.3) as region:
        begin = time.monotonic()
        with pytest.raises(PoisonedError):
            region.pread(1, 0)
        assert 0.2 < time.monotonic() - begin < 5
        assert region.pread(1, BLOCK) == b"x", "others are served meanwhile"
        assert region.errors[0].offset == 0
        store.release()
        deadline = time.monotonic() + 10
        while True:
            try:
                if region.heal(0, BLOCK) == BLOCK:
                    break
            except (StoreError, PoisonedError):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert region.pread(1, 0) == b"x"


def test_a_touch_of_a_hung_store_ends_with_sigbus(run_child: RunChild) -> None:
    done = run_child(
        code("""
        region = userfault.open(FaultyStore(userfault.MemoryStore(5000), [hang("read")]), retry_for=0.3)
        memoryview(region)[0]
        """),
        check=False,
        timeout=30,
    )
    assert done.status == -signal.SIGBUS
    assert 'File "<string>", line 5' in done.stderr


def test_slow_reads_are_waited_for_and_other_threads_of_python_go_on() -> None:
    store = FaultyStore(MemoryStore(b"x" * BLOCK), [delay("read", 0.5)])
    with userfault.open(store) as region:
        ticks = 0
        thread = threading.Thread(target=region.pread, args=(1, 0))
        thread.start()
        while thread.is_alive():
            time.sleep(0.01)
            ticks += 1
        assert ticks > 10


def test_a_short_read_is_never_shown() -> None:
    store = FaultyStore(MemoryStore(b"x" * BLOCK), [shorten("read", 100, count=1)])
    with userfault.open(store) as region:
        with pytest.raises(PoisonedError):
            region.pread(1, 0)
        assert region.heal(0, len(region)) == len(region)
        assert bytes(region) == b"x" * BLOCK


def test_a_failed_flush_raises_keeps_the_data_and_the_next_one_writes_it() -> None:
    memory = MemoryStore(4 * BLOCK)
    store = FaultyStore(memory, [fail("write", errno=errno.ENOSPC)])
    with userfault.open(store, "r+", block=BLOCK) as region:
        view = memoryview(region)
        view[:] = b"y" * len(view)
        with pytest.raises(StoreError) as caught:
            region.flush()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == memory.name
        assert caught.value.what == "write"
        assert bytes(view) == b"y" * len(view)
        store.plan = ()
        region.flush()
        assert memory.getvalue() == b"y" * 4 * BLOCK
        del view


def test_after_a_failed_sync_everything_that_was_written_before_it_is_written_again() -> None:
    """The kernel forgets pages that it could not write, and calls them clean."""
    store = FaultyStore(MemoryStore(8 * BLOCK), [])
    with userfault.open(store, "r+", block=BLOCK) as region:
        memoryview(region)[0] = 1
        region.flush()
        memoryview(region)[3 * BLOCK] = 1
        region.flush(3 * BLOCK, BLOCK)
        store.plan = [fail("sync", count=2)]
        memoryview(region)[BLOCK] = 1
        memoryview(region)[6 * BLOCK] = 1
        for _ in range(2):
            before = len(store.calls("write"))
            with pytest.raises(StoreError) as caught:
                region.flush()
            assert caught.value.what == "sync"
            written = {call.offset for call in store.calls("write")[before:]}
            assert written == {BLOCK, 6 * BLOCK}
        before = len(store.calls("write"))
        region.flush()
        assert {call.offset for call in store.calls("write")[before:]} == {BLOCK, 6 * BLOCK}
        region.flush()
        assert len(store.calls("write")) == before + 2


def test_a_half_written_block_is_written_again_whole() -> None:
    memory = MemoryStore(16 * BLOCK)
    store = FaultyStore(memory, [shorten("write", errno=errno.ENOSPC, count=2)])
    with userfault.open(store, "r+", block=4 * BLOCK) as region:
        view = memoryview(region)
        view[:] = bytes(range(256)) * (len(view) // 256)
        for _ in range(4):
            try:
                region.flush()
                break
            except StoreError:
                continue
        assert memory.getvalue() == bytes(view)
        view.release()


def test_what_cannot_be_written_cannot_be_evicted_and_is_not_lost() -> None:
    memory = MemoryStore(4 * BLOCK)
    store = FaultyStore(memory, [fail("write")])
    with userfault.open(store, "r+", block=BLOCK) as region:
        memoryview(region)[0] = 5
        with pytest.raises(StoreError):
            region.evict()
        assert region.pread(1, 0) == b"\5"
        store.plan = ()
        with contextlib.suppress(StoreError):
            # The background write-back may have tried and failed as well; that is raised once.
            region.evict()
        region.evict()
        assert memory.getvalue()[0] == 5
        assert region.resident() == bytes(4)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, run_child: RunChild) -> None:
    """The file lives on a tmpfs that is smaller than the file, in a mount namespace of the child's own."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount a tmpfs")
    done = run_child(
        code("""
        import ctypes, errno, os
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):
            sys.exit(77)
        if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=1m"):
            sys.exit(77)
        region = userfault.open(sys.argv[1] + "/file", "w", length="4MiB")
        array = region.ndarray("u1")
        array[:] = 1
        try:
            region.flush()
        except userfault.StoreError as error:
            assert error.errno == errno.ENOSPC, error
            assert error.filename.endswith("/small/file"), error
            print(error)
        assert (array == 1).all()
        os.remove(sys.argv[1] + "/file")
        os._exit(0)
        """),
        str(mount),
        check=False,
    )
    if done.status == 77:
        pytest.skip("needs the right to mount a tmpfs")
    assert done.status == 0, done.stderr
    assert "No space left on device" in done.stdout


def test_a_file_truncated_underneath_is_sigbus_with_the_reason(tmp_path: Path, run_child: RunChild) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(1 << 20))
    done = run_child(
        code("""
        import os
        region = userfault.open(sys.argv[1])
        view = memoryview(region)
        os.truncate(sys.argv[1], 100)
        view[500_000]
        """),
        str(path),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    assert "was truncated while it was open: it had 1048576 bytes and now has 100" in done.stderr


def test_a_second_line_is_told_for_a_second_block_only(run_child: RunChild) -> None:
    done = run_child(
        code("""
        store = FaultyStore(userfault.MemoryStore(20_000), [fail("read")])
        region = userfault.open(store, block="4KiB")
        for offset in (0, 1, 2, 5000, 5001):
            try:
                region.pread(1, offset)
            except userfault.PoisonedError:
                pass
        region.close()
        """),
    )
    assert len(done.stderr.strip().splitlines()) == 2
