"""What this machine allows: every feature, privilege and limit, why one is missing, and what mends it.

`examine` tries things out rather than believing what settings promise, in this process where that leaves no
trace and in a short-lived child where it would. Each file of the package looks at one topic, and its
conclusions are a function of what was tried, so that every answer can be tested on any machine.
"""

from __future__ import annotations

import platform
import sys

from userfault.doctor.finding import Finding
from userfault.doctor.machine import Machine

__all__ = ["Finding", "examine", "usable"]


def examine() -> list[Finding]:
    """Looks at this machine and process; takes a few hundredths of a second."""
    if sys.platform != "linux":
        why = f"This is {sys.platform}; userfaultfd is a system call of Linux. userfault.abi works here."
        return [Finding("kernel", "version", "no", platform.platform(), why)]
    from userfault.doctor.huge_pages import attempt_huge_tmpfs, huge_page_findings
    from userfault.doctor.kernel import kernel_findings
    from userfault.doctor.memory_limits import memory_findings
    from userfault.doctor.userfaultfd import attempt_all, scan_errno, userfaultfd_findings

    machine = Machine()
    return [
        *kernel_findings(machine, platform.release(), platform.machine()),
        *userfaultfd_findings(machine, attempt_all(), scan_errno()),
        *huge_page_findings(machine, attempt_huge_tmpfs()),
        *memory_findings(machine),
    ]


def usable(findings: list[Finding]) -> bool:
    """True if regions work on the machine that the findings are of, in whatever way."""
    by_name = {finding.name: finding.state for finding in findings}
    opened = (
        "system call, all faults",
        "/dev/userfaultfd, all faults",
        "system call, faults of the program alone",
    )
    needed = ("version", "missing pages of shared memory", "write protection of shared memory")
    return any(by_name.get(name) == "yes" for name in opened) and all(
        by_name.get(name) in ("yes", "unknown") for name in needed
    )
