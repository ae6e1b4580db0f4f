"""A process that forks, moves, unmaps, discards and writes at random while served reads no wrong byte."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serving.puppeteer import EVENTS, MEMORY, contents
from userfault import MemoryStore, serve
from userfault.testing.faulty_store import Fault, FaultyStore, delay, fail

THREADS = 4


@dataclass(frozen=True)
class Way:
    """What is served, from what kind of store."""

    kind: str = "anon"
    pages: int = 4096
    plan: list[Fault] = field(default_factory=list)
    block: int | str = "auto"
    track: bool = False
    minor: bool = False
    prefetch: bool = False


WAYS = {
    "anonymous memory": Way(),
    "small blocks": Way(pages=1024, block=4096),
    "large blocks": Way(block=1 << 20),
    "a slow store": Way(plan=[delay("read", 0.002)]),
    "a store that fails": Way(plan=[fail("read", skip=n, count=1) for n in range(0, 4000, 3)]),
    "everything pushed": Way(pages=16384, plan=[delay("read", 0.0003)], prefetch=True),
    "tracked writes": Way(track=True),
    "shared memory": Way("shmem"),
    "shared memory from a slow store": Way("shmem", plan=[delay("read", 0.002)]),
    "shared memory with minor faults": Way("shmem", minor=True),
    "huge pages": Way("hugetlb", pages=16),
    "huge pages from a slow store": Way("hugetlb", pages=16, plan=[delay("read", 0.002)]),
}


@pytest.fixture(scope="session")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled churn.c."""
    binary = tmp_path_factory.mktemp("churn") / "churn"
    source = Path(__file__).parent / "churn.c"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[:1]
    subprocess.run([*compiler, "-O2", "-Wall", "-Werror", "-pthread", "-o", binary, source], check=True)
    return binary


def run(churn: Path, way: Way, seed: int, seconds: float) -> dict[str, int]:
    """One process for so many seconds; the events that it caused."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    words = [seed, int(seconds * 1000), THREADS, way.kind, way.pages, EVENTS | MEMORY[way.kind]]
    more = {"CHURN_WP": "1"} if way.track else {"CHURN_MINOR": "1"} if way.minor else {}
    with ours, theirs:
        process = subprocess.Popen(
            [str(churn), str(theirs.fileno()), *map(str, words)],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **more},
            process_group=0,
        )
        try:
            message, [uffd], _, _ = socket.recv_fds(ours, 128, 1)
            address, length, page = map(int, message.split())
            store = FaultyStore(MemoryStore(contents(length)), way.plan)
            served = serve(
                uffd,
                [(address, length, 0, page)],
                store,
                pid=process.pid,
                block=way.block,  # type: ignore[arg-type]
                on_error="retry",
                track=way.track,
            )
            os.close(uffd)
            if way.prefetch:
                served.prefetch()
            ours.sendall(b"x")
            end = time.monotonic() + seconds + 60
            while process.poll() is None and time.monotonic() < end:
                if way.track:
                    served.take_written()
                time.sleep(0.01)
            hung = process.poll() is None
            story = f"{way}, seed {seed}: {served!r} {served.events()} {served.errors}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            _, complaint = process.communicate()
    assert not hung, f"it hung: {story}"
    assert process.returncode == 0, f"{complaint}{story}"
    assert served.wait(20), f"it is not forgotten: {story}"
    return served.events()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", WAYS)
def test_every_byte_is_right_whatever_the_process_does(
    name: str, seed: int, churn: Path, hugepages: Callable[[int], None]
) -> None:
    way = WAYS[name]
    if way.kind == "hugetlb":
        hugepages(way.pages)
    events = run(churn, way, seed, 1.0)
    assert events["remap"] > 0
    assert events["remove"] > 0
    assert events["unmap"] > 0
    assert events["fork"] > 0


@pytest.mark.soak
def test_every_byte_is_right_for_hours(
    churn: Path, hugepages: Callable[[int], None], soak_seconds: float
) -> None:
    hugepages(max(way.pages for way in WAYS.values() if way.kind == "hugetlb"))
    end = time.monotonic() + soak_seconds
    seed = int(time.time())
    while time.monotonic() < end:
        for way in WAYS.values():
            run(churn, way, seed, 5.0)
            seed += 1
