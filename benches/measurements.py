"""What is measured, against what, and what the ratio has to be."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

from benches.compare import Bar, Comparison, Contestant
from benches.files import fresh, in_tmpfs, is_sorted, kept, on_disk, sparse
from benches.memory import MIB
from benches.model import TABLES
from benches.snapshot_measurements import SNAPSHOTS
from userfault.model.scenarios.engine import RULES, SITUATIONS
from userfault.model.scenarios.handlers import NAMES as HANDLERS
from userfault.model.scenarios.history import NAMES as DEFECTS

GIB = 1 << 30


def _sizes(*, length: int, limit: int, block: int) -> tuple[str, ...]:
    return ("--length", str(length), "--limit", str(limit), "--block", str(block))


def _memory(kind: str) -> tuple[str, ...]:
    return ("--memory", kind)


def _fault(placement: str, where: str) -> Comparison:
    length = 64 * MIB
    # The signal handler runs in the thread that touches: there is nothing to place.
    inline = placement == "same-cpu"
    return Comparison(
        name=f"fault-{placement}",
        title=f"One 4 KiB fault, {where}",
        text=(
            "Median time of a touch of an absent page, 16,384 pages in random order, nothing evicted. The "
            "bare floor copies a hot page and does nothing else; so does userfault over a store of zeros; "
            "the others read a file in tmpfs."
        ),
        workload=("fault", "--placement", placement, *_sizes(length=length, limit=2 * length, block=4096)),
        unit="us",
        better="less",
        contestants=(
            Contestant("bare C handler thread", "floor", _memory("c-handler")),
            Contestant("C handler thread with pread", "floor", _memory("c-handler:file")),
            *(
                (
                    Contestant("bare C signal handler", "floor", _memory("c-signal")),
                    Contestant("C signal handler with pread", "floor", _memory("c-signal:file")),
                )
                if inline
                else ()
            ),
            Contestant("umap", "rival", _memory("umap")),
            Contestant("userfault, threads", "subject", _memory("userfault:4KiB,zero")),
            Contestant("userfault, threads, a file", "subject", _memory("userfault:4KiB")),
            *(
                (
                    Contestant("userfault, inline", "subject", _memory("userfault:4KiB,zero,inline")),
                    Contestant("userfault, inline, a file", "subject", _memory("userfault:4KiB,inline")),
                )
                if inline
                else ()
            ),
        ),
        bars=(
            Bar("userfault, threads", "bare C handler thread", 1.3),
            Bar("userfault, threads", "bare C handler thread", 1.2, "goal"),
            Bar("userfault, threads, a file", "C handler thread with pread", 1.3),
            *(
                (
                    Bar("userfault, inline", "bare C signal handler", 1.3, "goal"),
                    Bar("userfault, inline, a file", "C signal handler with pread", 1.3, "goal"),
                )
                if inline
                else ()
            ),
        ),
        rounds=7,
        file=partial(fresh, in_tmpfs(), length),
    )


def _served(placement: str, where: str) -> Comparison:
    length = 64 * MIB
    return Comparison(
        name=f"serve-{placement}",
        title=f"One 4 KiB fault that another process answers, {where}",
        text=(
            "Median time of a touch of an absent page, 16,384 pages in random order. The floor is a bare C "
            "process that copies a hot page and does nothing else; userfault.serve reads a store of zeros, "
            "and is ready for forks, moves and discarded memory."
        ),
        workload=("fault", "--placement", placement, *_sizes(length=length, limit=2 * length, block=4096)),
        unit="us",
        better="less",
        contestants=(
            Contestant("bare C handler process", "floor", _memory("c-handler:process")),
            Contestant("userfault.serve", "subject", _memory("served")),
        ),
        bars=(Bar("userfault.serve", "bare C handler process", 1.5),),
        rounds=7,
        file=partial(fresh, in_tmpfs(), length),
    )


def _resident(pages: str, access: str, unit: str, what: str) -> Comparison:
    length = 256 * MIB
    huge = pages == "2MiB"
    # The region needs pages for the whole, and a few blocks of room beside it.
    needed = length // (2 * MIB) + 16 if huge else 0
    return Comparison(
        name=f"resident-{pages}-{access}",
        title=f"Resident memory, pages of {pages}: {what}",
        text=(
            "256 MiB that are all there, against a memfd of the same page size. The best of five passes is "
            "one sample."
        ),
        workload=(
            "resident",
            "--access",
            access,
            *_sizes(length=length, limit=2 * length, block=2 * MIB if huge else 65536),
        ),
        unit=unit,
        better="more",
        contestants=(
            Contestant(f"memfd, {pages}", "floor", _memory(f"memfd:{pages}"), huge_pages=needed),
            Contestant(f"userfault, {pages}", "subject", _memory(f"userfault:{pages}"), huge_pages=needed),
        ),
        bars=(Bar(f"userfault, {pages}", f"memfd, {pages}", 0.98),),
        rounds=7,
        file=partial(fresh, in_tmpfs(), length),
    )


SORT = GIB
SORT_LIMIT = 256 * MIB
SORT_CGROUP = 288 * MIB
SORT_BOUND = 352 * MIB
"""The limit, and 96 MiB for the interpreter and for what an engine keeps free."""

SORT_PATIENCE = 150
"""Seconds. With 128 threads mmap had not ended after 270."""


def _sort(where: str, threads: int) -> Comparison:
    folder = on_disk() if where == "disk" else in_tmpfs()
    shared = ("--length", str(SORT), "--limit", str(SORT_LIMIT), "--threads", str(threads))
    two = ("--block", str(2 * MIB))
    pool = SORT_LIMIT // (2 * MIB) + 16
    ours: tuple[Contestant, ...] = (
        Contestant(
            "userfault, 2 MiB hugetlb", "subject", (*_memory("userfault:2MiB"), *two), huge_pages=pool
        ),
        Contestant("userfault, 2 MiB tmpfs", "subject", (*_memory("userfault:2MiB"), *two)),
        Contestant("userfault, 4 KiB", "subject", (*_memory("userfault:4KiB"), "--block", str(MIB))),
    )
    mmap: tuple[Contestant, ...]
    bars: tuple[Bar, ...]
    umap = Contestant("umap, 1 MiB", "rival", (*_memory("umap"), "--block", str(MIB)))
    if where == "disk":
        mmap = (
            Contestant("mmap", "rival", _memory("mmap"), cgroup=SORT_CGROUP, patience=SORT_PATIENCE),
            Contestant(
                "mmap, MADV_RANDOM",
                "rival",
                _memory("mmap:random"),
                cgroup=SORT_CGROUP,
                patience=SORT_PATIENCE,
            ),
            dataclasses.replace(umap, name="umap, 1 MiB, bounded", cgroup=SORT_BOUND),
        )
        ours = (
            *ours,
            dataclasses.replace(ours[0], name="userfault, hugetlb, bounded", cgroup=SORT_BOUND - SORT_LIMIT),
        )
        bars = (
            Bar("userfault, 2 MiB hugetlb", "mmap", 0.35),
            Bar("userfault, 2 MiB tmpfs", "mmap", 0.35),
            Bar("userfault, 2 MiB hugetlb", "mmap", 0.3, "goal"),
            Bar("userfault, 2 MiB hugetlb", "mmap, MADV_RANDOM", 0.3, "goal"),
        )
        text = (
            "mmap runs in a memory control group of 288 MiB. The others have limits of their own, which "
            "leave out the page cache of the file; those called bounded run in a group of 352 MiB as well, "
            "less the huge pages, which no group counts."
        )
    else:
        # In tmpfs the kernel charges the file to whoever made it, so mmap cannot be bounded there.
        mmap = ()
        bars = (
            Bar("userfault, 2 MiB hugetlb", "umap, 1 MiB", 0.65, "goal"),
            Bar("userfault, 2 MiB tmpfs", "umap, 1 MiB", 0.75, "goal"),
            Bar("userfault, 4 KiB", "umap, 1 MiB", 1.1, "goal"),
        )
        text = "Nothing waits for a disk: what is left is the work of paging."
    return Comparison(
        name=f"sort-{where}-{threads}",
        title=f"Sort 1 GiB of uint64 through 256 MiB, file {'on disk' if where == 'disk' else 'in tmpfs'}, "
        f"{threads} threads",
        text=f"A parallel quicksort in place, parts by numpy.ndarray.sort, until the file is durable. "
        f"The floor has 1 GiB of memory and has read the file before. {text}",
        workload=("sort", *shared),
        unit="s",
        better="less",
        contestants=(Contestant("loaded before", "floor", _memory("loaded")), *mmap, umap, *ours),
        bars=bars,
        rounds=3,
        file=partial(fresh, folder, SORT),
        check=is_sorted,
    )


def _random_read(threads: int, write: bool) -> Comparison:
    length, limit = 4 * GIB, GIB
    mode = "read-write" if write else "read-only"
    extra = ("--write",) if write else ()
    count = ("--count", "40000")
    few = ("--count", "1500")
    ours = (
        Contestant("userfault, threads", "subject", (*_memory("userfault:4KiB"), *count)),
        Contestant("userfault, inline", "subject", (*_memory("userfault:4KiB,inline"), *count)),
    )
    # What a handler that does nothing else gets out of the same disk.
    floors = (
        Contestant("C handler, io_uring", "floor", (*_memory("c-flight:ring"), *count)),
        Contestant("two C handlers, native AIO", "floor", (*_memory("c-flight:pair"), *count)),
    )
    many = threads == 16
    return Comparison(
        name=f"random-read-{threads}-{mode}",
        title=f"Random 4 KiB reads of a cold 4 GiB file under 1 GiB, {threads} touching thread"
        f"{'s' if threads > 1 else ''}, {mode}",
        text=(
            "Uniform, every byte of the page is read. mmap runs in a control group of 1 GiB. Its default "
            "reads ahead as far as the disk is set to, and is given fewer reads."
            + (" The floors have no limit, no table and no deadlines." if threads == 16 else "")
        ),
        workload=(
            "random-read",
            *_sizes(length=length, limit=limit, block=4096),
            "--threads",
            str(threads),
            *extra,
        ),
        unit="thousand/s",
        better="more",
        contestants=(
            Contestant("mmap, MADV_RANDOM", "rival", (*_memory("mmap:random"), *count), cgroup=limit),
            Contestant("numpy.memmap", "rival", (*_memory("mmap"), *few), cgroup=limit),
            *(floors if many else ()),
            *ours,
        ),
        bars=(
            Bar("userfault, threads", "mmap, MADV_RANDOM", 0.9, "goal"),
            Bar("userfault, inline", "mmap, MADV_RANDOM", 0.9, "goal"),
            Bar("userfault, threads", "numpy.memmap", 100, "goal"),
            *((Bar("userfault, threads", "userfault, inline", 0.8, "goal"),) if many else ()),
            *(Bar("userfault, threads", floor.name, 0.9, "goal") for floor in floors if many),
        ),
        rounds=3,
        file=partial(kept, on_disk(), length),
    )


def _zipf(layout: str) -> tuple[Comparison, Comparison]:
    length, limit = 4 * GIB, 512 * MIB
    workload = (*_sizes(length=length, limit=limit, block=4096), "--layout", layout)
    many, few = ("--count", "400000"), ("--count", "10000")
    how = "hot items together" if layout == "together" else "hot items scattered"
    speed = Comparison(
        name=f"zipf-{layout}",
        title=f"Zipf 0.99 over 4 GiB under 512 MiB, 90 % reads, {how}",
        text=(
            "Operations on items of 256 bytes, in pages of 4 KiB, at steady state. mmap runs in a control "
            "group of 512 MiB."
        ),
        workload=("zipf", *workload),
        unit="thousand/s",
        better="more",
        contestants=(
            Contestant("mmap", "rival", (*_memory("mmap"), *few), cgroup=limit),
            Contestant("mmap, MADV_RANDOM", "rival", (*_memory("mmap:random"), *many), cgroup=limit),
            Contestant("userfault, 4 KiB", "subject", (*_memory("userfault:4KiB"), *many)),
            Contestant("userfault, 4 KiB, inline", "subject", (*_memory("userfault:4KiB,inline"), *many)),
        ),
        bars=(
            Bar("userfault, 4 KiB", "mmap", 1.0, "goal"),
            Bar("userfault, 4 KiB", "mmap, MADV_RANDOM", 1.0, "goal"),
            Bar("userfault, 4 KiB, inline", "mmap, MADV_RANDOM", 1.0, "goal"),
        ),
        rounds=3,
        file=partial(kept, on_disk(), length),
    )
    misses = Comparison(
        name=f"zipf-misses-{layout}",
        title=f"The same, misses, {how}",
        # What is learned takes several turns of the memory: shorter than this is no steady state.
        text="Of 1,000 operations, after four million, how many found their page absent. FIFO is simulated.",
        workload=("zipf-misses", *workload, "--count", "4000000"),
        unit="misses",
        better="less",
        contestants=(
            Contestant("FIFO", "rival", _memory("fifo")),
            Contestant("userfault, 4 KiB", "subject", _memory("userfault:4KiB")),
        ),
        bars=(Bar("userfault, 4 KiB", "FIFO", 0.82 if layout == "together" else 0.90, "goal"),),
        rounds=1,
        file=partial(kept, on_disk(), length),
    )
    return speed, misses


def _sum() -> Comparison:
    length, limit = 2 * GIB, 256 * MIB
    pool = limit // (2 * MIB) + 16
    two = ("--block", str(2 * MIB))
    rivals = {
        "numpy.memmap": Contestant("numpy.memmap", "rival", _memory("mmap"), cgroup=limit),
        "numpy.fromfile in chunks": Contestant("numpy.fromfile in chunks", "rival", _memory("fromfile")),
        "readinto in chunks": Contestant("readinto in chunks", "rival", _memory("readinto")),
    }
    subjects = (
        Contestant(
            "userfault, 2 MiB hugetlb", "subject", (*_memory("userfault:2MiB"), *two), huge_pages=pool
        ),
        Contestant("userfault, 2 MiB tmpfs", "subject", (*_memory("userfault:2MiB"), *two)),
    )
    return Comparison(
        name="sum",
        title="Sum of a cold file eight times the limit",
        text="2 GiB on disk under 256 MiB, read once from front to back. Chunks are of 16 MiB.",
        workload=("sum", "--length", str(length), "--limit", str(limit)),
        unit="GB/s",
        better="more",
        contestants=(*rivals.values(), *subjects),
        bars=tuple(Bar("userfault, 2 MiB hugetlb", name, 1.0, "goal") for name in rivals),
        rounds=3,
        file=partial(kept, on_disk(), length),
    )


def _scaling(what: str) -> Comparison:
    """How the cost of a fault grows: with the size of the region, or with the threads that touch it."""
    limit = 256 * MIB
    sizes = (1, 4, 16, 64) if what == "size" else (4,)
    threads = (1,) if what == "size" else (1, 4, 16, 64, 128)
    rows: tuple[tuple[str, Literal["rival", "subject"], str, int], ...] = (
        ("mmap, MADV_RANDOM", "rival", "mmap:random", limit),
        ("userfault", "subject", "userfault:4KiB", 0),
        ("userfault, inline", "subject", "userfault:4KiB,inline", 0),
    )
    contestants = tuple(
        Contestant(
            f"{name}, {size} GiB" if what == "size" else f"{name}, {count} thread{'s' if count > 1 else ''}",
            role,
            (*_memory(kind), "--length", str(size * GIB), "--threads", str(count)),
            cgroup=cgroup,
        )
        for name, role, kind, cgroup in rows
        for size in sizes
        for count in threads
    )
    return Comparison(
        name=f"scaling-{what}",
        title=f"Random 4 KiB reads by {'size of the region' if what == 'size' else 'number of threads'}",
        text="A sparse file under 256 MiB: nothing is read from the disk, what is left is the paging.",
        workload=("random-read", "--limit", str(limit), "--block", "4096", "--count", "100000"),
        unit="thousand/s",
        better="more",
        contestants=contestants,
        rounds=3,
        file=partial(sparse, on_disk(), max(sizes) * GIB),
    )


def _replay() -> Comparison:
    return Comparison(
        name="model-replay",
        title="The executable model: replaying a kernel's measured cases",
        text=(
            "Every row of a table is run on the model of that kernel and compared, on one core. The tables "
            "are those of the oracle; they are not part of the repository."
        ),
        workload=("model-replay",),
        unit="s",
        better="less",
        contestants=tuple(Contestant(f"Linux {version}", "subject", _memory(version)) for version in TABLES),
        bars=(Bar("Linux 6.18", "", 60),),
        rounds=3,
        columns=("cpu_s", "agree", "disagree", "unsupported"),
    )


def _explored(
    group: str, what: str, names: tuple[str, ...], title: str, text: str, limit: float
) -> Comparison:
    """How long the explorer takes for each scenario of a group."""
    return Comparison(
        name=f"model-{group}-{what}",
        title=title,
        text=text,
        workload=("model-explore",),
        unit="s",
        better="less",
        contestants=tuple(Contestant(name, "subject", _memory(f"{group}:{name}:{what}")) for name in names),
        bars=tuple(Bar(name, "", limit) for name in names) if limit else (),
        rounds=3,
        columns=("states", "steps", "longest"),
    )


def _explorer() -> tuple[Comparison, ...]:
    found = "The explorer goes through interleavings, shortest first, until an invariant breaks."
    exhausted = "The explorer looks at every interleaving; states that are the same are looked at once."
    situations = tuple(name for name in SITUATIONS if name != "everything")
    rows = (
        ("history", "found", DEFECTS, "the kernel's historical defects, found", found, 10),
        ("history", "exhausted", DEFECTS, "the same, mended, exhausted", exhausted, 60),
        ("handlers", "found", HANDLERS, "mistakes of fault handlers, found", found, 0),
        ("handlers", "exhausted", HANDLERS, "the same, mended, exhausted", exhausted, 0),
        ("engine", "found", tuple(RULES), "wrong rules of the engine, found", found, 0),
        ("engine", "exhausted", situations, "the engine's protocol, exhausted", exhausted, 0),
    )
    return tuple(
        _explored(group, what, names, f"The explorer: {title}", text, limit)
        for group, what, names, title, text, limit in rows
    )


COMPARISONS: tuple[Comparison, ...] = (
    _fault("same-cpu", "handler on the same CPU"),
    _fault("other-cpu", "handler on another CPU"),
    _served("same-cpu", "handler on the same CPU"),
    _served("other-cpu", "handler on another CPU"),
    *(
        _resident(pages, access, unit, what)
        for pages in ("4KiB", "2MiB")
        for access, unit, what in (
            ("read", "GB/s", "reading in sequence"),
            ("write", "GB/s", "writing in sequence"),
            ("random", "million/s", "reading at random"),
        )
    ),
    _sort("disk", 2),
    _sort("disk", 128),
    _sort("tmpfs", 2),
    _sort("tmpfs", 128),
    *(_random_read(threads, write) for threads in (1, 16) for write in (False, True)),
    *_zipf("together"),
    *_zipf("scattered"),
    _sum(),
    _scaling("size"),
    _scaling("threads"),
    _replay(),
    *_explorer(),
    *SNAPSHOTS,
)
