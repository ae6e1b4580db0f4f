"""fork, spawn and exit while a point is being saved."""

from __future__ import annotations

from pathlib import Path

import pytest

import userfault
from conftest import RunChild
from userfault.verifying import verify

PRELUDE = """
import os, pickle, sys, time
import numpy as np
import userfault
folder, pages = sys.argv[1], sys.argv[2]
a = userfault.zeros(16 << 20, np.uint8, track=True, pages=pages)
foreign = np.zeros(2 << 20, np.uint8)
a[:] = np.random.default_rng(1).integers(0, 255, a.size, np.uint8)
# Slow enough to be still under way when something else happens.
ck = userfault.Checkpointer(folder, {"a": a, "foreign": foreign}, max_rate="24MB", staging="32MiB")
"""


def restored(folder: Path, step: int) -> tuple[int, int]:
    with userfault.restore(folder, step, lazy=False) as state:
        return int(state["a"][0]), int(state["foreign"][0])


@pytest.mark.parametrize("pages", ["4KiB", "2MiB"])
def test_a_forked_child_has_a_copy_and_the_parents_save_goes_on(
    run_child: RunChild, tmp_path: Path, pages: str
) -> None:
    folder = tmp_path / "points"
    run_child(
        PRELUDE
        + """
a[0], foreign[0] = 11, 12
point = ck.save(1)
assert not point.done()
child = os.fork()
if child == 0:
    # hugetlb pages a child does not get; the others are its own.
    foreign[0] = 99
    for call in (lambda: ck.save(2), ck.steps, ck.latest_step, ck.wait, ck.prune, lambda: point.result(5)):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            assert "fork" in str(error) or "keep" in str(error), error
        else:
            os._exit(3)
    ck.close()
    repr(ck), repr(point)
    del ck, point
    b = userfault.zeros(1 << 20, np.uint8, track=True, pages="4KiB")
    b[:] = 5
    # The child may save into a directory of its own, with an engine of its own.
    with userfault.Checkpointer(folder + "-child", {"b": b, "foreign": foreign}) as mine:
        mine.save(1).result(60)
    with userfault.restore(folder + "-child", lazy=False) as state:
        assert state["foreign"][0] == 99 and state["b"][7] == 5
    sys.exit(0)
a[0], foreign[0] = 21, 22
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
point.result(60)
ck.save(2).result(60)
ck.close()
""",
        str(folder),
        pages,
    )
    assert restored(folder, 1) == (11, 12)
    assert restored(folder, 2) == (21, 22)
    assert not verify(folder).damage


def test_a_child_that_exits_says_nothing_and_takes_nothing_away(run_child: RunChild, tmp_path: Path) -> None:
    done = run_child(
        PRELUDE
        + """
point = ck.save(1)
child = os.fork()
if child == 0:
    sys.exit(7)      # with everything that exit does
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
point.result(60)
""",
        str(tmp_path / "points"),
        "4KiB",
    )
    assert done.stderr == ""


def test_a_checkpointer_does_not_travel_to_a_spawned_process(run_child: RunChild, tmp_path: Path) -> None:
    run_child(
        PRELUDE
        + """
import multiprocessing
point = ck.save(1)
for what in (ck, point):
    try:
        pickle.dumps(what)
    except TypeError as error:
        assert "pickle" in str(error), error
    else:
        raise AssertionError("it was pickled")
# A spawned process that has nothing to do with it does not disturb it, and can read finished points.
worker = multiprocessing.get_context("spawn").Process(target=sum, args=([1, 2],))
worker.start()
worker.join(60)
assert worker.exitcode == 0
point.result(60)
""",
        str(tmp_path / "points"),
        "4KiB",
    )


@pytest.mark.parametrize("end", ["sys.exit(0)", "raise SystemExit(0)", "del ck"])
def test_what_is_under_way_at_exit_is_finished(run_child: RunChild, tmp_path: Path, end: str) -> None:
    folder = tmp_path / "points"
    run_child(PRELUDE + "a[0], foreign[0] = 3, 4\nck.save(1)\n" + end, str(folder), "4KiB")
    assert restored(folder, 1) == (3, 4)


def test_an_exit_that_finishes_nothing_leaves_the_points_before(run_child: RunChild, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    run_child(
        PRELUDE
        + """
ck.save(1).result(60)
a[:] = 9
point = ck.save(2)
assert not point.done()
os._exit(0)
""",
        str(folder),
        "4KiB",
    )
    with userfault.restore(folder) as state:
        assert state.step == 1
    with userfault.Checkpointer(folder, {"b": bytearray(b"x")}) as ck:
        assert ck.steps() == [1]
    assert len(list(folder.glob("segment-*"))) == 1
