"""The errors are the standard ones and the package's own at once."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from userfault.errors import CorruptError, Error, InUseError, PoisonedError, StoreError


def test_a_store_error_is_an_os_error_with_errno_and_file_name() -> None:
    error = StoreError(errno.EIO, "read of 4096 bytes at 0 failed", "data.bin")
    assert isinstance(error, OSError)
    assert isinstance(error, Error)
    assert (error.errno, error.filename) == (errno.EIO, "data.bin")
    assert "data.bin" in str(error)


def test_a_file_in_use_is_a_blocking_io_error() -> None:
    assert issubclass(InUseError, BlockingIOError)
    assert issubclass(InUseError, Error)


def test_a_corrupt_file_is_a_value_error() -> None:
    assert issubclass(CorruptError, ValueError)


@pytest.mark.parametrize("kind", [StoreError, PoisonedError])
def test_errors_keep_what_they_know_when_they_travel(kind: type[StoreError | PoisonedError]) -> None:
    error = kind(errno.ENOSPC, "no room", "data.bin")
    error.offset, error.length = 4096, 8192
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert (other.offset, other.length) == (4096, 8192)
