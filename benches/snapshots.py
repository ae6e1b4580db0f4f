"""Workloads of checkpoints: what a point costs the program, and how fast it is saved and read again.

A memory is "private:PAGES[,idle]" (the twin that forks; beside a writer its child saves a copy, or is idle),
"still:4KiB" (of which no point is taken), "numpy:4KiB" (numpy.save), "copy:4KiB" (a bare copy of what was
written: the floor of every point that copies at the cut),
"userfault:PAGES[,off|on[,arm|point]]" for tracked memory, without the drain or with it, protected anew or
saved every second where the workload has seconds, or "foreign:2MiB[,copy]" for memory that somebody else has
made, tracked or copied.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import userfault
from benches.files import on_disk
from benches.native import library

Facts = dict[str, float]
PAGE = 4096
RATE = 10_000
"""Random 8-byte writes a second of the writer thread."""
PAUSE = 0.3
"""Seconds from one turn of a stall to the next at least, for every contestant. Who has stored a point finds
caches and memory as others left them; fork() again and again would find them as it left them itself."""


def _writer() -> ctypes.CDLL:
    lib = library("writer")
    lib.private_memory.restype = lib.start_writer.restype = ctypes.c_void_p
    lib.timed_fork.restype = lib.rewrite.restype = ctypes.c_double
    lib.scatter.restype = lib.copy_dirty.restype = ctypes.c_double
    lib.stop_writer.restype = lib.written.restype = ctypes.c_uint64
    return lib


class Subject:
    """Memory of a kind, and taking a point of it."""

    def __init__(self, memory: str, length: int, staging: str = "256MiB", filled: int = 0) -> None:
        self.lib = _writer()
        self.length = length
        self.way, _, rest = memory.partition(":")
        self.pages, _, rest = rest.partition(",")
        drain, _, self.each_second = rest.partition(",")
        self.folder = Path(tempfile.mkdtemp(prefix="userfault-bench-", dir=on_disk()))
        self.checkpointer: userfault.Checkpointer | None = None
        self.array: NDArray[Any]
        if self.way == "userfault":
            pages: Any = self.pages
            userfault.set_memory_limit(length * 2)
            self.array = userfault.zeros(length, np.uint8, track=True, pages=pages)
            self.address = self.array.ctypes.data
            self.fill(filled or length)
            self.checkpointer = userfault.Checkpointer(
                self.folder,
                {"array": self.array},
                drain="off" if drain == "off" else "auto",
                staging=staging,
                durable=False,
                max_to_keep=2,
            )
        else:
            huge = int(self.pages == "2MiB")
            self.address = self.lib.private_memory(ctypes.c_uint64(length), huge)
            self.fill(length)
            self.written, self.idle = (0, 1), drain == "idle"
            if self.way == "copy":
                self.aside = self.lib.private_memory(ctypes.c_uint64(length), 1)
                self.lib.fill_words(
                    ctypes.c_void_p(self.aside), ctypes.c_uint64(length // 4), ctypes.c_uint64(2)
                )
            memory_of = (ctypes.c_uint8 * length).from_address(self.address)
            self.array = np.frombuffer(memoryview(memory_of).cast("B"), np.uint8)
            if self.way == "foreign":
                copied = ["array"] if drain == "copy" else []
                self.checkpointer = userfault.Checkpointer(
                    self.folder,
                    {"array": self.array},
                    always_copy=copied,
                    drain="off",
                    durable=False,
                    max_to_keep=1,
                )

    def fill(self, length: int) -> None:
        """Words that are all different, in the middle of the memory."""
        start = self.address + (self.length - length) // 2
        self.lib.fill_words(ctypes.c_void_p(start), ctypes.c_uint64(length), ctypes.c_uint64(1))

    def dirty(self, count: int, seed: int, times: int = 1) -> None:
        """Writes to so many pages, to each so many times."""
        self.written = (count, seed)
        for _ in range(times):
            self.lib.dirty_pages(
                ctypes.c_void_p(self.address),
                ctypes.c_uint64(self.length),
                ctypes.c_uint64(count),
                ctypes.c_uint64(seed),
            )

    def point(self, linger: float = 0.0, copied: bool = False) -> tuple[float, Facts]:
        """Takes a point; seconds that the caller stood still.

        A child of fork() lives for `linger` seconds at least, and saves its copy in a file if it is `copied`.
        """
        if self.checkpointer:
            # The thread's own time says on a busy machine too what the cut costs.
            begin = time.thread_time()
            point = self.checkpointer.save()
            cpu = time.thread_time() - begin
            point.result()
            return point.stall, {"extra_bytes": float(point.extra_bytes), "stall_cpu_ms": cpu * 1e3}
        if self.way == "copy":
            count, seed = self.written
            aside = ctypes.c_void_p(self.aside)
            base, length = ctypes.c_void_p(self.address), ctypes.c_uint64(self.length)
            return float(
                self.lib.copy_dirty(base, length, ctypes.c_uint64(count), ctypes.c_uint64(seed), aside)
            ), {}
        if self.way == "numpy":
            begin = time.perf_counter()
            np.save(self.folder / "array.npy", self.array)
            return time.perf_counter() - begin, {}
        begin = time.thread_time()
        stall, child = self.fork(linger, self.folder / "copy" if copied else None)
        cpu = time.thread_time() - begin
        _, status = os.waitpid(child, 0)
        assert status == 0, "the child could not write its copy"
        return stall, {"stall_cpu_ms": cpu * 1e3}

    def fork(self, linger: float, copy: Path | None = None) -> tuple[float, int]:
        """Seconds that fork() takes, and its child, which lives for `linger` seconds and writes a copy."""
        child = ctypes.c_int()
        stall = self.lib.timed_fork(
            ctypes.byref(child),
            ctypes.c_int(int(linger * 1e6)),
            ctypes.c_void_p(self.address),
            ctypes.c_uint64(self.length),
            ctypes.c_char_p(os.fsencode(copy) if copy else None),
        )
        return float(stall), child.value

    def write_steadily(self, beside: int = 0) -> tuple[ctypes.c_void_p, NDArray[Any], NDArray[Any]]:
        """Starts a thread of `RATE` random writes a second: its handle, and nanoseconds of each write.

        As often it writes to as much memory at the address `beside`, if that is not 0: nanoseconds of those.
        """
        latencies, others = np.zeros((2, 2_000_000), np.uint32)
        writer = self.lib.start_writer(
            ctypes.c_void_p(self.address),
            ctypes.c_uint64(self.length),
            ctypes.c_uint64(RATE),
            latencies.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(len(latencies)),
            ctypes.c_void_p(beside or None),
            others.ctypes.data_as(ctypes.c_void_p),
        )
        return ctypes.c_void_p(writer), latencies, others

    def memory_beside(self) -> int:
        """As much memory on pages as small, which nobody follows and no child gets: its address."""
        address = self.lib.private_memory(ctypes.c_uint64(self.length), ctypes.c_int(0))
        base, length = ctypes.c_void_p(address), ctypes.c_uint64(self.length)
        self.lib.fill_words(base, length, ctypes.c_uint64(3))
        assert self.lib.keep_from_children(base, length) == 0
        return int(address)

    def close(self) -> None:
        """Removes the files."""
        if self.checkpointer:
            self.checkpointer.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def subject(options: argparse.Namespace) -> Iterator[Subject]:
    """Memory of the kind that the options name; `--limit` bytes of staging, if it is not 0."""
    made = Subject(options.memory, options.length, staging=str(options.limit or "256MiB"))
    try:
        yield made
    finally:
        made.close()


def stall(options: argparse.Namespace) -> Facts:
    """Milliseconds that a caller stands still, `--count` pages having been written since the point before.

    Each is written `--passes` times. The host of a guest may take its memory from it, 2 MiB at a time (two
    thirds of it within a second where this was measured), and the next touch of each then takes 145 us. That
    befalls whoever copies pages that were written a while ago. A second and a third pass are short.
    """
    with subject(options) as memory:
        memory.point()
        stalls, all_facts = [], []
        for turn in range(5):
            began = time.monotonic()
            if memory.checkpointer:
                # What is given back of the point before last is that point's work.
                memory.checkpointer.wait()
            time.sleep(max(0.0, began + PAUSE - time.monotonic()))
            memory.dirty(options.count, turn + 1, options.passes)
            took, facts = memory.point()
            stalls.append(took * 1e3)
            all_facts.append(facts)
        medians = {name: statistics.median(facts[name] for facts in all_facts) for name in all_facts[0]}
        return {"value": statistics.median(stalls), "least": min(stalls), "worst": max(stalls), **medians}


def drained(options: argparse.Namespace) -> Facts:
    """Milliseconds of stall with a steady writer, and a point every `--count` seconds; its p99 in us."""
    with subject(options) as memory:
        memory.point()
        handle, latencies, _ = memory.write_steadily()
        stalls, marks = [], []
        extra = 0.0
        for _ in range(3):
            time.sleep(options.count)
            first = memory.lib.written(handle)
            took, facts = memory.point(linger=1.0)
            # What a point makes of the writer is seen for as long as the copy lives: a second at least.
            time.sleep(max(0.0, 1.0 - took))
            marks.append((first, memory.lib.written(handle)))
            stalls.append(took * 1e3)
            extra = max(extra, facts.get("extra_bytes", 0.0))
        count = memory.lib.stop_writer(handle)
        during = np.concatenate([latencies[first:last] for first, last in marks])
        quiet = np.ones(min(count, len(latencies)), bool)
        for first, last in marks:
            quiet[first:last] = False
        times = {"": during, "_quiet": latencies[: len(quiet)][quiet]}
        return {
            "value": statistics.median(stalls),
            **{
                f"p{share}{when}_us": float(np.percentile(each, share)) / 1e3
                for share in (50, 90, 99)
                for when, each in times.items()
            },
            "worst_us": float(during.max()) / 1e3,
            "extra_bytes": extra,
        }


def excess(during: NDArray[Any], beside: NDArray[Any], share: float) -> float:
    """The quantile of what a point adds to a write, from times of writes to memory with a point and without.

    This machine's own noise is in both. A write is slower than t if the noise or the point makes it so; as
    they do not know of each other, the share of writes that the point alone makes slower than t is
    1 - (1 - during(t)) / (1 - beside(t)). The answer is the least t from which on that is at most
    1 - `share`.
    """
    times = np.unique(during)
    within_during = np.searchsorted(np.sort(during), times, "right") / len(during)
    within_beside = np.searchsorted(np.sort(beside), times, "right") / len(beside)
    by_point = 1 - within_during / np.maximum(within_beside, 1 / len(beside))
    above = np.flatnonzero(by_point > 1 - share)
    return float(times[min(above[-1] + 1, len(times) - 1)] if len(above) else times[0])


def writer_p99(options: argparse.Namespace) -> Facts:
    """Microseconds: the p99 of what points make of a steady writer's writes, without this machine's noise.

    Each write is followed by one to memory that nobody follows, so that both meet the same noise. Those in
    the second from each of eight cuts on count; the cuts are `--count` seconds apart.
    """
    with subject(options) as memory:
        handle, to_it, to_other = memory.write_steadily(memory.memory_beside())
        if memory.checkpointer:
            # Everything is copied once; that is no point that a program takes again and again.
            memory.point()
        counted, stalls = [], []
        for _ in range(8):
            time.sleep(options.count - 1)
            first = memory.lib.written(handle)
            if memory.way != "still":
                copied = memory.way == "private" and not memory.idle
                stalls.append(memory.point(linger=1.0, copied=copied)[0] * 1e3)
            while memory.lib.written(handle) < first + RATE:
                time.sleep(0.01)
            counted.append(slice(first, first + RATE))
        memory.lib.stop_writer(handle)
        during, beside = (np.concatenate([times[part] for part in counted]) for times in (to_it, to_other))
        return {
            "value": excess(during, beside, 0.99) / 1e3,
            **{
                f"p{share}{where}_us": float(np.percentile(each, share)) / 1e3
                for share in (50, 90, 99)
                for where, each in (("", during), ("_beside", beside))
            },
            **{
                f"p{share}_excess_us": excess(during, beside, share / 100) / 1e3 for share in (50, 90, 95, 98)
            },
            "mean_us": float(during.mean()) / 1e3,
            "mean_beside_us": float(beside.mean()) / 1e3,
            "worst_us": float(during.max()) / 1e3,
            "stall_ms": statistics.median(stalls) if stalls else 0.0,
        }


def rewriting(options: argparse.Namespace) -> Facts:
    """GB/s of a program that rewrites all its memory; what happens every second the memory's name says."""
    with subject(options) as memory:
        if memory.checkpointer and memory.each_second != "arm":
            memory.point()
            # The kernel is not to write the point to the disk beside what is measured.
            os.sync()
        base, length = ctypes.c_void_p(memory.address), ctypes.c_uint64(options.length)
        memory.lib.rewrite(base, length, ctypes.c_double(0.5))
        speeds = []
        for _ in range(5):
            began = time.perf_counter()
            arming = None
            if memory.checkpointer and memory.each_second == "point":
                # The program itself asks for it, and stands still.
                memory.checkpointer.save()
            elif memory.checkpointer and memory.each_second == "arm":
                # A thread in the background does it.
                arming = threading.Thread(target=memory.checkpointer._rearm)
                arming.start()
            stood_still = time.perf_counter() - began
            speed = memory.lib.rewrite(base, length, ctypes.c_double(1.0)) / 1e9
            whole = time.perf_counter() - began
            if arming:
                arming.join()
            speeds.append(speed * (whole - stood_still) / whole)
        return {"value": statistics.median(speeds)}


def full_save(options: argparse.Namespace) -> Facts:
    """Seconds until all of an array is in files."""
    with subject(options) as memory:
        begin = time.perf_counter()
        memory.point()
        return {"value": time.perf_counter() - begin}


def incremental(options: argparse.Namespace) -> Facts:
    """Seconds until a point of `--count` written pages is in files."""
    with subject(options) as memory:
        memory.point()
        times = []
        for turn in range(3):
            if memory.checkpointer:
                memory.checkpointer.wait()
            memory.dirty(options.count, turn + 1)
            begin = time.perf_counter()
            memory.point()
            times.append(time.perf_counter() - begin)
        return {"value": statistics.median(times)}


def foreign(options: argparse.Namespace) -> Facts:
    """Million random writes a second to memory of which a point was taken."""
    with subject(options) as memory:
        base, length = ctypes.c_void_p(memory.address), ctypes.c_uint64(options.length)
        facts: Facts = {}
        memory.lib.scatter(base, length, ctypes.c_double(0.5))
        if memory.checkpointer:
            stalls = []
            for _ in range(3):
                memory.lib.scatter(base, length, ctypes.c_double(0.3))
                stalls.append(memory.point()[0] * 1e3)
            facts = {"stall_ms": statistics.median(stalls)}
        speed = statistics.median(memory.lib.scatter(base, length, ctypes.c_double(1.0)) for _ in range(3))
        return {"value": speed / 1e6, **facts}


def _readinto(memory: Subject) -> float:
    """Seconds that readinto() takes for all of it, from a warm page cache into memory that is there."""
    path = memory.folder / "array.npy"
    np.save(path, memory.array)
    into = np.empty(memory.length, np.uint8)
    into[::PAGE] = 1
    for _ in range(2):
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            file.seek(128)
            done = 0
            while done < memory.length:
                done += file.readinto(into.data[done:])
        took = time.perf_counter() - begin
    return took


def restoring(options: argparse.Namespace) -> Facts:
    """Milliseconds to an element of a point in a warm page cache; `--limit` bytes of it are no zeros."""
    memory = Subject(options.memory, options.length, filled=options.limit)
    with contextlib.closing(memory):
        if memory.checkpointer is None:
            return {"value": _readinto(memory) * 1e3}
        memory.point()
        expected = int(memory.array[options.length // 2])
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            with userfault.restore(memory.folder, mode="r") as state:
                element = int(state["array"][options.length // 2])
                times.append(time.perf_counter() - begin)
            assert element == expected
        return {"value": statistics.median(times) * 1e3}


def eager(options: argparse.Namespace) -> Facts:
    """GB/s of all of a point into memory that is there, in a warm page cache."""
    with subject(options) as memory:
        if memory.checkpointer is None:
            return {"value": options.length / _readinto(memory) / 1e9}
        memory.point()
        into = np.empty(options.length, np.uint8)
        into[::PAGE] = 1
        for _ in range(2):
            begin = time.perf_counter()
            userfault.restore(memory.folder, into={"array": into})
            took = time.perf_counter() - begin
        assert into[12345] == memory.array[12345]
        return {"value": options.length / took / 1e9}


def extra(options: argparse.Namespace) -> Facts:
    """MiB of extra memory when everything is rewritten while a point is saved; `--limit` bytes of staging."""
    memory = Subject(options.memory, options.length, staging=str(options.limit or "256MiB"))
    with contextlib.closing(memory):
        base, length = ctypes.c_void_p(memory.address), ctypes.c_uint64(options.length)
        if memory.checkpointer:
            memory.point()
            memory.lib.rewrite(base, length, ctypes.c_double(0.2))
            point = memory.checkpointer.save()
            memory.lib.rewrite(base, length, ctypes.c_double(0.5))
            point.result()
            return {"value": point.extra_bytes / (1 << 20)}
        _, child = memory.fork(60.0)
        memory.lib.rewrite(base, length, ctypes.c_double(0.5))
        lines = Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()
        os.kill(child, 9)
        os.waitpid(child, 0)
        private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
        return {"value": private / 1024}


WORKLOADS = {
    "snapshot-stall": stall,
    "snapshot-drained": drained,
    "snapshot-writer": writer_p99,
    "snapshot-rewriting": rewriting,
    "snapshot-full": full_save,
    "snapshot-incremental": incremental,
    "snapshot-restoring": restoring,
    "snapshot-eager": eager,
    "snapshot-extra": extra,
    "snapshot-foreign": foreign,
}
