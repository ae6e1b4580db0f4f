"""Prefetches are futures, like other work in the background."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading

import pytest

import userfault
from userfault import MemoryStore
from userfault.testing import FaultyStore, fail, hang

BLOCKS = 64


def region_over(store: userfault.Store) -> userfault.Region:
    return userfault.open(store, block="4KiB", retry_for=20)


def test_a_prefetch_is_a_future_that_calls_back() -> None:
    with region_over(FaultyStore(MemoryStore(BLOCKS * 4096), [])) as region:
        called = threading.Event()
        future = region.prefetch([(0, len(region))])
        assert isinstance(future, concurrent.futures.Future)
        future.add_done_callback(lambda future: called.set())
        assert called.wait(30)
        assert future.result() is None
        assert region.resident() == b"\1" * BLOCKS


def test_several_are_awaited_together_and_a_hung_store_keeps_no_other_one() -> None:
    slow = FaultyStore(MemoryStore(BLOCKS * 4096), [hang("read")])
    with region_over(slow) as one, region_over(FaultyStore(MemoryStore(BLOCKS * 4096), [])) as other:
        hanging, quick = one.prefetch([(0, 4096)]), other.prefetch([(0, 4096)])
        done, pending = concurrent.futures.wait([hanging, quick], timeout=5, return_when="FIRST_COMPLETED")
        assert (done, pending) == ({quick}, {hanging})
        with pytest.raises(TimeoutError):
            hanging.result(timeout=0.01)
        assert not hanging.cancel()
        slow.release()

        async def both() -> None:
            await asyncio.gather(asyncio.wrap_future(hanging), asyncio.wrap_future(quick))

        asyncio.run(both())
        assert one.resident(0, 4096) == b"\1"


def test_what_cannot_be_had_is_the_futures_exception(capfd: pytest.CaptureFixture[str]) -> None:
    store = FaultyStore(MemoryStore(BLOCKS * 4096), [fail("read")])
    with userfault.open(store, block="4KiB", on_error="poison") as region:
        future = region.prefetch([(3 * 4096, 4096)])
        assert isinstance(future.exception(timeout=30), (userfault.PoisonedError, userfault.StoreError))
        store.plan = []
        region.heal(0, len(region))
    capfd.readouterr()


def test_a_forked_child_has_futures_of_its_own(run_child) -> None:
    done = run_child("""
import os, userfault
from userfault import MemoryStore
from userfault.testing import FaultyStore, hang
store = FaultyStore(MemoryStore(64 * 4096), [hang("read")])
region = userfault.open(store, block="4KiB")
pending = region.prefetch([(0, 4096)])
if (child := os.fork()) == 0:
    own = userfault.open(MemoryStore(64 * 4096), block="4KiB")
    own.prefetch([(0, 8 * 4096)]).result(timeout=20)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
store.release()
pending.result(timeout=20)
print("done")
""")
    assert done.stdout.strip() == "done"


def test_the_thread_that_watches_ends_when_there_is_nothing_to_watch() -> None:
    with region_over(FaultyStore(MemoryStore(BLOCKS * 4096), [])) as region:
        region.prefetch([(0, len(region))]).result(timeout=30)
        for _ in range(2000):
            if "userfault-prefetch" not in {thread.name for thread in threading.enumerate()}:
                return
            os.sched_yield()
            threading.Event().wait(0.005)
        raise AssertionError("it is still there")
