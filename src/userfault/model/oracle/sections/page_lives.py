"""Lives of pages: ends of files, protections, markers, poison, split VMAs (s_misc.c)."""

from __future__ import annotations

from collections.abc import Callable

from userfault import abi
from userfault.model import kernel_access
from userfault.model.exit import exit_process
from userfault.model.fill import Fill
from userfault.model.fill_copy import copy
from userfault.model.fork import fork
from userfault.model.layout import PAGE
from userfault.model.madvise import madvise
from userfault.model.mapping import READ, WRITE, mprotect, munmap
from userfault.model.oracle.memory import ALIAS, DST, MSRC, SRC, Memory
from userfault.model.oracle.probe import (
    REMOVE,
    SIGBUS,
    THREAD_ID,
    UNPOPULATED,
    Probe,
    kernel_read,
    user_read,
    user_write,
)
from userfault.model.oracle.sections import Unsupported
from userfault.model.oracle.sections.kernel_accesses import accessed
from userfault.model.pagecache import File
from userfault.model.step import Op
from userfault.model.thread import Thread
from userfault.model.zap import truncate

FOUR = (0, 1, 2, 3)
_Access = Callable[[Thread], Op[tuple[int, int, int]]]


def run(p: Probe, name: str, parts: list[str]) -> None:
    """misc/CASE[/MEM]."""
    if len(parts) == 2 and parts[0] in _BY_MEMORY:
        _BY_MEMORY[parts[0]](p, parts[1])
    elif len(parts) == 1 and parts[0] in _PLAIN:
        _PLAIN[parts[0]](p)
    else:
        raise Unsupported


# Cases with a name of their own.


def _remote_readv(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(THREAD_ID)
    uffd.register(DST, memory.length, 1)
    got: list[int] = []

    def child(thread: Thread) -> Op[None]:
        got.extend((yield from kernel_access.remote_read(thread, p.process.mm, DST + 5, 1)))
        yield from exit_process(thread, thread.process)

    born = p.call(fork(p.caller, child))
    p.settle()
    message = uffd.read_one()
    if isinstance(message, abi.Pagefault):
        p.see("message", p.message(message, DST, born.main))
        p.see("ptid_is_remote_caller", int(message.ptid == born.main.tid))
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.settle()
    p.see("child_ok", int(got == [0xC0]))


def _eof(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(0)
    p.see("register", uffd.register(DST, memory.length, 7))
    assert memory.file is not None
    truncate(memory.file, 2 * size)
    p.see("truncate_to_2_pages", int(memory.file.size != 2 * size))
    beyond = DST + 2 * size
    p.see("copy_beyond", uffd.copy(beyond, SRC, size))
    p.see("copy_wp_beyond", uffd.copy(beyond, SRC, size, abi.UFFDIO_COPY_MODE_WP))
    p.see("zeropage_beyond", uffd.zero(beyond, size))
    p.see("continue_beyond", uffd.cont(beyond, size))
    p.see("poison_beyond", uffd.poison(beyond, size))
    p.see("copy_straddle", uffd.copy(DST + size, SRC, 2 * size))
    p.see("wp_beyond", uffd.wp(beyond, size, 1))
    p.see("post", p.pages(memory, FOUR))
    accessed(p, "read_beyond", uffd, memory, user_read(beyond + 8), "stop")
    accessed(p, "write_beyond", uffd, memory, user_write(DST + 3 * size + 8), "stop")


def _split_and_merge(p: Probe) -> None:
    memory = p.memory("anon", 8)
    uffd, other = p.uffd(0), p.uffd(0)

    def flags(key: str) -> None:
        p.see(key, p.vmflags(DST, memory.length))

    p.see("reg_2_4", uffd.register(DST + 2 * PAGE, 2 * PAGE, 1))
    flags("v1")
    p.see("reg_4_6_same", uffd.register(DST + 4 * PAGE, 2 * PAGE, 1))
    flags("v2_merged")
    p.see("reg_6_8_other_mode", uffd.register(DST + 6 * PAGE, 2 * PAGE, 2))
    flags("v3")
    p.see("reg_0_2_other_uffd", other.register(DST, 2 * PAGE, 1))
    flags("v4")
    p.see("unreg_3_7", uffd.unregister(DST + 3 * PAGE, 4 * PAGE))
    flags("v5")
    p.see("unreg_all_u_hits_other", uffd.unregister(DST, 8 * PAGE))
    flags("v6")
    p.see("unreg_already", uffd.unregister(DST + 4 * PAGE, PAGE))
    p.see("reg_all_u_ebusy", uffd.register(DST, 8 * PAGE, 1))
    flags("v7_no_partial")
    other.close()
    flags("v8")
    p.see("unreg_all", uffd.unregister(DST, 8 * PAGE))
    flags("v9")


def _mixed_ranges(p: Probe) -> None:
    """anon, shmem, a hole, anon: one page each; later ext4 in the hole."""
    p.mmap(DST, PAGE)
    p.mmap(DST + PAGE, PAGE, shared=True, file=File(p.kernel, "shmem", 4 * PAGE))
    p.mmap(DST + 3 * PAGE, PAGE)
    uffd = p.uffd(0)

    def flags(key: str) -> None:
        p.see(key, p.vmflags(DST, 5 * PAGE))

    p.see("anon+shmem_missing", uffd.register(DST, 2 * PAGE, 1))
    uffd.unregister(DST, 2 * PAGE)
    p.see("anon+shmem_minor", uffd.register(DST, 2 * PAGE, 4))
    p.see("anon+shmem+hole+anon", uffd.register(DST, 4 * PAGE, 1))
    flags("v")
    uffd.unregister(DST, 4 * PAGE)
    p.see("start_in_hole", uffd.register(DST + 2 * PAGE, 2 * PAGE, 1))
    flags("v2")
    uffd.unregister(DST, 4 * PAGE)
    p.see("only_hole", uffd.register(DST + 2 * PAGE, PAGE, 1))
    p.see("unreg_only_hole", uffd.unregister(DST + 2 * PAGE, PAGE))
    p.mmap(DST + 2 * PAGE, PAGE, shared=True, file=File(p.kernel, "ordinary", PAGE))
    p.see("with_ext4_in_middle", uffd.register(DST, 4 * PAGE, 1))
    flags("v3_none")
    p.see("unreg_with_ext4_in_middle", uffd.unregister(DST, 4 * PAGE))
    p.call(munmap(p.caller, DST + 2 * PAGE, PAGE))
    for page in (0, 1, 3):
        uffd.register(DST + page * PAGE, PAGE, 2)
    for page in (0, 1, 3):
        p.poke(DST + page * PAGE, 1)
    plain = Memory("anon")
    p.see("wp_across_2_vmas", uffd.wp(DST, 2 * PAGE, 1))
    p.see("wp_across_hole", uffd.wp(DST, 4 * PAGE, 1))
    p.see("p", p.pages(plain, FOUR))
    p.see("unwp_across_hole", uffd.wp(DST, 4 * PAGE, 0))
    uffd.unregister(DST + PAGE, PAGE)
    p.see("wp_with_unregistered_middle", uffd.wp(DST, 4 * PAGE, 1))
    p.see("p2", p.pages(plain, FOUR))
    p.see("wp_hole_only", uffd.wp(DST + 2 * PAGE, PAGE, 1))
    p.see("wp_start_in_hole", uffd.wp(DST + 2 * PAGE, 2 * PAGE, 1))
    p.see("p3", p.pages(plain, FOUR))
    uffd.register(DST + PAGE, PAGE, 1)
    p.see("wp_with_missing_only_vma_first", uffd.wp(DST + PAGE, PAGE, 1))


def _copy_sources(p: Probe) -> None:
    memory = p.memory("anon")
    uffd, other = p.uffd(0), p.uffd(0)
    uffd.register(DST, 2 * PAGE, 1)
    other.register(DST + 2 * PAGE, 2 * PAGE, 1)

    def nested(thread: Thread) -> Op[tuple[int, int, int]]:
        reply = yield from copy(thread, uffd.ctx, Fill(DST, PAGE, 0, DST + 2 * PAGE))
        return -1 if reply.errno else 0, reply.errno, -1 if reply.out is None else reply.out

    accessed(p, "src_missing_on_other_uffd", other, memory, nested, "resolve")
    p.see("post", p.pages(memory, FOUR))
    p.mmap(MSRC, 2 * PAGE, shared=True, file=File(p.kernel, "shmem", PAGE))
    p.see("src_unpopulated_shmem", uffd.copy(DST + PAGE, MSRC, PAGE))
    p.call(madvise(p.caller, DST + PAGE, PAGE, "DONTNEED"))
    p.see("src_beyond_eof", uffd.copy(DST + PAGE, MSRC + PAGE, PAGE))
    p.see("src_unaligned_spans_eof", uffd.copy(DST + PAGE, MSRC + 8, PAGE))
    p.see("src_unaligned_ok", uffd.copy(DST + PAGE, SRC + 8, PAGE))


def _destination_protection(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(0)
    if memory.fileish:
        p.fill(ALIAS + 2 * size, size, 0xCA)

    def protect(protection: int) -> int:
        return p.attempt(mprotect(p.caller, DST, memory.length, protection))

    def write(key: str, offset: int) -> None:
        accessed(p, key, uffd, memory, user_write(DST + offset), "stop")

    p.see("register", uffd.register(DST, memory.length, 7 if memory.fileish else 3))
    p.see("mprotect_read", protect(READ))
    p.see("vmflags", p.vmflags(DST, memory.length))
    p.see("copy_ro", uffd.copy(DST, SRC, size))
    p.see("zeropage_ro", uffd.zero(DST + size, size))
    p.see("continue_ro", uffd.cont(DST + 2 * size, size))
    write("write_ro_present", 8)
    write("write_ro_missing", 3 * size + 8)
    protect(READ | WRITE)
    write("write_rw_again_copied", 8)
    if memory.fileish:
        write("write_rw_again_continued", 2 * size + 8)
    protect(0)
    p.see("copy_prot_none", uffd.copy(DST + 3 * size, SRC, size))
    accessed(p, "read_prot_none", uffd, memory, user_read(DST + 3 * size), "stop")
    p.see("wp_prot_none", uffd.wp(DST, size, 1))
    protect(READ | WRITE)
    p.see("post", p.pages(memory, FOUR, cache=1))
    write("write_after_wp_prot_roundtrip", 8)


def _marker_life(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    length, size = memory.length, memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(UNPOPULATED)
    uffd.register(DST, length, 2)

    def pages(key: str) -> None:
        p.see(key, p.pages(memory, FOUR, cache=1))

    p.see("wp_all", uffd.wp(DST, length, 1))
    pages("s0")
    accessed(p, "read0", uffd, memory, user_read(DST), "resolve")
    pages("s1_after_read0")
    accessed(p, "write0", uffd, memory, user_write(DST), "resolve")
    accessed(p, "write1", uffd, memory, user_write(DST + size), "resolve")
    pages("s2_after_writes")
    p.see("wp_all_again", uffd.wp(DST, length, 1))
    p.see("dontneed", p.attempt(madvise(p.caller, DST, length, "DONTNEED")))
    pages("s3_after_dontneed")
    if memory.shared:
        p.see("remove", p.attempt(madvise(p.caller, DST, length, "REMOVE")))
        pages("s4_after_remove")
    p.see("reregister_missing_only", uffd.register(DST, length, 1))
    pages("s5")
    p.see("unregister", uffd.unregister(DST, length))
    pages("s6")


def _alias_write(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    p.see("mem", kind)
    p.fill(DST, memory.page_size, 0x11)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 2)
    uffd.wp(DST, memory.page_size, 1)
    p.poke(ALIAS + 3, 0x55)
    p.settle()
    p.see("event_on_alias_write", int(uffd.readable()))
    p.see("seen_through_wp_mapping", p.peek(DST + 3))
    assert memory.file is not None
    if not memory.huge and memory.file.write(4, b"\x66") == 1:
        p.see("event_on_pwrite", int(uffd.readable()))
    p.see("post", p.pages(memory, (0, 1), cache=1))


def _poison_life(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    length, size = memory.length, memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(0)
    uffd.register(DST, length, 7 if memory.fileish else 3)

    def pages(key: str, which: tuple[int, ...] = FOUR) -> None:
        p.see(key, p.pages(memory, which, cache=1))

    p.see("poison_all", uffd.poison(DST, length))
    pages("s0")
    accessed(p, "user_read", uffd, memory, user_read(DST + 5), "stop")
    accessed(p, "kernel_read", uffd, memory, kernel_read(DST + 5), "stop")

    def child(thread: Thread) -> Op[None]:
        process = thread.process
        reader = process.thread("reader")
        reader.start(user_read(DST + 5)(reader))
        while not reader.done:
            yield "wait for the reader"
        from userfault.model.oracle.probe import Accessor

        p.see("child_read", Accessor(reader).seen(DST))
        p.see("child_pages", p.pages(memory, (0,), process=process))
        yield from exit_process(thread, process)

    p.call(fork(p.caller, child))
    p.settle()
    p.see("wp_over", uffd.wp(DST, size, 1))
    p.see("unwp_over", uffd.wp(DST, size, 0))
    if memory.fileish:
        p.fill(ALIAS + size, size, 0xCA)
        p.see("continue_over_poison_with_cache", uffd.cont(DST + size, size))
    p.see("copy_over_poison", uffd.copy(DST + 2 * size, SRC, size))
    p.see("zeropage_over_poison", uffd.zero(DST + 3 * size, size))
    pages("s1")
    p.see("dontneed", p.attempt(madvise(p.caller, DST, size, "DONTNEED")))
    pages("s2", (0,))
    uffd.poison(DST, size)
    returned = p.attempt(mprotect(p.caller, DST, size, READ))
    p.see("mprotect_cycle", returned | p.attempt(mprotect(p.caller, DST, size, READ | WRITE)))
    pages("s3_after_mprotect", (0,))
    if memory.shared:
        p.see("madv_remove", p.attempt(madvise(p.caller, DST, size, "REMOVE")))
        pages("s4_after_remove", (0,))
    p.see("unregister", uffd.unregister(DST, length))
    accessed(p, "user_read_after_unreg", uffd, memory, user_read(DST + 5), "stop")


def _two_mappings(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    length, size = memory.length, memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(0)

    def accessed_at(key: str, access: _Access) -> None:
        accessed(p, key, uffd, memory, access, "stop")

    p.see("reg_main", uffd.register(DST, length, 7))
    p.see("reg_alias", uffd.register(ALIAS, length, 7))
    p.see("copy_main", uffd.copy(DST, SRC, size))
    accessed_at("read_alias_after_copy_main", user_read(ALIAS + 8))
    p.see("copy_alias_same_page", uffd.copy(ALIAS, SRC, size))
    p.see("continue_alias", uffd.cont(ALIAS, size))
    accessed_at("read_alias_page1", user_read(ALIAS + size + 8))
    p.see("copy_alias_wp", uffd.copy(ALIAS + 2 * size, SRC, size, abi.UFFDIO_COPY_MODE_WP))
    p.see("continue_main_p2", uffd.cont(DST + 2 * size, size))
    accessed_at("write_main_p2", user_write(DST + 2 * size))
    accessed_at("write_alias_p2", user_write(ALIAS + 2 * size))


def _sigbus(p: Probe) -> None:
    memory = p.memory("anon")
    uffd = p.uffd(SIGBUS | REMOVE)
    uffd.register(DST, memory.length, 3)

    def accessed_at(key: str, access: _Access) -> None:
        accessed(p, key, uffd, memory, access, "stop")

    accessed_at("read_missing", user_read(DST + 0x123))
    p.see("copy_then", uffd.copy(DST, SRC, PAGE, abi.UFFDIO_COPY_MODE_WP))
    accessed_at("read_ok", user_read(DST + 0x123))
    accessed_at("write_wp", user_write(DST + 0x123))
    p.see("unwp", uffd.wp(DST, PAGE, 0))
    accessed_at("write_ok", user_write(DST + 0x123))
    p.see("poll", int(uffd.readable()))
    p.see("note", "REMOVE etc. events still delivered with SIGBUS")


def _zap_then_fault(p: Probe, kind: str) -> None:
    memory = p.memory(kind)
    size = memory.page_size
    p.see("mem", kind)
    uffd = p.uffd(0)
    uffd.register(DST, memory.length, 5 if memory.fileish else 1)
    uffd.copy(DST, SRC, 2 * size)
    p.attempt(madvise(p.caller, DST, size, "DONTNEED"))
    accessed(p, "after_dontneed", uffd, memory, user_read(DST + 8), "stop")
    if memory.shared:
        p.attempt(madvise(p.caller, DST + size, size, "REMOVE"))
        accessed(p, "after_remove", uffd, memory, user_read(DST + size + 8), "stop")


_PLAIN: dict[str, Callable[[Probe], None]] = {
    "remote_process_vm_readv": _remote_readv,
    "vma_split_merge": _split_and_merge,
    "mixed_vma_ranges": _mixed_ranges,
    "copy_sources": _copy_sources,
    "sigbus_feature": _sigbus,
}

_BY_MEMORY: dict[str, Callable[[Probe, str], None]] = {
    "eof": _eof,
    "dst_protection": _destination_protection,
    "wp_marker_lifecycle": _marker_life,
    "wp_alias_write": _alias_write,
    "poison_lifecycle": _poison_life,
    "two_registered_mappings": _two_mappings,
    "zap_then_fault": _zap_then_fault,
}
