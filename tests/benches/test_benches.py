"""The measurements measure what they say: the same work for all, checked, and ratios within a round."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from benches.compare import Bar, Comparison, Contestant, Result, clean_environment, ratio, take
from benches.files import fresh, is_sorted
from benches.measurements import COMPARISONS
from benches.native import library
from benches.profile import heading, shares
from benches.snapshots import excess
from benches.workloads import sort_part, zipf_trace

from benches import compare, report

MIB = 1 << 20


def sort(words: np.ndarray, threads: int, alone: object) -> None:
    library("sort").sort_words(
        ctypes.c_void_p(words.ctypes.data), ctypes.c_uint64(words.size), ctypes.c_int(threads), alone
    )


@pytest.mark.parametrize("alone", [None, sort_part], ids=["here", "numpy"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 25, 1000, 8192 * 4, 300_001])
@pytest.mark.parametrize("kind", ["random", "few values", "descending", "sorted", "all greatest"])
def test_the_sort_sorts(kind: str, size: int, threads: int, alone: object) -> None:
    random = np.random.default_rng(size)
    words = {
        "random": random.integers(0, 2**64 - 1, size, dtype=np.uint64),
        "few values": random.integers(0, 3, size, dtype=np.uint64),
        "descending": np.arange(size, 0, -1, dtype=np.uint64),
        "sorted": np.arange(size, dtype=np.uint64),
        "all greatest": np.full(size, 2**64 - 1, dtype=np.uint64),
    }[kind]
    expected = np.sort(words)
    sort(words, threads, alone)
    assert (words == expected).all()


def test_a_file_that_is_not_sorted_or_lost_a_word_is_found(tmp_path: Path) -> None:
    with fresh(tmp_path, MIB) as (path, _):
        with pytest.raises(AssertionError):
            is_sorted(path)
        words = np.sort(np.fromfile(path, np.uint64))
        words.tofile(path)
        is_sorted(path)
        words[5] = words[4]
        words.tofile(path)
        with pytest.raises(AssertionError):
            is_sorted(path)


def test_fifo_misses_are_those_of_a_queue() -> None:
    pages, _ = zipf_trace(500, 5000, "scattered")
    queue: list[int] = []
    misses = 0
    for i, page in enumerate(pages.tolist()):
        if page not in queue:
            misses += i >= 1000
            queue = [*queue, page][-50:]
    function = library("fifo").fifo_misses
    function.restype = ctypes.c_uint64
    numbers = (pages.size, 1000, 500, 50)
    assert function(ctypes.c_void_p(pages.ctypes.data), *(ctypes.c_uint64(n) for n in numbers)) == misses


def test_a_ratio_is_taken_within_each_round() -> None:
    floor = Contestant("floor", "floor", ())
    # The machine is three times slower in the second round: the ratio does not see it.
    assert ratio(Result(floor, {0: 2.0, 1: 6.0}, {}), Result(floor, {0: 1.0, 1: 3.0}, {})) == 2


def test_samples_run_without_what_would_slow_numpy_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1")
    assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & clean_environment().keys()


def by_name(name: str) -> Comparison:
    return next(comparison for comparison in COMPARISONS if comparison.name == name)


def test_every_bar_is_between_contestants_of_its_comparison() -> None:
    for comparison in COMPARISONS:
        names = {contestant.name for contestant in comparison.contestants}
        assert {name for bar in comparison.bars for name in (bar.subject, bar.against) if name} <= names


def test_a_floor_is_measured(tmp_path: Path) -> None:
    sample = take(by_name("resident-4KiB-read"), Contestant("memfd", "floor", ("--memory", "memfd:4KiB")))
    assert 0.1 < float(sample["value"]) < 1000


def test_a_kind_of_memory_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERFAULT_BENCH_UMAP", raising=False)
    sample = take(by_name("fault-same-cpu"), Contestant("umap", "rival", ("--memory", "umap")))
    assert "USERFAULT_BENCH_UMAP" in str(sample["unavailable"])


def test_a_sample_that_dies_says_why() -> None:
    sample = take(by_name("fault-same-cpu"), Contestant("none", "floor", ("--memory", "no-such-memory")))
    assert "no-such-memory" in str(sample["unavailable"])


def test_the_page_tells_what_was_held_missed_and_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    floor, subject, rival = (
        Contestant(name, role, ())
        for name, role in (("floor", "floor"), ("us", "subject"), ("them <&>", "rival"))
    )
    comparison = dataclasses.replace(
        by_name("sum"),
        contestants=(floor, subject, rival),
        better="less",
        bars=(Bar("us", "floor", 1.3), Bar("us", "floor", 1.2, "goal"), Bar("us", "them <&>", 1.0)),
    )
    lines = report.Lines(tmp_path / "lines.jsonl")
    for name, samples in {
        "floor": [{"value": 1.0}, {"value": 3.0}],
        "us": [{"value": 1.25}, {"value": 3.75}],
        "them <&>": [{"unavailable": "it is not here"}],
    }.items():
        for number, sample in enumerate(samples):
            lines.add(comparison, name, number, sample)
    lines.save()
    report.write_page((comparison, by_name("sort-disk-2")), report.Lines(tmp_path / "lines.jsonl"))
    page = (tmp_path / "page.md").read_text()
    assert "| bar: at most 1.3 | 1.25 | held |" in page
    assert "| goal: at most 1.2 | 1.25 | **missed** |" in page
    assert "not measured: them <&>: it is not here" in page
    assert "Not run: `sort-disk-2`" in page
    ElementTree.fromstring((tmp_path / "pictures" / "sum.svg").read_text())


def test_a_figure_without_a_rival_is_held_to_a_limit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    comparison = by_name("model-history-found")
    lines = report.Lines(tmp_path / "lines.jsonl")
    for contestant, seconds in zip(comparison.contestants, (0.5, 11.0, *[1.0] * 8), strict=True):
        lines.add(comparison, contestant.name, 0, {"value": seconds, "states": 7})
    report.write_page((comparison,), lines)
    page = (tmp_path / "page.md").read_text()
    assert "| bar: at most 10 s | 0.5 | held |" in page
    assert "| bar: at most 10 s | 11 | **missed** |" in page


def test_a_rival_that_was_stopped_has_lost_by_the_time_it_was_given_and_by_no_more() -> None:
    us = Contestant("us", "subject", ())
    them = Contestant("them", "rival", ("--memory", "memfd:4KiB"), patience=0)
    timed = dataclasses.replace(
        by_name("resident-4KiB-read"), unit="s", better="less", contestants=(us, them)
    )
    sample = take(timed, them)
    assert sample["unavailable"] == "not done after 0 s"
    found = {
        result.contestant.name: result
        for result in compare.results(
            timed, [("us", 0, {"value": 8.0}), ("them", 0, {**sample, "stopped_after": 100.0})]
        )
    }
    assert report.judge(timed, Bar("us", "them", 0.3), found) == ("below 0.08", "held")
    assert report.judge(timed, Bar("us", "them", 0.05), found)[1].startswith("not measured: them")
    faster = dataclasses.replace(timed, unit="GB/s", better="more")
    assert report.judge(faster, Bar("us", "them", 0.3), found)[1].startswith("not measured: them")


def test_an_exploration_is_measured() -> None:
    comparison = by_name("model-history-found")
    sample = take(comparison, comparison.contestants[0])
    assert float(sample["value"]) > 0
    assert float(sample["states"]) > 1


def test_measuring_again_replaces_only_its_own_lines(tmp_path: Path) -> None:
    lines = report.Lines(tmp_path / "lines.jsonl")
    one, other = by_name("sum"), by_name("zipf-together")
    for comparison in (one, other):
        lines.add(comparison, comparison.contestants[0].name, 0, {"value": 1.0})
    lines.save()
    again = report.Lines(tmp_path / "lines.jsonl")
    again.begin(one)
    again.save()
    kept = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [record["comparison"] for record in kept] == ["zipf-together"]


def test_contestants_take_turns_and_one_that_is_unavailable_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"a": {"value": 1.0}, "b": {"unavailable": "not here"}, "c": {"value": 2.0}}
    monkeypatch.setattr(compare, "take", lambda comparison, contestant: answers[contestant.name])
    comparison = dataclasses.replace(
        by_name("sum"), contestants=tuple(Contestant(name, "floor", ()) for name in "abc"), rounds=3
    )
    order: list[tuple[int, str]] = []
    compare.run(comparison, lambda name, number, sample: order.append((number, name)))
    assert order == [(0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "a"), (2, "c"), (2, "a")]


def test_a_run_that_is_ended_takes_its_child_with_it(tmp_path: Path) -> None:
    """Its own process group is what the child is killed by, so the end of the parent alone would leave it."""
    parent = subprocess.Popen(
        [sys.executable, "-m", "benches", "scaling-threads"],
        cwd=report.ROOT,
        env={**os.environ, "USERFAULT_BENCH_FOLDER": str(tmp_path), "USERFAULT_BENCH_REPORT": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        deadline = time.monotonic() + 30
        while not (child := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.terminate()
        assert parent.wait(30) == 128 + signal.SIGTERM
    finally:
        parent.kill()
        parent.wait()
    assert not Path(f"/proc/{child[0]}").exists()
    assert list(tmp_path.glob("userfault-bench-*")) == []


def test_what_a_point_makes_of_a_write_is_told_from_the_noise_of_the_machine() -> None:
    random = np.random.default_rng(6)
    count = 40_000

    def noise() -> np.ndarray:
        # One write in fourteen meets the host.
        return np.where(random.random(count) < 0.07, 120_000 + random.integers(0, 50_000, count), 800)

    alone, quiet = noise(), noise()
    # Every write meets a fault of 3 us, one in fifty a longer one.
    point = np.where(random.random(count) < 0.02, 40_000, 3_000)
    during = np.maximum(quiet, point)
    assert np.percentile(during, 99) > 120_000
    assert excess(during, alone, 0.9) == 3_000
    assert excess(during, alone, 0.99) == 40_000
    # A few writes that were faster than any before say nothing of the others.
    during[:5] = 100
    assert excess(during, alone, 0.99) == 40_000
    # Without a point nothing is left but the writes themselves.
    assert excess(quiet, alone, 0.9) <= 800


def test_a_profile_puts_each_function_under_one_heading() -> None:
    report = """
# Overhead;Shared Object;Symbol
 21.88% ;[kernel.kallsyms]  ;[k] _copy_to_iter
  6.40% ;[kernel.kallsyms]  ;[k] clear_page_erms
  4.53% ;[kernel.kallsyms]  ;[k] rwsem_spin_on_owner
  1.18% ;[kernel.kallsyms]  ;[k] hugetlb_change_protection
  0.30% ;_multiarray_umath.so  ;[.] partition<zmm_vector<unsigned long>, Comparator, false>
  0.20% ;_native.abi3.so  ;[.] userfault_engine::fill
"""
    got = {
        function: (percent, heading(where, function))
        for percent, where, function in shares(report.splitlines())
    }
    assert got == {
        "_copy_to_iter": (21.88, "copying"),
        "clear_page_erms": (6.4, "clearing pages"),
        "rwsem_spin_on_owner": (4.53, "waiting and scheduling"),
        "hugetlb_change_protection": (1.18, "mappings, faults, other processors"),
        "partition<zmm_vector<unsigned long>, Comparator, false>": (0.3, "the work itself"),
        "userfault_engine::fill": (0.2, "other code of the process"),
    }
