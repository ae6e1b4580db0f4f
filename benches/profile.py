"""Where the processor time of a measurement goes: `python -m benches.profile sort-tmpfs-2 [CONTESTANT ...]`.

Each contestant runs once under perf(1), and each function that was seen is put under one of a few headings
by its name. Printed are processor seconds under each heading, of all threads together, and the functions that
weigh most. It takes root, and a kernel that shows its symbols. A shared machine changes the seconds, and the
shares much less.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from benches.compare import take
from benches.measurements import COMPARISONS

HEADINGS: tuple[tuple[str, str], ...] = (
    ("clearing pages", r"clear_(huge_)?page|clear_subpage|clear_user|folio_zero|clear_contig|clear_gigantic"),
    ("copying", r"copy|memcpy|memmove|rep_movs"),
    (
        "mappings, faults, other processors",
        r"fault|pte|pmd|tlb|zap|unmap|userfaultfd|uffd|mfill|vma|mmap|smp_call|write_msr|mprotect|pagemap|rmap"
        r"|change_protection|set_huge|ipi|mm_walk|walk_p|hugetlb_change|csd_lock|madvise|populate",
    ),
    (
        "page cache, allocation, freeing",
        r"folio|page|xas_|xa_|filemap|shmem|hugetlb|alloc|free|rmqueue|lru|memcg|mem_cgroup|charge|list_(del|add)"
        r"|truncate|undo_range|kmem|lruvec|workingset|fallocate|simple_write|iov_iter|generic_perform",
    ),
    (
        "waiting and scheduling",
        r"sched|futex|halt|spin|rwsem|mutex|wake|switch|idle|wait|osq|lock|try_to|enqueue|dequeue|hrtimer|tick"
        r"|timer|pick_|load_avg|update_curr",
    ),
)
"""Headings of the kernel's functions, each with a pattern of their names; the first that fits counts."""

WORK = r"_umath|sort\.so"
"""Objects whose functions are the work that was asked for."""

BESIDE = "other code of the process"
OF_THE_WORK = "the work itself"
REST = "the rest"


def heading(shared_object: str, function: str) -> str:
    """Under which heading a function counts; `shared_object` is the file that it is in, as perf names it."""
    if not shared_object.startswith("["):
        if re.search(WORK, shared_object):
            return OF_THE_WORK
        return "copying" if re.search(r"memcpy|memmove|memset", function) else BESIDE
    return next((name for name, pattern in HEADINGS if re.search(pattern, function)), REST)


def shares(lines: Iterable[str]) -> Iterator[tuple[float, str, str]]:
    """Percent, object and function of each line that `perf report -F overhead,dso,symbol -t ;` prints."""
    for line in lines:
        found = re.match(r"\s*([\d.]+)%\s*;\s*([^;]*?)\s*;\s*\[.\]\s*(.*?)\s*(;.*)?$", line)
        if found:
            yield float(found[1]), found[2], found[3]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=[comparison.name for comparison in COMPARISONS])
    parser.add_argument("contestants", nargs="*", help="beginnings of their names; none means all")
    options = parser.parse_args()
    # A run that is ended puts back what it holds.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    comparison = next(comparison for comparison in COMPARISONS if comparison.name == options.name)
    for contestant in comparison.contestants:
        if options.contestants and not contestant.name.startswith(tuple(options.contestants)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "perf.data"
            perf = ("perf", "record", "--quiet", "--freq", "999", "--output", str(data), "--")
            sample = take(comparison, contestant, under=perf)
            if "unavailable" in sample:
                print(f"{contestant.name}: {sample['unavailable']}")
                continue
            report = ["perf", "report", "--input", str(data), "--no-children", "--percent-limit", "0"]
            report += ["--fields", "overhead,dso,symbol", "--field-separator", ";", "--stdio"]
            text = subprocess.run(report, capture_output=True, text=True, check=True).stdout
        seconds = float(sample["cpu_s"]) / 100
        print(f"{contestant.name}: {float(sample['value']):.2f} {comparison.unit}, cpu {100 * seconds:.2f} s")
        total: dict[str, float] = defaultdict(float)
        heaviest: dict[str, list[str]] = defaultdict(list)
        for percent, shared_object, function in shares(text.splitlines()):
            under = heading(shared_object, function)
            total[under] += percent
            if len(heaviest[under]) < 4:
                heaviest[under].append(f"{function[:44]} {percent * seconds:.2f}")
        for under, percent in sorted(total.items(), key=lambda item: -item[1]):
            print(f"  {percent * seconds:6.2f} s {percent:5.1f} %  {under:36} {', '.join(heaviest[under])}")


if __name__ == "__main__":
    main()
