"""The kinds of memory that are compared: each gives an address, and everything else is the same for all."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benches.native import library

MIB = 1 << 20


class Unavailable(Exception):
    """This kind of memory cannot be had here; the message says why."""


@dataclass
class Memory:
    """Some memory, and how to make what was written to it durable."""

    address: int
    length: int
    flush: Callable[[], None] = lambda: None
    facts: Callable[[], dict[str, float]] = field(default=dict)
    """Numbers worth keeping beside the result."""
    server: int = 0
    """The process that brings the pages, if it is another one."""


@contextlib.contextmanager
def memory(
    kind: str, path: Path | None, length: int, *, write: bool, limit: int, block: int, cpu: int = -1
) -> Iterator[Memory]:
    """Memory of `length` bytes over the file at `path`; `limit` and `block` in bytes where the kind has them.

    `cpu` is where a handler thread is put, -1 for anywhere.
    """
    name, _, variant = kind.partition(":")
    with _KINDS[name](variant, path, length, write, limit, block) as made:
        if cpu >= 0:
            _move_other_threads(cpu, made.server or os.getpid())
        yield made


@contextlib.contextmanager
def _c_handler(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """Variant "file": the handler reads each page from the file first; "process": it is another process."""
    address = ctypes.c_void_p()
    if variant == "process":
        pid = ctypes.c_int()
        floor = library("handler_thread")
        _check(floor.handler_process_map(ctypes.c_size_t(length), ctypes.byref(address), ctypes.byref(pid)))
        yield Memory(address.value or 0, length, server=pid.value)
        os.kill(pid.value, signal.SIGKILL)
        os.waitpid(pid.value, 0)
        return
    fd = os.open(path, os.O_RDONLY) if variant == "file" and path else -1
    _check(library("handler_thread").handler_thread_map(ctypes.c_size_t(length), fd, ctypes.byref(address)))
    yield Memory(address.value or 0, length)


@contextlib.contextmanager
def _c_signal(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """Variant "file": the handler reads each page from the file first."""
    address = ctypes.c_void_p()
    fd = os.open(path, os.O_RDONLY) if variant == "file" and path else -1
    _check(library("signal_handler").signal_handler_map(ctypes.c_size_t(length), fd, ctypes.byref(address)))
    yield Memory(address.value or 0, length)


@contextlib.contextmanager
def _c_flight(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """Variant "ring": one handler with an io_uring; "pair": two with native asynchronous reads. No limit."""
    assert path
    address = ctypes.c_void_p()
    one = ctypes.c_int(variant == "ring")
    floor = library("reads_in_flight")
    name = ctypes.c_char_p(os.fsencode(path))
    _check(floor.reads_in_flight_map(name, ctypes.c_size_t(length), one, ctypes.byref(address)))
    yield Memory(address.value or 0, length)


@contextlib.contextmanager
def _memfd(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    flags = os.MFD_CLOEXEC
    if variant == "2MiB":
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("floor", flags)
    try:
        os.ftruncate(fd, length)
        with mmap.mmap(fd, length) as mapping:
            yield Memory(_address(mapping), length)
    except OSError as error:
        raise Unavailable(f"memfd of {variant} pages: {error.strerror}") from error
    finally:
        os.close(fd)


@contextlib.contextmanager
def _mmap(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """numpy.memmap, which is mmap; variant "random" is MADV_RANDOM."""
    assert path
    array = np.memmap(path, np.uint8, "r+" if write else "r", shape=(length,))
    if variant == "random":
        array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    yield Memory(array.ctypes.data, length, array.flush)


@contextlib.contextmanager
def _loaded(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """All of the file in private memory, read before anything is measured: the work without paging."""
    assert path
    array = np.fromfile(path, np.uint8, length)

    def flush() -> None:
        with open(path, "r+b") as file:
            file.write(array.data)
            os.fsync(file.fileno())

    yield Memory(array.ctypes.data, length, flush)


@contextlib.contextmanager
def _userfault(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """Variant: pages, then "inline" for the way to take a fault, "zero" for a store that reads no file,
    "private" for changes that stay private."""
    userfault: Any = importlib.import_module("userfault")
    pages, *words = variant.split(",")
    options = {"block": block, "memory_limit": limit, "pages": pages or "auto"}
    if "inline" in words:
        options["fault"] = "inline"
    try:
        # In a control group the process's own limit is half of what the group leaves, and would hold instead.
        userfault.set_memory_limit(max(limit, userfault.stats().limit))
        store = userfault.ZeroStore(length) if "zero" in words else path
        mode = "c" if "private" in words else "r+" if write else "r"
        region = userfault.open(store, mode, length=length, **options)
    except (AttributeError, TypeError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Unavailable(f"userfault {variant}: {reason}") from error
    array = region.ndarray(np.uint8)

    def facts() -> dict[str, float]:
        stats = region.stats()
        names = (
            "faults_missing faults_minor faults_write_protect hits bytes_read bytes_written evictions "
            "waits latency_p50 latency_p99 page_tables hugetlb"
        )
        return {name: getattr(stats, name) for name in names.split() if hasattr(stats, name)}

    yield Memory(array.ctypes.data, length, region.flush, facts)


_SERVER = """
import sys
from userfault import ZeroStore, serve
fd, pid, address, length, block = map(int, sys.argv[1:])
served = serve(fd, [(address, length, 0)], ZeroStore(length), block=block, pid=pid)
print("ready", flush=True)
served.wait()
"""


@contextlib.contextmanager
def _served(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """Memory of this process that another one serves with userfault.serve, from a store of zeros."""
    userfault: Any = importlib.import_module("userfault")
    with mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
        address = _address(mapping)
        abi: Any = importlib.import_module("userfault.abi")
        uffd = userfault.Userfaultfd(abi.UFFD_FEATURE_THREAD_ID)
        uffd.register(address, length, abi.UFFDIO_REGISTER_MODE_MISSING).check()
        words = [uffd.fileno(), os.getpid(), address, length, block]
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *map(str, words)],
            pass_fds=[uffd.fileno()],
            stdout=subprocess.PIPE,
        )
        try:
            if not server.stdout or server.stdout.readline() != b"ready\n":
                raise Unavailable("userfault.serve: the server did not begin")
            yield Memory(address, length, server=server.pid)
        finally:
            server.kill()
            server.wait()


@contextlib.contextmanager
def _umap(
    variant: str, path: Path | None, length: int, write: bool, limit: int, block: int
) -> Iterator[Memory]:
    """LLNL umap, from the built copy that USERFAULT_BENCH_UMAP names (its prefix, or the library itself)."""
    assert path
    prefix = os.environ.get("USERFAULT_BENCH_UMAP")
    if not prefix:
        raise Unavailable("USERFAULT_BENCH_UMAP names no built copy of umap")
    found = [Path(prefix), *sorted(Path(prefix).glob("lib*/libumap.so"))]
    built = next((each for each in found if each.is_file()), None)
    if built is None:
        raise Unavailable(f"USERFAULT_BENCH_UMAP: no libumap.so in {prefix}")
    os.environ["UMAP_PAGESIZE"] = str(block)
    os.environ["UMAP_BUFSIZE"] = str(max(1, limit // block))
    umap = ctypes.CDLL(str(built))
    umap.umap.restype = ctypes.c_void_p
    umap.umap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    umap.uunmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(path, os.O_RDWR if write else os.O_RDONLY)
    # UMAP_PRIVATE is MAP_PRIVATE: umap itself decides how it writes back.
    address = umap.umap(None, length, mmap.PROT_READ | (mmap.PROT_WRITE if write else 0), 2, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise Unavailable("umap() failed")

    def flush() -> None:
        # The whole is unmapped, which writes back what is dirty; umap has no durable flush.
        umap.uunmap(address, length)
        os.fsync(fd)

    yield Memory(address, length, flush)


_KINDS = {
    "c-flight": _c_flight,
    "c-handler": _c_handler,
    "c-signal": _c_signal,
    "loaded": _loaded,
    "memfd": _memfd,
    "mmap": _mmap,
    "served": _served,
    "umap": _umap,
    "userfault": _userfault,
}


def _address(mapping: mmap.mmap) -> int:
    return np.frombuffer(mapping, np.uint8).ctypes.data


def _check(errno: int) -> None:
    if errno:
        raise Unavailable(os.strerror(errno))


def _move_other_threads(cpu: int, process: int) -> None:
    for thread in Path(f"/proc/{process}/task").iterdir():
        if int(thread.name) != os.getpid():
            os.sched_setaffinity(int(thread.name), {cpu})
