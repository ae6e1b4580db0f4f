"""What the differential test does and sees beyond a backend, on the running kernel."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import select
from pathlib import Path
from typing import Any

from conformance.backend import Area
from conformance.kernel import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    Process,
    Running,
    Thread,
    number,
)
from userfault import abi
from userfault.abi import PageRegion

PUNCH_HOLE, KEEP_SIZE = 2, 1
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
REPORTED = 0x1FF & ~abi.PAGE_IS_SOFT_DIRTY

_libc = ctypes.CDLL(None, use_errno=True)


class KernelObserver:
    """See `conformance.differential.Observer`."""

    def begin(self, process: Process) -> None:
        process.mover()

    def vmas(self, process: Process) -> list[tuple[int, int, str]]:
        found: list[tuple[int, int, str]] = []
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) (....) ", line):
                start, end, permissions = int(head[1], 16), int(head[2], 16), head[3]
            elif line.startswith("VmFlags:"):
                modes = [flag for flag in line.split()[1:] if flag in ("um", "uw", "ui")]
                found.append((start, end, " ".join([permissions, *modes])))
        return found

    def content(self, process: Process, address: int, length: int) -> bytes | None:
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), length, address)
            except OSError:
                return None

    def scan(self, process: Process, start: int, end: int, flags: int, any_of: int) -> list[PageRegion] | int:
        try:
            return (
                process.backend.scanner()
                .pagemap_scan(
                    start, end, flags=flags, category_anyof_mask=any_of, return_mask=REPORTED, pid=process.pid
                )
                .regions
            )
        except OSError as error:
            return error.errno or errno.EIO

    def waiting(self, uffd: Any) -> tuple[int, int, bool]:
        text = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
        pending, total = (
            int(re.search(rf"^{word}:\s*(\d+)", text, re.M)[1])  # type: ignore[index]
            for word in ("pending", "total")
        )
        return pending, total, bool(select.select([uffd], [], [], 0)[0])

    def close(self, uffd: Any) -> None:
        process: Process = uffd.process
        process.mover().errno_of("close", uffd.theirs).result()
        uffd.close()

    def thread_id(self, thread: Thread) -> int:
        return thread.tid

    def system_call_reads(self, thread: Thread, address: int) -> Running[int]:
        return self._mask(thread, address, 0)

    def system_call_writes(self, thread: Thread, address: int) -> Running[int]:
        return self._mask(thread, 0, address)

    def _mask(self, thread: Thread, new: int, old: int) -> Running[int]:
        """rt_sigprocmask(2) copies a mask of 8 bytes. One that it takes is followed by EINVAL, for there is
        no such `how`; the one that it gives is 0."""
        how = 99 if new else 0
        call = number("rt_sigprocmask")
        return thread.ask(
            0,
            call,
            how,
            new,
            old,
            8,
            convert=lambda answer: 0 if answer.errno == errno.EINVAL else answer.errno,
        )

    def munmap(self, thread: Thread, start: int, length: int) -> Running[int]:
        return thread.errno_of("munmap", start, length)

    def mmap(self, thread: Thread, area: Area, start: int, length: int, offset: int) -> Running[int]:
        _, fd = thread.process.backend.files.get(area.start, (-1, -1))
        flags = MAP_FIXED | (MAP_SHARED if area.kind.shared else MAP_PRIVATE)
        if fd < 0:
            flags |= MAP_ANONYMOUS
        return thread.errno_of("mmap", start, length, 3, flags, fd, offset if fd >= 0 else 0)

    def mremap(
        self, thread: Thread, start: int, old: int, new: int, to: int, dontunmap: bool
    ) -> Running[int]:
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if dontunmap else 0)
        return thread.errno_of("mremap", start, old, new, flags, to)

    def pwrite(self, process: Process, area: Area, offset: int, data: bytes) -> int:
        return _errno(lambda fd: os.pwrite(fd, data, offset), process, area)

    def punch(self, process: Process, area: Area, offset: int, length: int) -> int:
        def call(fd: int) -> None:
            if _libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)):
                raise OSError(ctypes.get_errno(), "fallocate")

        return _errno(call, process, area)

    def truncate(self, process: Process, area: Area, size: int) -> int:
        return _errno(lambda fd: os.ftruncate(fd, size), process, area)


def _errno(call: Any, process: Process, area: Area) -> int:
    fd, _ = process.backend.files[area.start]
    with contextlib.suppress(BlockingIOError):
        try:
            call(fd)
        except OSError as error:
            return error.errno or errno.EIO
    return 0
