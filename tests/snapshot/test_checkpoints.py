"""Points of memory that keeps changing, from Python: saved, verified, restored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import userfault


@pytest.mark.parametrize("pages", ["4KiB", "auto"])
def test_a_point_holds_what_was_there_at_the_cut(tmp_path: Path, pages: str) -> None:
    array = userfault.zeros(1 << 18, np.float64, track=True, pages=pages)  # type: ignore[call-overload]
    array[:] = np.arange(array.size)
    with userfault.Checkpointer(tmp_path / "points", {"a": array}) as ck:
        first = ck.save(1, meta={"epoch": 7})
        array[5] = -1
        first.result(60)
        second = ck.save(2)
        array[6] = -2
        second.result(60)
        assert ck.steps() == [1, 2]
        assert ck.latest_step() == 2
    with userfault.restore(tmp_path / "points", 1) as state:
        assert np.array_equal(state["a"], np.arange(array.size))
        assert state.meta == {"epoch": 7}
    with userfault.restore(tmp_path / "points") as state:
        assert state["a"][5] == -1
        assert state["a"][6] == 6


def test_foreign_arrays_are_taken_too(tmp_path: Path) -> None:
    big = np.arange(1 << 18, dtype=np.int64)
    small = np.arange(10)
    with userfault.Checkpointer(tmp_path / "points", {"big": big, "small": small}) as ck:
        point = ck.save(1)
        big[7] = 0
        small[3] = 0
        point.result(60)
    with userfault.restore(tmp_path / "points", lazy=False) as state:
        assert state["big"][7] == 7
        assert state["small"].tolist() == list(range(10))


def test_verify_names_a_changed_byte(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, 1 << 21, dtype=np.uint8)
    folder = tmp_path / "points"
    with userfault.Checkpointer(folder, {"a": array}) as ck:
        ck.save(1).result(60)
        assert not ck.verify()
        largest = max(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        with largest.open("r+b") as file:
            file.seek(largest.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        assert ck.verify()
