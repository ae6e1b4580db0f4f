"""The handshake, registration, and what kind of memory can be registered (s_api.c)."""

from __future__ import annotations

import ctypes
from typing import Any

from userfault import abi
from userfault.model.descriptor import MODE, NAME, poll, try_operation
from userfault.model.errnos import EINVAL, ENOSYS, SystemCallError, errno_name
from userfault.model.fill_continue import continue_
from userfault.model.fill_copy import copy
from userfault.model.fill_poison import poison
from userfault.model.fill_zeropage import zeropage
from userfault.model.handshake import (
    O_CLOEXEC,
    O_NONBLOCK,
    ApiReply,
    api,
    device_ioctl,
    device_read,
    ioctl_known,
    open_device,
)
from userfault.model.layout import HUGE_PAGE, PAGE
from userfault.model.madvise import madvise, mlock
from userfault.model.mapping import READ
from userfault.model.move import move
from userfault.model.oracle.memory import DST, MODE_NAMES, SRC, mode_number
from userfault.model.oracle.probe import ASYNC, FORK, UNPOPULATED, Probe, Seen, Uffd, user_write
from userfault.model.oracle.sections import Unsupported
from userfault.model.pagecache import File
from userfault.model.register import register, unregister
from userfault.model.wake import wake
from userfault.model.writeprotect import writeprotect

NOBODY = 65534


def run(p: Probe, name: str, parts: list[str]) -> None:
    """api/CASE."""
    (case,) = parts
    plain = {
        "constants": _constants,
        "bad_pointer": _bad_pointer,
        "ops_before_api": _before_api,
        "syscall_flags": _system_call_flags,
        "dev_userfaultfd": _device,
        "dev_userfaultfd_unpriv": _device_unprivileged,
        "unknown_ioctls_and_fd_ops": _unknown_ioctls,
    }
    if case in plain:
        plain[case](p)
    elif case == "version_ab_with_fork":
        _api(p, 0xAB, FORK, 0, O_NONBLOCK)
    elif case.startswith("feature_bit_"):
        _api(p, abi.UFFD_API, 1 << int(case.removeprefix("feature_bit_")), 0, O_NONBLOCK)
    elif case.startswith("features_"):
        _api(p, abi.UFFD_API, int(case.removeprefix("features_"), 16), 0, O_NONBLOCK)
    elif case.startswith("version_"):
        _api(p, int(case.removeprefix("version_"), 16), 0, 0, O_NONBLOCK)
    elif case.startswith("unpriv_flags"):
        flags, features = case.removeprefix("unpriv_flags").split("_feat")
        _api(p, abi.UFFD_API, int(features, 16), NOBODY, int(flags))
    else:
        raise Unsupported


def _api(p: Probe, version: int, features: int, uid: int, flags: int) -> None:
    p.see("args", {"api": f"{version:#x}", "features": f"{features:#x}", "uid": uid, "flags": flags})
    p.process.privileged = not uid
    opened: list[Uffd] = []
    answer = _attempt(lambda: opened.append(p.uffd_open(flags)))
    p.see("open", {"ok": len(opened), "errno": answer[1]})
    if not opened:
        return
    uffd = opened[0]
    p.see(
        "fcntl", {"fl": _status_flags(uffd), "fd_cloexec": int(uffd.number in p.process.descriptors.cloexec)}
    )
    p.see("api1", _api_seen(api(p.process, uffd.ctx, version, features), version, features))
    if not uid:
        p.see("fdinfo", p.fdinfo(uffd))
    p.see("api2", _api_seen(api(p.process, uffd.ctx, abi.UFFD_API, 0), abi.UFFD_API, 0))
    if not uid:
        p.see("fdinfo2", p.fdinfo(uffd))


def _status_flags(uffd: Uffd) -> str:
    """fcntl(F_GETFL)."""
    return hex(O_NONBLOCK if uffd.file.nonblock else 0)


SENTINEL = 0x5E5E5E5E


def _api_seen(reply: ApiReply, version: int, features: int, ioctls: int = SENTINEL) -> Seen:
    """put_api: what the struct holds afterwards."""
    held = (version, features, ioctls) if reply.api is None else (reply.api, reply.features, reply.ioctls)
    return {
        "ret": -1 if reply.errno else 0,
        "errno": errno_name(reply.errno),
        "api": f"{held[0]:#x}",
        "features": f"{held[1]:#x}",
        "ioctls": f"{held[2]:#x}",
    }


def _pair(errno: int) -> list[Any]:
    return [-1 if errno else 0, errno_name(errno)]


def _bad_pointer(p: Probe) -> None:
    uffd = p.uffd_open(O_NONBLOCK)
    p.see("null", _pair(api(p.process, uffd.ctx, 0, 0, readable=False).errno))
    p.see("ro_zero_page", _pair(api(p.process, uffd.ctx, 0, 0, writable=False).errno))
    p.see("ro_valid", _pair(api(p.process, uffd.ctx, abi.UFFD_API, 0, writable=False).errno))
    # The probe prints errno, which a call that succeeds leaves at 0.
    p.see("after_ro_valid", _pair(api(p.process, uffd.ctx, abi.UFFD_API, 0).errno))


def _before_api(p: Probe) -> None:
    p.memory("anon")
    uffd = p.uffd_open(O_NONBLOCK)
    p.see("register", uffd.register(DST, PAGE, 1))
    p.see("unregister", uffd.unregister(DST, PAGE))
    p.see("wake", uffd.wake(DST, PAGE))
    p.see("copy", uffd.copy(DST, SRC, PAGE))
    p.see("zeropage", uffd.zero(DST, PAGE))
    p.see("writeprotect", uffd.wp(DST, PAGE, 1))
    p.see("continue", uffd.cont(DST, PAGE))
    p.see("poison", uffd.poison(DST, PAGE))
    p.see("move", uffd.move(DST, SRC, PAGE))
    p.see("read", _read(uffd))
    events = poll(uffd.file)
    p.see("poll", [int(bool(events)), events])
    p.see("fdinfo", p.fdinfo(uffd))


def _read(uffd: Uffd) -> list[Any]:
    try:
        return [32 * len(uffd.read()), "ok"]
    except SystemCallError as error:
        return [-1, errno_name(error.errno)]


def _hex_int(value: int) -> str:
    return f"0x{value & 0xFFFFFFFF:x}"


def _system_call_flags(p: Probe) -> None:
    rows = []
    for flags in (
        0,
        1,
        2,
        4,
        O_CLOEXEC,
        O_NONBLOCK,
        O_CLOEXEC | O_NONBLOCK | 1,
        0o2,
        0o2000,
        0x40000000,
        -1,
    ):
        try:
            uffd = p.uffd_open(flags)
            rows.append([_hex_int(flags), "ok", _status_flags(uffd)])
            uffd.close()
        except SystemCallError as error:
            rows.append([_hex_int(flags), errno_name(error.errno), "0x0"])
    p.see("syscall_flags", rows)


def _device(p: Probe) -> None:

    opened = _attempt(lambda: open_device(p.process))
    p.see("open", opened[1])
    if opened[0]:
        return
    rows = []
    for flags in (0, 1, 2, O_CLOEXEC, O_NONBLOCK, O_CLOEXEC | O_NONBLOCK | 1):
        try:
            number = device_ioctl(p.process, abi.USERFAULTFD_IOC_NEW, flags)
            uffd = Uffd(p, number)
            cloexec = int(number in p.process.descriptors.cloexec)
            rows.append([_hex_int(flags), "ok", _status_flags(uffd), cloexec])
        except SystemCallError as error:
            rows.append([_hex_int(flags), errno_name(error.errno), "0x0", 0])
    p.see("ioc_new_flags", rows)
    p.see("other_ioctl", _attempt(lambda: device_ioctl(p.process, abi.UFFDIO_API, 0)))
    p.see("read", _attempt(lambda: device_read(p.process)))
    p.see("ioc_new_on_rdonly", _attempt(lambda: device_ioctl(p.process, abi.USERFAULTFD_IOC_NEW, 0))[1])


def _attempt(call: Any) -> list[Any]:
    try:
        call()
    except SystemCallError as error:
        return [-1, errno_name(error.errno)]
    return [0, "ok"]


def _device_unprivileged(p: Probe) -> None:

    try:
        open_device(p.process)
    except SystemCallError as error:
        p.see("open", errno_name(error.errno))
        return
    p.process.privileged = False
    p.see("open_as_nobody", _attempt(lambda: open_device(p.process))[1])
    opened: list[int] = []
    p.see(
        "ioc_new_on_inherited_fd",
        _attempt(lambda: opened.append(device_ioctl(p.process, abi.USERFAULTFD_IOC_NEW, 0)))[1],
    )
    uffd = Uffd(p, opened[0])
    first = api(p.process, uffd.ctx, abi.UFFD_API, FORK)
    p.see("api_fork_feature", _api_seen(first, abi.UFFD_API, FORK, 0))
    p.see("api_retry_no_feature", _api_seen(api(p.process, uffd.ctx, abi.UFFD_API, 0), abi.UFFD_API, 0, 0))
    p.see("syscall0", _attempt(lambda: p.uffd_open(0))[1])
    p.see("syscall_user_mode_only", _attempt(lambda: p.uffd_open(1))[1])


def _unknown_ioctls(p: Probe) -> None:
    uffd = p.uffd(0)

    def tried(request: int) -> list[Any]:
        return _pair(0 if ioctl_known(p.kernel, request) else EINVAL)

    numbers: list[list[Any]] = [
        [f"{number:#x}", *tried(abi._ioc(3, 0xAA, number, 32))] for number in (0x09, 0x0A, 0x3E, 0x40)
    ]
    numbers.append(["copy_nr_wrong_size", *tried(abi._ioc(3, 0xAA, 3, 48))])
    numbers.append(["unreg_iow_dir", *tried(abi._ioc(1, 0xAA, 1, 16))])
    numbers.append(["other_magic", *tried(abi._ioc(0, ord("x"), 1, 0))])
    p.see("unknown", numbers)
    caller, ctx = p.caller, uffd.ctx
    null = {
        "register": register(caller, ctx, None, 0, 0),
        "unregister": unregister(caller, ctx, None, 0),
        "wake": wake(caller, ctx, None, 0),
        "copy": copy(caller, ctx, None),
        "zeropage": zeropage(caller, ctx, None),
        "move": move(caller, ctx, None),
        "writeprotect": writeprotect(caller, ctx, 0, 0, None),
        "continue": continue_(caller, ctx, None),
        "poison": poison(caller, ctx, None),
    }
    p.see("null_arg", {name: errno_name(p.call(operation).errno) for name, operation in null.items()})
    p.see("write_fd", _pair(try_operation(uffd.file, "write")))
    p.see("lseek", _pair(try_operation(uffd.file, "lseek")))
    for operation, key in (("mmap", "mmap_fd"), ("fsync", "fsync"), ("ftruncate", "ftruncate")):
        p.see(key, errno_name(try_operation(uffd.file, operation)))
    p.see("st_mode", f"0{MODE:o}")
    p.see("readlink", NAME)


def _constants(p: Probe) -> None:
    names = (
        "API",
        "REGISTER",
        "UNREGISTER",
        "WAKE",
        "COPY",
        "ZEROPAGE",
        "MOVE",
        "WRITEPROTECT",
        "CONTINUE",
        "POISON",
    )
    numbers = {f"UFFDIO_{name}": f"{getattr(abi, f'UFFDIO_{name}'):#x}" for name in names}
    numbers["USERFAULTFD_IOC_NEW"] = f"{abi.USERFAULTFD_IOC_NEW:#x}"
    numbers["PAGEMAP_SCAN"] = f"{abi.PAGEMAP_SCAN:#x}"
    p.see("ioctl_numbers", numbers)
    structs = ("api", "register", "range", "copy", "zeropage", "move", "writeprotect", "continue", "poison")
    sizes = {f"uffdio_{name}": ctypes.sizeof(getattr(abi, f"uffdio_{name}")) for name in structs}
    sizes["uffd_msg"] = ctypes.sizeof(abi.uffd_msg)
    p.see("sizes", sizes)


# Registration.


def run_register(p: Probe, name: str, parts: list[str]) -> None:
    """register/MEM/MODE/fFEATURES."""
    kind, mode_text, features_text = parts
    mode, features = int(mode_text, 16), int(features_text[1:], 16)
    memory = p.memory(kind)
    p.see("mem", kind)
    p.see("mode", MODE_NAMES[mode] if mode < 8 else "invalid")
    p.see("features", f"{features:#x}")
    uffd = p.uffd(features)
    done = uffd.register(DST, memory.length, mode)
    p.see("op", done)
    p.see("vmflags", p.vmflags(DST, memory.length))
    if not done["ret"]:
        p.see("unregister", uffd.unregister(DST, memory.length))
        p.see("vmflags_after_unreg", p.vmflags(DST, memory.length))


def run_reregister(p: Probe, name: str, parts: list[str]) -> None:
    """reregister/MEM/MODE/then/MODE."""
    kind, first, _, second = parts
    memory = p.memory(kind)
    p.see("mem", kind)
    p.see("mode", first)
    p.see("mode2", second)
    uffd = p.uffd(UNPOPULATED)
    p.fill(DST + memory.target_offset, memory.page_size, 0x11)
    p.see("reg1", uffd.register(DST, memory.length, mode_number(first)))
    if mode_number(first) & 2:
        p.see("wp", uffd.wp(DST, memory.length, 1))
    p.see("vmflags1", p.vmflags(DST, memory.length))
    p.see("state1", p.target(memory))
    p.see("reg2", uffd.register(DST, memory.length, mode_number(second)))
    p.see("vmflags2", p.vmflags(DST, memory.length))
    p.see("state2", p.target(memory))
    for key, offset, value in (
        ("present_page", memory.target_offset, 0x77),
        ("next_page", 2 * memory.page_size, 0x78),
    ):
        writer = p.start(user_write(DST + offset + 8, value))
        p.see(f"write_{key}", p.pump(uffd, memory, [writer], "stop").messages)
        p.see("write_result" if key == "present_page" else "write_next_result", writer.seen(DST))
    p.see("state3", p.target(memory))


VMAS = (
    "anon PROT_NONE",
    "anon PROT_READ",
    "anon MAP_SHARED",
    "memfd shared PROT_READ (rw fd)",
    "memfd shared PROT_READ (ro fd)",
    "memfd private rw (ro fd)",
    "memfd shared ro F_SEAL_WRITE",
    "memfd shared ro F_SEAL_FUTURE_WRITE",
    "memfd private rw F_SEAL_WRITE",
    "ext4 file private rw",
    "ext4 file shared rw",
    "tmpfs file (/dev/shm) shared rw",
    "/dev/zero private",
    "/dev/zero shared",
    "hugetlb MAP_ANONYMOUS private",
    "hugetlb MAP_ANONYMOUS shared",
    "MAP_DROPPABLE",
    "secretmem",
    "anon mlocked",
    "anon MAP_GROWSDOWN",
    "stack",
    "vdso",
    "vvar",
    "sysv shm",
    "anon with MADV_GUARD_INSTALL page",
    "ext4 file shared ro-fd",
)


def run_register_vma(p: Probe, name: str, parts: list[str]) -> None:
    """register_vma/NUMBER/MODE[/wp_async]."""
    number, mode = int(parts[0]), parts[1]
    if number >= len(VMAS):
        raise Unsupported
    features = ASYNC if parts[2:] == ["wp_async"] else 0
    kind = VMAS[number]
    length = _make_vma(p, kind)
    p.see("vma", kind)
    p.see("mode", mode)
    p.see("features", f"{features:#x}")
    uffd = p.uffd(features)
    p.see("op", uffd.register(DST, length, mode_number(mode)))
    if kind not in ("stack", "vdso", "vvar"):
        p.see("vmflags", p.vmflags(DST, length))


def _make_vma(p: Probe, kind: str) -> int:
    """Map the VMA at DST; its length."""
    length = 4 * PAGE

    def file(what: str) -> File:
        return File(p.kernel, what, length)

    match kind:
        case "anon PROT_NONE":
            p.mmap(DST, length, protection=0)
        case "anon PROT_READ":
            p.mmap(DST, length, protection=READ)
        case "anon MAP_SHARED" | "/dev/zero shared":
            p.mmap(DST, length, shared=True)
        case "memfd shared PROT_READ (rw fd)":
            p.mmap(DST, length, protection=READ, shared=True, file=file("shmem"))
        case "memfd shared PROT_READ (ro fd)":
            p.mmap(DST, length, protection=READ, shared=True, file=file("shmem"), may_write=False)
        case "memfd shared ro F_SEAL_WRITE" | "memfd shared ro F_SEAL_FUTURE_WRITE":
            sealed = file("shmem")
            sealed.seals = frozenset((kind.rpartition(" ")[2],))
            if p.attempt(_mmap_sealed(p, length, sealed)):
                p.see("mmap_errno", errno_name(p.errno))
        case "memfd private rw (ro fd)" | "memfd private rw F_SEAL_WRITE":
            p.mmap(DST, length, file=file("shmem"))
        case "ext4 file private rw":
            p.mmap(DST, length, file=file("ordinary"))
        case "ext4 file shared rw":
            p.mmap(DST, length, shared=True, file=file("ordinary"))
        case "ext4 file shared ro-fd":
            p.mmap(DST, length, protection=READ, shared=True, file=file("ordinary"), may_write=False)
        case "tmpfs file (/dev/shm) shared rw":
            p.mmap(DST, length, shared=True, file=file("shmem"))
        case "hugetlb MAP_ANONYMOUS private" | "hugetlb MAP_ANONYMOUS shared":
            length = HUGE_PAGE
            p.mmap(DST, length, hugetlb=True, shared=kind.endswith("shared"))
        case "MAP_DROPPABLE":
            if p.kernel.version < (6, 11):
                p.see("mmap_errno", errno_name(EINVAL))
            else:
                p.mmap(DST, length, droppable=True)
        case "secretmem" if p.kernel.version < (6, 5):  # switched off unless asked for at boot
            p.see("secretmem_errno", errno_name(ENOSYS))
        case "secretmem":
            p.mmap(DST, length, shared=True, file=file("ordinary"))
        case "sysv shm":
            p.mmap(DST, length, shared=True, file=file("sysv"))
        case "anon mlocked":
            p.mmap(DST, length)
            p.call(mlock(p.caller, DST, length))
        case "stack":
            length = PAGE
            p.mmap(DST, length, growsdown=True)
        case "anon MAP_GROWSDOWN":
            p.mmap(DST, length, growsdown=True)
        case "vdso" | "vvar":
            p.mmap(DST, length, special=True, protection=READ)
        case "anon with MADV_GUARD_INSTALL page":
            p.mmap(DST, length)
            p.see("guard_ret", p.attempt(madvise(p.caller, DST + PAGE, PAGE, "GUARD_INSTALL")))
        case _:
            p.mmap(DST, length)
    return length


def _mmap_sealed(p: Probe, length: int, file: File) -> Any:
    from userfault.model.mapping import mmap

    return mmap(p.caller, DST, length, READ, shared=True, file=file)
