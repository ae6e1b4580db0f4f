"""A byte that is not what was saved: verify names it, and nobody is ever given it."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import userfault
from conftest import RunChild
from userfault.errors import CorruptError
from userfault.saved_array import Shape
from userfault.verifying import verify


def saved(folder: Path, compress: Any) -> dict[int, dict[str, Any]]:
    """Three points of three arrays; what each holds."""
    rng = np.random.default_rng(3)
    weights = userfault.zeros(300_000, np.uint8, track=True, pages="4KiB")
    moments = np.zeros(100_000, np.uint32)
    small = bytearray(500)
    copies = {}
    with userfault.Checkpointer(
        folder,
        {"weights": weights, "moments": moments, "small": small},
        compress=compress,
        max_to_keep=2,
        drain="off",
    ) as ck:
        for step in range(4):
            weights[rng.integers(0, weights.size, 40)] = rng.integers(0, 255, 40)
            moments[: 1000 * step] = np.arange(1000 * step)
            small[step] = step
            ck.save(step, meta={"step": step}).result(60)
            copies[step] = {"weights": weights.copy(), "moments": moments.copy(), "small": bytes(small)}
    return {step: copies[step] for step in (2, 3)}


@pytest.mark.parametrize("compress", [None, "lz4", "zstd"])
def test_any_changed_byte_is_named_and_never_handed_out(tmp_path: Path, compress: Any) -> None:
    folder = tmp_path / "points"
    copies = saved(folder, compress)
    chance = random.Random(7)
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    assert not verify(folder).damage
    named = 0
    for path in files:
        original = path.read_bytes()
        used = [at for at in range(len(original)) if original[at]]
        places = [chance.choice(used) for _ in range(40)] + [
            chance.randrange(len(original)) for _ in range(10)
        ]
        for at in places:
            spoilt = bytearray(original)
            spoilt[at] ^= 1 << chance.randrange(8)
            path.write_bytes(spoilt)
            found = verify(folder)
            assert found.damage or found.unused, f"{path.name}: byte {at} is not noticed"
            for damage in found.damage:
                assert damage.path
                if damage.offset is not None:
                    named += 1
                    assert damage.array in copies[3]
                    assert damage.step in copies
            for step, expected in copies.items():
                check_nothing_wrong_is_read(folder, step, expected)
        path.write_bytes(original)
    assert named > 50
    assert not verify(folder).damage


def check_nothing_wrong_is_read(folder: Path, step: int, expected: dict[str, Any]) -> None:
    try:
        with userfault.restore(folder, step, lazy=False) as state:
            assert state.meta == {"step": step}
            for name, array in expected.items():
                assert bytes(state[name].data) == bytes(memoryview(array)), (step, name)
    except (CorruptError, userfault.StoreError, OSError):
        pass
    try:
        state = userfault.restore(folder, step, mode="r")
    except (CorruptError, OSError):
        return
    # pread says as an exception what a touch would say as a signal.
    for name, region in zip(state, state._regions.values(), strict=True):
        want = bytes(memoryview(expected[name]))
        lead = len(region) - len(want)
        for start in range(0, len(want), 65_536):
            part = want[start : start + 65_536]
            try:
                got = region.pread(len(part), lead + start)
            except userfault.PoisonedError:
                continue
            assert got == part, (step, name, start)
    state.close()


def test_a_touch_of_a_damaged_block_is_sigbus_and_says_which(run_child: RunChild, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    saved(folder, None)
    largest = max(folder.glob("segment-*"), key=lambda path: path.stat().st_size)
    spoilt = bytearray(largest.read_bytes())
    for at in range(4096, len(spoilt), 4096):
        spoilt[at] ^= 1
    largest.write_bytes(spoilt)
    damaged = [damage for damage in verify(folder, 3).damage if damage.offset is not None]
    if not damaged:
        # Everything in it is index: then opening says so.
        with pytest.raises(CorruptError):
            userfault.restore(folder, 3)
        return
    done = run_child(
        """
import sys, userfault
state = userfault.restore(sys.argv[1], 3)
print(state[sys.argv[2]].reshape(-1).view("u1")[int(sys.argv[3])])
""",
        str(folder),
        str(damaged[0].array),
        str(damaged[0].offset),
        check=False,
    )
    assert done.status == -signal.SIGBUS
    assert done.stdout == ""
    assert "damaged" in done.stderr
    assert str(damaged[0].array) in done.stderr


def test_a_missing_segment_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    saved(folder, None)
    for path in folder.glob("segment-*"):
        aside = path.with_suffix(".away")
        shutil.move(path, aside)
        with pytest.raises((OSError, CorruptError)):
            userfault.restore(folder, 3, lazy=False)
        assert verify(folder).damage
        shutil.move(aside, path)


def test_a_cut_off_segment_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    copies = saved(folder, "zstd")
    for path in folder.glob("segment-*"):
        original = path.read_bytes()
        for length in (0, 100, 4096, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:length])
            # What was cut off may be a hole that a prune had made: then nothing is lost.
            assert verify(folder).damage or length > 4096, (path.name, length)
            for step, expected in copies.items():
                check_nothing_wrong_is_read(folder, step, expected)
        path.write_bytes(original)


def test_a_segment_that_ends_in_the_middle_of_a_page_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    saved(folder, None)
    for path in folder.glob("segment-*"):
        original = path.read_bytes()
        # Behind all that a point needs, so that nothing else is wrong.
        path.write_bytes(original + bytes(100))
        (damage,) = verify(folder).damage
        assert damage.path == path
        assert "no multiple of a page" in damage.detail
        path.write_bytes(original)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["<f8", "|O", "u1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(
    JSON
    | st.fixed_dictionaries(
        {"kind": st.sampled_from(["ndarray", "buffer", "tensor"]) | JSON, "dtype": JSON, "shape": JSON}
    ),
    st.integers(0, 1 << 46),
)
def test_no_description_of_an_array_is_trusted(description: Any, nbytes: int) -> None:
    description = json.loads(json.dumps(description))
    try:
        shape = Shape.of("a", description, nbytes)
    except CorruptError:
        return
    assert not shape.dtype.hasobject
    # An array without elements is stored as one byte.
    assert (int(np.prod(shape.shape, dtype=object)) * shape.dtype.itemsize or 1) == nbytes
