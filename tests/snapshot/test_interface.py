"""What a program that saves and restores can rely on, by its names."""

from __future__ import annotations

import asyncio
import inspect
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import userfault
from conftest import RunChild
from snapshot.exactness import torch_like
from userfault import working_set

SIGNATURES: dict[str, tuple[Callable[..., Any], str]] = {
    "Checkpointer": (
        userfault.Checkpointer.__new__,
        "(cls, directory, arrays, *, always_copy=(), max_to_keep=None, compress=None, durable=True, "
        "max_rate=None, staging='256MiB', drain='auto', timeout=60.0)",
    ),
    "save": (userfault.Checkpointer.save, "(self, step=None, *, meta=None, pause=None, progress=None)"),
    "restore": (
        userfault.restore,
        "(directory, step=None, *, names=None, lazy=True, mode='c', into=None, progress=None)",
    ),
    "steps": (userfault.Checkpointer.steps, "(self)"),
    "latest_step": (userfault.Checkpointer.latest_step, "(self)"),
    "result": (userfault.Point.result, "(self, timeout=None)"),
    "exception": (userfault.Point.exception, "(self, timeout=None)"),
    "add_done_callback": (userfault.Point.add_done_callback, "(self, callback)"),
    "done": (userfault.Point.done, "(self)"),
    "verify": (userfault.Checkpointer.verify, "(self)"),
    "close": (userfault.Checkpointer.close, "(self)"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_promised_one(name: str) -> None:
    function, promised = SIGNATURES[name]
    signature = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == promised


def test_the_other_names_are_there() -> None:
    for name in ("step", "stall", "method", "extra_bytes"):
        assert isinstance(inspect.getattr_static(userfault.Point, name), property)
    for name in ("wait", "prune", "__enter__", "__exit__"):
        assert callable(getattr(userfault.Checkpointer, name))
    for function in (userfault.zeros, userfault.empty, userfault.Arena):
        assert "track" in inspect.signature(function).parameters


def test_a_point_can_be_awaited_and_calls_back(tmp_path: Path) -> None:
    array = np.zeros(2 << 20, np.uint8)
    heard: list[Any] = []
    told: list[tuple[int, int]] = []

    async def serve() -> int:
        with userfault.Checkpointer(tmp_path, {"a": array}) as ck:
            point = ck.save(5, meta=[1, {"b": None}], progress=lambda done, total: told.append((done, total)))
            point.add_done_callback(heard.append)
            assert await point == 5
            # A point that is finished can be awaited too, also several times at once.
            assert await asyncio.gather(point_result(point), point_result(point)) == [5, 5]
            assert point.done()
            assert point.result() == 5
            assert point.exception() is None
            assert 0 < point.stall < 60
            assert point.extra_bytes <= 256 << 20
            deadline = time.monotonic() + 30
            while not heard and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            return point.step

    async def point_result(point: userfault.Point) -> int:
        return await point

    assert asyncio.run(serve()) == 5
    assert [point.step for point in heard] == [5]
    assert told
    assert told[-1][0] == told[-1][1] > 0


def test_other_writers_are_held_by_pause(tmp_path: Path) -> None:
    """Without it their writes get into the point as with fork(): some of them. With it, all or nothing."""
    array = np.zeros((4, 300_000), np.int64)
    lock, stop = threading.Lock(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            with lock:
                array[0] += 1
                array[3] -= 1

    thread = threading.Thread(target=write, daemon=True)
    with userfault.Checkpointer(tmp_path, {"a": array}, durable=False) as ck:
        thread.start()
        for _ in range(20):
            ck.save(pause=lambda: lock)
        stop.set()
        thread.join()
        ck.wait()
        for step in ck.steps():
            with userfault.restore(tmp_path, step, lazy=False) as state:
                first, last = state["a"][0], state["a"][3]
                assert (first == first[0]).all(), step
                assert (first + last == 0).all(), step


def test_pause_is_left_again_when_the_cut_fails(tmp_path: Path) -> None:
    lock = threading.Lock()
    with userfault.Checkpointer(tmp_path, {"a": bytearray(10)}) as ck:
        ck.save(5).result(60)
        with pytest.raises(ValueError, match="does not come after"):
            ck.save(5, pause=lambda: lock)
    assert lock.acquire(blocking=False)


def test_what_cannot_be_tracked_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "points"
    with (tmp_path / "file").open("wb") as file:
        file.truncate(4 << 20)
    mapped = np.memmap(tmp_path / "file", np.uint8, "r+")
    shared = np.frombuffer(mmap.mmap(-1, 4 << 20), np.uint8)
    for array, reason in ((mapped, "mapping of .*file"), (shared, "private anonymous")):
        with pytest.raises(ValueError, match=f"array .a. cannot be tracked.*{reason}.*always_copy"):
            userfault.Checkpointer(folder, {"a": array})
        with userfault.Checkpointer(folder, {"a": array}, always_copy=["a"]) as ck:
            array[1000] = 7
            assert ck.save().method == {"a": "copied"}
        with userfault.restore(folder) as state:
            assert state["a"][1000] == 7
    fixed = np.zeros(10)
    fixed.flags.writeable = False
    for name, bad, error, reason in (
        ("objects", np.array([None]), ValueError, "Python objects"),
        ("strided", np.zeros((4, 4))[:, ::2], ValueError, "C-contiguous"),
        ("read-only", fixed, ValueError, "read-only"),
        ("bytes", b"abc", ValueError, "read-only"),
        ("masked", np.ma.array([1, 2]), ValueError, "masked"),
        (
            "overlapping",
            np.zeros(4, np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]})),
            ValueError,
            "array 'overlapping' is of a type that cannot be written down",
        ),
        ("a list", [1, 2], TypeError, "no buffer"),
    ):
        with pytest.raises(error, match=reason):
            userfault.Checkpointer(folder, {name: bad})
    for attribute, value, reason in (
        ("device", SimpleNamespace(type="cuda"), "only memory of the CPU"),
        ("layout", "torch.sparse_coo", "layout torch.sparse_coo"),
        ("is_conj", lambda self: True, "is the conjugate of what its memory holds"),
        ("is_neg", lambda self: True, "is the negative of what its memory holds"),
        ("is_contiguous", lambda self: False, "not contiguous"),
    ):
        tensor, _ = torch_like(1 << 20)
        setattr(type(tensor), attribute, value)
        with pytest.raises(ValueError, match=reason):
            userfault.Checkpointer(folder, {"tensor": tensor})


def test_memory_that_another_userfaultfd_watches_is_refused_with_the_reason(
    run_child: RunChild, tmp_path: Path
) -> None:
    run_child(
        """
import ctypes, sys
import numpy as np
import userfault
from userfault import abi
array = np.zeros(4 << 20, np.uint8)
start = -(-array.ctypes.data // 4096) * 4096
with userfault.Userfaultfd() as watching:
    watching.register(start, 1 << 20, abi.UFFDIO_REGISTER_MODE_WP).check()
    try:
        userfault.Checkpointer(sys.argv[1], {"a": array})
    except ValueError as error:
        assert "another userfaultfd" in str(error) and "always_copy" in str(error), error
    else:
        raise AssertionError("it was taken")
    with userfault.Checkpointer(sys.argv[1], {"a": array}, always_copy=["a"]) as ck:
        ck.save().result(60)
""",
        str(tmp_path / "points"),
    )


def test_arrays_without_elements_are_given_back_as_they_are(tmp_path: Path) -> None:
    tensor, _ = torch_like(0)
    arrays: dict[str, Any] = {
        "rows": np.zeros((0, 3), np.float32),
        "text": bytearray(),
        "tensor": tensor,
        "some": np.arange(4),
    }
    with userfault.Checkpointer(tmp_path, arrays) as ck:
        ck.save(1).result(60)
        assert ck.verify() == []
    for lazy in (True, False):
        with userfault.restore(tmp_path, lazy=lazy) as state:
            assert state["rows"].shape == (0, 3)
            assert state["rows"].dtype == np.float32
            assert state["text"].nbytes == state["tensor"].nbytes == 0
            assert state["some"].tolist() == [0, 1, 2, 3]
    with userfault.restore(tmp_path, into=arrays) as state:
        assert state["rows"] is arrays["rows"]
    with pytest.raises(ValueError, match="has 8 bytes, the saved array 0"):
        userfault.restore(tmp_path, into={"rows": np.zeros(1)})


@pytest.mark.parametrize(("kind", "size", "as_what"), [("complex32", 4, "u4"), ("float8_e5m2", 1, "u1")])
def test_tensors_of_types_that_numpy_does_not_have_come_as_their_bytes(
    tmp_path: Path, kind: str, size: int, as_what: str
) -> None:
    tensor, storage = torch_like(4000)
    storage[:] = np.arange(4000) % 251
    for name, value in (("dtype", f"torch.{kind}"), ("shape", (4000 // size,))):
        setattr(type(tensor), name, value)
    type(tensor).numel = lambda self: 4000 // size
    type(tensor).element_size = lambda self: size
    with userfault.Checkpointer(tmp_path, {"a": tensor}) as ck:
        ck.save().result(60)
    with userfault.restore(tmp_path) as state:
        assert state["a"].dtype == as_what
        assert state["a"].shape == (4000 // size,)
        assert state["a"].tobytes() == storage.tobytes()


def test_the_directory_stays_the_same_wherever_the_program_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.arange(1 << 18)
    with userfault.Checkpointer("points", {"a": array}) as ck:
        ck.save(1).result(60)
        state = userfault.restore("points")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        ck.save(2).result(60)
        assert ck.verify() == []
        assert state["a"][12345] == 12345
        state.close()
    assert list(Path().iterdir()) == []


def test_arrays_come_go_and_change_their_shape_between_runs(tmp_path: Path) -> None:
    runs: list[dict[str, Any]] = [
        {"a": np.arange(300_000), "b": np.ones(10)},
        {"a": np.arange(300_000).reshape(3, -1) + 1, "c": np.ones(11)},
        {"a": np.arange(200_000, dtype=">f4"), "b": np.zeros(10), "c": np.ones(11)},
    ]
    for step, arrays in enumerate(runs):
        with userfault.Checkpointer(tmp_path, arrays) as ck:
            assert ck.latest_step() == (step - 1 if step else None)
            ck.save().result(60)
    assert ck.steps() == [0, 1, 2]
    for step, arrays in enumerate(runs):
        with userfault.restore(tmp_path, step) as state:
            assert list(state) == list(arrays)
            for name, array in arrays.items():
                assert (state[name].dtype, state[name].shape) == (array.dtype, array.shape)
                assert np.array_equal(state[name], array)


def test_arrays_that_overlap_are_each_what_they_were(tmp_path: Path) -> None:
    array = np.zeros(4 << 20, np.uint8)
    arrays = {"all": array, "half": array[: 2 << 20], "middle": array[1 << 20 : 3 << 20]}
    with userfault.Checkpointer(tmp_path, arrays) as ck:
        for step in range(4):
            array[:] = step
            array[step * 4096 * 300] = 99
            point = ck.save(step)
            expected = {name: each.copy() for name, each in arrays.items()}
            array[:] = 200
            point.result(60)
            with userfault.restore(tmp_path, lazy=False) as state:
                for name, each in expected.items():
                    assert np.array_equal(state[name], each), (step, name)


def test_ragged_edges_small_arrays_and_ties_are_taken(tmp_path: Path) -> None:
    # Of small pages: what lies on huge ones may be copied instead of tracked.
    memory = mmap.mmap(-1, (2 << 20) + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    tensor, storage = torch_like(1 << 20)
    arrays = {
        "odd": whole[13 : 13 + (2 << 20) + 1001],
        "small": np.arange(3, dtype=np.complex128),
        "record": np.zeros(4, [("x", "<i4"), ("y", "<f8", (2,))]),
        "date": np.zeros(3, "datetime64[s]"),
        "text": bytearray(b"some text"),
        "scalar": np.array(5.0),
        "weights": tensor,
        "tied": tensor,
    }
    with userfault.Checkpointer(tmp_path, arrays, drain="off", durable=False) as ck:
        for step in range(4):
            for at in (0, 1, 4082, 4083, 4084, (2 << 20) + 1000):
                arrays["odd"][at] = step * 10 + at % 10
            arrays["small"][step % 3] = step
            arrays["record"]["x"][step] = step
            storage[7] = step
            copies = {name: np.array(arrays[name]) for name in ("odd", "small", "record", "date", "scalar")}
            point = ck.save(step)
            point.result(60)
            with userfault.restore(tmp_path, lazy=bool(step % 2)) as state:
                for name, copy in copies.items():
                    assert state[name].dtype == copy.dtype
                    assert state[name].shape == copy.shape
                    assert np.array_equal(state[name], copy), (step, name)
                assert bytes(state["text"]) == b"some text"
                assert state["weights"].view(np.uint8)[7] == step
                assert state["tied"].ctypes.data == state["weights"].ctypes.data, "saved once, restored once"
        assert point.method["odd"].startswith("tracked")
        assert point.method["small"] == "copied"
        assert point.method["weights"].startswith(("tracked", "copied"))


def test_a_restore_takes_some_arrays_or_fills_those_that_are_there(tmp_path: Path) -> None:
    a, b = np.arange(400_000.0), bytearray(b"x" * 5000)
    with userfault.Checkpointer(tmp_path, {"a": a, "b": b}) as ck:
        ck.save(1, meta="first").result(60)
        a += 1
        ck.save(2, meta="second").result(60)
    with userfault.restore(tmp_path, 1, names=["b"]) as state:
        assert list(state) == ["b"]
        assert state.meta == "first"
        assert state.step == 1
    told: list[tuple[int, int]] = []
    into = {"a": np.empty_like(a), "b": bytearray(5000)}
    with userfault.restore(tmp_path, into=into, progress=lambda *numbers: told.append(numbers)) as state:
        assert state["a"] is into["a"]
        assert state["b"] is into["b"]
    assert np.array_equal(into["a"], a)
    assert into["b"] == b
    assert told[-1] == (a.nbytes + 5000, a.nbytes + 5000)
    with userfault.restore(tmp_path, mode="r") as state, pytest.raises(ValueError, match="read-only"):
        state["a"][0] = 1
    with userfault.restore(tmp_path, mode="c") as state:
        state["a"][0] = -1
    with userfault.restore(tmp_path) as state:
        assert state["a"][0] == a[0]
    for wrong, error in (
        ({"names": ["c"]}, KeyError),
        ({"step": 7}, FileNotFoundError),
        ({"mode": "w"}, ValueError),
        ({"into": {"a": bytearray(3)}}, ValueError),
        ({"into": {"b": bytes(5000)}}, ValueError),
        ({"names": "a"}, TypeError),
    ):
        with pytest.raises(error):
            userfault.restore(tmp_path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        userfault.restore(tmp_path / "nowhere")


def test_an_incremental_point_stores_what_differs_and_needs_no_long_chain(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, 4 << 20, np.uint8)
    with userfault.Checkpointer(tmp_path, {"a": array}, drain="off", durable=False) as ck:
        ck.save().result(60)
        full = size(tmp_path)
        for page in range(100):
            array[page * 4096] ^= 1
            array[2 << 20 :] = array[2 << 20 :].copy()  # the same bytes: they cost nothing
            ck.save().result(60)
        assert size(tmp_path) < full + 100 * 10 * 4096
        ck.prune(1)
        assert ck.steps() == [100]
        assert size(tmp_path) < full * 1.2
        assert len(list(tmp_path.glob("segment-*"))) <= 64
    with userfault.restore(tmp_path) as state:
        assert np.array_equal(state["a"], array)


def size(folder: Path) -> int:
    """Bytes on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_pruning_takes_nothing_that_somebody_reads(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, 4 << 20, np.uint8)
    first = array.copy()
    with userfault.Checkpointer(tmp_path, {"a": array}, durable=False) as ck:
        ck.save(1).result(60)
        state = userfault.restore(tmp_path, 1, mode="r")
        state._stop.set()
        array[:] = 0
        ck.save(2).result(60)
        ck.prune(1)
        assert np.array_equal(state["a"], first)
        state.close()
        ck.prune(1)
        assert len(list(tmp_path.glob("segment-*"))) == 1


@pytest.mark.parametrize("pages", ["4KiB", "2MiB"])
def test_extra_memory_stays_within_staging_whatever_is_written(tmp_path: Path, pages: Any) -> None:
    array = userfault.zeros(24 << 20, np.uint8, track=True, pages=pages)
    with userfault.Checkpointer(tmp_path, {"a": array}, staging="6MiB", drain="off", durable=False) as ck:
        for step in range(3):
            array[:] = step + 1
            point = ck.save(step)
            array[:] = 99
            point.result(60)
            assert point.extra_bytes <= 6 << 20
    with userfault.restore(tmp_path, lazy=False) as state:
        assert (state["a"] == 3).all()


EXTRA = """
import sys, threading, time
import numpy as np
import userfault

MIB = 1 << 20
pages, drain = sys.argv[2:]

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

if pages == "foreign":
    array = np.zeros(96 * MIB, np.uint8)
else:
    array = userfault.zeros(96 * MIB, np.uint8, track=True, pages=pages)
array[:] = 1
before, most, stop = memory(), 0, False


def look():
    global most
    while not stop:
        most = max(most, memory())
        time.sleep(0.0005)

watching = threading.Thread(target=look)
watching.start()
ck = userfault.Checkpointer(sys.argv[1], {"a": array}, staging="8MiB", drain=drain, durable=False)
for step in range(3):
    array[:] = step + 2
    points = [ck.save()]
    array[:] = 99
    points.append(ck.save())
    array[:] = 100
    for point in points:
        point.result(60)
        assert point.extra_bytes <= 8 * MIB
stop = True
watching.join()
# Beside staging: buffers of the threads that store, what malloc keeps of them, and the index.
assert most - before < (8 + 24) * MIB, (most - before) / MIB
ck.close()
assert memory() - before < 24 * MIB, "a closed Checkpointer keeps nothing"

ck = userfault.Checkpointer(sys.argv[1], {"a": array}, staging="64MiB", drain=drain, durable=False)
array[: 64 * MIB] += 1
ck.save().result(60)
ck.close()
assert memory() - before < 24 * MIB, "however much staging there was"
"""


@pytest.mark.parametrize("drain", ["auto", "off"])
@pytest.mark.parametrize("pages", ["4KiB", "2MiB", "foreign"])
def test_the_process_takes_no_more_memory_than_that(
    run_child: RunChild, tmp_path: Path, pages: str, drain: str
) -> None:
    run_child(EXTRA, str(tmp_path / "points"), pages, drain, timeout=100)


def test_what_a_first_pass_touched_is_fetched_first_the_next_time(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, 64 << 20, np.uint8)
    with userfault.Checkpointer(tmp_path, {"a": array}, durable=False, max_to_keep=1) as ck:
        ck.save(1).result(60)
        state = userfault.restore(tmp_path, 1, mode="r")
        state._stop.set()  # the background stands still, as on a slow disk
        state._filler.join()
        before = state._looked_at[0]
        hot = [array.size - 5, array.size // 2]
        assert all(state["a"][at] == array[at] for at in hot)
        # A thread goes on a moment before the table says that its block is there.
        deadline = time.monotonic() + 30
        while sum(state._regions[0].resident()) < before // (2 << 20) + len(hot):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        state.close()
        kept = working_set.read(tmp_path, 1, state.time)
        assert kept is not None
        ranges = kept[0]
        lead = array.ctypes.data % 4096
        assert all(any(o <= lead + at < o + n for o, n in ranges) for at in hot if at >= before)
        assert sum(length for _, length in ranges) < array.size + (2 << 20)

        with userfault.restore(tmp_path, 1, mode="r") as again:
            assert again._known == kept
            assert not again._touched[0], "it is noted once"
            again.fill(wait=True)
            assert np.array_equal(again["a"], array)

        # It is advice: what is wrong with it changes nothing.
        path = working_set.path_of(tmp_path, 1)
        for wrong in (b"", b"{}", b"[]\ncrc32 00000000", path.read_bytes()[:-3]):
            path.write_bytes(wrong)
            assert working_set.read(tmp_path, 1, state.time) is None
            with userfault.restore(tmp_path, 1) as again:
                assert again["a"][5] == array[5]
        working_set.write(tmp_path, 1, state.time, {0: [(1 << 60, 5), (-3, 9)], 7: [(0, 4096)]})
        with userfault.restore(tmp_path, 1) as again:
            assert again["a"][5] == array[5]
            again.fill(wait=True)

        ck.save(2).result(60)
        ck.wait()
        assert not path.exists(), "it goes with its point"


def test_a_callers_mistake_is_told_at_once(tmp_path: Path) -> None:
    for wrong, match in (
        ({"arrays": {}}, "nothing to save"),
        ({"always_copy": ["b"]}, "always_copy names"),
        ({"max_to_keep": 0}, "max_to_keep"),
        ({"compress": "gzip"}, "compress"),
        ({"drain": "on"}, "drain"),
        ({"timeout": 0}, "timeout"),
        ({"max_rate": 0}, "max_rate"),
        ({"staging": "much"}, "staging"),
        ({"arrays": {"\ud800": bytearray(5)}}, "half a surrogate pair"),
    ):
        options: dict[str, Any] = {"arrays": {"a": bytearray(5)}, **wrong}
        with pytest.raises(ValueError, match=match):
            userfault.Checkpointer(tmp_path, options.pop("arrays"), **options)
    for confused, why in (
        ({"arrays": [bytearray(5)]}, "arrays is a list"),
        ({"arrays": {5: bytearray(5)}}, "the name 5 of an array"),
        ({"always_copy": "a"}, "always_copy is 'a'"),
    ):
        options = {"arrays": {"a": bytearray(5)}, **confused}
        with pytest.raises(TypeError, match=why):
            userfault.Checkpointer(tmp_path, options.pop("arrays"), **options)
    ck = userfault.Checkpointer(tmp_path, {"a": bytearray(5)})
    with pytest.raises(TypeError, match="JSON"):
        ck.save(meta={1, 2})
    for step in (-1, 1 << 63, 1 << 70):
        with pytest.raises(ValueError, match=f"step is {step}"):
            ck.save(step)
    with pytest.raises(TypeError):
        ck.save(1.5)  # type: ignore[arg-type]
    ck.close()
    ck.close()
    with pytest.raises(ValueError, match="closed"):
        ck.save()
    assert ck.steps() == []
