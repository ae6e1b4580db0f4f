"""System calls that touch user memory in their own way [P6]. Each returns (ret, errno, value seen or -1).

    plain copies      write(2), read(2), getrandom: a fault is taken as for user code, a refusal is EFAULT
                      (`access.load` and `access.store` with user=False)
    page pinning      process_vm_readv and writev, vmsplice, futex (as a write), mlock, MADV_POPULATE
    /proc/PID/mem     cannot sleep: a fault that has to ask is EIO, never a message
    mincore           looks, and does not fault

A remote access names the caller's thread in its message, even in another process [M3].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model import madvise
from userfault.model.access import MemoryFault, load, store, touch, translate
from userfault.model.errnos import EAGAIN, EFAULT, EIO, ENOMEM, ETIMEDOUT, SystemCallError
from userfault.model.layout import PAGE
from userfault.model.mm import AddressSpace
from userfault.model.page import Page
from userfault.model.step import Op

if TYPE_CHECKING:
    from userfault.model.thread import Thread

Result = tuple[int, int, int]


def remote_read(thread: Thread, mm: AddressSpace, address: int, length: int) -> Op[bytes]:
    """process_vm_readv of any address space. Raises MemoryFault."""
    return load(thread, mm, address, length, user=False)


def process_vm_readv(thread: Thread, address: int, length: int) -> Op[Result]:
    """process_vm_readv of the caller itself."""
    try:
        yield from remote_read(thread, thread.process.mm, address, length)
    except MemoryFault:
        return -1, EFAULT, -1
    return length, 0, -1


def process_vm_writev(thread: Thread, address: int, length: int) -> Op[Result]:
    """process_vm_writev of the caller itself."""
    try:
        yield from store(thread, thread.process.mm, address, b"\x05" * length, user=False)
    except MemoryFault:
        return -1, EFAULT, -1
    return length, 0, -1


def proc_mem_read(thread: Thread, address: int, length: int) -> Op[Result]:
    """pread of /proc/self/mem, within one page."""
    return _proc_mem(thread, address, length, None)


def proc_mem_write(thread: Thread, address: int, length: int) -> Op[Result]:
    """pwrite of /proc/self/mem, within one page."""
    return _proc_mem(thread, address, length, b"\x03" * length)


def _proc_mem(thread: Thread, address: int, length: int, data: bytes | None) -> Op[Result]:
    yield "access /proc/self/mem"
    try:
        page, offset = yield from touch(
            thread, thread.process.mm, address, write=data is not None, user=False, may_sleep=False
        )
    except MemoryFault:
        return -1, EIO, -1
    if data is not None:
        page.content = page.content.write(offset, data, page.size)
    return length, 0, -1


def mlock(thread: Thread, address: int, length: int) -> Op[Result]:
    """mlock(2)."""
    try:
        yield from madvise.mlock(thread, address, length)
    except SystemCallError as error:
        return -1, error.errno, -1
    return 0, 0, -1


def mincore(thread: Thread, address: int, length: int) -> Op[Result]:
    """mincore(2) of one page: 1 if it is mapped or cached; nothing is faulted in."""
    mm = thread.process.mm
    yield from mm.mmap_lock.read("mincore")
    vma = mm.find(address)
    there = translate(mm, address, False) is not None
    if vma is not None and vma.file is not None and not vma.hugetlb and not there:
        there = type(vma.file.pages.get(vma.index(address))) is Page
    mm.mmap_lock.unread()
    if vma is None:
        return -1, ENOMEM, -1
    return 0, 0, int(there)


def futex_wait(thread: Thread, address: int, length: int) -> Op[Result]:
    """FUTEX_WAIT for the value 0 with a timeout: the key is made from the page, pinned for writing."""
    mm = thread.process.mm
    yield "FUTEX_WAIT: pin the page"
    try:
        yield from touch(thread, mm, address, write=True, user=False)
        value = yield from load(thread, mm, address, length, user=False)
    except MemoryFault:
        return -1, EFAULT, -1
    return -1, EAGAIN if any(value) else ETIMEDOUT, -1


def vmsplice(thread: Thread, address: int, length: int) -> Op[Result]:
    """vmsplice(2) into a pipe: pins pages for reading."""
    mm = thread.process.mm
    try:
        for at in range(address // PAGE * PAGE, address + length, PAGE):
            yield f"vmsplice: pin {at:#x}"
            yield from touch(thread, mm, max(at, address), write=False, user=False)
    except MemoryFault:
        return -1, EFAULT, -1
    return length, 0, -1
