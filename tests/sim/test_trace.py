"""What `userfault trace` records, and that the simulator counts what the engine does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = 4096


def traced(
    file: Path, program: str, *options: str, status: int = 0
) -> tuple[list[list[str]], list[list[str]], str]:
    """The region lines and the events of a recording, and what the command said."""
    done = subprocess.run(
        [sys.executable, "-m", "userfault", "trace", *options, str(file), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=90,
        process_group=0,
        cwd=file.parent,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if not file.exists():
        return [], [], done.stderr
    first, *lines = file.read_text().splitlines()
    assert first == "userfault-trace 1"
    regions = [line.split(" ", 5) for line in lines if line.startswith("region ")]
    events = [line.split(" ") for line in lines if line[0].isdigit()]
    assert len(regions) + len(events) == len(lines)
    return regions, events, done.stderr + done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(256 * PAGE))
    return path


def test_each_fault_is_a_line_with_time_thread_region_block_and_kind(data: Path, tmp_path: Path) -> None:
    program = """
import threading, userfault
with userfault.open("data.bin", "r+", block=4096, pages="4KiB") as region:
    region.advise("random")
    memory = memoryview(region)
    for block in (7, 3, 200):
        memory[block * 4096]
    def elsewhere():
        print(threading.get_native_id())
        memory[5 * 4096] = 1
    thread = threading.Thread(target=elsewhere); thread.start(); thread.join()
    memory[7 * 4096]
    region.prefetch([(20 * 4096, 2 * 4096)], wait=True)
    print(threading.get_native_id())
    memory.release()
"""
    regions, events, said = traced(tmp_path / "out.trace", program)
    other, own = re.findall(r"^\d+$", said, re.M)
    assert [[*region[2:4], region[5].endswith("data.bin")] for region in regions] == [["4096", "256", True]]
    assert all(event[2] == regions[0][1] for event in events)
    assert [(event[1], event[3], event[4]) for event in events] == [
        (own, "7", "m"),
        (own, "3", "m"),
        (own, "200", "m"),
        (other, "5", "m"),
        ("0", "20", "a"),
        ("0", "21", "a"),
    ]
    times = [int(event[0]) for event in events]
    assert times == sorted(times)
    assert "1 region, 4 faults on absent blocks, 0 on resting ones" in said


def test_a_smaller_limit_shows_more_touches_and_the_shape_of_the_region_stays(
    data: Path, tmp_path: Path
) -> None:
    program = """
import userfault
with userfault.open("data.bin", block=4096) as region:
    region.advise("random")
    memory = memoryview(region)
    for _ in range(3):
        for block in range(0, 200, 2):
            memory[block * 4096]
    memory.release()
"""
    regions, events, _ = traced(tmp_path / "all.trace", program)
    assert len(events) == 100
    again, more, _ = traced(tmp_path / "more.trace", program, "--memory-limit", "64KiB")
    assert regions[0][2:4] == again[0][2:4]
    assert len(more) == 300


def test_another_process_of_the_program_has_a_recording_of_its_own(data: Path, tmp_path: Path) -> None:
    program = """
import os, userfault
def once():
    with userfault.open("data.bin") as region:
        bytes(memoryview(region)[:1])
once()
if (child := os.fork()) == 0:
    once()
    userfault._native.write_out_trace()
    os._exit(0)
os.waitpid(child, 0)
print(child)
"""
    _, events, said = traced(tmp_path / "out.trace", program)
    child = re.findall(r"^\d+$", said, re.M)[0]
    assert len(events) == 1
    assert (tmp_path / f"out.trace.{child}").read_text().count(" m\n") == 1


def test_the_status_is_the_programs_and_a_recording_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    program = "import userfault; r = userfault.open('data.bin'); raise SystemExit(3)"
    traced(tmp_path / "out.trace", program, status=3)
    before = (tmp_path / "out.trace").read_text()
    _, _, said = traced(tmp_path / "out.trace", program, status=2)
    assert "exists" in said
    assert (tmp_path / "out.trace").read_text() == before
    assert "no region" in traced(tmp_path / "none.trace", "pass", status=2)[2]
    assert "no size" in traced(tmp_path / "none.trace", "pass", "--memory-limit", "much", status=2)[2]


@pytest.fixture(scope="module")
def simulator() -> Path:
    built = subprocess.run(
        ["cargo", "build", "--release", "--locked", "-q", "-p", "userfault-sim"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return ROOT / "target" / "release" / "userfault-sim"


def misses(simulator: Path, trace: Path, blocks: int, policy: str) -> tuple[float, float]:
    """Misses and minor faults of 1,000 touches."""
    done = subprocess.run(
        [str(simulator), "--policy", policy, "--blocks", str(blocks), str(trace)],
        capture_output=True,
        text=True,
        check=True,
    )
    word = done.stdout.splitlines()[-1].split()
    assert word[0] == policy
    return float(word[1]), float(word[2])


@pytest.mark.time_limit(400)
@pytest.mark.parametrize(("mode", "policy"), [("r+", "userfault"), ("r", "userfault-no-rest")])
def test_the_engine_misses_as_often_as_the_simulator_says(
    mode: str, policy: str, tmp_path: Path, simulator: Path
) -> None:
    """The same touches, once on a region and once in the simulator: the policy is the same code, and the rest
    of the engine does what the simulator does in its place."""
    total, count, limit = 4096, 60_000, 2 << 20
    random = np.random.default_rng(5)
    weights = np.arange(1, total + 1) ** -0.99
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), random.random(count))
    touches = random.permutation(total)[np.minimum(ranks, total - 1)]
    (tmp_path / "data.bin").write_bytes(bytes(total * PAGE))
    np.save(tmp_path / "touches.npy", touches)
    program = f"""
import numpy as np, userfault
touches = (np.load("touches.npy") * 4096).tolist()
with userfault.open("data.bin", {mode!r}, block=4096, pages="4KiB", memory_limit={limit}) as region:
    region.advise("random")
    memory = memoryview(region)
    for at in touches:
        memory[at]
    print(region.stats().page_tables, region.stats().faults_missing, region.stats().faults_minor)
    memory.release()
"""
    _, events, said = traced(tmp_path / "out.trace", program)
    tables, missing, minor = map(int, re.findall(r"^(\d+) (\d+) (\d+)$", said, re.M)[0])
    kinds = [event[4] for event in events]
    assert (kinds.count("m"), kinds.count("r")) == (missing, minor), "every fault is in the recording"
    whole = tmp_path / "whole.trace"
    lines = (f"{number} 1 1 {block} t" for number, block in enumerate(touches))
    whole.write_text("userfault-trace 1\n" + "\n".join(lines) + "\n")
    expected, expected_minor = misses(simulator, whole, (limit - tables) // PAGE, policy)
    assert missing / count * 1000 == pytest.approx(expected, rel=0.03)
    assert minor / count * 1000 == pytest.approx(expected_minor, rel=0.15, abs=0.5)
