"""What every test may use: child processes that cannot hang the run, huge pages, memory control groups.

A thread that waits for a page is deaf to Python, and if it holds the interpreter lock so is the whole
process. So every test has a time limit that is kept by a thread of C code, and whatever may wait for a page
nobody brings runs in a child process that is killed at its own limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from child_process import TIME_SCALE, Finished, run
from userfault.testing.hugetlb_pool import PoolUnavailable, reclaim, reserved
from userfault.testing.memory_cgroup import CgroupUnavailable, MemoryCgroup

SECONDS = 120
"""The limit of a test that names none with @pytest.mark.time_limit(seconds)."""

_stderr = -1


def pytest_configure(config: pytest.Config) -> None:
    global _stderr
    config.addinivalue_line("markers", "time_limit(seconds): ends the run if this test takes longer")
    config.addinivalue_line("markers", "soak: runs for USERFAULT_SOAK_MINUTES, and only by `make soak`")
    # Now the descriptor is the real one; while a test runs it is pytest's capture.
    _stderr = os.dup(2)
    reclaim()


def pytest_unconfigure() -> None:
    reclaim()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    mark = item.get_closest_marker("time_limit")
    seconds = (mark.args[0] if mark else SECONDS) * TIME_SCALE
    if item.get_closest_marker("soak"):
        seconds = max(seconds, 60 * soak_minutes() + SECONDS)
    faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def soak_minutes() -> float:
    """How long a soak goes on, in minutes."""
    return float(os.environ.get("USERFAULT_SOAK_MINUTES", "0"))


@pytest.fixture(scope="session")
def soak_seconds() -> float:
    """How long each soak test should go on, in seconds."""
    return 60 * soak_minutes()


class RunChild(Protocol):
    def __call__(
        self,
        program: str | Path,
        *arguments: str,
        timeout: float = 60,
        check: bool = True,
        env: dict[str, str] | None = None,
        prefix: list[str] | None = None,
    ) -> Finished: ...


@pytest.fixture
def run_child(tmp_path: Path) -> RunChild:
    """Runs Python code (a string) or a script (a path) in a process group that is killed at the end.

    The child that takes longer than `timeout` seconds shows where it stands, is killed, and the test fails;
    with check=True a failed child fails the test too. `prefix` goes before the command line, for instance
    ``memory_cgroup(...).joining([])``.
    """

    def call(
        program: str | Path,
        *arguments: str,
        timeout: float = 60,
        check: bool = True,
        env: dict[str, str] | None = None,
        prefix: list[str] | None = None,
    ) -> Finished:
        return run(program, arguments, folder=tmp_path, timeout=timeout, check=check, env=env, prefix=prefix)

    return call


@pytest.fixture
def hugepages() -> Iterator[Callable[[int], None]]:
    """hugepages(n) adds n pages of 2 MiB to the machine's pool until the test ends, or skips the test."""
    with contextlib.ExitStack() as stack:

        def reserve(pages: int) -> None:
            try:
                stack.enter_context(reserved(pages))
            except PoolUnavailable as error:
                pytest.skip(f"needs {pages} huge pages: {error.strerror}")

        yield reserve


@pytest.fixture
def memory_cgroup() -> Iterator[Callable[[int], MemoryCgroup]]:
    """memory_cgroup(limit) makes a control group of that many bytes until the test ends, or skips it."""
    with contextlib.ExitStack() as stack:

        def make(limit: int) -> MemoryCgroup:
            try:
                return stack.enter_context(MemoryCgroup(limit))
            except CgroupUnavailable as error:
                pytest.skip(f"needs a memory control group: {error.strerror}")

        yield make


@pytest.fixture
def longest_file() -> Iterator[int]:
    """No file of this process may become longer than so many bytes, as on a small file system."""
    longest = 1 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest, hard))
    yield longest
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
