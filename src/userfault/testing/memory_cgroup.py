"""A memory limit for a program, by a control group of its own: ``with MemoryCgroup(288 << 20) as group:``.

A limit set by the kernel is how mmap is made to work in less memory than it would take, and how a promise
about memory is judged from outside. Both versions of control groups are spoken. Where the machine allows
none, CgroupUnavailable says what was tried.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["CgroupUnavailable", "Counters", "MemoryCgroup"]

_numbers = itertools.count()


class CgroupUnavailable(OSError):
    """No memory control group can be made here; the message says what was tried."""


@dataclass(frozen=True)
class Counters:
    """What the kernel charges to a group, all in bytes but `oom_kills`."""

    anon: int
    """Private memory."""
    shmem: int
    """memfd, tmpfs and other shared memory, each page once."""
    file: int
    """Page cache of files, without `shmem`."""
    kernel: int
    """The kernel's own memory for the group; page tables are in it."""
    page_tables: int | None
    """Page tables; None where the kernel does not say (version 1)."""
    usage: int
    """Everything together, now."""
    peak: int
    """The most that `usage` has been; 0 where the kernel does not say."""
    oom_kills: int
    """Processes that the kernel killed because the limit was reached."""


class MemoryCgroup:
    """A control group with a memory limit in bytes and no swap, removed at the end of the with-block.

    Raises CgroupUnavailable on construction. Whatever still runs in the group at the end is killed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._restore: Path | None = None
        tried: list[str] = []
        for version, parent in _parents():
            _sweep(parent)
            try:
                self.path = self._make(version, parent)
            except OSError as error:
                tried.append(f"{parent}: {error.strerror or error}")
                continue
            self.version = version
            return
        raise CgroupUnavailable(
            1,
            "no memory control group can be made: "
            + ("; ".join(tried) or "none is mounted that limits memory"),
        )

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def joining(self, command: Sequence[str]) -> list[str]:
        """The command line that joins the group and then becomes `command`: nothing of it runs outside."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def counters(self) -> Counters:
        """What is charged to the group now, in bytes."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        if self.version == 2:
            events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
            return Counters(
                anon=int(stat["anon"]),
                shmem=int(stat["shmem"]),
                file=int(stat["file"]) - int(stat["shmem"]),
                kernel=int(stat.get("kernel", 0)),
                page_tables=int(stat["pagetables"]) if "pagetables" in stat else None,
                usage=self._number("memory.current"),
                peak=self._number("memory.peak"),
                oom_kills=int(events.get("oom_kill", 0)),
            )
        shmem = int(stat.get("total_shmem", stat.get("shmem", 0)))
        control = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        return Counters(
            anon=int(stat["total_rss"]),
            shmem=shmem,
            file=int(stat["total_cache"]) - shmem,
            kernel=self._number("memory.kmem.usage_in_bytes"),
            page_tables=None,
            usage=self._number("memory.usage_in_bytes"),
            peak=self._number("memory.max_usage_in_bytes"),
            oom_kills=int(control.get("oom_kill", 0)),
        )

    def remove(self) -> None:
        """Kill what runs in the group and remove it. Raises OSError if it cannot be removed within 10 s."""
        deadline = time.monotonic() + 10
        while self.path.exists():
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if self.version == 1:
                # Page cache stays charged to a removed group of version 1 unless it is given back first.
                with contextlib.suppress(OSError):
                    (self.path / "memory.force_empty").write_text("0")
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if self._restore is not None:
            with contextlib.suppress(OSError):
                self._restore.write_text("-memory")
            self._restore = None

    def _number(self, file: str) -> int:
        try:
            return int((self.path / file).read_text())
        except OSError:
            return 0

    def _make(self, version: int, parent: Path) -> Path:
        control = parent / "cgroup.subtree_control"
        switched = False
        if version == 2 and "memory" not in control.read_text().split():
            control.write_text("+memory")
            switched = True
        path = parent / f"userfault-{os.getpid()}-{next(_numbers)}"
        try:
            path.mkdir()
            try:
                self._limit(version, path)
                # May a process of ours go in? On version 2 that takes rights on a common ancestor too.
                join = ["/bin/sh", "-c", 'echo $$ > "$0"', str(path / "cgroup.procs")]
                done = subprocess.run(join, stderr=subprocess.PIPE, text=True, check=False)
                if done.returncode != 0:
                    raise PermissionError(1, f"a process may not join it ({done.stderr.strip()})")
            except OSError:
                path.rmdir()
                raise
        except OSError:
            if switched:
                control.write_text("-memory")
            raise
        self._restore = control if switched else None
        return path

    def _limit(self, version: int, path: Path) -> None:
        if version == 2:
            (path / "memory.max").write_text(str(self.limit))
            swap, amount = path / "memory.swap.max", 0
        else:
            (path / "memory.limit_in_bytes").write_text(str(self.limit))
            swap, amount = path / "memory.memsw.limit_in_bytes", self.limit
        if swap.exists():
            swap.write_text(str(amount))


def _sweep(parent: Path) -> None:
    """Remove what a killed process left here: empty, and old enough not to be just in the making."""
    for path in parent.glob("userfault-*"):
        pid = path.name.split("-")[1]
        with contextlib.suppress(OSError):
            if not Path("/proc", pid).exists() and time.time() - path.stat().st_mtime > 60:
                path.rmdir()


def _parents() -> Iterator[tuple[int, Path]]:
    """Groups under which one could be made, (version, folder), the nearest to this process first."""
    try:
        own = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own[controllers] = path
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in mounts:
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((p for names, p in own.items() if "memory" in names.split(",")), "/")
            # One level is enough: version 1 lets groups and processes stand side by side.
            yield 1, _below(Path(mount), root, path)
        elif kind == "cgroup2":
            top = Path(mount)
            here = _below(top, root, own.get("", "/"))
            for folder in [here, *here.parents]:
                if (folder / "cgroup.controllers").exists() and _controls_memory(folder):
                    yield 2, folder
                if folder == top:
                    break


def _controls_memory(folder: Path) -> bool:
    return "memory" in (folder / "cgroup.controllers").read_text().split()


def _below(mount: Path, root: str, path: str) -> Path:
    """The folder of group `path` in a file system whose mount shows the tree from `root` down."""
    if root != "/" and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    inside = mount / path.lstrip("/")
    return inside if inside.exists() else mount
