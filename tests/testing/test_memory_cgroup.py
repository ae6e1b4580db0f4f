"""A memory control group limits what runs in it, counts it, and is gone afterwards."""

import signal
import subprocess

import pytest

from userfault.testing.memory_cgroup import CgroupUnavailable, MemoryCgroup

LIMIT = 64 << 20


def test_memory_within_the_limit_is_counted_and_not_killed(memory_cgroup, run_child) -> None:
    group = memory_cgroup(LIMIT)
    run_child("held = bytearray(32 << 20)", prefix=group.joining([]))
    assert 32 << 20 < group.counters().peak <= LIMIT
    assert group.counters().oom_kills == 0


def test_memory_over_the_limit_is_killed(memory_cgroup, run_child) -> None:
    group = memory_cgroup(LIMIT)
    done = run_child("held = bytearray(128 << 20)", prefix=group.joining([]), check=False)
    assert done.status == -signal.SIGKILL
    assert group.counters().oom_kills == 1


def test_private_and_shared_memory_are_told_apart(memory_cgroup, run_child) -> None:
    group = memory_cgroup(LIMIT)
    report = """
import os, sys
from pathlib import Path
from userfault.testing.memory_cgroup import MemoryCgroup
group = MemoryCgroup.__new__(MemoryCgroup)
group.path, group.version = Path(sys.argv[1]), int(sys.argv[2])
before = group.counters()
shared = os.memfd_create("shared")
os.write(shared, bytes(1 << 20) * 1)
os.posix_fallocate(shared, 0, 16 << 20)
private = bytearray(8 << 20)
after = group.counters()
print(after.shmem - before.shmem, after.anon - before.anon)
"""
    done = run_child(report, str(group.path), str(group.version), prefix=group.joining([]))
    shmem, anon = map(int, done.stdout.split())
    # The kernel gathers the counts of each CPU in batches, so they may lag by some hundred kilobytes.
    assert abs(shmem - (16 << 20)) < 2 << 20
    assert abs(anon - (8 << 20)) < 3 << 20


def test_a_group_is_removed_with_what_still_runs_in_it(memory_cgroup) -> None:
    memory_cgroup(LIMIT)
    with MemoryCgroup(LIMIT) as group:
        left = subprocess.Popen(group.joining(["sleep", "60"]))
        while str(left.pid) not in (group.path / "cgroup.procs").read_text().split():
            assert left.poll() is None
    assert left.wait(5) == -signal.SIGKILL
    assert not group.path.exists()


def test_without_control_groups_the_error_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.testing.memory_cgroup._parents", lambda: iter([]))
    with pytest.raises(CgroupUnavailable, match="none is mounted"):
        MemoryCgroup(LIMIT)
