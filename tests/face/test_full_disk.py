"""A disk that is really full: a small file system of the child's own, in a mount namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import RunChild

MOUNTS_OF_ITS_OWN = """
import ctypes, errno, os, subprocess, sys, threading, time
import numpy as np
import userfault

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
    sys.exit(77)
MIB = 1 << 20
"""
"""The beginning of a program that may mount, unseen by others. Status 77: it may not."""

PROGRAM = """
kind, block, mount, image = sys.argv[1:]
if kind == "tmpfs":
    if libc.mount(b"tmpfs", mount.encode(), b"tmpfs", 0, b"size=12m"):
        sys.exit(77)
elif subprocess.run(["mount", "-o", "loop", image, mount]).returncode:
    sys.exit(77)

path, ballast = mount + "/file", mount + "/ballast"
with open(ballast, "wb") as file:
    room = os.statvfs(mount)
    file.write(os.urandom(room.f_bavail * room.f_frsize - 4 * MIB))
limit = "8MiB" if block == "2MiB" else "4MiB"
region = userfault.open(path, "w", length=9 * MIB + 77, block=block, memory_limit=limit)
array = region.ndarray(np.uint8)
expected = np.zeros(len(array), np.uint8)
# As much as memory holds can be written, and more than the disk has room for.
for start in range(0, 3 * MIB, 4096):
    array[start : start + 4096] = expected[start : start + 4096] = 1 + start // 4096 % 250
region.flush()
for start in range(3 * MIB, 6 * MIB, 4096):
    array[start : start + 4096] = expected[start : start + 4096] = 1 + start // 4096 % 250


def refused(call):
    try:
        call()
    except userfault.StoreError as error:
        assert error.errno == errno.ENOSPC, error
        assert error.filename == path, error
        return True
    return False


failed = refused(region.flush)
again = refused(region.flush)
assert failed or again, "the disk was not full"
refused(region.evict)
# Nothing is lost, and what was stored can be read, in the memory that is left.
assert np.array_equal(array, expected)
assert region.pread(100, 7 * MIB) == bytes(100)
del array
assert refused(region.close) or refused(region.close), "closed, and the data are nowhere"
assert not region.closed
# Room comes, and everything gets there.
os.remove(ballast)
for _ in range(3):
    if not refused(region.close):
        break
assert region.closed
assert np.array_equal(np.fromfile(path, np.uint8), expected)
print("all there")
"""


@pytest.mark.parametrize(
    ("kind", "block"), [("tmpfs", "4KiB"), ("tmpfs", "64KiB"), ("tmpfs", "2MiB"), ("ext4", "64KiB")]
)
def test_a_full_disk_loses_nothing_and_says_so_until_there_is_room(
    kind: str, block: str, run_child: RunChild, tmp_path: Path
) -> None:
    # Blocks of 64 KiB and more leave straight for a file in tmpfs (`store_mapping`), and find it full so.
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount a file system")
    mount, image = tmp_path / "mount", tmp_path / "image"
    mount.mkdir()
    if kind == "ext4":
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("needs mkfs.ext4")
        with image.open("wb") as file:
            file.truncate(16 << 20)
        made = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)]
        subprocess.run(made, check=True, stdin=subprocess.DEVNULL)
    program = MOUNTS_OF_ITS_OWN + PROGRAM
    done = run_child(program, kind, block, str(mount), str(image), check=False, timeout=100)
    if done.status == 77:
        pytest.skip(f"needs the right to mount {kind}: {done.stderr.strip()}")
    assert done.stdout == "all there\n", done.stderr


SCRATCH = """
way, mount, folder = sys.argv[1:]
if libc.mount(b"tmpfs", mount.encode(), b"tmpfs", 0, b"size=8m"):
    sys.exit(77)
ballast = mount + "/ballast"
with open(ballast, "wb") as file:
    file.write(bytes(7 * MIB))
region = None
if way == "zeros":
    array = userfault.zeros(6 * MIB, np.uint8, memory_limit="2MiB", scratch=mount)
else:
    np.zeros(6 * MIB, np.uint8).tofile(folder + "/below")
    region = userfault.open(
        folder + "/below", "c", block="64KiB", memory_limit="2MiB", scratch=mount, fault=way
    )
    array = region.ndarray(np.uint8)


def value(at):
    return 1 + at // 4096 % 250


# One MiB finds room on the disk and two in memory: here the next touch waits, until there is room.
def write():
    for at in range(0, 6 * MIB, 4096):
        array[at : at + 4096] = value(at)


writing = threading.Thread(target=write, daemon=True)
writing.start()
writing.join(4)
assert writing.is_alive(), "the disk was not full"
if region is not None:
    try:
        region.evict()
        raise SystemExit("evicted, although the disk is full")
    except userfault.StoreError as error:
        assert error.errno == errno.ENOSPC, error
        assert mount in str(error), error
os.remove(ballast)
writing.join(60)
assert not writing.is_alive(), "there is room, and nobody goes on"
assert all((array[at : at + 4096] == value(at)).all() for at in range(0, 6 * MIB, 4096))
print("all there")
"""


@pytest.mark.parametrize("way", ["zeros", "threads", "inline"])
def test_a_full_scratch_disk_is_told_at_once_and_what_was_written_is_all_there_when_there_is_room(
    way: str, run_child: RunChild, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount a file system")
    mount = tmp_path / "mount"
    mount.mkdir()
    done = run_child(MOUNTS_OF_ITS_OWN + SCRATCH, way, str(mount), str(tmp_path), check=False, timeout=100)
    if done.status == 77:
        pytest.skip(f"needs the right to mount tmpfs: {done.stderr.strip()}")
    assert done.stdout == "all there\n", done.stderr
    told = done.stderr.splitlines()
    assert len(told) == 1, done.stderr
    assert "touches wait for memory" in told[0]
    assert f"the scratch file in {mount}: No space left on device" in told[0]
