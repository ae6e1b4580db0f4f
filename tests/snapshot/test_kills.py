"""kill -9 at any moment: the last finished point is whole, and the next run carries on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import RunChild

# Forks the program again and again from a parent that has imported everything, and kills it. In step s the
# pages (37 s + 0 ... 37 s + 36) mod PAGES are set to s, so that what a point holds can be said of any step.
PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import userfault
from userfault import _native, restoring, checkpointer, verifying, arrays

folder, options, kills, seed = Path(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
PAGES, TOUCHED = 512, 37
chance = random.Random(seed)

def expected(step):
    pages = np.zeros(PAGES, np.uint64)
    first = max(0, step - 2 * PAGES // TOUCHED)
    for each in range(first, step + 1):
        pages[(each * TOUCHED + np.arange(TOUCHED)) % PAGES] = each + 1
    return pages

def run(ready):
    a = userfault.zeros((PAGES, 512), np.uint64, track=True, pages=options.pop("pages"))
    step = -1
    if (folder / "MANIFEST").exists():
        with userfault.restore(folder, into={"a": a}) as state:
            step = state.step
    with userfault.Checkpointer(folder, {"a": a}, max_to_keep=2, **options) as ck:
        os.write(ready, b"x")
        while True:
            step += 1
            pages = (step * TOUCHED + np.arange(TOUCHED)) % PAGES
            # Bytes that do not compress to nothing, and the number that counts.
            a[pages] = np.random.default_rng(step).integers(0, 1 << 63, (TOUCHED, 512), dtype=np.uint64)
            a[pages, 0] = step + 1
            point = ck.save(step)
            if step % 3 == 0:
                point.result(60)
            if step % 5 == 0:
                time.sleep(0.01)

last, reached = -1, set()
for turn in range(kills):
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(writable)
        finally:
            os._exit(1)
    os.close(writable)
    assert os.read(readable, 1) == b"x", "the next run does not carry on"
    os.close(readable)
    time.sleep(chance.random() ** 2 * 0.4)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if not (folder / "MANIFEST").exists():
        continue
    listed = [step for step, _, _ in _native.list_points(folder)]
    if not listed:
        continue
    assert listed[-1] >= last, (listed, last)
    last = listed[-1]
    reached.add(last)
    for step in listed:
        point = _native.OpenPoint(folder, step)
        got = np.empty((PAGES, 512), np.uint64)
        point.store(0).read_into(got.view(np.uint8), 0, 1)
        assert np.array_equal(got[:, 0], expected(step)), (turn, step)
    damage = userfault.verifying.verify(folder).damage
    assert not damage, (turn, damage)
    assert len(listed) < 8
files = sorted(path.name for path in folder.iterdir())
print(len(reached), last, len(files))
assert len(reached) > kills // 4, "hardly a run came to a point"
"""


@pytest.mark.time_limit(300)
@pytest.mark.parametrize(
    "options",
    [
        "dict(pages='4KiB')",
        "dict(pages='4KiB', drain='off', compress='zstd')",
        "dict(pages='2MiB', durable=False)",
    ],
    ids=["drain", "compressed", "huge pages"],
)
def test_a_kill_at_any_moment_leaves_the_last_point_whole_and_the_next_run_carries_on(
    run_child: RunChild, tmp_path: Path, options: str
) -> None:
    run_child(PROGRAM, str(tmp_path / "points"), options, "30", "1", timeout=280)


@pytest.mark.soak
def test_so_does_every_one_of_very_many(run_child: RunChild, tmp_path: Path, soak_seconds: float) -> None:
    kills = str(max(200, int(soak_seconds)))
    run_child(PROGRAM, str(tmp_path / "points"), "dict(pages='4KiB')", kills, "2", timeout=soak_seconds + 100)
