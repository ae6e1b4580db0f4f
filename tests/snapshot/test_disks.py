"""Disks that are full, and disks that do not answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import RunChild

PRELUDE = """
import errno, os, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
import userfault

class Counting(threading.Thread):
    "A program that goes on: it writes all the time, and says how long it ever stood still."
    def __init__(self, array):
        super().__init__(daemon=True)
        self.array, self.longest, self.stop, self.rounds = array, 0.0, False, 0
    def run(self):
        last = time.monotonic()
        while not self.stop:
            self.array[self.rounds % len(self.array)] += 1
            self.rounds += 1
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
            time.sleep(0)

def content(folder, step, name="a"):
    with userfault.restore(folder, step, lazy=False) as state:
        return state[name].copy()
"""

FULL = """
mount, pages, drain = sys.argv[1], sys.argv[2], sys.argv[3]
folder = Path(mount, "points")
ballast = Path(mount, "ballast")
a = userfault.zeros(8 << 20, np.uint8, track=True, pages=pages)
other = userfault.zeros(1 << 16, np.uint64, track=True, pages="4KiB")
a[:] = np.random.default_rng(1).integers(0, 255, a.size, np.uint8)
ck = userfault.Checkpointer(folder, {"a": a, "other": other}, drain=drain, timeout=30)
ck.save(1).result(60)
first = a.copy()
ballast.write_bytes(bytes(9 << 20))
writer = Counting(other)
writer.start()
a[:] = np.random.default_rng(2).integers(0, 255, a.size, np.uint8)
second = a.copy()
if drain == "auto":
    time.sleep(0.6)      # the drain meets the full disk before the cut does
point = ck.save(2)
error = point.exception(60)
assert isinstance(error, OSError) and error.errno == errno.ENOSPC, error
a[:5] = 7
second[:5] = 7
try:
    ck.save(3)
except OSError as again:
    assert again.errno == errno.ENOSPC
else:
    raise AssertionError("the failure is told again by save()")
names = sorted(path.name for path in folder.iterdir())
if drain == "auto":
    # The drain may have begun anew with what still fits.
    names = [name for name in names if name < "segment-0000000003"]
assert names == ["LOCK", "MANIFEST", "segment-0000000001"], names
assert ck.steps() == [1] and ck.latest_step() == 1
assert np.array_equal(content(folder, 1), first)
before = writer.rounds
time.sleep(0.2)
assert writer.rounds > before
ballast.unlink()
ck.save(4).result(60)
writer.stop = True
writer.join()
ck.close()
assert ck.steps() == [1, 4]
assert len(list(folder.iterdir())) == 4
assert np.array_equal(content(folder, 4), second)
assert not userfault.verifying.verify(folder).damage
# It stood still for cuts alone, however slow this machine is.
assert writer.longest < 20, writer.longest
"""


@pytest.mark.parametrize("drain", ["auto", "off"])
@pytest.mark.parametrize("pages", ["4KiB", "2MiB"])
def test_a_full_disk_fails_the_point_and_leaves_the_directory_clean(
    run_child: RunChild, tmp_path: Path, pages: str, drain: str
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    inside = """
import ctypes
libc = ctypes.CDLL(None)
if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):
    sys.exit(77)
if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=20m"):
    sys.exit(77)
import userfault.verifying
"""
    done = run_child(PRELUDE + inside + FULL, str(mount), pages, drain, check=False)
    if done.status == 77:
        pytest.skip("needs the right to mount a tmpfs")
    assert done.status == 0, done.stderr


HUNG = """
mount, pages, drain = sys.argv[1], sys.argv[2], sys.argv[3]
folder = Path(mount, "points")
a = userfault.zeros(8 << 20, np.uint8, track=True, pages=pages)
other = userfault.zeros(1 << 16, np.uint64, track=True, pages="4KiB")
ck = userfault.Checkpointer(folder, {"a": a, "other": other}, drain=drain, timeout=1.0, staging="4MiB")
ck.save(1).result(60)
a[:] = 1
second = a.copy()
subprocess.run(["fsfreeze", "-f", mount], check=True)
try:
    writer = Counting(other)
    writer.start()
    begin = time.monotonic()
    point = ck.save(2)          # returns: at the latest when the point is given up
    a[:] = 2                    # as does every writer of guarded memory
    error = point.exception(60)
    took = time.monotonic() - begin
    assert isinstance(error, (TimeoutError, OSError)) and "nothing was written" in str(error), repr(error)
    assert 1.0 <= took < 30, took
    rounds = writer.rounds
    time.sleep(0.2)
    assert writer.rounds > rounds
    assert ck.latest_step() == 1
finally:
    subprocess.run(["fsfreeze", "-u", mount], check=True)
try:
    ck.save(3)
except Exception as again:
    assert "nothing was written" in str(again)
else:
    raise AssertionError("the failure is told again by save()")
deadline = time.monotonic() + 60
while True:
    try:
        ck.save().result(60)
        break
    except Exception:
        # The thread that hung may still be on its way out.
        assert time.monotonic() < deadline
        time.sleep(0.1)
writer.stop = True
writer.join()
step = ck.latest_step()
ck.close()
assert (content(folder, step) == 2).all()
assert (content(folder, 1) == 0).all()
"""


@pytest.mark.parametrize("drain", ["auto", "off"])
@pytest.mark.parametrize("pages", ["4KiB", "2MiB"])
def test_a_disk_that_does_not_answer_fails_the_point_after_its_timeout(
    run_child: RunChild, tmp_path: Path, pages: str, drain: str
) -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("fsfreeze", "mkfs.ext4", "losetup"))):
        pytest.skip("needs the right to mount a loop device, and fsfreeze")
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, mount], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no loop device can be mounted: {mounted.stderr.decode().strip()}")
    try:
        run_child(PRELUDE + HUNG, str(mount), pages, drain, timeout=100)
    finally:
        subprocess.run(["fsfreeze", "-u", mount], check=False, capture_output=True)
        subprocess.run(["umount", mount], check=True)
