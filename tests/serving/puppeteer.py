"""The test's end of a guest: orders, answers, and the certainty that it does not outlive the test."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from userfault import Store, abi
from userfault.serving import LayoutItem, Served, receive, serve
from userfault.userfaultfd import Userfaultfd

EVENTS = (
    abi.UFFD_FEATURE_EVENT_FORK
    | abi.UFFD_FEATURE_EVENT_REMAP
    | abi.UFFD_FEATURE_EVENT_REMOVE
    | abi.UFFD_FEATURE_EVENT_UNMAP
    | abi.UFFD_FEATURE_THREAD_ID
    | abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
)
MEMORY = {
    "anon": 0,
    "shmem": abi.UFFD_FEATURE_MISSING_SHMEM
    | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | abi.UFFD_FEATURE_MINOR_SHMEM,
    "hugetlb": abi.UFFD_FEATURE_MISSING_HUGETLBFS | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
}
HUGE = 2 << 20
LIMIT = 20.0
"""Seconds that an answer may take on a loaded machine."""


def page_of(kind: str) -> int:
    return HUGE if kind == "hugetlb" else mmap.PAGESIZE


def contents(length: int) -> bytes:
    """Bytes that belong to their place, none of whose words is zero; churn.c computes the same."""
    index = np.arange(length // 8, dtype=np.uint64)
    return ((index * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)).tobytes()


class Guest:
    """A guest process, its userfaultfd and its layout as it handed them over."""

    uffd: Userfaultfd
    layout: list[LayoutItem]

    def __init__(
        self,
        kind: str = "anon",
        pages: int = 64,
        *,
        mode: int = abi.UFFDIO_REGISTER_MODE_MISSING,
        features: int = EVENTS,
    ) -> None:
        self.kind, self.page = kind, page_of(kind)
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(LIMIT)
        script = Path(__file__).parent / "guest.py"
        words = [theirs.fileno(), kind, pages, features | MEMORY[kind], mode, self.page]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        self.waiting: dict[int, Future[Any]] = {}
        threading.Thread(target=self._listen, daemon=True).start()
        self.take()

    def take(self) -> None:
        """Receives the userfaultfd and the layout."""
        self.uffd, self.layout, _ = receive(self.connection)

    def serve(self, store: Store, **options: Any) -> Served:
        """Serves it from this process, which keeps no other copy of the descriptor."""
        served = serve(self.uffd, self.layout, store, pid=self.process.pid, **options)
        self.uffd.close()
        return served

    def order(self, do: str, **arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        number = len(self.waiting)
        self.waiting[number] = answer
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"id": number, "do": do, "with": arguments}) + "\n")
        self.process.stdin.flush()
        return answer

    def do(self, do: str, **arguments: Any) -> Any:
        return self.order(do, **arguments).result(LIMIT)

    def read(self, at: int, length: int = 8) -> bytes:
        return bytes.fromhex(self.do("read", at=at, length=length))

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            answer = json.loads(line)
            future = self.waiting[answer["id"]]
            if "errno" in answer:
                future.set_exception(OSError(answer["errno"], os.strerror(answer["errno"])))
            else:
                future.set_result(answer.get("result"))

    def kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.connection.close()
