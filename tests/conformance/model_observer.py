"""What the differential test does and sees beyond a backend, on the model."""

from __future__ import annotations

from typing import Any

from conformance.backend import Area
from conformance.model import Process, Running, Thread, _errno
from userfault import abi
from userfault.abi import PageRegion
from userfault.model import Userfaultfd
from userfault.model.access import translate
from userfault.model.errnos import EINVAL
from userfault.model.pagemap import Scan, pagemap_scan
from userfault.model.smaps import smaps
from userfault.model.zap import punch, truncate

REPORTED = 0x1FF & ~abi.PAGE_IS_SOFT_DIRTY


class ModelObserver:
    """See `conformance.differential.Observer`."""

    def begin(self, process: Process) -> None:
        pass

    def vmas(self, process: Process) -> list[tuple[int, int, str]]:
        return [
            (start, end, " ".join([permissions, *(flag for flag in flags if flag in ("um", "uw", "ui"))]))
            for start, end, permissions, flags in smaps(process.process.mm)
        ]

    def content(self, process: Process, address: int, length: int) -> bytes | None:
        place = translate(process.process.mm, address, False)
        return None if place is None else place[0].content.read(place[1], length)

    def scan(self, process: Process, start: int, end: int, flags: int, any_of: int) -> list[PageRegion] | int:
        mm = process.process.mm
        known = REPORTED if mm.kernel.version >= (6, 13) else REPORTED & 0xFF
        reply = pagemap_scan(
            mm, Scan(start, end, flags, category_anyof_mask=any_of, return_mask=known, vec_len=1 << 20)
        )
        return reply.errno or reply.regions

    def waiting(self, uffd: Userfaultfd) -> tuple[int, int, bool]:
        return uffd.context.pending, uffd.context.total, uffd.readable

    def close(self, uffd: Userfaultfd) -> None:
        uffd.close()

    def thread_id(self, thread: Thread) -> int:
        return thread.thread.tid

    def system_call_reads(self, thread: Thread, address: int) -> Running[int]:
        return thread._do(_errno(thread.calls.write_from(address, 8)))

    def system_call_writes(self, thread: Thread, address: int) -> Running[int]:
        return thread._do(_errno(thread.calls.read_into(address, bytes(8))))

    def munmap(self, thread: Thread, start: int, length: int) -> Running[int]:
        if not thread.process.process.mm.overlapping(start, start + length):
            return thread._do(_errno(thread.calls.step("nothing is mapped there")))
        return thread._do(_errno(thread.calls.munmap(start, length)))

    def mmap(self, thread: Thread, area: Area, start: int, length: int, offset: int) -> Running[int]:
        options: dict[str, Any] = {"replace": True, "shared": area.kind.shared}
        file = thread.process.backend.files.get(area.start)
        if file is not None:
            options |= {"file": file, "offset": offset}
        return thread._do(_errno(thread.calls.mmap(start, length, **options)))

    def mremap(
        self, thread: Thread, start: int, old: int, new: int, to: int, dontunmap: bool
    ) -> Running[int]:
        return thread._do(_errno(thread.calls.mremap(start, old, new, to, dontunmap=dontunmap)))

    def pwrite(self, process: Process, area: Area, offset: int, data: bytes) -> int:
        file = process.backend.files[area.start]
        if file.kind == "hugetlb":
            return EINVAL
        file.write(offset, data)
        return 0

    def punch(self, process: Process, area: Area, offset: int, length: int) -> int:
        punch(process.backend.files[area.start], offset, length)
        return 0

    def truncate(self, process: Process, area: Area, size: int) -> int:
        truncate(process.backend.files[area.start], size)
        return 0
