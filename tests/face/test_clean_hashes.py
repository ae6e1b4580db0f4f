"""USERFAULT_DEBUG=hash: a write that the engine has not seen ends the process where it would be lost."""

from __future__ import annotations

import signal

import pytest

from conftest import RunChild

PROGRAM = """
import os, sys
import userfault

def behind(region, offset):
    # The memory file itself: no page table sees this write, as it would not see one of a device.
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "memfd:userfault" in os.readlink(f"/proc/self/fd/{fd}"):
                return os.pwrite(int(fd), b"unseen", offset)
        except FileNotFoundError:
            pass

region = userfault.open(userfault.MemoryStore(1 << 20), "r+", block="64KiB")
view = memoryview(region)
view[0] = view[70_000] = 1
if sys.argv[1] == "a read block":
    region.pread(1, 140_000)
    behind(region, 140_000)
    region.evict(140_000, 1)
elif sys.argv[1] == "a flushed block":
    region.flush()
    behind(region, 70_001)
    region.evict()
elif sys.argv[1] == "a block at close":
    region.flush()
    behind(region, 70_001)
    view.release()
    region.close()
elif sys.argv[1] == "a written block":
    # It is dirty, and goes to the store with all its bytes.
    behind(region, 70_001)
    region.evict()
    assert region.pread(7, 70_000) == b"\\1unseen"
elif sys.argv[1] == "a block that a device may write":
    with region.pin(65_536, 65_536, write=True):
        region.flush()
        behind(region, 70_001)
    region.evict()
    assert region.pread(7, 70_000) == b"\\1unseen"
print("went on")
"""


@pytest.mark.parametrize("which", ["a read block", "a flushed block", "a block at close"])
def test_a_clean_block_that_changed_ends_the_process_and_is_named(which: str, run_child: RunChild) -> None:
    done = run_child(PROGRAM, which, check=False, env={"USERFAULT_DEBUG": "hash"})
    assert done.status == -signal.SIGABRT
    assert "changed without being seen" in done.stderr
    assert "memory (1048576 bytes)" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize("which", ["a written block", "a block that a device may write"])
def test_what_is_dirty_may_change(which: str, run_child: RunChild) -> None:
    assert run_child(PROGRAM, which, env={"USERFAULT_DEBUG": "hash"}).stdout == "went on\n"


@pytest.mark.parametrize("which", ["a read block", "a flushed block", "a block at close"])
def test_nothing_is_hashed_unless_it_is_asked_for(which: str, run_child: RunChild) -> None:
    assert run_child(PROGRAM, which, env={"USERFAULT_DEBUG": ""}).stdout == "went on\n"
