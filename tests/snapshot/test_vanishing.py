"""Memory that goes away under a save: the point fails, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import RunChild

PRELUDE = """
import ctypes, mmap, sys, time
import numpy as np
import userfault
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
folder, drain = sys.argv[1], sys.argv[2]
SIZE = 4 << 20

def anonymous(address=None, flags=0x22):
    got = libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), 3, flags, -1, ctypes.c_long(0))
    assert got != ctypes.c_void_p(-1).value
    return got

address = anonymous()
going = np.frombuffer(memoryview((ctypes.c_uint8 * SIZE).from_address(address)).cast("B"), np.uint8)
staying = userfault.zeros(1 << 20, np.uint8, track=True, pages="4KiB")
going[:] = 1
staying[:] = 1
ck = userfault.Checkpointer(folder, {"going": going, "staying": staying}, drain=drain, timeout=30)
ck.save(1).result(60)
going[:] = 2
staying[:] = 2
"""

WAYS = {
    "unmapped": "libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))",
    "partly unmapped": "libc.munmap(ctypes.c_void_p(address + (1 << 20)), ctypes.c_size_t(1 << 20))",
    "mapped anew": "assert anonymous(address, 0x32) == address",
    "moved": "libc.mremap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), ctypes.c_size_t(2 * SIZE), 1)",
}

AFTER = """
if drain == "auto":
    time.sleep(0.5)
error = ck.save(2).exception(60)
assert error is not None and "going" in str(error) or "unmapped" in str(error), repr(error)
print(error)
# It is told again, once; then everything goes on as far as it can.
try:
    ck.save(3)
except Exception as again:
    assert "unmapped" in str(again) or "going" in str(again), again
assert ck.steps() == [1]
with userfault.restore(folder, lazy=False) as state:
    assert (state["going"] == 1).all() and (state["staying"] == 1).all()
staying[:] = 3
try:
    ck.close()
except Exception as again:
    assert "unmapped" in str(again) or "going" in str(again), again
with userfault.Checkpointer(folder, {"staying": staying}, drain=drain) as rest:
    rest.save(9).result(60)
with userfault.restore(folder, lazy=False) as state:
    assert (state["staying"] == 3).all()
sys.stdout.flush()
"""


@pytest.mark.parametrize("drain", ["auto", "off"])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_tracked_memory_that_is_taken_away_fails_the_point_and_nothing_else(
    run_child: RunChild, tmp_path: Path, way: str, drain: str
) -> None:
    done = run_child(PRELUDE + WAYS[way] + AFTER, str(tmp_path / "points"), drain)
    assert "unmapped" in done.stdout or "mapped anew" in done.stdout


def test_memory_that_the_program_gave_back_reads_as_the_zeros_that_it_is(
    run_child: RunChild, tmp_path: Path
) -> None:
    run_child(
        PRELUDE
        + """
ck.save(2).result(60)
libc.madvise(ctypes.c_void_p(address + (1 << 20)), ctypes.c_size_t(1 << 20), 4)   # MADV_DONTNEED
ck.save(3).result(60)
ck.close()
with userfault.restore(folder, 3, lazy=False) as state:
    assert (state["going"][1 << 20 : 2 << 20] == 0).all()
    assert (state["going"][: 1 << 20] == 2).all()
""",
        str(tmp_path / "points"),
        "off",
    )


def test_an_array_that_is_followed_cannot_be_resized_or_freed(run_child: RunChild, tmp_path: Path) -> None:
    run_child(
        """
import gc, sys
import numpy as np
import userfault
array, text = np.zeros(2 << 20, np.uint8), bytearray(2 << 20)
with userfault.Checkpointer(sys.argv[1], {"array": array, "text": text}) as ck:
    for resize in (lambda: array.resize(5), lambda: text.extend(b"more"), text.clear):
        try:
            resize()
        except (ValueError, BufferError):
            continue
        raise AssertionError("it moved")
    text[0] = array[0] = 5
    # The names go; the memory stays for as long as it is followed.
    array = text = None
    gc.collect()
    ck.save(1).result(60)
with userfault.restore(sys.argv[1]) as state:
    assert state["array"][0] == state["text"][0] == 5
text = bytearray(8)
with userfault.Checkpointer(sys.argv[1], {"text": text}):
    pass
text.extend(b"it is free again after close()")
""",
        str(tmp_path / "points"),
    )
