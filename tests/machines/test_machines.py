"""Regions driven by Hypothesis, with one thread and with several, compared with plain bytes.

Each machine runs in a child: a touch that is never answered hangs its whole process. The debug option that
hashes clean blocks is on, so that a write that the engine misses ends the child where it happens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import RunChild

HERE = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(HERE.parent)]), "USERFAULT_DEBUG": "hash"}
MACHINES = [
    "store-4KiB",
    "file-4KiB",
    "file-inline-4KiB",
    "threads-4KiB",
    "threads-inline-4KiB",
    "store-2MiB",
    "file-2MiB",
    "file-inline-2MiB",
    "threads-2MiB",
]
EXAMPLES = {"store": (60, 60), "file": (50, 60), "threads": (30, 8)}
"""How many runs of how many steps, by kind of machine."""
POOL = 32
"""Pages of 2 MiB that a machine has at most in memory: two regions come and go, and a limit of 64 MiB."""


@pytest.fixture(params=["hugetlb", "tmpfs"])
def huge(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(run_child: RunChild, name: str, *, timeout: float, seconds: float = 0) -> None:
    kind, *words, pages = name.split("-")
    examples, steps = EXAMPLES[kind]
    if pages == "2MiB":
        examples = max(4, examples // 8)
    # What is hashed is read by the engine's threads alone: the touching thread would have nothing to do.
    environment = {**ENVIRONMENT, "USERFAULT_DEBUG": ""} if "inline" in words else ENVIRONMENT
    arguments = (name, str(examples), str(steps), str(seconds))
    run_child(HERE / "drive.py", *arguments, timeout=timeout, env=environment)


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("name", [name for name in MACHINES if name.endswith("4KiB")])
def test_a_region_on_small_pages_is_its_bytes_whatever_is_done_to_it(name: str, run_child: RunChild) -> None:
    run(run_child, name, timeout=360)


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("name", [name for name in MACHINES if name.endswith("2MiB")])
def test_a_region_on_huge_pages_is_its_bytes_whatever_is_done_to_it(
    name: str, huge: str, run_child: RunChild, hugepages: Callable[[int], None]
) -> None:
    if huge == "hugetlb":
        hugepages(POOL)
    run(run_child, name, timeout=360)


@pytest.mark.soak
@pytest.mark.parametrize("name", MACHINES)
def test_a_region_is_its_bytes_for_hours(
    name: str, run_child: RunChild, hugepages: Callable[[int], None], soak_seconds: float
) -> None:
    if name.endswith("2MiB") and random.random() < 0.5:
        hugepages(POOL)
    # The last round of examples may begin just before the end.
    run(run_child, name, timeout=soak_seconds + 110, seconds=soak_seconds)
