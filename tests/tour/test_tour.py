"""The tour shows what is true: the same program both ways, checked against the file, within a limit."""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from userfault.testing.memory_cgroup import MemoryCgroup
from userfault.tour import screen, stop
from userfault.tour.program import places
from userfault.tour.stop import MARGIN, Plan, Stuck, Truth, cool, on_disk, run

MIB = 1 << 20
LIMIT = 16 * MIB
"""Of tests that set no limit by the kernel: there the engine needs more room than this."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a tour be a small one."""
    monkeypatch.setattr(stop, "MARGIN", 8 * MIB)


@pytest.fixture
def real_margin(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin as it is, for tests within a control group."""
    monkeypatch.setattr(stop, "MARGIN", MARGIN)


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    """A file of 24 MiB and 5 bytes: no multiple of a word."""
    path = tmp_path / "ragged"
    path.write_bytes(np.random.default_rng(3).bytes(24 * MIB + 5))
    return path


@pytest.fixture
def own() -> Iterator[Plan]:
    plan = Plan.for_own_file(48 * MIB, LIMIT)
    plan.write()
    yield plan
    plan.remove()


def finished(way: str, plan: Plan, group: MemoryCgroup | None = None) -> dict[str, stop.Message]:
    return {message["step"]: message for message in run(way, plan, group) if "step" in message}


def test_the_truth_about_a_file_is_what_numpy_says_of_its_bytes(ragged: Path) -> None:
    data = ragged.read_bytes()
    words = np.frombuffer(data[: len(data) // 8 * 8], np.uint64)
    assert Truth.of(ragged) == Truth(
        {
            "hash": hashlib.sha256(data).hexdigest(),
            "sum": str(words.sum(dtype=np.uint64)),
            "walk": str(words[places(words.size)].sum(dtype=np.uint64)),
        },
        sorted=False,
    )


def test_a_sorted_file_is_known_as_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "CHUNK", 8 * 100)
    path = tmp_path / "sorted"
    words = np.arange(1000, dtype=np.uint64)
    words.tofile(path)
    assert Truth.of(path).sorted
    # The one inversion is where two chunks meet.
    words[100] = 98
    words.tofile(path)
    assert not Truth.of(path).sorted


@pytest.mark.parametrize("way", ["userfault", "memmap"])
def test_a_file_of_the_users_is_read_right_and_stays_as_it_was(way: str, ragged: Path) -> None:
    before = ragged.read_bytes()
    done = finished(way, Plan.for_file(ragged, LIMIT))
    assert {step: message["result"] for step, message in done.items()} == Truth.of(ragged).results
    assert ragged.read_bytes() == before


@pytest.mark.parametrize("way", ["userfault", "memmap"])
def test_the_tours_own_file_is_sorted_and_keeps_its_words(way: str, own: Plan) -> None:
    before = Truth.of(own.path)
    done = finished(way, own)
    after = Truth.of(own.path)
    assert list(done) == ["hash", "sum", "walk", "sort"]
    assert (before.sorted, after.sorted) == (False, True)
    assert after.results["sum"] == before.results["sum"]


def test_userfault_stays_within_the_kernels_limit(real_margin: None, memory_cgroup) -> None:
    plan = Plan.for_own_file(160 * MIB, 128 * MIB)
    group = memory_cgroup(plan.limit)
    try:
        plan.write()
        cool(plan.path)
        assert list(finished("userfault", plan, group)) == ["hash", "sum", "walk", "sort"]
        assert Truth.of(plan.path).sorted
    finally:
        plan.remove()
    counters = group.counters()
    assert counters.oom_kills == 0
    assert 0 < counters.peak <= plan.limit


def test_a_program_that_is_killed_is_reported(own: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = run("memmap", own, None)
    started = []
    popen = stop.subprocess.Popen
    monkeypatch.setattr(
        stop.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0]
    )
    next(messages)
    started[0].send_signal(signal.SIGKILL)
    with pytest.raises(Stuck, match="memmap ended with status -9"):
        list(messages)


def test_a_program_that_says_nothing_is_killed(own: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "PATIENCE", 0.001)
    with pytest.raises(Stuck, match="nothing was heard"):
        list(run("memmap", own, None))


def test_a_file_that_fits_into_the_limit_is_refused(ragged: Path) -> None:
    with pytest.raises(ValueError, match="fits into the limit"):
        Plan.for_file(ragged, 64 * MIB)
    with pytest.raises(ValueError, match="fits into the limit"):
        Plan.for_own_file(16 * MIB, 16 * MIB)


def test_a_limit_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="too small for the tour"):
        Plan.for_own_file(64 * MIB, 8 * MIB)


def test_the_tours_own_file_is_not_in_memory() -> None:
    plan = Plan.for_own_file(24 * MIB, LIMIT)
    try:
        assert on_disk(plan.path.parent)
    finally:
        plan.remove()
    assert not plan.path.exists()
    assert not on_disk(Path("/dev/shm"))


def shown(plan: Plan) -> tuple[bool, str]:
    console = Console(record=True, width=140, quiet=False, force_terminal=False)
    right = screen.show(plan, console)
    return right, console.export_text()


def test_the_screen_shows_both_ways_and_what_was_checked(real_margin: None, memory_cgroup) -> None:
    memory_cgroup(MIB)
    right, text = shown(Plan.for_own_file(160 * MIB, 128 * MIB))
    assert right
    assert text.count("✓") == 4
    assert "Every result agrees with the file read plainly." in text
    assert "All of it: userfault" in text


def test_without_control_groups_the_screen_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.testing.memory_cgroup._parents", lambda: iter([]))
    right, text = shown(Plan.for_own_file(24 * MIB, LIMIT))
    assert right
    assert "this machine gives no memory limit to compare under" in text


def test_a_wrong_result_is_shown_and_fails_the_tour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userfault.testing.memory_cgroup._parents", lambda: iter([]))
    truth = Truth.of

    def wrong(path: Path) -> Truth:
        real = truth(path)
        return Truth({**real.results, "sum": "0"}, real.sorted)

    monkeypatch.setattr(Truth, "of", wrong)
    right, text = shown(Plan.for_own_file(24 * MIB, LIMIT))
    assert not right
    assert "Wrong results: userfault: sum" in text


def test_the_rust_compilers_own_library_reads_right_through_a_small_limit() -> None:
    """A real file of 100 MB and more, which nobody made for a test."""
    found = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=False)
    libraries = sorted(Path(found.stdout.strip()).glob("lib/librustc_driver*.so")) if found.stdout else []
    if not libraries or libraries[0].stat().st_size < 100 * MIB:
        pytest.skip("no Rust compiler with a library of 100 MB is installed")
    with libraries[0].open("rb") as file:
        plain = hashlib.file_digest(file, "sha256").hexdigest()
    done = finished("userfault", Plan(libraries[0], libraries[0].stat().st_size, 16 * MIB, own=False))
    assert done["hash"]["result"] == plain
    assert done["hash"]["faults"] > 10
