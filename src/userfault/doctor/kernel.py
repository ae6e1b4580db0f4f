"""The kernel, and what this process is allowed to do in it."""

from __future__ import annotations

import re

from userfault.doctor.finding import Finding
from userfault.doctor.machine import Machine

TOPIC = "kernel"

OLDEST = (5, 19)
"""Write-protect faults on shared memory came with Linux 5.19; without them nothing can be paged writably."""


def kernel_findings(machine: Machine, release: str, architecture: str) -> list[Finding]:
    """Version, seccomp, capabilities and container, from a release such as "6.1.0-18-amd64"."""
    return [_version(release, architecture), _seccomp(machine), _capabilities(machine), _container(machine)]


def parse_release(release: str) -> tuple[int, int] | None:
    """The two numbers that a kernel release begins with; None if it begins with none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else None


def _version(release: str, architecture: str) -> Finding:
    version = parse_release(release)
    value = f"{release} on {architecture}"
    if version is None:
        return Finding(TOPIC, "version", "unknown", value)
    if version < OLDEST:
        return Finding(
            TOPIC,
            "version",
            "no",
            value,
            "userfault needs Linux 5.19 or newer: before it shared memory has no write-protect faults.",
            ("install a newer kernel (6.7 or newer for tracking writes without faults)",),
        )
    return Finding(TOPIC, "version", "yes", value)


def _seccomp(machine: Machine) -> Finding:
    mode = machine.status("Seccomp")
    if mode is None:
        return Finding(TOPIC, "seccomp", "unknown", why="/proc/self/status does not say.")
    if mode == "2":
        return Finding(
            TOPIC,
            "seccomp",
            "fact",
            f"filter mode, {machine.status('Seccomp_filters') or 'some'} filters",
            "A filter may forbid the system call userfaultfd; the device /dev/userfaultfd passes by it.",
        )
    return Finding(TOPIC, "seccomp", "fact", "off" if mode == "0" else "strict mode")


def _capabilities(machine: Machine) -> Finding:
    held = ", ".join(sorted(machine.capabilities())) or "none of those that matter here"
    no_new = machine.status("NoNewPrivs") == "1"
    return Finding(TOPIC, "capabilities", "fact", held + (", no_new_privs is set" if no_new else ""))


def _container(machine: Machine) -> Finding:
    return Finding(TOPIC, "container", "fact", machine.container() or "none that shows")
