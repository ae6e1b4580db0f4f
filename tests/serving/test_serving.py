"""Serving the memory of another process: what it reads, whatever it does to its memory, and who may die."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.puppeteer import EVENTS, HUGE, LIMIT, MEMORY, Guest, contents, page_of
from userfault import MemoryStore, abi, serve
from userfault.serving import LayoutItem, receive, send
from userfault.testing.faulty_store import FaultyStore, delay, fail, hang
from userfault.userfaultfd import Userfaultfd

PAGE = mmap.PAGESIZE
MISSING_WP = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP
REMOVE = 9
"""MADV_REMOVE, which Python's mmap has only as a constant of some platforms."""


def zeros(length: int = 8) -> bytes:
    return bytes(length)


def until(holds: Callable[[], bool]) -> None:
    """Waits for something that takes a moment."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


@contextmanager
def hanging(pages: int, page: int = PAGE) -> Iterator[tuple[bytes, FaultyStore]]:
    """A store whose reads do not come back until they are released."""
    data = contents(pages * page)
    store = FaultyStore(MemoryStore(data), [hang("read")])
    try:
        yield data, store
    finally:
        store.plan = []
        store.release()


def let_go(store: FaultyStore) -> None:
    store.plan = []
    store.release()


@pytest.mark.parametrize("kind", ["anon", "shmem", "hugetlb"])
def test_a_page_comes_from_the_store_when_it_is_touched(kind: str, hugepages: Callable[[int], None]) -> None:
    pages = 4 if kind == "hugetlb" else 64
    if kind == "hugetlb":
        hugepages(pages)
    page = page_of(kind)
    data = contents(pages * page)
    with Guest(kind, pages) as guest:
        served = guest.serve(MemoryStore(data), block=page)
        assert served.owed_bytes == pages * page
        for number in (2, 0, pages - 1):
            assert guest.read(number * page, page) == data[number * page :][:page]
        assert served.owed_bytes == (pages - 3) * page
        assert served.stats().bytes_read == 3 * page
        guest.do("store", at=page, data="0123456789abcdef")
        assert guest.read(page, 16) == bytes.fromhex("0123456789abcdef") + data[page + 8 : page + 16]
        assert guest.do("write", at=2 * page, length=64) == 64


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_what_is_thrown_away_is_zeros_even_if_its_bytes_are_on_their_way(kind: str) -> None:
    advice = mmap.MADV_DONTNEED if kind == "anon" else REMOVE
    with hanging(16) as (data, store), Guest(kind, 16) as guest:
        served = guest.serve(store)
        touch = guest.order("read", at=PAGE)
        until(lambda: store.hung == 1)
        guest.do("madvise", at=PAGE, length=2 * PAGE, advice=advice)
        # Also while the rest of its block is still being read: nothing has to be waited for.
        assert touch.result(LIMIT) == zeros().hex()
        let_go(store)
        assert guest.read(2 * PAGE) == zeros()
        assert guest.read(3 * PAGE) == data[3 * PAGE :][:8]
        assert guest.read(PAGE) == zeros()
        assert served.events()["remove"] == 1
        assert served.owed_bytes == 0


def test_what_was_written_and_thrown_away_is_zeros_and_not_the_stores() -> None:
    with Guest(pages=16) as guest:
        guest.serve(MemoryStore(contents(16 * PAGE)), block=PAGE)
        guest.do("store", at=PAGE, data="ff" * 8)
        guest.do("madvise", at=0, length=4 * PAGE, advice=mmap.MADV_DONTNEED)
        assert [guest.read(number * PAGE) for number in range(4)] == [zeros()] * 4


def test_what_is_moved_is_filled_at_its_new_address() -> None:
    with hanging(16) as (data, store), Guest(pages=16) as guest:
        served = guest.serve(store)
        touch = guest.order("read", at=0)
        until(lambda: store.hung == 1)
        to = guest.do("move", at=4 * PAGE, length=2 * PAGE, new_length=2 * PAGE)
        let_go(store)
        assert touch.result(LIMIT) == data[:8].hex()
        until(lambda: served.owed_bytes == 0)
        assert guest.read(to, 2 * PAGE) == data[4 * PAGE :][: 2 * PAGE]
        assert served.stats().faults_missing == 1, "the fill delivered the moved pages too"


def test_memory_that_grows_is_zeros_behind_its_old_end() -> None:
    with Guest(pages=16) as guest:
        data = contents(16 * PAGE)
        guest.serve(MemoryStore(data), block=PAGE)
        to = guest.do("move", at=14 * PAGE, length=2 * PAGE, new_length=4 * PAGE)
        assert guest.read(to, 4 * PAGE) == data[14 * PAGE :] + zeros(2 * PAGE)


def test_nothing_is_filled_where_memory_was_unmapped() -> None:
    with hanging(16) as (data, store), Guest(pages=16) as guest:
        served = guest.serve(store)
        touch = guest.order("read", at=0)
        until(lambda: store.hung == 1)
        guest.do("munmap", at=8 * PAGE, length=4 * PAGE)
        let_go(store)
        assert touch.result(LIMIT) == data[:8].hex()
        assert guest.read(15 * PAGE) == data[15 * PAGE :][:8]
        assert served.owed == []


def test_a_forked_child_is_served_with_what_was_owed_at_the_fork() -> None:
    with Guest(pages=64) as guest:
        data = contents(64 * PAGE)
        served = guest.serve(MemoryStore(data), block=PAGE)
        guest.do("store", at=0, data="ff" * 8)
        guest.do("madvise", at=PAGE, length=PAGE, advice=mmap.MADV_DONTNEED)
        child = guest.do("fork", at=0, length=4 * PAGE)
        assert len(served.processes) == 2
        # The child's memory is its own: what its parent does from here on is not its affair.
        guest.do("madvise", at=2 * PAGE, length=PAGE, advice=mmap.MADV_DONTNEED)
        guest.do("store", at=3 * PAGE, data="ee" * 8)
        read = bytes.fromhex(guest.do("child_reads", child=child))
        assert read == b"\xff" * 8 + data[8:PAGE] + zeros(PAGE) + data[2 * PAGE : 4 * PAGE]
        assert guest.read(2 * PAGE) == zeros()
        until(lambda: len(served.processes) == 1)


def test_a_child_that_is_forked_while_a_fill_is_under_way_gets_its_bytes_too() -> None:
    with hanging(16) as (data, store), Guest(pages=16) as guest:
        served = guest.serve(store)
        touch = guest.order("read", at=0)
        until(lambda: store.hung == 1)
        child = guest.do("fork", at=PAGE)
        read = guest.order("child_reads", child=child)
        until(lambda: store.hung == 2)
        let_go(store)
        assert touch.result(LIMIT) == data[:8].hex()
        assert read.result(LIMIT) == data[PAGE:][:8].hex()
        assert served.events()["fork"] == 1


def test_memory_that_parent_and_child_share_is_thrown_away_for_both() -> None:
    with Guest("shmem", 16) as guest:
        data = contents(16 * PAGE)
        guest.serve(MemoryStore(data), block=PAGE)
        child = guest.do("fork", at=0, length=2 * PAGE)
        guest.do("madvise", at=0, length=PAGE, advice=REMOVE)
        guest.do("store", at=PAGE, data="ff" * 8)
        read = bytes.fromhex(guest.do("child_reads", child=child))
        assert read == zeros(PAGE) + b"\xff" * 8 + data[PAGE + 8 : 2 * PAGE]


def test_one_server_serves_several_processes() -> None:
    stores = [contents(16 * PAGE * (number + 1))[-16 * PAGE :] for number in range(3)]
    guests = [Guest(pages=16) for _ in stores]
    try:
        served = [guest.serve(MemoryStore(data)) for guest, data in zip(guests, stores, strict=True)]
        for guest, data in zip(guests, stores, strict=True):
            assert guest.read(0, 16 * PAGE) == data
        guests[0].kill()
        assert served[0].wait(LIMIT)
        assert not served[1].wait(0)
    finally:
        for guest in guests:
            guest.kill()


def test_a_block_that_cannot_be_had_is_an_error_for_whoever_touches_it_until_it_is_healed() -> None:
    data = contents(32 * PAGE)
    store = FaultyStore(MemoryStore(data), [fail("read", offset=0, length=PAGE)])
    with Guest(pages=32) as guest:
        served = guest.serve(store, name="the guest")
        assert guest.do("write", at=0, length=8) == -errno.EFAULT
        assert guest.read(16 * PAGE) == data[16 * PAGE :][:8]
        [error] = served.errors
        assert (error.offset, error.length, error.errno) == (0, 16 * PAGE, errno.EIO)
        # What was thrown away is no longer anybody's error.
        guest.do("madvise", at=PAGE, length=PAGE, advice=mmap.MADV_DONTNEED)
        assert guest.read(PAGE) == zeros()
        store.plan = []
        assert served.heal() == 16 * PAGE
        assert served.errors == []
        assert guest.read(0) == data[:8]
        assert guest.read(PAGE) == zeros()


def test_a_read_that_fails_for_a_while_is_tried_again() -> None:
    data = contents(16 * PAGE)
    store = FaultyStore(MemoryStore(data), [fail("read", count=3)])
    with Guest(pages=16) as guest:
        guest.serve(store, on_error="retry")
        assert guest.read(0) == data[:8]


def test_close_gives_sleepers_and_later_touches_an_error_and_never_zeros() -> None:
    with hanging(32) as (_, store), Guest(pages=32) as guest:
        served = guest.serve(store)
        sleeper = guest.order("write", at=0, length=8)
        until(lambda: store.hung == 1)
        served.close()
        assert sleeper.result(LIMIT) == -errno.EFAULT
        assert guest.do("write", at=20 * PAGE, length=8) == -errno.EFAULT
        served.close()
        assert served.processes == {}


def test_another_server_takes_over_what_is_still_owed() -> None:
    with hanging(32) as (data, store), Guest(pages=32) as guest:
        first = guest.serve(store, block=PAGE)
        sleeper = guest.order("read", at=0)
        until(lambda: store.hung == 1)
        guest.do("madvise", at=4 * PAGE, length=2 * PAGE, advice=mmap.MADV_DONTNEED)
        to = guest.do("move", at=8 * PAGE, length=PAGE, new_length=PAGE)
        owed = [item for _, item in first.owed]
        first.close(poison=False)
        guest.do("again")
        guest.take()
        with serve(guest.uffd, owed, MemoryStore(data), pid=guest.process.pid):
            guest.uffd.close()
            assert sleeper.result(LIMIT) == data[:8].hex()
            assert guest.read(4 * PAGE) == zeros()
            assert guest.read(to) == data[8 * PAGE :][:8]
            assert guest.read(31 * PAGE) == data[31 * PAGE :][:8]


SERVER = """
import json, sys
from userfault import serve, MemoryStore
from serving.puppeteer import contents
from userfault.testing.faulty_store import FaultyStore, hang
layout = json.loads(sys.argv[2])
data = MemoryStore(contents(sum(item[1] for item in layout)))
store = FaultyStore(data, [hang("read", offset=int(sys.argv[3]))])
served = serve(int(sys.argv[1]), layout, store)
print("serving", flush=True)
while store.hung == 0:
    served.wait(0.01)
print("hung", flush=True)
served.wait()
"""


def test_a_server_that_is_killed_leaves_its_process_waiting_and_not_reading_zeros() -> None:
    data = contents(32 * PAGE)
    with Guest(pages=32) as guest:
        tests = str(Path(__file__).parent.parent)
        server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                SERVER,
                str(guest.uffd.fileno()),
                json.dumps(guest.layout),
                str(16 * PAGE),
            ],
            pass_fds=[guest.uffd.fileno()],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": tests},
            process_group=0,
        )
        try:
            assert server.stdout
            assert server.stdout.readline() == "serving\n"
            guest.uffd.close()
            assert guest.read(0, 16 * PAGE) == data[: 16 * PAGE]
            # One fault is being filled, another comes when nobody is there.
            before = guest.order("read", at=16 * PAGE)
            assert server.stdout.readline() == "hung\n"
        finally:
            server.kill()
            server.wait()
        after = guest.order("read", at=24 * PAGE)
        time.sleep(0.3)
        assert not before.done()
        assert not after.done()
        # The copy of the descriptor that the guest kept is all that the next server needs.
        guest.do("again")
        guest.take()
        with guest.serve(MemoryStore(data)):
            assert before.result(LIMIT) == data[16 * PAGE :][:8].hex()
            assert after.result(LIMIT) == data[24 * PAGE :][:8].hex()
            assert guest.read(0, 32 * PAGE) == data


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("known", [True, False])
def test_a_process_that_is_killed_is_forgotten_with_its_children(known: bool) -> None:
    with Guest(pages=16) as guest:
        guest.uffd.close()
    before = descriptors()
    with hanging(16) as (_, store):
        with Guest(pages=16) as guest:
            pid = guest.process.pid if known else None
            served = serve(guest.uffd, guest.layout, store, pid=pid)
            guest.uffd.close()
            guest.order("read", at=0)
            until(lambda: store.hung == 1)
            guest.do("fork", at=0)
            assert len(served.processes) == 2
        assert served.wait(LIMIT)
        assert served.processes == {}
        assert served.owed_bytes == 0
        let_go(store)
        until(lambda: store.hung == 0)
    guest.process.stdin.close()  # type: ignore[union-attr]
    guest.process.stdout.close()  # type: ignore[union-attr]
    until(lambda: descriptors() <= before)


def test_what_is_not_touched_is_delivered_too_if_that_is_asked_for() -> None:
    data = contents(256 * PAGE)
    with Guest(pages=256) as guest:
        store = FaultyStore(MemoryStore(data), [delay("read", 0.002)])
        served = guest.serve(store)
        guest.do("madvise", at=100 * PAGE, length=PAGE, advice=mmap.MADV_DONTNEED)
        served.prefetch()
        assert guest.read(255 * PAGE) == data[255 * PAGE :][:8]
        until(lambda: served.owed_bytes == 0)
        read = served.stats().bytes_read
        assert guest.read(0, 256 * PAGE) == data[: 100 * PAGE] + zeros(PAGE) + data[101 * PAGE :]
        assert served.stats().bytes_read == read


@pytest.mark.parametrize("kind", ["anon", "shmem", "hugetlb"])
def test_what_is_written_is_told_and_told_once(kind: str, hugepages: Callable[[int], None]) -> None:
    pages = 4 if kind == "hugetlb" else 32
    if kind == "hugetlb":
        hugepages(pages)
    page = page_of(kind)
    with Guest(kind, pages, mode=MISSING_WP) as guest:
        data = contents(pages * page)
        served = guest.serve(MemoryStore(data), track=True)

        def written() -> list[int]:
            return [
                number
                for one in served.take_written()
                for number in range(one.offset // page, (one.offset + one.length) // page)
            ]

        assert written() == []
        assert guest.read(0, pages * page) == data
        assert written() == []
        guest.do("store", at=page, data="ff" * 8)
        guest.do("store", at=page + 8, data="ff" * 8)
        guest.do("store", at=3 * page, data="ff" * 8)
        assert written() == [1, 3]
        assert written() == []
        guest.do("store", at=page, data="ee" * 8)
        assert written() == [1]
        assert guest.read(page, 16) == b"\xee" * 8 + b"\xff" * 8
        if kind == "anon":
            guest.do("madvise", at=0, length=page, advice=mmap.MADV_DONTNEED)
            assert written() == [0]
            assert guest.read(0) == zeros()
            assert written() == []
            guest.do("store", at=0, data="ff" * 8)
            assert written() == [0]


def test_writes_of_memory_that_is_not_registered_for_it_cannot_be_tracked() -> None:
    with Guest(pages=16) as guest, pytest.raises(OSError, match="UFFDIO_REGISTER_MODE_WP"):
        guest.serve(MemoryStore(contents(16 * PAGE)), track=True)


def test_a_layout_that_makes_no_sense_is_refused() -> None:
    store = MemoryStore(contents(16 * PAGE))
    with Userfaultfd(EVENTS) as uffd:
        for layout, why in [
            ([], "empty"),
            ([(PAGE, 0, 0)], "whole pages"),
            ([(PAGE + 1, PAGE, 0)], "whole pages"),
            ([(HUGE, PAGE, 0, HUGE)], "whole pages"),
            ([(PAGE, PAGE, 0, 12345)], "page size"),
            ([(PAGE, 17 * PAGE, 0)], "do not lie within"),
            ([(PAGE, PAGE, 16 * PAGE)], "do not lie within"),
            ([(PAGE, 4 * PAGE, 0), (2 * PAGE, PAGE, 0)], "twice"),
            ([(PAGE, PAGE)], "layout item"),
        ]:
            with pytest.raises(ValueError, match=why):
                serve(uffd, layout, store)
        with pytest.raises(ValueError, match="power of two"):
            serve(uffd, [(PAGE, PAGE, 0)], store, block=PAGE + 1)
        with pytest.raises(ValueError, match="tracked"), Userfaultfd(0) as plain:
            serve(plain, [(PAGE, PAGE, 0)], store, track=True)
        with pytest.raises(ValueError, match="signals"), Userfaultfd(abi.UFFD_FEATURE_SIGBUS) as signals:
            serve(signals, [(PAGE, PAGE, 0)], store)
    with open(os.devnull) as null, pytest.raises(OSError, match="userfaultfd"):
        serve(null.fileno(), [(PAGE, PAGE, 0)], store)
    with pytest.raises(OSError, match="Bad file descriptor"):
        serve(-1, [(PAGE, PAGE, 0)], store)


def test_a_layout_travels_as_firecracker_sends_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Userfaultfd(EVENTS) as uffd:
        items = [LayoutItem(1 << 30, 1 << 20, 0), LayoutItem(1 << 31, HUGE, 1 << 20, HUGE, True)]
        send(ours, uffd, items)
        received, layout, pid = receive(theirs)
        assert layout == items
        assert pid == os.getpid()
        received.close()
        older = {"base_host_virt_addr": 4096, "size": 8192, "offset": 0, "page_size_kib": 4096}
        socket.send_fds(ours, [json.dumps([older]).encode()], [uffd.fileno()])
        received, layout, _ = receive(theirs)
        assert layout == [LayoutItem(4096, 8192, 0, 4096)]
        received.close()
        before = descriptors()
        socket.send_fds(ours, [b"[]"], [uffd.fileno(), uffd.fileno()])
        with pytest.raises(ValueError, match="one descriptor"):
            receive(theirs)
        ours.sendall(b"{")
        ours.close()
        with pytest.raises(ValueError, match="no layout"):
            receive(theirs)
        with pytest.raises(EOFError):
            receive(theirs)
        assert descriptors() <= before


def test_memory_without_events_is_served_as_it_lies() -> None:
    # Firecracker asks for REMOVE alone; others ask for nothing.
    data = contents(16 * PAGE)
    with Guest(pages=16, features=0) as guest:
        guest.serve(MemoryStore(data))
        assert guest.read(0, 16 * PAGE) == data


def test_minor_faults_of_shared_memory_are_answered() -> None:
    mode = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_MINOR
    data = contents(16 * PAGE)
    with Guest("shmem", 16, mode=mode, features=EVENTS | MEMORY["shmem"]) as guest:
        served = guest.serve(MemoryStore(data), block=PAGE)
        assert guest.read(PAGE) == data[PAGE:][:8]
        # The bytes stay in the page cache: they come back without the store.
        guest.do("madvise", at=PAGE, length=PAGE, advice=mmap.MADV_DONTNEED)
        assert guest.read(PAGE) == data[PAGE:][:8]
        assert served.stats().faults_minor == 1
        assert served.stats().bytes_read == PAGE
