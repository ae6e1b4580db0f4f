"""Side by side: every contestant takes its turn in every round, and what counts is the ratio within a round.

Absolute times move between machines and between minutes. So a subject is never compared with a figure from
another day, but with its floor (what the kernel itself costs) or its rival, measured a few seconds before it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from userfault.testing.hugetlb_pool import PoolUnavailable, reserved
from userfault.testing.memory_cgroup import CgroupUnavailable, MemoryCgroup

ROOT = Path(__file__).parent.parent
HUGE = 2 << 20
FILL = b"\1" * HUGE
MAP_HUGETLB = 0x40000
TOUCHED = 2 << 30
"""Bytes of ordinary memory that are touched before each sample; what is freed last is taken first."""
SECONDS = 900
"""A sample that takes longer is killed, unless its contestant says otherwise."""


@dataclass(frozen=True)
class Contestant:
    """One row: a memory, put to the workload of its comparison."""

    name: str
    role: Literal["floor", "rival", "subject"]
    arguments: tuple[str, ...]
    """Of `python -m benches.workloads`, after those that all contestants share."""
    cgroup: int = 0
    """Bytes of a memory control group that the sample runs in; 0 for none."""
    huge_pages: int = 0
    """Pages of 2 MiB that the machine's pool is given for the sample."""
    patience: int = SECONDS
    """A sample is killed after so many seconds. Where seconds are counted, it lost by that much at least."""


@dataclass(frozen=True)
class Bar:
    """What a ratio of medians has to be; without `against` what the median itself has to be, in its unit."""

    subject: str
    against: str
    limit: float
    kind: Literal["bar", "goal"] = "bar"

    def __str__(self) -> str:
        return f"{self.subject} / {self.against}" if self.against else self.subject


@dataclass(frozen=True)
class Comparison:
    """Contestants on one workload."""

    name: str
    title: str
    text: str
    workload: tuple[str, ...]
    unit: str
    better: Literal["less", "more"]
    contestants: tuple[Contestant, ...]
    bars: tuple[Bar, ...] = ()
    rounds: int = 5
    columns: tuple[str, ...] = ("cpu_s", "disk_read", "disk_written", "page_tables")
    """Facts that the page shows beside the value; `report.COLUMNS` says how."""
    file: Callable[[], contextlib.AbstractContextManager[tuple[Path, tuple[str, ...]]]] | None = None
    """Makes the file that a sample works on, cold; with further arguments for the workload."""
    check: Callable[[Path], None] = field(default=lambda path: None)
    """Looks at the file after a sample: a fast wrong answer is no answer."""


Sample = dict[str, float | str]


def run(comparison: Comparison, report: Callable[[str, int, Sample], None], rounds: int = 0) -> None:
    """Take all samples, the contestants alternating; each goes to `report` (contestant, round, sample)."""
    out: set[str] = set()
    for number in range(rounds or comparison.rounds):
        # Each round begins with another one, so that nobody is always the first after a pause.
        turn = number % len(comparison.contestants)
        for contestant in comparison.contestants[turn:] + comparison.contestants[:turn]:
            if contestant.name in out:
                continue
            sample = take(comparison, contestant)
            if "unavailable" in sample:
                out.add(contestant.name)
            report(contestant.name, number, sample)


def command(comparison: Comparison, contestant: Contestant) -> list[str]:
    """The command line of a sample, without the interpreter."""
    return ["-m", "benches.workloads", *comparison.workload, *contestant.arguments]


def take(comparison: Comparison, contestant: Contestant, under: tuple[str, ...] = ()) -> Sample:
    """One sample, in a process of its own; `under` begins a command line that runs another one."""
    try:
        with contextlib.ExitStack() as stack:
            environment = clean_environment()
            further: tuple[str, ...] = ()
            path = None
            if comparison.file:
                path, further = stack.enter_context(comparison.file())
                environment["BENCH_FILE"] = str(path)
            touch_memory(TOUCHED, mmap.MAP_PRIVATE)
            if contestant.huge_pages:
                stack.enter_context(reserved(contestant.huge_pages))
                touch_memory(contestant.huge_pages * HUGE, mmap.MAP_PRIVATE | MAP_HUGETLB)
            line = [*under, sys.executable, *command(comparison, contestant), *further]
            if contestant.cgroup:
                line = stack.enter_context(MemoryCgroup(contestant.cgroup)).joining(line)
            sample = _child(line, environment, contestant.patience)
            if path and "unavailable" not in sample:
                comparison.check(path)
            return sample
    except (PoolUnavailable, CgroupUnavailable) as error:
        return {"unavailable": str(error.strerror)}


def touch_memory(length: int, flags: int) -> None:
    """Writes to so many bytes and frees them again.

    A guest gives free memory back to its host (free page reporting), and whoever gets it next waits for the
    host: 5.2 ms for each page of 2 MiB of a new pool here, and 0.4 ms for one that was touched a moment
    before. That is no cost of any contestant.
    """
    with mmap.mmap(-1, length, flags=flags | mmap.MAP_ANONYMOUS) as memory:
        if not flags & MAP_HUGETLB:
            memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, length, HUGE):
            memory[start : start + HUGE] = FILL


def clean_environment() -> dict[str, str]:
    """This process's environment without what would make NumPy's libraries behave unlike a user's."""
    left_out = {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PYTHONPATH": str(ROOT)}


def _child(line: list[str], environment: dict[str, str], patience: int) -> Sample:
    child = subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        cwd=ROOT,
    )
    try:
        out, err = child.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return {"unavailable": f"not done after {patience} s", "stopped_after": patience}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()
    if child.returncode != 0:
        reason = err.strip().splitlines()[-1].replace(str(ROOT), ".") if err.strip() else "no message"
        return {"unavailable": f"ended with status {child.returncode}: {reason}"}
    sample: Sample = json.loads(out.splitlines()[-1])
    return sample


@dataclass(frozen=True)
class Result:
    """All samples of one contestant."""

    contestant: Contestant
    values: dict[int, float]
    """By round."""
    facts: dict[str, float]
    """Medians of what else was measured."""
    unavailable: str = ""
    stopped_after: float = 0.0
    """Seconds after which it was killed; 0 if it was not."""

    @property
    def median(self) -> float:
        return statistics.median(self.values.values())


def ratio(subject: Result, against: Result) -> float:
    """Median of the ratios within each round."""
    rounds = subject.values.keys() & against.values.keys()
    return statistics.median(subject.values[number] / against.values[number] for number in rounds)


def results(comparison: Comparison, samples: list[tuple[str, int, Sample]]) -> Iterator[Result]:
    """The contestants of a comparison in order, with their samples."""
    for contestant in comparison.contestants:
        own = [(number, sample) for name, number, sample in samples if name == contestant.name]
        reasons = [str(sample["unavailable"]) for _, sample in own if "unavailable" in sample]
        good = [(number, sample) for number, sample in own if "unavailable" not in sample]
        facts = {
            name: statistics.median(float(sample[name]) for _, sample in good if name in sample)
            for name in sorted({name for _, sample in good for name in sample} - {"value"})
        }
        yield Result(
            contestant,
            {number: float(sample["value"]) for number, sample in good},
            facts,
            reasons[0] if reasons else "" if good else "not run",
            max((float(sample.get("stopped_after", 0.0)) for _, sample in own), default=0.0),
        )
