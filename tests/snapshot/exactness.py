"""A program whose memory has laws, writing at full speed while points are taken of it.

    python exactness.py FOLDER COMPRESS DRAIN POINTS [--huge]

Arrays of every kind are one bank. Each page of an array holds the number of the transaction that touched it
last and that number's seal, counters and their mirror image, and an amount of money; a transaction touches
pages of several arrays, and the money in all of them together never changes. Two threads make transactions
all the time. Each point is compared with a digest of what was there at its cut, and then by the laws alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import userfault

PAGE = 4096
SEAL = np.uint64(0x9E37_79B9_7F4A_7C15)
Words = NDArray[np.uint64]


def torch_like(nbytes: int) -> Any:
    """Something that looks as a torch tensor on the CPU does, with memory of its own."""
    memory = np.zeros(nbytes, np.uint8)
    members = {
        "device": SimpleNamespace(type="cpu"),
        "dtype": "torch.bfloat16",
        "shape": (nbytes // 2,),
        "is_contiguous": lambda self: True,
        "numel": lambda self: nbytes // 2,
        "element_size": lambda self: 2,
        "data_ptr": lambda self: memory.ctypes.data,
        "untyped_storage": lambda self: memory,
        "__module__": "torch",
    }
    return type("Tensor", (), members)(), memory


def on_huge_pages(nbytes: int) -> NDArray[np.uint8]:
    """A foreign array that lies on transparent huge pages, as NumPy's large ones do."""
    mapping = mmap.mmap(-1, nbytes + (2 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % (2 << 20)
    return whole[start + 96 : start + 96 + nbytes - 4096]


def bank(folder: Path, huge: bool) -> tuple[dict[str, Any], dict[str, Words]]:
    """Arrays by name, and their whole pages as words."""
    mib = 1 << 20
    own = userfault.Arena(2 * mib, track=True, pages="4KiB")
    tensor, storage = torch_like(mib + 6000)
    with (folder / "mapped").open("wb") as file:
        file.truncate(256 << 10)
    arrays: dict[str, Any] = {
        "own": userfault.zeros(2 * mib + 100, np.uint8, track=True, pages="4KiB"),
        "empty": userfault.empty((500, 1024), np.float32, track=True, pages="4KiB"),
        "arena 1": own.zeros(300_000, np.uint8),
        "arena 2": own.zeros(mib + 50_000, np.uint8),
        "numpy, small": np.zeros(64 << 10, np.uint8),
        "numpy, large": np.zeros(2 * mib + 777, np.uint8),
        "numpy, huge": on_huge_pages(4 * mib),
        "bytearray": bytearray(mib + 9000),
        "tensor": tensor,
        "tied": tensor,
        "file": np.memmap(folder / "mapped", np.uint8, "r+"),
    }
    if huge:
        arrays["own, huge"] = userfault.zeros(4 * mib, np.uint8, track=True, pages="2MiB")
        many = userfault.Arena(4 * mib, track=True, pages="2MiB")
        arrays["huge arena 1"] = many.zeros(900_000, np.uint8)
        arrays["huge arena 2"] = many.zeros(2_500_000, np.uint8)
    raw = {
        name: storage
        if array is tensor
        else np.frombuffer(array, np.uint8).reshape(-1)
        if isinstance(array, bytearray)
        else array.reshape(-1).view(np.uint8)
        for name, array in arrays.items()
    }
    return arrays, {name: pages_of(each) for name, each in raw.items() if name != "tied"}


def pages_of(raw: NDArray[np.uint8]) -> Words:
    """The whole pages of an array, counted from its own start. Unaligned words are fine here."""
    count = raw.nbytes // PAGE
    return raw[: count * PAGE].view(np.uint64).reshape(count, PAGE // 8)


class Writer:
    """Makes transactions, each under the lock."""

    version = 1

    def __init__(self, words: dict[str, Words], seed: int) -> None:
        self.words = list(words.values())
        self.random = np.random.default_rng(seed)

    def transaction(self) -> None:
        """Touches some pages of three arrays, and moves money between them."""
        random = self.random
        chosen = random.choice(len(self.words), 3, replace=False)
        Writer.version += 1
        version = np.uint64(Writer.version)
        moved = np.uint64(random.integers(1, 1000))
        for place, number in enumerate(chosen):
            words = self.words[number]
            many = len(words) if random.random() < 0.02 else random.integers(1, 6)
            pages = np.unique(random.integers(0, len(words), many))
            with np.errstate(over="ignore"):
                words[pages, 0] = version
                words[pages, 1] = version * SEAL + pages.astype(np.uint64)
                counter = 2 + int(random.integers(0, 250))
                words[pages, counter] += np.uint64(1)
                words[pages, 254 + counter] -= np.uint64(1)
                if place == 0:
                    words[pages[0], 510] += moved
                elif place == 1:
                    words[pages[0], 510] -= moved
                if random.random() < 0.05:
                    # A page of zeros, but for its money.
                    kept = words[pages[-1], 510]
                    words[pages[-1], :510] = 0
                    words[pages[-1], 1] = pages[-1].astype(np.uint64)
                    words[pages[-1], 510] = kept


def broken_laws(words: dict[str, Words]) -> list[str]:
    """What is wrong with a bank."""
    broken = []
    money = np.uint64(0)
    with np.errstate(over="ignore"):
        for name, each in words.items():
            numbers = np.arange(len(each), dtype=np.uint64)
            if not np.array_equal(each[:, 1], each[:, 0] * SEAL + numbers):
                broken.append(f"{name}: a page whose seal is not that of its transaction")
            if np.any(each[:, 2:252] + each[:, 256:506]):
                broken.append(f"{name}: counters and their mirror differ")
            money += each[:, 510].sum(dtype=np.uint64)
    if money != 0:
        broken.append(f"the money in all of them is {money}")
    return broken


def digests(raws: dict[str, NDArray[np.uint8]]) -> dict[str, bytes]:
    return {name: hashlib.blake2b(raw, digest_size=16).digest() for name, raw in raws.items()}


def main() -> None:
    folder, compress, drain, points = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    huge = "--huge" in sys.argv
    arrays, words = bank(folder, huge)
    with np.errstate(over="ignore"):
        for each in words.values():
            each[:, 1] = np.arange(len(each), dtype=np.uint64)
    raws = {name: whole(arrays[name], words[name]) for name in words}
    lock, stop, failed = threading.Lock(), threading.Event(), []
    copies: dict[int, dict[str, bytes]] = {}
    transactions = 0

    def write(seed: int) -> None:
        nonlocal transactions
        writer = Writer(words, seed)
        try:
            while not stop.is_set():
                with lock:
                    writer.transaction()
                    transactions += 1
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=write, args=(seed,), daemon=True) for seed in (1, 2)]
    with userfault.Checkpointer(
        folder / "points",
        arrays,
        always_copy=["file"],
        compress=None if compress == "none" else compress,
        drain=drain,
        durable=False,
        staging="16MiB",
    ) as ck:
        for thread in threads:
            thread.start()
        for step in range(points):
            with lock:
                point = ck.save(step)
                copies[step] = digests(raws)
            if step % 7 == 3:
                time.sleep(0.25)
            elif step % 3 == 0:
                point.result(60)
        methods = point.method
        stop.set()
        for thread in threads:
            thread.join()
        ck.wait()
        assert ck.steps() == list(range(points)), ck.steps()
    assert not failed
    for step in range(points):
        with userfault.restore(folder / "points", step, lazy=step % 2 == 0, mode="r") as state:
            got = {name: bytes_of(state[name]) for name in words}
            differs = [name for name, digest in digests(got).items() if digest != copies[step][name]]
            assert not differs, f"step {step}: {differs} are not what they were at the cut"
            broken = broken_laws({name: pages_of(each) for name, each in got.items()})
            assert not broken, f"step {step}: {broken}"
            assert np.array_equal(state["tied"], state["tensor"])
            got.clear()
    print(transactions, methods)


def whole(array: Any, words: Words) -> NDArray[np.uint8]:
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    if isinstance(array, bytearray):
        return np.frombuffer(array, np.uint8)
    nbytes = array.numel() * array.element_size()
    memory = (ctypes.c_uint8 * nbytes).from_address(array.data_ptr())
    return np.frombuffer(memory, np.uint8)


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.reshape(-1).view(np.uint8)


if __name__ == "__main__":
    main()
