"""A faulty store does what its plan says, and nothing else."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from userfault import MemoryStore, StoreError
from userfault.testing import FaultyStore, delay, fail, hang, shorten


def test_a_call_fails_where_and_as_often_as_planned() -> None:
    store = FaultyStore(
        MemoryStore(b"0123456789"), [fail("read", errno=errno.ESTALE, offset=4, length=2, count=1)]
    )
    assert store.read(0, 4) == b"0123"
    with pytest.raises(StoreError) as caught:
        store.read(5, 3)
    assert caught.value.errno == errno.ESTALE
    assert store.read(5, 3) == b"567"
    assert [call.errno for call in store.calls("read")] == [0, errno.ESTALE, 0]
    assert store.calls("write") == []


def test_skipped_calls_pass_first() -> None:
    store = FaultyStore(MemoryStore(8), [fail("write", skip=2)])
    store.write(0, b"a")
    store.write(1, b"b")
    with pytest.raises(StoreError):
        store.write(2, b"c")


def test_a_shortened_write_stores_a_part() -> None:
    memory = MemoryStore(8)
    store = FaultyStore(memory, [shorten("write", errno=errno.ENOSPC, count=1), shorten("write", 1)])
    for _ in range(2):
        with pytest.raises(StoreError):
            store.write(0, b"abcd")
        assert memory.getvalue()[2:] == bytes(6)
    assert memory.getvalue() == b"ab" + bytes(6)


def test_a_delayed_call_takes_longer_and_other_threads_go_on() -> None:
    store = FaultyStore(MemoryStore(8), [delay("sync", 0.2)])
    start = time.monotonic()
    thread = threading.Thread(target=store.sync)
    thread.start()
    assert time.monotonic() - start < 0.15
    thread.join()
    assert time.monotonic() - start >= 0.2


def test_a_hung_call_waits_for_its_release_and_then_does_its_work() -> None:
    memory = MemoryStore(8)
    store = FaultyStore(memory, [hang("write", count=1)])
    thread = threading.Thread(target=store.write, args=(0, b"late"))
    thread.start()
    while not store.hung:
        time.sleep(0.001)
    store.write(4, b"soon")
    assert memory.getvalue() == bytes(4) + b"soon"
    assert store.release() == 1
    thread.join()
    assert memory.getvalue() == b"latesoon"
    assert [call.offset for call in store.calls()] == [4, 0]


def test_the_plan_can_be_replaced() -> None:
    store = FaultyStore(MemoryStore(8), [fail("sync")])
    assert store.plan == (fail("sync"),)
    store.plan = (fail("punch"),)
    store.sync()
    with pytest.raises(StoreError):
        store.punch(0, 1)


def test_it_is_called_as_the_store_that_it_wraps() -> None:
    memory = MemoryStore(8)
    store = FaultyStore(memory)
    assert store.name == memory.name
    assert len(store) == 8
    assert store.store is memory


def test_a_plan_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="read, write, punch or sync"):
        FaultyStore(MemoryStore(8), [fail("reed")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds"):
        FaultyStore(MemoryStore(8), [delay("read", -1)])
