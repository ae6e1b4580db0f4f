"""Stores as Python sees them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from conftest import RunChild
from userfault import FileStore, InUseError, MemoryStore, StoreError, ZeroStore


def test_a_file_store_reads_and_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(100)))
    store = FileStore(path, "r+")
    store.write(10, b"hello")
    store.sync()
    assert store.read(8, 9) == b"\x08\x09hello\x0f\x10"
    assert path.read_bytes()[10:15] == b"hello"
    assert len(store) == 100
    assert store.writable
    assert store.name == str(path)
    assert os.fspath(store.path) == str(path)
    assert "data.bin" in repr(store)


def test_bytes_past_the_end_are_zeros_and_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    store = FileStore(str(path), "r+")
    assert store.read(1, 5) == b"bc\0\0\0"
    with pytest.raises(StoreError) as caught:
        store.write(2, b"xy")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert (caught.value.what, caught.value.offset, caught.value.length) == ("write", 2, 2)
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("mode", "existing", "outcome"),
    [
        ("r", None, FileNotFoundError),
        ("r+", None, FileNotFoundError),
        ("a", None, bytes(8)),
        ("w", None, bytes(8)),
        ("w-", None, bytes(8)),
        ("x", None, bytes(8)),
        ("r", b"abc", b"abc"),
        ("r+", b"abc", b"abc" + bytes(5)),
        ("a", b"abc", b"abc" + bytes(5)),
        ("w", b"abc", bytes(8)),
        ("w-", b"abc", FileExistsError),
        ("x", b"abc", FileExistsError),
        ("rw", b"abc", ValueError),
    ],
)
def test_modes(tmp_path: Path, mode: str, existing: bytes | None, outcome: bytes | type[Exception]) -> None:
    path = tmp_path / "data.bin"
    if existing is not None:
        path.write_bytes(existing)
    if isinstance(outcome, bytes):
        FileStore(path, mode, length=8)
        assert path.read_bytes() == outcome
    else:
        with pytest.raises(outcome) as caught:
            FileStore(path, mode, length=8)
        if isinstance(caught.value, OSError):
            assert caught.value.filename == str(path)
        assert (path.read_bytes() if path.exists() else None) == existing


def test_a_second_writer_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    first = FileStore(path, "r+")
    with pytest.raises(InUseError, match="locking=False") as caught:
        FileStore(path, "w")
    assert isinstance(caught.value, BlockingIOError)
    assert caught.value.errno == errno.EAGAIN
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"abc"
    FileStore(path, "r+", locking=False)
    del first
    FileStore(path, "r+")


def test_a_reader_may_join_a_writer_unless_it_locks(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    writer = FileStore(path, "r+")
    assert FileStore(path).read(0, 3) == b"abc"
    with pytest.raises(InUseError):
        FileStore(path, locking=True)
    del writer
    reader = FileStore(path, locking=True)
    other = FileStore(path, locking=True)
    with pytest.raises(InUseError):
        FileStore(path, "r+")
    del reader, other


def test_writers_in_other_processes_are_refused_and_named(tmp_path: Path, run_child: RunChild) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    writer = FileStore(path, "r+")
    code = "import sys, userfault; userfault.FileStore(sys.argv[1], 'r+')"
    done = run_child(code, str(path), check=False)
    assert f"userfault.errors.InUseError: [Errno 11] {path} is in use in process {os.getpid()}" in done.stderr
    del writer
    run_child(code, str(path))


def test_a_forked_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    writer = FileStore(path, "r+")
    wait, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(wait, 1)
        os._exit(0)
    try:
        del writer
        FileStore(path, "r+")
    finally:
        os.close(wait)
        os.close(end)
        os.waitpid(child, 0)


def test_a_forked_child_that_drops_its_copy_leaves_the_parent_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"abc")
    writer = FileStore(path, "r+")
    child = os.fork()
    if child == 0:
        del writer
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InUseError):
        FileStore(path, "r+")
    del writer


@pytest.mark.parametrize(("path", "error"), [("/", IsADirectoryError), ("/dev/null", ValueError)])
def test_what_is_no_file_is_refused(path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        FileStore(path)


def test_a_file_truncated_underneath_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(10_000))
    store = FileStore(path, "r+")
    os.truncate(path, 5_000)
    with pytest.raises(
        StoreError, match="truncated while it was open: it had 10000 bytes and now has 5000"
    ) as caught:
        store.read(0, 10_000)
    assert caught.value.errno == errno.EIO
    with pytest.raises(StoreError, match="truncated"):
        store.write(0, b"x")
    assert path.stat().st_size == 5_000


def test_a_memory_store_holds_what_it_was_given() -> None:
    store = MemoryStore(np.arange(3, dtype=np.uint8))
    store.write(1, bytearray(b"x"))
    assert store.getvalue() == b"\0x\x02"
    assert MemoryStore(5).getvalue() == bytes(5)
    with pytest.raises((TypeError, BufferError)):
        MemoryStore(1.5)  # type: ignore[arg-type]
    with pytest.raises((OverflowError, TypeError)):
        MemoryStore(-1)
    with pytest.raises(MemoryError):
        MemoryStore(1 << 62)


def test_a_zero_store_is_zeros_and_read_only() -> None:
    store = ZeroStore(1 << 50)
    assert len(store) == 1 << 50
    assert store.read(1 << 49, 10) == bytes(10)
    assert not store.writable
    with pytest.raises(StoreError) as caught:
        store.write(0, b"x")
    assert caught.value.errno == errno.EROFS


def test_a_punch_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"x" * (1 << 20))
    store = FileStore(path, "r+")
    store.sync()
    os.sync()
    before = path.stat().st_blocks
    store.punch(0, 1 << 19)
    assert path.stat().st_blocks < before
    assert store.read((1 << 19) - 1, 2) == b"\0x"
