"""Pages of 2 MiB: the hugetlb pool, huge tmpfs, and transparent huge pages.

Blocks of 2 MiB and more are several times cheaper on them: the kernel keeps one page instead of 512.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from userfault.doctor.finding import Finding
from userfault.doctor.machine import Machine
from userfault.sizes import in_words

TOPIC = "huge pages"
SECONDS = 20
"""How long the attempt to mount a tmpfs may take, in seconds."""

_PROBE = Path(__file__).with_name("_huge_tmpfs.py")
_THP = "/sys/kernel/mm/transparent_hugepage"


@dataclass(frozen=True)
class TmpfsAttempt:
    """One try to get a huge page from a tmpfs of one's own: the step that failed, "" for none."""

    failed: str
    errno: int = 0
    by_user_namespace: bool = False


def attempt_huge_tmpfs() -> TmpfsAttempt:
    """Mounts a tmpfs with huge=always in a namespace of a child process, and takes one huge page from it.

    Nothing of it is seen from outside the child, and nothing is left afterwards.
    """
    command = [sys.executable, "-I", "-S", str(_PROBE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        answer = json.loads(done.stdout)
        return TmpfsAttempt(answer["failed"], answer["errno"], answer["by_user_namespace"])
    except subprocess.TimeoutExpired:
        return TmpfsAttempt("the attempt took too long", errno.ETIMEDOUT)
    except (OSError, ValueError, KeyError) as error:
        return TmpfsAttempt(
            f"the attempt itself failed ({error})", getattr(error, "errno", None) or errno.EIO
        )


def huge_page_findings(machine: Machine, tmpfs: TmpfsAttempt) -> list[Finding]:
    """The pools of all sizes, a tmpfs of one's own, and the settings of transparent huge pages."""
    return [*_pools(machine), _tmpfs(machine, tmpfs), *_transparent(machine)]


def _pools(machine: Machine) -> list[Finding]:
    folder = machine.root / "sys/kernel/mm/hugepages"
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        why = "The kernel was built without hugetlb, or /sys is not readable here."
        return [Finding(TOPIC, "hugetlb pool", "no", why=why)]
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names)
    return [_pool(machine, kib) for kib in sizes if kib <= 2048] or [
        Finding(TOPIC, "hugetlb pool", "no", why="The kernel has no pages of 2 MiB or smaller.")
    ]


def _pool(machine: Machine, kib: int) -> Finding:
    path = f"/sys/kernel/mm/hugepages/hugepages-{kib}kB"
    total, free, promised, surplus = (
        machine.number(f"{path}/{name}") or 0
        for name in ("nr_hugepages", "free_hugepages", "resv_hugepages", "nr_overcommit_hugepages")
    )
    room = max(free - promised, 0) + surplus
    name = f"hugetlb pool of {in_words(kib << 10)} pages"
    value = f"{total} pages, {room} to be had ({in_words(room * kib << 10)})"
    if room:
        return Finding(TOPIC, name, "yes", value)
    return Finding(
        TOPIC,
        name,
        "no",
        value,
        "No pages are set aside, or all are in use. Huge tmpfs is the second best.",
        (
            f"sudo sysctl -w vm.nr_hugepages={(1 << 20) // kib}   (sets 1 GiB aside, until the next boot)"
            if kib == 2048
            else f"echo {(1 << 20) // kib} | sudo tee {path}/nr_hugepages",
        ),
    )


def _tmpfs(machine: Machine, attempt: TmpfsAttempt) -> Finding:
    name = "huge tmpfs"
    if not attempt.failed:
        how = "by a user and mount namespace" if attempt.by_user_namespace else "by a mount namespace"
        return Finding(TOPIC, name, "yes", how)
    value = f"{attempt.failed}: {errno.errorcode.get(attempt.errno, attempt.errno)}"
    if attempt.failed.startswith("the attempt"):
        return Finding(TOPIC, name, "unknown", value)
    if "unshare" not in attempt.failed and "map" not in attempt.failed:
        why = (
            "A tmpfs was mounted, but gave no huge page: the kernel has none free, or was built without them."
        )
        return Finding(TOPIC, name, "no", value, why)
    why, mend = "This process may not make a user namespace.", tuple[str, ...]()
    if machine.number("/proc/sys/user/max_user_namespaces") == 0:
        why = "user.max_user_namespaces is 0: nobody may make a user namespace."
        mend = ("sudo sysctl -w user.max_user_namespaces=16384",)
    elif machine.number("/proc/sys/kernel/unprivileged_userns_clone") == 0:
        why = "kernel.unprivileged_userns_clone is 0: only root may make a user namespace."
        mend = ("sudo sysctl -w kernel.unprivileged_userns_clone=1",)
    elif machine.number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == 1:
        why = "AppArmor lets user namespaces do nothing (kernel.apparmor_restrict_unprivileged_userns is 1)."
        mend = ("sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",)
    elif machine.seccomp_filtered():
        why = "A seccomp filter forbids namespaces, as container engines do."
        mend = ("docker run --cap-add SYS_ADMIN ...", "set hugetlb pages aside instead (see above)")
    return Finding(TOPIC, name, "no", value, why, mend)


def _transparent(machine: Machine) -> list[Finding]:
    anonymous = machine.chosen(f"{_THP}/enabled")
    shared = machine.chosen(f"{_THP}/shmem_enabled")
    if anonymous is None:
        why = "The kernel was built without them, or /sys is not readable here."
        return [Finding(TOPIC, "transparent huge pages", "unknown", why=why)]
    return [
        Finding(TOPIC, "transparent huge pages", "fact", anonymous),
        Finding(
            TOPIC,
            "transparent huge pages of shared memory",
            "fact",
            shared or "not offered",
            "userfault mounts a tmpfs of its own and does not depend on this.",
        ),
    ]
