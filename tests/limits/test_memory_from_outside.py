"""The memory limit as the kernel counts it: a control group that holds one process, and its huge pages.

Anonymous and shared memory, page tables, and hugetlb pages in use are sampled while a program pages several
times what it may keep. RSS is no judge: it counts both mappings of a page, no hugetlb and no resting page.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import RunChild
from userfault.testing.memory_cgroup import MemoryCgroup

MIB = 1 << 20
LIMIT = 32 * MIB

BESIDE = 8 * MIB
"""What a process may take beside its memory limit, as docs/explanation/limits.md states it: stacks of the
engine's threads, block tables, and what the interpreter allocates meanwhile."""

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sample:
    anonymous: int
    shared: int
    page_tables: int
    hugetlb: int

    @property
    def total(self) -> int:
        return self.anonymous + self.shared + self.page_tables + self.hugetlb


def sample(group: MemoryCgroup) -> Sample | None:
    """What the group holds now; None if its process has just gone."""
    counters = group.counters()
    try:
        pids = (group.path / "cgroup.procs").read_text().split()
        page_tables = sum(page_tables_of(pid) for pid in pids)
        huge = sum(hugetlb_of(pid) for pid in pids)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Sample(counters.anon, counters.shmem, page_tables, huge)


def page_tables_of(pid: str) -> int:
    for line in Path("/proc", pid, "status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) << 10
    return 0


def hugetlb_of(pid: str) -> int:
    """Bytes of the huge pages that a process holds, mapped or not, each once."""
    blocks = {}
    for link in Path("/proc", pid, "fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:userfault"):
                status = link.stat()
                if status.st_blksize == 2 << 20:
                    blocks[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(blocks.values())


class Watched:
    """Runs a workload alone in a control group and keeps the largest sample of each kind."""

    def __init__(self, run_child: RunChild, group: MemoryCgroup, folder: Path) -> None:
        self.run_child, self.group, self.folder = run_child, group, folder
        self.peak = self.before = Sample(0, 0, 0, 0)
        self.samples = 0

    def run(self, name: str) -> str:
        ended = threading.Event()
        watcher = threading.Thread(target=self.watch, args=(ended,))
        watcher.start()
        try:
            done = self.run_child(
                HERE / "workload.py",
                name,
                str(LIMIT),
                str(self.folder),
                timeout=150,
                prefix=self.group.joining([]),
            )
        finally:
            ended.set()
            watcher.join()
        return done.stdout

    def watch(self, ended: threading.Event) -> None:
        while not (self.folder / "ready").exists():
            if ended.wait(0.01):
                return
        time.sleep(0.05)
        self.before = sample(self.group) or self.before
        (self.folder / "go").touch()
        while not ended.wait(0.002):
            now = sample(self.group)
            if now is not None:
                self.samples += 1
                if now.total > self.peak.total:
                    self.peak = now


@pytest.mark.time_limit(200)
@pytest.mark.parametrize(
    "name",
    [
        "reading 4KiB",
        "reading 64KiB",
        "writing 4KiB",
        "writing 64KiB",
        "writing 1MiB",
        "private changes",
        "reading 2MiB",
        "writing 2MiB",
        "reading 2MiB on hugetlb",
        "writing 2MiB on hugetlb",
        "several regions",
    ],
)
def test_what_the_kernel_counts_stays_within_the_limit_and_a_stated_constant(
    name: str,
    run_child: RunChild,
    memory_cgroup: Callable[[int], MemoryCgroup],
    hugepages: Callable[[int], None],
    tmp_path: Path,
) -> None:
    hugetlb = name.endswith(" on hugetlb")
    if hugetlb:
        hugepages(LIMIT // (2 * MIB) + 8)
    watched = Watched(run_child, memory_cgroup(1 << 30), tmp_path)
    watched.run(name.removesuffix(" on hugetlb"))
    assert watched.samples > 20
    assert watched.before.total > 0
    taken = watched.peak.total - watched.before.total
    print(f"{name}: {taken / MIB:.1f} MiB under a limit of {LIMIT / MIB:.0f}; {watched.peak}")
    assert taken <= LIMIT + BESIDE, (watched.before, watched.peak)
    assert watched.peak.shared == 0 or not name.startswith("reading 4KiB"), "what was closed before is gone"
    # Had it not used its memory, the limit would prove nothing.
    assert taken >= LIMIT // 2, (watched.before, watched.peak)
    # Without pages of our own in the pool, others' may still be there to be had.
    assert watched.peak.hugetlb > 0 or not hugetlb
    assert watched.group.counters().oom_kills == 0
