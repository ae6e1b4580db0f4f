"""Whether this process can have a userfaultfd, in which way, and what it can do with it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from userfault import abi
from userfault.doctor.finding import Finding
from userfault.doctor.machine import Machine

TOPIC = "userfaultfd"
DEVICE = "/dev/userfaultfd"
WITHOUT = "USERFAULT_WITHOUT"
"""The environment variable that names features of the kernel to do without, for tests."""

Way: TypeAlias = Literal["system call", "device", "user-mode-only"]
"""How a userfaultfd is opened. Only the first two may answer faults of the kernel (read(2) into a region)."""

_NUMBERS: Final = {
    "x86_64": 323,
    "aarch64": 282,
    "riscv64": 282,
    "loongarch64": 282,
    "ppc64le": 364,
    "s390x": 355,
}
"""The number of userfaultfd(2) by architecture (asm/unistd.h)."""

DEVICE_MENDS: Final = (
    "docker run --device /dev/userfaultfd ...   (or podman; for a container)",
    f"sudo setfacl -m u:$USER:rw {DEVICE}   (until the next boot)",
)
"""Mends that open the device to one user or container and leave everybody else where they are."""

SYSCTL_MEND: Final = "sudo sysctl -w vm.unprivileged_userfaultfd=1   (for every user of the machine)"


@dataclass(frozen=True)
class Attempt:
    """One try to open a userfaultfd: an errno (0: it worked) and the features the kernel then offered."""

    errno: int
    features: int = 0


def attempt_all() -> dict[Way, Attempt]:
    """Opens and closes a userfaultfd in every way."""
    return {
        "system call": _attempt(_by_system_call(os.O_CLOEXEC)),
        "device": _attempt(_by_device()),
        "user-mode-only": _attempt(_by_system_call(os.O_CLOEXEC | abi.UFFD_USER_MODE_ONLY)),
    }


def _by_system_call(flags: int) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        return -errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(number, flags)
    return fd if fd >= 0 else -ctypes.get_errno()


def _by_device() -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return -(error.errno or errno.EIO)
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
    except OSError as error:
        return -(error.errno or errno.EIO)
    finally:
        os.close(device)


def _attempt(fd: int) -> Attempt:
    if fd < 0:
        return Attempt(-fd)
    try:
        api = abi.uffdio_api(api=abi.UFFD_API, features=0, ioctls=0)
        fcntl.ioctl(fd, abi.UFFDIO_API, api)
        return Attempt(0, api.features)
    except OSError as error:
        return Attempt(error.errno or errno.EIO)
    finally:
        os.close(fd)


def scan_errno() -> int:
    """What PAGEMAP_SCAN answers to a scan of one page: 0 or an errno."""
    page = os.sysconf("SC_PAGESIZE")
    memory = ctypes.create_string_buffer(2 * page)
    start = (ctypes.addressof(memory) + page - 1) // page * page
    arg = abi.pm_scan_arg(size=ctypes.sizeof(abi.pm_scan_arg), start=start, end=start + page)
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        fcntl.ioctl(pagemap, abi.PAGEMAP_SCAN, arg)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(pagemap)
    return 0


def userfaultfd_findings(machine: Machine, attempts: Mapping[Way, Attempt], scan: int) -> list[Finding]:
    """What the attempts mean; `scan` is the errno of PAGEMAP_SCAN."""
    findings = [
        _sysctl(machine),
        _system_call(machine, attempts["system call"]),
        _device(machine, attempts["device"]),
        _user_mode_only(machine, attempts["user-mode-only"]),
        _kernel_faults(attempts),
    ]
    features = max((a.features for a in attempts.values()), default=0)
    if any(a.errno == 0 for a in attempts.values()):
        findings += [_feature(name, bit, features) for name, bit in _FEATURES.items()]
    findings.append(_pagemap_scan(scan))
    if without := os.environ.get(WITHOUT):
        why = f"{WITHOUT} is set: regions do without these."
        findings.append(Finding(TOPIC, "left out", "fact", without, why))
    return findings


def _sysctl(machine: Machine) -> Finding:
    value = machine.number("/proc/sys/vm/unprivileged_userfaultfd")
    if value is None:
        return Finding(TOPIC, "vm.unprivileged_userfaultfd", "unknown", why="/proc/sys is not readable here.")
    words = {0: "0: the system call needs CAP_SYS_PTRACE", 1: "1: everybody may answer every fault"}
    return Finding(TOPIC, "vm.unprivileged_userfaultfd", "fact", words.get(value, str(value)))


def _system_call(machine: Machine, attempt: Attempt) -> Finding:
    name = "system call, all faults"
    if attempt.errno == 0:
        return Finding(TOPIC, name, "yes")
    if attempt.errno == errno.ENOSYS:
        return _no_such_call(name)
    allowed = machine.number("/proc/sys/vm/unprivileged_userfaultfd") == 1
    if (
        attempt.errno == errno.EPERM
        and machine.seccomp_filtered()
        and (allowed or "CAP_SYS_PTRACE" in machine.capabilities())
    ):
        return _filtered(name)
    if attempt.errno == errno.EPERM:
        return Finding(
            TOPIC,
            name,
            "no",
            "EPERM",
            "vm.unprivileged_userfaultfd is 0 and this process has no CAP_SYS_PTRACE.",
            (*DEVICE_MENDS, SYSCTL_MEND),
        )
    return Finding(TOPIC, name, "no", _name(attempt.errno), os.strerror(attempt.errno))


def _device(machine: Machine, attempt: Attempt) -> Finding:
    name = f"{DEVICE}, all faults"
    if attempt.errno == 0:
        return Finding(TOPIC, name, "yes")
    if attempt.errno == errno.ENOENT:
        inside = machine.container() is not None
        return Finding(
            TOPIC,
            name,
            "no",
            "ENOENT",
            "This container was started without the device."
            if inside
            else "The kernel is older than 6.1, has no CONFIG_USERFAULTFD, or /dev is not the machine's own.",
            (DEVICE_MENDS[0],) if inside else (),
        )
    if attempt.errno in (errno.EACCES, errno.EPERM):
        return Finding(
            TOPIC,
            name,
            "no",
            _name(attempt.errno),
            "This user may not open the device."
            if attempt.errno == errno.EACCES
            else "The container's device rules forbid it.",
            DEVICE_MENDS[::-1] if attempt.errno == errno.EACCES else DEVICE_MENDS[:1],
        )
    return Finding(TOPIC, name, "no", _name(attempt.errno), os.strerror(attempt.errno))


def _user_mode_only(machine: Machine, attempt: Attempt) -> Finding:
    name = "system call, faults of the program alone"
    if attempt.errno == 0:
        return Finding(TOPIC, name, "yes")
    if attempt.errno == errno.ENOSYS:
        return _no_such_call(name)
    if attempt.errno == errno.EPERM:
        return _filtered(name)
    return Finding(TOPIC, name, "no", _name(attempt.errno), os.strerror(attempt.errno))


def _kernel_faults(attempts: Mapping[Way, Attempt]) -> Finding:
    name = "system calls on absent memory"
    if attempts["system call"].errno == 0 or attempts["device"].errno == 0:
        return Finding(TOPIC, name, "yes")
    if attempts["user-mode-only"].errno == 0:
        return Finding(
            TOPIC,
            name,
            "no",
            "EFAULT",
            "A system call that reads or writes memory which is not there fails with EFAULT or comes back "
            "short. Region.pread, pwrite, readinto and pin() work all the same.",
            (*DEVICE_MENDS, SYSCTL_MEND),
        )
    return Finding(TOPIC, name, "no", why="There is no way to a userfaultfd.")


def _no_such_call(name: str) -> Finding:
    return Finding(
        TOPIC,
        name,
        "no",
        "ENOSYS",
        "The kernel was built without CONFIG_USERFAULTFD, or a sandbox such as gVisor stands for it.",
        ("use a kernel with CONFIG_USERFAULTFD=y (every large distribution's has it)",),
    )


def _filtered(name: str) -> Finding:
    return Finding(
        TOPIC,
        name,
        "no",
        "EPERM",
        "Nothing in the kernel forbids it, so a seccomp filter or a security module does (the default "
        "profile of container engines among them).",
        (
            DEVICE_MENDS[0],
            "docker run --security-opt seccomp=PROFILE.json ...   (a profile that allows userfaultfd)",
        ),
    )


_FEATURES: Final = {
    "missing pages of shared memory": ("UFFD_FEATURE_MISSING_SHMEM", "4.11", "no"),
    "missing pages of hugetlb": ("UFFD_FEATURE_MISSING_HUGETLBFS", "4.11", "no"),
    "minor faults of shared memory": ("UFFD_FEATURE_MINOR_SHMEM", "5.14", "no"),
    "minor faults of hugetlb": ("UFFD_FEATURE_MINOR_HUGETLBFS", "5.13", "no"),
    "write protection of shared memory": ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", "5.19", "no"),
    "write protection of untouched pages": ("UFFD_FEATURE_WP_UNPOPULATED", "6.4", "partly"),
    "poison": ("UFFD_FEATURE_POISON", "6.6", "partly"),
    "tracking writes without faults": ("UFFD_FEATURE_WP_ASYNC", "6.7", "partly"),
    "moving pages": ("UFFD_FEATURE_MOVE", "6.8", "partly"),
    "exact addresses": ("UFFD_FEATURE_EXACT_ADDRESS", "5.18", "partly"),
    "faulting thread's number": ("UFFD_FEATURE_THREAD_ID", "4.14", "partly"),
    "faults as signals": ("UFFD_FEATURE_SIGBUS", "4.14", "partly"),
    "events of fork": ("UFFD_FEATURE_EVENT_FORK", "4.11", "partly"),
}
"""What userfault builds on: the kernel's name, the first version with it, and how bad its absence is."""

_WITHOUT: Final = {
    "poison": "A block that cannot be had is covered by a mapping of nothing; the touch is SIGBUS all the "
    "same.",
    "tracking writes without faults": "The first write to each page costs a fault. Where kernel faults are "
    "not allowed, a system call that writes it gets EFAULT, unless the range is pinned for writing.",
}


def _feature(name: str, entry: tuple[str, str, str], features: int) -> Finding:
    constant, since, gravity = entry
    if features & getattr(abi, constant):
        return Finding(TOPIC, name, "yes", constant)
    return Finding(
        TOPIC,
        name,
        "no" if gravity == "no" else "partly",
        f"{constant} is not offered",
        f"Linux has it since {since}. {_WITHOUT.get(name, '')}".strip(),
    )


def _pagemap_scan(scan: int) -> Finding:
    if scan == 0:
        return Finding(TOPIC, "PAGEMAP_SCAN", "yes")
    if scan == errno.ENOTTY:
        why = "Linux has it since 6.7; without it the first write to each page costs a fault."
        return Finding(TOPIC, "PAGEMAP_SCAN", "partly", "ENOTTY", why)
    return Finding(TOPIC, "PAGEMAP_SCAN", "partly", _name(scan), "/proc/self/pagemap cannot be scanned here.")


def _name(number: int) -> str:
    return errno.errorcode.get(number, f"errno {number}")
