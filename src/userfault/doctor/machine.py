"""What a machine says about itself in /proc and /sys, read without assuming that any of it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}
"""The capabilities that matter here, with their numbers (linux/capability.h)."""


@dataclass(frozen=True)
class Machine:
    """This machine, or for tests a folder that looks like one."""

    root: Path = field(default_factory=lambda: Path("/"))

    def text(self, path: str) -> str | None:
        """The stripped text of a file; None if there is none that may be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The integer in a file; None if there is none."""
        text = self.text(path)
        try:
            return int(text) if text else None
        except ValueError:
            return None

    def exists(self, path: str) -> bool:
        """True if the path is there, readable or not."""
        try:
            (self.root / path.lstrip("/")).stat()
        except OSError:
            return False
        return True

    def chosen(self, path: str) -> str | None:
        """The word in brackets of a file like "always [madvise] never"."""
        match = re.search(r"\[(\w+)\]", self.text(path) or "")
        return match[1] if match else None

    def status(self, key: str) -> str | None:
        """A field of /proc/self/status."""
        match = re.search(rf"^{key}:\s*(.*)$", self.text("/proc/self/status") or "", re.MULTILINE)
        return match[1] if match else None

    def capabilities(self) -> frozenset[str]:
        """The effective capabilities among those that matter here."""
        mask = int(self.status("CapEff") or "0", 16)
        return frozenset(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)

    def seccomp_filtered(self) -> bool:
        """True if a seccomp filter decides which system calls this process may make."""
        return self.status("Seccomp") == "2"

    def container(self) -> str | None:
        """The kind of container this is, as far as it says; None outside of one."""
        if self.exists("/.dockerenv"):
            return "docker"
        if self.exists("/run/.containerenv"):
            return "podman"
        if self.exists("/var/run/secrets/kubernetes.io"):
            return "kubernetes"
        match = re.search(r"\b(docker|podman|kubepods|lxc|containerd)\b", self.text("/proc/1/cgroup") or "")
        return match[1] if match else None
