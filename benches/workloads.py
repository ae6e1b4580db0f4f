"""What is done to memory: one function a workload. Run in a child process of its own, one sample a process.

``python -m benches.workloads sort --memory mmap:random --length ...`` prints one JSON object: "value" in the
unit of the measurement, or "unavailable" with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benches import model, snapshots
from benches.memory import MIB, Memory, Unavailable, memory
from benches.native import library

PAGE = 4096
ITEMS = 16
"""Items of a page, in the Zipf loads."""

COUNTS = {"faults_missing", "faults_minor", "hits", "bytes_read", "bytes_written", "evictions"}
"""Facts of a region that grow: of these the measured half counts alone."""


def fault(options: argparse.Namespace) -> dict[str, float]:
    """Median microseconds of a touch of an absent 4 KiB page; `placement` says where the handler runs."""
    pages = options.length // PAGE
    cpus = sorted(os.sched_getaffinity(0))
    other = -1
    if options.placement == "same-cpu":
        os.sched_setaffinity(0, {cpus[0]})
    else:
        if len(cpus) < 2:
            raise Unavailable("needs two CPUs")
        os.sched_setaffinity(0, set(cpus[:2]))
        other = cpus[1]
    with opened(options, write=False, cpu=other) as region:
        if other >= 0:
            os.sched_setaffinity(os.getpid(), {cpus[0]})
        order = np.random.default_rng(1).permutation(pages).astype(np.uint64)
        seconds = np.zeros(pages)
        library("access").touch_each(
            ctypes.c_void_p(region.address),
            ctypes.c_uint64(PAGE),
            ctypes.c_void_p(order.ctypes.data),
            ctypes.c_uint64(pages),
            ctypes.c_void_p(seconds.ctypes.data),
        )
        micro = seconds * 1e6
        return {"value": float(np.median(micro)), "p99": float(np.quantile(micro, 0.99)), **region.facts()}


def resident(options: argparse.Namespace) -> dict[str, float]:
    """GB/s (or million random reads a second) of memory that is all there."""
    access = library("access")
    words = options.length // 8
    with opened(options, write=True) as region:
        start, count = ctypes.c_void_p(region.address), ctypes.c_uint64(words)
        access.write_words(start, count, ctypes.c_uint64(1))
        access.sum_words(start, count)
        reads = 4_000_000
        work: dict[str, Callable[[], object]] = {
            "read": lambda: access.sum_words(start, count),
            "write": lambda: access.write_words(start, count, ctypes.c_uint64(2)),
            "random": lambda: access.walk_words(start, count, ctypes.c_uint64(reads)),
        }
        took = []
        for _ in range(5):
            begin = time.perf_counter()
            work[options.access]()
            took.append(time.perf_counter() - begin)
        amount = reads / 1e6 if options.access == "random" else options.length / 1e9
        return {"value": amount / min(took), **region.facts()}


def _sort_part(address: int, words: int) -> None:
    np.ctypeslib.as_array((ctypes.c_uint64 * words).from_address(address)).sort()


sort_part = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)(_sort_part)
"""NumPy's own sort, as a function that C can call; it leaves the interpreter lock while it sorts."""


def sort(options: argparse.Namespace) -> dict[str, float]:
    """Seconds to sort the file in place and make it durable."""
    with opened(options, write=True) as region:
        begin = time.perf_counter()
        library("sort").sort_words(
            ctypes.c_void_p(region.address),
            ctypes.c_uint64(options.length // 8),
            ctypes.c_int(options.threads),
            sort_part,
        )
        sorted_after = time.perf_counter() - begin
        facts = region.facts()
        region.flush()
        return {"value": time.perf_counter() - begin, "sort_s": sorted_after, **facts}


def random_read(options: argparse.Namespace) -> dict[str, float]:
    """Thousand random 4 KiB reads a second, with every byte of the page read."""
    pages = np.random.default_rng(2).integers(0, options.length // PAGE, options.count, dtype=np.uint32)
    with opened(options, write=options.write) as region:
        took = _operate(region, pages, None, options.threads)
        return {"value": options.count / took / 1e3, **region.facts()}


def zipf(options: argparse.Namespace) -> dict[str, float]:
    """Thousand operations a second on 4 KiB pages, Zipf 0.99, 90 % reads, after as many to warm up.

    Beside it "misses": how many of 1,000 operations found their page absent.
    """
    pages, writes = zipf_trace(options.length // PAGE, 2 * options.count, options.layout)
    half = options.count
    with opened(options, write=True) as region:
        _operate(region, pages[:half], writes[:half], options.threads)
        before = region.facts()
        took = _operate(region, pages[half:], writes[half:], options.threads)
        grown = {name: number - before[name] for name, number in region.facts().items() if name in COUNTS}
        if "faults_missing" in grown:
            grown["misses"] = 1000 * grown["faults_missing"] / half
        return {"value": half / took / 1e3, **grown}


def zipf_misses(options: argparse.Namespace) -> dict[str, float]:
    """How many of 1,000 operations of the same load find their page absent; memory "fifo" is a simulation."""
    if options.memory != "fifo":
        result = zipf(options)
        if "misses" not in result:
            raise Unavailable(f"{options.memory} does not count its misses")
        return {**result, "value": result["misses"]}
    total_pages = options.length // PAGE
    pages, _ = zipf_trace(total_pages, 2 * options.count, options.layout)
    function = library("fifo").fifo_misses
    function.restype = ctypes.c_uint64
    numbers = (pages.size, options.count, total_pages, options.limit // PAGE)
    misses = function(ctypes.c_void_p(pages.ctypes.data), *(ctypes.c_uint64(number) for number in numbers))
    return {"value": 1000 * misses / options.count}


def zipf_trace(pages: int, count: int, layout: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Which page each operation touches and whether it writes; layout "together" or "scattered".

    What is popular are items of 256 bytes, 16 to a page: the k-th has a weight of k to the power of -0.99.
    """
    random = np.random.default_rng(3)
    items = pages * ITEMS
    sums = np.cumsum(np.arange(1, items + 1, dtype=np.float64) ** -0.99)
    ranks = np.searchsorted(sums, random.random(count) * sums[-1]).astype(np.uint32)
    ranks = np.minimum(ranks, items - 1)
    if layout == "scattered":
        ranks = random.permutation(np.arange(items, dtype=np.uint32))[ranks]
    return ranks // ITEMS, (random.random(count) < 0.1).astype(np.uint8)


def total(options: argparse.Namespace) -> dict[str, float]:
    """GB/s of the sum over a whole cold file; memory "fromfile" and "readinto" read it in chunks."""
    begin = time.perf_counter()
    chunk = 16 * MIB
    if options.memory == "fromfile":
        with open(options.path, "rb") as file:
            result = 0
            while (part := np.fromfile(file, np.uint64, chunk // 8)).size:
                result += _sum(part.ctypes.data, part.size)
    elif options.memory == "readinto":
        buffer = np.empty(chunk // 8, np.uint64)
        with open(options.path, "rb", buffering=0) as file:
            result = 0
            while got := file.readinto(buffer.data):
                result += _sum(buffer.ctypes.data, got // 8)
    else:
        with opened(options, write=False) as region:
            result = _sum(region.address, options.length // 8)
            return _summed(result, options, begin, region.facts())
    return _summed(result, options, begin, {})


def _summed(
    result: int, options: argparse.Namespace, begin: float, facts: dict[str, float]
) -> dict[str, float]:
    took = time.perf_counter() - begin
    assert result % (1 << 64) == options.sum, "wrong bytes"
    return {"value": options.length / took / 1e9, **facts}


def _sum(address: int, words: int) -> int:
    function = library("access").sum_words
    function.restype = ctypes.c_uint64
    return int(function(ctypes.c_void_p(address), ctypes.c_uint64(words)))


def _operate(
    region: Memory, pages: npt.NDArray[np.uint32], writes: npt.NDArray[np.uint8] | None, threads: int
) -> float:
    function = library("access").page_operations
    function.restype = ctypes.c_double
    total = ctypes.c_uint64()
    return float(
        function(
            ctypes.c_void_p(region.address),
            ctypes.c_uint64(PAGE),
            ctypes.c_void_p(pages.ctypes.data),
            ctypes.c_void_p(writes.ctypes.data if writes is not None else None),
            ctypes.c_uint64(pages.size),
            ctypes.c_uint64(threads),
            ctypes.byref(total),
        )
    )


def opened(
    options: argparse.Namespace, *, write: bool, cpu: int = -1
) -> contextlib.AbstractContextManager[Memory]:
    return memory(
        options.memory,
        options.path,
        options.length,
        write=write,
        limit=options.limit,
        block=options.block,
        cpu=cpu,
    )


WORKLOADS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "fault": fault,
    "resident": resident,
    "sort": sort,
    "random-read": random_read,
    "zipf": zipf,
    "zipf-misses": zipf_misses,
    "sum": total,
    **snapshots.WORKLOADS,
    **model.WORKLOADS,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.workloads")
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--memory", required=True)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--block", type=int, default=PAGE)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--sum", type=int, default=0)
    parser.add_argument("--placement", default="other-cpu")
    parser.add_argument("--access", default="read")
    parser.add_argument("--layout", default="together")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.path is None and "BENCH_FILE" in os.environ:
        options.path = Path(os.environ["BENCH_FILE"])
    try:
        result: dict[str, object] = dict(WORKLOADS[options.workload](options))
    except Unavailable as error:
        result = {"unavailable": str(error)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    result["cpu_s"] = used.ru_utime + used.ru_stime
    result["page_tables"] = _status("VmPTE")
    result |= _io()
    print(json.dumps(result), flush=True)
    # Nothing is taken down in order: the figures are out, and a handler may still hold some of the memory.
    sys.stdout.flush()
    os._exit(0)


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _io() -> dict[str, int]:
    """Bytes that this process had brought from the disk and sent there."""
    words = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"disk_read": int(words["read_bytes"]), "disk_written": int(words["write_bytes"])}


if __name__ == "__main__":
    main()
