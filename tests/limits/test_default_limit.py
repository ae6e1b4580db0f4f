"""The limit nobody set, in a control group smaller than the machine: the kernel kills, so a margin stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunChild
from userfault.testing.memory_cgroup import MemoryCgroup

MIB = 1 << 20
GROUP = 160 * MIB

PROGRAM = """
import sys
import numpy as np
import userfault

path, mode, block = sys.argv[1:]
regions = []
for index in range(2):
    with open(f"{path}-{index}", "wb") as file:
        file.truncate(256 << 20)
    regions.append(userfault.open(f"{path}-{index}", mode, block=block))
limit = userfault.stats().limit
assert (8 << 20) <= limit <= (160 - 48) << 20, limit
for turn in range(2):
    for region in regions:
        array = region.ndarray(np.uint8)
        if mode == "r":
            assert not array[::4096].any()
        else:
            array[turn::4096] = turn + 1
        del array
assert userfault.stats().bytes_read > 3 * (160 << 20)
print(limit)
"""


@pytest.mark.time_limit(200)
@pytest.mark.parametrize(
    ("mode", "block"), [("r", "4KiB"), ("r", "auto"), ("r+", "64KiB"), ("r+", "auto"), ("c", "64KiB")]
)
def test_a_program_that_pages_three_times_its_control_group_survives(
    mode: str,
    block: str,
    run_child: RunChild,
    memory_cgroup: Callable[[int], MemoryCgroup],
    tmp_path: Path,
) -> None:
    group = memory_cgroup(GROUP)
    run_child(PROGRAM, str(tmp_path / "file"), mode, block, prefix=group.joining([]), timeout=180)
    counters = group.counters()
    assert counters.oom_kills == 0
    assert 0 < counters.peak <= GROUP
