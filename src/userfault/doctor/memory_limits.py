"""How much memory and how many mappings this process may have."""

from __future__ import annotations

import re
import resource
from pathlib import PurePosixPath

from userfault.doctor.finding import Finding
from userfault.doctor.machine import Machine
from userfault.sizes import in_words

TOPIC = "memory"

_NO_LIMIT = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2^63."""


def memory_findings(machine: Machine) -> list[Finding]:
    """The machine's memory, the control group's limits, and the process's own."""
    return [
        _available(machine),
        _swap(machine),
        _cgroup(machine),
        _mappings(machine),
        _locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], machine),
        _descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def _meminfo(machine: Machine, key: str) -> int | None:
    match = re.search(rf"^{key}:\s*(\d+) kB", machine.text("/proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) << 10 if match else None


def _available(machine: Machine) -> Finding:
    total, available = _meminfo(machine, "MemTotal"), _meminfo(machine, "MemAvailable")
    if total is None or available is None:
        return Finding(TOPIC, "machine", "unknown", why="/proc/meminfo is not readable here.")
    return Finding(TOPIC, "machine", "fact", f"{in_words(available)} available of {in_words(total)}")


def _swap(machine: Machine) -> Finding:
    total = _meminfo(machine, "SwapTotal") or 0
    return Finding(TOPIC, "swap", "fact", in_words(total) if total else "none")


def cgroup_limit(machine: Machine) -> tuple[int, str] | None:
    """The tightest memory limit of this process's control groups, in bytes, and the file that sets it."""
    limits: list[tuple[int, str]] = []
    for line in (machine.text("/proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts, file = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], "memory.max"
        elif "memory" in controllers.split(","):
            mounts, file = ["/sys/fs/cgroup/memory"], "memory.limit_in_bytes"
        else:
            continue
        # A limit of any group above counts too. Inside a container the path may lie outside of what is seen.
        group = PurePosixPath(path)
        for folder in (group, *group.parents):
            for mount in mounts:
                name = f"{mount}{folder}".rstrip("/") + f"/{file}"
                limit = machine.number(name)
                if limit is not None and limit < _NO_LIMIT:
                    limits.append((limit, name))
    return min(limits, default=None)


def _cgroup(machine: Machine) -> Finding:
    name = "control group limit"
    found = cgroup_limit(machine)
    if found is None:
        return Finding(TOPIC, name, "fact", "none")
    limit, file = found
    used = machine.number(file.replace("memory.max", "memory.current").replace("limit_in", "usage_in"))
    value = in_words(limit) + (f", {in_words(used)} in use" if used is not None else "") + f" ({file})"
    why = "Beyond it the kernel kills: the default memory limit of userfault leaves a margin below it."
    return Finding(TOPIC, name, "fact", value, why)


def _mappings(machine: Machine) -> Finding:
    name = "vm.max_map_count"
    most = machine.number("/proc/sys/vm/max_map_count")
    now = len((machine.text("/proc/self/maps") or "").splitlines())
    if most is None:
        return Finding(TOPIC, name, "unknown", why="/proc/sys is not readable here.")
    value = f"{most}, {now} in use"
    if most < 65_530:
        why = "A region needs a few mappings; thousands of regions may reach this limit."
        return Finding(TOPIC, name, "partly", value, why, ("sudo sysctl -w vm.max_map_count=65530",))
    return Finding(TOPIC, name, "yes", value)


def _locked(limit: int, machine: Machine) -> Finding:
    name = "RLIMIT_MEMLOCK"
    if limit == resource.RLIM_INFINITY or "CAP_IPC_LOCK" in machine.capabilities():
        return Finding(TOPIC, name, "fact", "no limit for this process")
    why = "Memory registered for devices (RDMA, io_uring before 5.12) counts against it; regions do not."
    return Finding(TOPIC, name, "fact", in_words(limit), why)


def _descriptors(limit: int) -> Finding:
    name = "RLIMIT_NOFILE"
    value = "no limit" if limit == resource.RLIM_INFINITY else str(limit)
    return Finding(TOPIC, name, "fact", f"{value} open files")
