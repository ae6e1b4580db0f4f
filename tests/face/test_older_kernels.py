"""What takes the place of features that older kernels lack: the running one is made to do without them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from conftest import RunChild

NAMES = ("wp_async", "continue_wp", "poison")
COMBINATIONS = [",".join(names) for count in range(1, 4) for names in combinations(NAMES, count)]


def without(*names: str) -> dict[str, str]:
    return {"USERFAULT_WITHOUT": ",".join(names)}


def test_stats_names_what_is_done_without(run_child: RunChild) -> None:
    program = """
import userfault
assert userfault.stats().without == ()
with userfault.open(userfault.MemoryStore(10_000), "r+") as region:
    assert userfault.stats().without == region.stats().without
    print(",".join(userfault.stats().without))
"""
    for names in COMBINATIONS:
        left = set(run_child(program, env=without(names)).stdout.strip().split(","))
        # The kernel may lack more by itself.
        assert left >= set(names.split(","))


def test_a_name_that_is_none_is_refused(run_child: RunChild) -> None:
    program = """
import userfault
try:
    userfault.open(userfault.MemoryStore(10_000))
except ValueError as error:
    print(error)
"""
    told = run_child(program, env=without("wp_sync")).stdout
    assert "'wp_sync'" in told.replace('"', "'")
    assert "wp_async, continue_wp, poison, hugetlb and aio" in told


def test_the_first_write_to_a_page_is_a_message_and_a_walk_costs_few(run_child: RunChild) -> None:
    program = """
import userfault
with userfault.open(userfault.MemoryStore(1 << 20), "r+", block="64KiB", pages="4KiB") as region:
    view = memoryview(region)
    assert bytes(view) == bytes(1 << 20)
    assert region.stats().faults_write_protect == 0
    for page in range(16):
        view[page * 4096] = 1
    assert region.stats().faults_write_protect == 5
    view[65536 + 4 * 4096] = 1
    assert region.stats().dirty == 17 * 4096
    region.flush()
    assert (region.stats().bytes_written, region.stats().dirty) == (17 * 4096, 0)
    view[0] = 2
    assert region.stats().dirty == 4096
    view.release()
"""
    run_child(program, env=without("wp_async"))


@pytest.mark.parametrize("names", ["continue_wp", "wp_async,continue_wp"])
@pytest.mark.parametrize("block", ["64KiB", "4MiB"])
def test_what_was_only_read_is_not_written(names: str, block: str, run_child: RunChild) -> None:
    program = """
import sys
import userfault
with userfault.open(userfault.MemoryStore(b"x" * (8 << 20)), "r+", block=sys.argv[1], pages="4KiB") as region:
    for _ in range(2):
        assert bytes(memoryview(region)) == b"x" * (8 << 20)
        region.flush()
        region.evict()
    assert region.stats().bytes_written == 0
    memoryview(region)[5_000_000] = 1
    region.flush()
    assert region.stats().bytes_written == 4096
"""
    run_child(program, block, env=without(names))


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_without_poison_a_touch_is_sigbus_and_the_block_heals(mode: str, run_child: RunChild) -> None:
    program = """
import os, signal, sys, userfault
from userfault.testing import FaultyStore, fail

store = FaultyStore(userfault.MemoryStore(b"x" * 100_000), [fail("read", offset=8192, length=4096, count=1)])
with userfault.open(store, sys.argv[1], block="4KiB") as region:
    view = memoryview(region)
    reader, writer = os.pipe()
    try:
        os.write(writer, view[8192:12288])
        raise SystemExit("the kernel read what cannot be had")
    except OSError as error:
        print(error.strerror, flush=True)
    assert [error.offset for error in region.errors] == [8192]
    # The neighbours are as they were.
    assert bytes(view[:8192]) == b"x" * 8192 and view[12288] == ord("x")
    if sys.argv[2] == "touch":
        view[9000]
    assert region.heal(8192, 4096) == 4096
    assert bytes(view) == b"x" * 100_000
    if sys.argv[1] == "r+":
        view[8192] = 1
        region.flush()
        assert region.stats().bytes_written == 4096
    view.release()
"""
    for names in ("poison", "wp_async,continue_wp,poison"):
        assert run_child(program, mode, "heal", env=without(names)).stdout == "Bad address\n"
        assert run_child(program, mode, "touch", env=without(names), check=False).status == -signal.SIGBUS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permissions")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed (package util-linux)")
def test_a_system_call_that_writes_protected_memory_gets_efault_unless_it_is_pinned(
    run_child: RunChild,
) -> None:
    if any(not parent.stat().st_mode & 0o001 for parent in Path(__file__).parents):
        pytest.skip("another user cannot read this repository")
    program = """
import os, userfault
with userfault.open(userfault.MemoryStore(1 << 20), "r+", block="64KiB") as region:
    assert not region.kernel_faults
    view = memoryview(region)
    assert view[0] == 0  # in memory, protected
    with open("/dev/zero", "rb", buffering=0) as zero:
        try:
            zero.readinto(view[:4096])
            raise SystemExit("the kernel wrote a protected page")
        except OSError as error:
            print(error.strerror)
        with region.pin(0, 65536, write=True):
            assert zero.readinto(view[:65536]) == 65536
            # A write-back must not protect it again.
            region.flush()
            assert zero.readinto(view[:65536]) == 65536
    view.release()
"""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    environment = without("wp_async") | {"PYTHONDONTWRITEBYTECODE": "1"}
    assert run_child(program, env=environment, prefix=nobody).stdout == "Bad address\n"


def test_without_hugetlb_the_machines_pool_is_left_to_others(
    run_child: RunChild, hugepages: Callable[[int], None]
) -> None:
    program = """
import numpy as np, userfault
with userfault.open(userfault.MemoryStore(8 << 20), "r+", pages="2MiB", memory_limit="8MiB") as region:
    region.ndarray("u1")[:] = 1
    print(region.pages)
print(userfault.zeros(4 << 20, "u1", track=True, pages="2MiB").sum(), *userfault.stats().without)
"""
    hugepages(16)
    assert run_child(program).stdout.splitlines() == ["2MiB hugetlb", "0"]
    assert run_child(program, env=without("hugetlb")).stdout.splitlines() == ["2MiB tmpfs", "0 hugetlb"]
