"""Several who want to know what was written: two Checkpointers, write-back, eviction, several threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import userfault
from conftest import RunChild
from userfault.verifying import verify


@pytest.mark.parametrize("drain", ["auto", "off"])
def test_each_checkpointer_has_a_dirty_map_of_its_own(tmp_path: Path, drain: Any) -> None:
    memory: dict[str, Any] = {
        "own": userfault.zeros(1 << 20, np.uint8, track=True, pages="4KiB"),
        "huge": userfault.zeros(4 << 20, np.uint8, track=True, pages="2MiB"),
        "foreign": np.zeros((1 << 20) + 5000, np.uint8),
    }
    random = np.random.default_rng(5)
    copies: dict[tuple[int, int], dict[str, Any]] = {}
    with (
        userfault.Checkpointer(tmp_path / "0", memory, drain=drain, durable=False) as first,
        userfault.Checkpointer(tmp_path / "1", memory, drain=drain, durable=False, compress="lz4") as second,
    ):
        for step in range(60):
            for array in memory.values():
                array[random.integers(0, array.size, 20)] = random.integers(0, 255, 20)
            for number, ck in enumerate((first, second)):
                # One of them, the other, both, or neither.
                if random.random() < 0.5:
                    point = ck.save(step)
                    copies[number, step] = {name: array.copy() for name, array in memory.items()}
                    if random.random() < 0.3:
                        point.result(60)
        first.wait()
        second.wait()
    for (number, step), expected in copies.items():
        with userfault.restore(tmp_path / str(number), step, lazy=False) as state:
            for name, array in expected.items():
                assert np.array_equal(state[name], array), (number, step, name)


def test_protecting_anew_between_points_loses_nothing(tmp_path: Path) -> None:
    array = userfault.zeros(1 << 20, np.uint8, track=True, pages="4KiB")
    with userfault.Checkpointer(tmp_path, {"a": array}, drain="off", durable=False) as ck:
        ck.save(0).result(60)
        for step in range(1, 6):
            array[step * 4096] = step
            ck._rearm()
            array[step * 8192 + 1] = step
            ck._rearm()
            point = ck.save(step)
            expected = array.copy()
            array[:] ^= 3
            array[:] ^= 3
            ck._rearm()
            point.result(60)
            with userfault.restore(tmp_path, lazy=False) as state:
                assert np.array_equal(state["a"], expected), step
    with pytest.raises(ValueError, match="closed"):
        ck._rearm()


def test_paged_arrays_are_flushed_and_evicted_beside_a_checkpointer(tmp_path: Path) -> None:
    paged = userfault.memmap(tmp_path / "paged", np.uint32, "w+", shape=(1 << 20,), memory_limit="1MiB")
    tracked = userfault.zeros(1 << 20, np.uint32, track=True, pages="4KiB")
    random = np.random.default_rng(6)
    copies = {}
    with userfault.Checkpointer(
        tmp_path / "points", {"tracked": tracked, "paged": paged}, always_copy=["paged"], durable=False
    ) as ck:
        for step in range(12):
            places = random.integers(0, 1 << 20, 3000)
            paged[places] = tracked[places] = step + 1
            if step % 3 == 0:
                paged.flush()
            point = ck.save(step)
            copies[step] = tracked.copy()
            tracked[places[:10]] = paged[places[:10]] = 99
            if step % 2:
                point.result(60)
    paged.flush()
    assert np.array_equal(np.fromfile(tmp_path / "paged", np.uint32), tracked)
    for step, expected in copies.items():
        with userfault.restore(tmp_path / "points", step) as state:
            assert np.array_equal(state["tracked"], expected)
            assert np.array_equal(state["paged"], expected)


def test_several_threads_save_by_one_checkpointer(tmp_path: Path) -> None:
    array = userfault.zeros(1 << 20, np.uint8, track=True, pages="4KiB")
    lock = threading.Lock()
    copies: dict[int, Any] = {}
    failed = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(15):
                with lock:
                    array[random.integers(0, array.size, 50)] = seed
                    if random.random() < 0.5:
                        # The number is asked for under the lock too: it names this copy.
                        point = ck.save()
                        copies[point.step] = array.copy()
                point = ck.save(pause=lambda: lock)
                point.result(60)
        except BaseException as error:
            failed.append(error)
            raise

    with userfault.Checkpointer(tmp_path / "points", {"a": array}, durable=False) as ck:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        steps = ck.steps()
    assert len(steps) >= 60
    assert steps == sorted(set(steps))
    for step, expected in copies.items():
        with userfault.restore(tmp_path / "points", step, lazy=False) as state:
            assert np.array_equal(state["a"], expected), step
    assert not verify(tmp_path / "points").damage


def test_closing_ends_although_other_threads_go_on_saving(run_child: RunChild, tmp_path: Path) -> None:
    run_child(
        """
import sys, threading, time
import numpy as np
import userfault
array = np.zeros(4 << 20, np.uint8)
for turn in range(8):
    ck = userfault.Checkpointer(sys.argv[1], {"a": array}, durable=False, max_to_keep=3)
    ended = []
    def save():
        try:
            while True:
                array[turn] += 1
                points.append(ck.save())
                time.sleep(0.002)
        except ValueError as error:
            ended.append(str(error))
    points = []
    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    ck.close()
    for thread in threads:
        thread.join()
    assert ended == ["the checkpointer is closed"] * 3, ended
    # Whoever got a point hears how it ended.
    assert [point.exception(10) for point in points] == [None] * len(points)
    assert ck.latest_step() == max(point.step for point in points)
""",
        str(tmp_path / "points"),
        timeout=100,
    )


def test_two_checkpointers_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        userfault.Checkpointer(tmp_path, {"a": bytearray(10)}),
        pytest.raises(userfault.InUseError, match="another Checkpointer"),
    ):
        userfault.Checkpointer(tmp_path, {"a": bytearray(10)})
