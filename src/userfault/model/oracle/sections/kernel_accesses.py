"""Accesses that system calls make, of many kinds (s_misc.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from userfault import abi
from userfault.model import kernel_access
from userfault.model.access import load, touch
from userfault.model.layout import PAGE
from userfault.model.mapping import EXEC, READ, WRITE, mprotect
from userfault.model.oracle.memory import ALIAS, DST, MODE_NAMES, SRC, Memory
from userfault.model.oracle.probe import (
    SIGBUS,
    Probe,
    Uffd,
    kernel_read,
    kernel_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.step import Op
from userfault.model.thread import Thread

_Access = Callable[[Thread], Op[tuple[int, int, int]]]


def accessed(p: Probe, key: str, uffd: Uffd, memory: Memory, access: _Access, policy: str) -> None:
    """run_acc."""
    accessor = p.start(access)
    p.see(f"{key}_msgs", p.pump(uffd, memory, [accessor], policy, most=12).messages)
    p.see(f"{key}_result", accessor.seen(DST))


# Accesses.


class Access(NamedTuple):
    """An access: from where, how long, and what it does."""

    offset: int
    length: int
    make: Callable[[int, int], _Access]


def _fetch(address: int, length: int) -> _Access:
    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        yield "fetch an instruction"
        yield from touch(thread, thread.process.mm, address, write=False, execute=True)
        return 0, 0, -1

    return run


def _add(address: int, length: int) -> _Access:
    """An atomic read-modify-write: one write access."""

    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        yield "add atomically"
        page, offset = yield from touch(thread, thread.process.mm, address, write=True)
        value = int.from_bytes(page.content.read(offset, length), "little") + 1
        page.content = page.content.write(offset, value.to_bytes(length, "little"), page.size)
        return 0, 0, -1

    return run


def _memcpy(address: int, length: int) -> _Access:
    def run(thread: Thread) -> Op[tuple[int, int, int]]:
        data = yield from load(thread, thread.process.mm, address, length)
        return 0, 0, data[0] if data[0] < 128 else data[0] - 256  # a signed char

    return run


def _system_call(
    operation: Callable[[Thread, int, int], Op[tuple[int, int, int]]],
) -> Callable[[int, int], _Access]:
    return lambda address, length: lambda thread: operation(thread, address, length)


ACCESSES = {
    "process_vm_readv": Access(0x123, 1, _system_call(kernel_access.process_vm_readv)),
    "process_vm_writev": Access(0x123, 1, _system_call(kernel_access.process_vm_writev)),
    "proc_self_mem_read": Access(0x123, 1, _system_call(kernel_access.proc_mem_read)),
    "proc_self_mem_write": Access(0x123, 1, _system_call(kernel_access.proc_mem_write)),
    "write_to_ext4_file": Access(0x123, 100, kernel_read),
    "read_from_ext4_file": Access(
        0x123, 100, lambda at, length: kernel_write(at, b"\x01" + bytes(length - 1))
    ),
    "mlock_2pages": Access(0, 2 * PAGE, _system_call(kernel_access.mlock)),
    "mincore": Access(0, PAGE, _system_call(kernel_access.mincore)),
    "futex_wait": Access(0x120, 4, _system_call(kernel_access.futex_wait)),
    "getrandom": Access(0x123, 1, lambda at, length: kernel_write(at, bytes(length))),
    "vmsplice": Access(0x123, 16, _system_call(kernel_access.vmsplice)),
    "pipe_write_spanning_2_pages": Access(0xFF0, 0x20, kernel_read),
    "pipe_read_spanning_2_pages": Access(0xFF0, 0x20, lambda at, length: kernel_write(at, b"\x01" * length)),
    "user_atomic_rmw": Access(0x120, 4, _add),
    "user_memcpy_2pages": Access(0xFF0, 0x20, _memcpy),
    "user_exec_fetch": Access(0x100, 1, _fetch),
}


def run(p: Probe, name: str, parts: list[str]) -> None:
    """kaccess/MEM/MODE/STATE[/VARIANT]/ACCESS."""
    kind, mode_name, state, *variant, what = parts
    if what not in ACCESSES or variant not in ([], ["user_mode_only"], ["sigbus"]):
        raise Unsupported
    features = SIGBUS if variant == ["sigbus"] else 0
    flags = abi.UFFD_USER_MODE_ONLY if variant == ["user_mode_only"] else 0
    access = ACCESSES[what]
    memory = p.memory(kind)
    p.see("mem", kind)
    p.see("mode", mode_name)
    p.see("features", f"{features:#x}")
    p.see("op", f"kaccess:{what}")
    p.see("state", state)
    if flags:
        p.see("uffd_flags", "UFFD_USER_MODE_ONLY")
    if state == "wp_present":
        p.fill(DST, memory.length, 0xC3)
    elif state == "cache_only":
        p.fill(ALIAS, memory.length, 0xC3)
    if what == "user_exec_fetch":
        p.call(mprotect(p.caller, DST, memory.length, READ | WRITE | EXEC))
        p.fill(SRC, memory.page_size * 2, 0xC3)
    uffd = p.uffd(features, flags)
    uffd.register(DST, memory.length, MODE_NAMES.index(mode_name))
    if state == "wp_present":
        uffd.wp(DST, memory.length, 1)
    accessed(p, "access", uffd, memory, access.make(DST + access.offset, access.length), "resolve")
    p.see("post", p.pages(memory, (0, 1, 2)))
