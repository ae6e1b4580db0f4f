"""exit, execve: the end of an address space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userfault.model.context import Context
from userfault.model.mm import AddressSpace
from userfault.model.release import close_context
from userfault.model.step import Op
from userfault.model.zap import zap

if TYPE_CHECKING:
    from userfault.model.process import Process
    from userfault.model.thread import Thread


def exit_process(thread: Thread, process: Process) -> Op[None]:
    """The process ends: its threads die, its address space goes, its descriptors are closed.

    A userfaultfd that somebody else holds stays, for an address space that is gone [D1].
    """
    yield f"{process.name} exits"
    process.exited = True
    for other in process.threads:
        if other is not thread:
            other.kill()
    yield from _drop_address_space(process.mm)
    yield from _close(process, set(process.descriptors.files))


def execve(thread: Thread) -> Op[None]:
    """execve(2): the old address space goes, descriptors without CLOEXEC stay [E13]."""
    process = thread.process
    yield "execve"
    old, process.mm = process.mm, AddressSpace(process.kernel, process.name)
    yield from _drop_address_space(old)
    yield from _close(process, set(process.descriptors.cloexec))


def _drop_address_space(mm: AddressSpace) -> Op[None]:
    yield from mm.mmap_lock.write("the address space goes")
    mm.alive = False
    for vma in mm.vmas:
        zap(mm, vma, vma.start, vma.end, drop_markers=True)
    mm.vmas.clear()
    mm.mmap_lock.unwrite()


def _close(process: Process, numbers: set[int]) -> Op[None]:
    for number in sorted(numbers):
        file = process.descriptors.remove(number)
        if file is not None and isinstance(file.target, Context):
            yield from close_context(file.target)
