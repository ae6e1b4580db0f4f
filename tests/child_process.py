"""Runs a Python program in a process group of its own that cannot outlive its time limit."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

TIME_SCALE = float(os.environ.get("USERFAULT_TIME_SCALE", "1"))
"""By how much every time limit is longer: `make kernels` sets it, since an emulated machine is slow."""


@dataclass(frozen=True)
class Finished:
    """How a child ended: its status (negative: the signal that ended it), its output, seconds it took."""

    status: int
    stdout: str
    stderr: str
    seconds: float


def run(
    program: str | Path,
    arguments: Sequence[str],
    *,
    folder: Path,
    timeout: float,
    check: bool,
    env: dict[str, str] | None,
    prefix: list[str] | None,
) -> Finished:
    """Runs code (a string) or a script (a path) and kills its whole group at the end, whatever happened."""
    timeout *= TIME_SCALE
    code = [str(program)] if isinstance(program, Path) else ["-c", program]
    command = [*(prefix or []), sys.executable, "-X", "faulthandler", *code, *arguments]
    with TemporaryDirectory(dir=folder) as scratch:
        out, err = Path(scratch) / "stdout", Path(scratch) / "stderr"
        begin = time.monotonic()
        # Files, not pipes: a grandchild that holds a pipe open would make us wait for it.
        with out.open("wb") as stdout, err.open("wb") as stderr:
            # A group, not a session: whoever kills the session of the whole run finds these too.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **(env or {})},
                process_group=0,
            )
        ended = False
        try:
            ended = _ended(child.pid, timeout)
            if not ended:
                # faulthandler prints where every thread stands, also one that waits for a page.
                os.kill(child.pid, signal.SIGABRT)
                _ended(child.pid, 5)
        finally:
            # Before the child is reaped: until then nobody else can get its number.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        result = Finished(
            status, out.read_text(errors="replace"), err.read_text(errors="replace"), time.monotonic() - begin
        )
    if not ended:
        raise AssertionError(f"the child had not ended after {timeout} s\n{result.stdout}\n{result.stderr}")
    if check and status != 0:
        raise AssertionError(f"the child ended with status {status}\n{result.stdout}\n{result.stderr}")
    return result


def _ended(pid: int, timeout: float) -> bool:
    """True when the process has ended (it is not reaped), False when `timeout` seconds went by."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(handle)
