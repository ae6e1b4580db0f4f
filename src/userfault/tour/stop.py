"""One stop of the tour: a file, a limit, a program that runs through userfault and through numpy.memmap.

``Plan`` says what is going to happen, ``run`` lets one of the two ways do it and yields what it says
meanwhile, and ``Truth`` is what the file says when it is read plainly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from userfault.testing.memory_cgroup import CgroupUnavailable, MemoryCgroup

__all__ = ["MARGIN", "Message", "Plan", "Stuck", "Truth", "cool", "limited", "on_disk", "run"]

MARGIN = 64 << 20
"""Bytes of the limit that userfault's blocks are not given: the engine keeps 48 MiB of a control group free,
for the kernel kills at a group's limit, and the rest is for stacks, buffers and page tables."""

PATIENCE = 60.0
"""Seconds without a word from the program after which it is taken for stuck."""

CHUNK = 16 << 20

Message = dict[str, Any]
"""What the program says: a tick or a finished step. Times are in seconds, sizes in bytes."""


class Stuck(RuntimeError):
    """The program did not come to its end; the message says how it stood."""


@dataclass(frozen=True)
class Plan:
    """What the stop is going to do. Sizes are in bytes."""

    path: Path
    size: int
    limit: int
    own: bool
    """The file is made for the tour, may be sorted, and is removed afterwards."""

    def __post_init__(self) -> None:
        if self.limit < 2 * MARGIN:
            raise ValueError(f"a limit of {self.limit} bytes is too small for the tour: {2 * MARGIN} or more")
        if self.size <= self.limit:
            raise ValueError(
                f"a file of {self.size} bytes fits into the limit of {self.limit}: nothing would be shown"
            )

    @property
    def blocks(self) -> int:
        """The part of the limit that userfault is told to keep its blocks in."""
        return self.limit - MARGIN

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of the program, by name."""
        return ("hash", "sum", "walk", "sort") if self.own else ("hash", "sum", "walk")

    @classmethod
    def for_file(cls, path: Path, limit: int) -> Plan:
        """A stop that reads a file of the user's, within `limit` bytes.

        Raises ValueError if the file is not larger than the limit, or the limit too small.
        """
        return cls(path, path.stat().st_size, limit, own=False)

    @classmethod
    def for_own_file(cls, size: int, limit: int) -> Plan:
        """A stop on a new file of `size` bytes of random words, within a limit of `limit` bytes.

        Raises ValueError if the file would not be larger than the limit, or the limit is too small; OSError
        if no folder has room.
        """
        folders = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
        for folder in folders:
            # In tmpfs the file itself would be memory.
            if folder.is_dir() and on_disk(folder) and shutil.disk_usage(folder).free > 2 * size:
                plan = cls(folder / f"userfault-tour-{os.getpid()}", size, limit, own=True)
                plan.path.touch(exist_ok=False)
                return plan
        raise OSError(28, f"no disk has {2 * size} bytes free; looked in {', '.join(map(str, folders))}")

    def write(self) -> None:
        """Fill the tour's own file with random words, the same every time."""
        random = np.random.default_rng(1)
        with self.path.open("wb") as file:
            for at in range(0, self.size, CHUNK):
                part = min(CHUNK, self.size - at)
                file.write(random.integers(0, 1 << 63, part // 8, dtype=np.uint64).tobytes())

    def remove(self) -> None:
        """Remove the tour's own file; a file of the user's stays."""
        if self.own:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Truth:
    """What a file holds, learnt by reading it plainly and in order."""

    results: dict[str, str]
    """For each step that says something, what it has to say."""
    sorted: bool

    @classmethod
    def of(cls, path: Path) -> Truth:
        """Read a file. The hash is of all of it, the sums are of its whole words, as in the program."""
        from userfault.tour.program import places

        digest, total, last, ordered = hashlib.sha256(), 0, np.uint64(0), True
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                words = np.frombuffer(data, np.uint64, len(data) // 8)
                if words.size:
                    total += int(words.sum(dtype=np.uint64))
                    ordered = ordered and bool(words[0] >= last and (words[1:] >= words[:-1]).all())
                    last = words[-1]
            at = 8 * places(path.stat().st_size // 8)
            read = (os.pread(file.fileno(), 8, place) for place in at.tolist())
            walked = sum(int.from_bytes(word, sys.byteorder) for word in read)
        sums = {"sum": total, "walk": walked}
        return cls({"hash": digest.hexdigest(), **{n: str(s % (1 << 64)) for n, s in sums.items()}}, ordered)


def on_disk(folder: Path) -> bool:
    """False if a folder is in tmpfs or ramfs, where a file takes memory."""
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == name:
            return right.split()[0] not in {"tmpfs", "ramfs"}
    return True


def cool(path: Path) -> None:
    """Write a file out and drop it from the page cache, so that each way begins with a cold file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def limited(limit: int) -> Iterator[tuple[MemoryCgroup | None, str]]:
    """A control group of `limit` bytes, and ""; or None and the reason why there is none."""
    try:
        group = MemoryCgroup(limit)
    except CgroupUnavailable as error:
        yield None, str(error.strerror)
        return
    with group:
        yield group, ""


def run(
    way: str, plan: Plan, group: MemoryCgroup | None, steps: tuple[str, ...] = (), block: int = 0
) -> Iterator[Message]:
    """Let the program do its steps in one way, "userfault" or "memmap", and yield what it says.

    `steps` are those of the plan unless they are named; `block` is userfault's, in bytes, 0: its own choice.
    Raises Stuck if it dies, or says nothing for PATIENCE seconds; it is killed then.
    """
    command = [
        sys.executable,
        "-m",
        "userfault.tour.program",
        way,
        str(plan.path),
        "--limit",
        str(plan.blocks),
    ]
    command += ["--block", str(block), "--steps", *(steps or plan.steps)]
    if group:
        command += ["--cgroup", str(group.path)]
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, process_group=0)
        try:
            yield from _messages(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if child.returncode != 0:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            raise Stuck(_ending(way, child.returncode, group, said[-1] if said else ""))


def _messages(child: subprocess.Popen[bytes]) -> Iterator[Message]:
    assert child.stdout
    rest = b""
    while True:
        if not select.select([child.stdout], [], [], PATIENCE)[0]:
            raise Stuck(f"nothing was heard of the program for {PATIENCE:.0f} s")
        data = os.read(child.stdout.fileno(), 1 << 16)
        if not data:
            child.wait()
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _ending(way: str, status: int, group: MemoryCgroup | None, said: str) -> str:
    if group and status == -signal.SIGKILL and group.counters().oom_kills:
        return f"the kernel killed {way}: it needed more than the limit"
    return f"{way} ended with status {status}" + (f": {said}" if said else "")
