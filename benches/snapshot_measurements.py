"""What is measured of checkpoints, against whom, and what the ratio has to be."""

from __future__ import annotations

import dataclasses
from typing import Literal

from benches.compare import Bar, Comparison, Contestant

GIB = 1 << 30
PAGE = 4096
Role = Literal["floor", "rival", "subject"]


def _row(name: str, role: Role, memory: str, *more: str) -> Contestant:
    return Contestant(name, role, ("--memory", memory, *more))


FORK = _row("fork(), 4 KiB", "rival", "private:4KiB")
FORK_IDLE = _row("fork(), 4 KiB, idle child", "rival", "private:4KiB,idle")
FORK_HUGE = _row("fork(), 2 MiB", "rival", "private:2MiB")
STILL = _row("no point, 4 KiB", "floor", "still:4KiB")
SAVE = _row("numpy.save", "rival", "numpy:4KiB")
COPY = _row("a bare copy, 2 threads", "floor", "copy:4KiB")
SMALL = _row("userfault, 4 KiB", "subject", "userfault:4KiB,off")
DRAINED = _row("userfault, 4 KiB, drain", "subject", "userfault:4KiB")
HUGE = _row("userfault, 2 MiB", "subject", "userfault:2MiB,off")
HUGETLB = "userfault, 2 MiB hugetlb"


def _hugetlb(gib: int) -> Contestant:
    """As `HUGE`, from the machine's pool instead of transparent huge pages."""
    return dataclasses.replace(HUGE, name=HUGETLB, huge_pages=gib * 512 + 8)


def _once(contestant: Contestant) -> Contestant:
    """With pages that were written once, some while ago: see `benches.snapshots.stall`."""
    return dataclasses.replace(
        contestant,
        name=f"{contestant.name}, written once",
        arguments=(*contestant.arguments, "--passes", "1"),
    )


ROOM = dataclasses.replace(
    SMALL, name="userfault, 4 KiB, 1 GiB staging", arguments=(*SMALL.arguments, "--limit", str(GIB))
)
"""For cuts of more than the default staging: those wait for the disk."""


def _stall(gib: int, percent: int) -> Comparison:
    length = gib * GIB
    # A tenth of 4 GiB is more than the 256 MiB of the default.
    room = (ROOM,) if length * percent // 100 > GIB // 4 else ()
    limit = 0.1 if percent == 1 else 2 / 3
    return Comparison(
        name=f"snapshot-stall-{gib}GiB-{percent}",
        title=f"A point of {gib} GiB, {percent} % of the pages written since the last",
        text=(
            "Milliseconds; the median of five points is one sample. fork() is of a twin process with the "
            "same bytes; numpy.save writes to the same disk. Nothing was drained. The floor copies the same "
            "pages into memory that is there, and need not find out which they are. The pages are written "
            "three times over, the last time just before. Where they are written once, the host of the guest "
            "has taken some of its memory away meanwhile, and a copy waits for it, 145 us for each 2 MiB."
        ),
        workload=("snapshot-stall", "--length", str(length), "--count", str(length // PAGE * percent // 100)),
        unit="ms",
        better="less",
        contestants=(COPY, _once(COPY), FORK, FORK_HUGE, SAVE, SMALL, _once(SMALL), *room, HUGE),
        bars=(
            Bar(SMALL.name, FORK.name, limit),
            *(Bar(more.name, FORK.name, limit) for more in room),
            Bar(HUGE.name, FORK.name, 1 / 20),
            Bar(HUGE.name, FORK_HUGE.name, 1.0),
            Bar(HUGE.name, SAVE.name, 1 / 200),
            *((Bar(SMALL.name, SAVE.name, 1 / 50),) if percent == 1 else ()),
        ),
        rounds=5 if gib == 1 else 2,
    )


def _crossover() -> Comparison:
    shares = (0.1, 0.3, 1, 3, 10, 20, 30, 50, 100)
    pages = GIB // PAGE
    return Comparison(
        name="snapshot-crossover",
        title="From which share of written pages on fork() is shorter",
        text="Milliseconds of stall for 1 GiB, nothing drained. fork() does not depend on the share.",
        workload=("snapshot-stall", "--length", str(GIB)),
        unit="ms",
        better="less",
        contestants=(
            _row(FORK.name, "rival", "private:4KiB", "--count", str(pages // 100)),
            *(
                _row(
                    f"userfault, {share:g} %",
                    "subject",
                    "userfault:4KiB,off",
                    "--count",
                    str(int(pages * share / 100)),
                )
                for share in shares
            ),
        ),
        rounds=3,
    )


def _drained(gib: int) -> Comparison:
    return Comparison(
        name=f"snapshot-drained-{gib}GiB",
        title=f"A point every ten seconds of {gib} GiB that 10,000 random writes a second go to: the stall",
        text=(
            "Milliseconds, the median of three points. The drain copies ahead of the cut. Another thread "
            "runs all the time here: taking rights away interrupts its processor."
        ),
        workload=("snapshot-drained", "--length", str(gib * GIB), "--count", "10"),
        unit="ms",
        better="less",
        contestants=(FORK, DRAINED, HUGE, _hugetlb(gib)),
        bars=(
            Bar(DRAINED.name, FORK.name, 1 / 5),
            Bar(HUGE.name, FORK.name, 1 / 20),
            Bar(HUGETLB, FORK.name, 1 / 20),
        ),
        rounds=3 if gib == 1 else 1,
    )


def _writer() -> Comparison:
    return Comparison(
        name="snapshot-writer",
        title="What a point makes of the writer: p99 of one write while it is taken and saved",
        text=(
            "Microseconds, 1 GiB, 10,000 random writes a second, in the second from each of eight cuts on. "
            "The child of fork() writes its copy into a file, as a point is, and lives for that second at "
            "least; an idle child shows what copying on write costs alone. One write in twenty may take "
            "100 us on a guest with no point at all: each write is followed by one to as much memory that "
            "nobody follows and no child gets, and what their times explain is taken out "
            "(`benches.snapshots.excess`). The floor takes no point."
        ),
        workload=("snapshot-writer", "--length", str(GIB), "--count", "3"),
        unit="us",
        better="less",
        contestants=(STILL, FORK, FORK_IDLE, DRAINED, HUGE),
        bars=(Bar(DRAINED.name, FORK.name, 1 / 2),),
        rounds=3,
    )


def _rewriting() -> Comparison:
    plain = _row("private memory, 4 KiB", "floor", "private:4KiB")
    never = _row("tracked, never asked", "subject", "userfault:4KiB,off")
    armed = _row("tracked, re-armed every second", "subject", "userfault:4KiB,off,arm")
    drained = _row("tracked, the drain at work", "subject", "userfault:4KiB,on")
    points = _row("tracked, a point every second", "subject", "userfault:4KiB,off,point")
    return Comparison(
        name="snapshot-rewriting",
        title="A program that rewrites all its memory in a loop",
        text=(
            "GB/s of memset over 256 MiB, again and again. Re-armed: what was written is protected again, "
            "and its next write noted, but for most of what was written whole twice. A point copies and "
            "stores all of it, by a second thread on the same machine."
        ),
        workload=("snapshot-rewriting", "--length", str(GIB // 4)),
        unit="GB/s",
        better="more",
        contestants=(plain, armed, never, drained, points),
        bars=(Bar(armed.name, plain.name, 0.9), Bar(never.name, plain.name, 0.98)),
        rounds=5,
    )


def _foreign() -> Comparison:
    return Comparison(
        name="snapshot-foreign",
        title="Random writes to a foreign array on huge pages, before and while it is tracked",
        text=(
            "Million 8-byte writes a second to 256 MiB, after a point was taken. Tracking splits the huge "
            "pages; copying at the cut leaves them whole, and costs a stall instead."
        ),
        workload=("snapshot-foreign", "--length", str(GIB // 4)),
        unit="million/s",
        better="more",
        contestants=(
            _row("nobody asks", "floor", "private:2MiB"),
            _row("tracked", "subject", "foreign:2MiB"),
            _row("copied at the cut", "subject", "foreign:2MiB,copy"),
        ),
        rounds=3,
    )


def _saving() -> tuple[Comparison, Comparison]:
    full = Comparison(
        name="snapshot-full",
        title="All of 1 GiB to the disk",
        text="Seconds until the point is finished. Neither waits for the disk to be durable.",
        workload=("snapshot-full", "--length", str(GIB)),
        unit="s",
        better="less",
        contestants=(SAVE, SMALL, HUGE),
        bars=(Bar(SMALL.name, SAVE.name, 1.0), Bar(HUGE.name, SAVE.name, 1.0)),
        rounds=5,
    )
    part = Comparison(
        name="snapshot-incremental",
        title="A point of 1 GiB of which 1 % of the pages were written",
        text="Seconds until the point is finished; numpy.save writes all of it.",
        workload=("snapshot-incremental", "--length", str(GIB), "--count", str(GIB // PAGE // 100)),
        unit="s",
        better="less",
        contestants=(SAVE, SMALL, HUGE),
        bars=(Bar(SMALL.name, SAVE.name, 1 / 20),),
        rounds=3,
    )
    return full, part


def _restoring() -> tuple[Comparison, Comparison]:
    # Most of the 8 GiB are zeros that take no room; what is touched is not.
    lazy = Comparison(
        name="snapshot-first-element",
        title="The first element of a point, from a warm page cache",
        text="Milliseconds from the call of restore() to an element in the middle. Has to be below 5.",
        workload=("snapshot-restoring", "--limit", str(GIB // 4)),
        unit="ms",
        better="less",
        contestants=(
            _row("readinto of all, 256 MiB", "rival", "numpy:4KiB", "--length", str(GIB // 4)),
            _row("userfault, 256 MiB", "subject", "userfault:4KiB,off", "--length", str(GIB // 4)),
            _row("userfault, 8 GiB", "subject", "userfault:4KiB,off", "--length", str(8 * GIB)),
        ),
        rounds=3,
    )
    eager = Comparison(
        name="snapshot-eager",
        title="All of a point into memory that is there, from a warm page cache",
        text="GB/s for 1 GiB; every block is checked on the way.",
        workload=("snapshot-eager", "--length", str(GIB)),
        unit="GB/s",
        better="more",
        contestants=(
            _row("readinto", "rival", "numpy:4KiB"),
            _row("userfault", "subject", "userfault:4KiB,off"),
        ),
        bars=(Bar("userfault", "readinto", 1.0),),
        rounds=5,
    )
    return lazy, eager


def _extra() -> Comparison:
    return Comparison(
        name="snapshot-extra",
        title="Extra memory when all of 512 MiB is rewritten while a point is saved",
        text="MiB at most: of staging, or of pages that a child of fork() keeps.",
        workload=("snapshot-extra", "--length", str(GIB // 2)),
        unit="MiB",
        better="less",
        contestants=(
            FORK,
            _row("userfault, 4 KiB, 256 MiB", "subject", "userfault:4KiB,off", "--limit", str(GIB // 4)),
            _row("userfault, 4 KiB, 1 GiB", "subject", "userfault:4KiB,off", "--limit", str(GIB)),
            _row("userfault, 2 MiB, 256 MiB", "subject", "userfault:2MiB,off", "--limit", str(GIB // 4)),
        ),
        bars=(Bar("userfault, 4 KiB, 256 MiB", FORK.name, 0.51),),
        rounds=1,
    )


SNAPSHOTS: tuple[Comparison, ...] = (
    *(_stall(gib, percent) for gib in (1, 4) for percent in (1, 10)),
    _crossover(),
    *(_drained(gib) for gib in (1, 4)),
    _writer(),
    _rewriting(),
    _foreign(),
    *_saving(),
    *_restoring(),
    _extra(),
)
