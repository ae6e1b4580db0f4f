"""The memory of another process, served from a store."""

from __future__ import annotations

import json
import mmap
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

from userfault import _native
from userfault.sizes import Size, parse_size
from userfault.userfaultfd import Userfaultfd

__all__ = ["LayoutItem", "Owed", "Served", "ServedError", "Written", "receive", "send", "serve"]

_SLICE = 0.1
"""Seconds of a wait between two looks at signals."""


class LayoutItem(NamedTuple):
    """Where bytes of the store lie in the memory of a process."""

    address: int
    """Address of the first byte in that process, a multiple of the page size."""
    length: int
    """Length in bytes, a multiple of the page size."""
    offset: int
    """Where they begin in the store, in bytes."""
    page_size: int = mmap.PAGESIZE
    """Bytes of a page of that memory: 2 MiB on hugetlb, else the kernel's small page."""
    shared: bool | None = None
    """True if the mapping is MAP_SHARED, so that a forked child has the same memory. None: /proc/PID/maps is
    asked if `pid` is given, otherwise it counts as private."""


class Owed(NamedTuple):
    """Bytes that the store still owes to a process, where they lie now."""

    process: int
    """A number of this page server's own; the process that was handed over has the least."""
    item: LayoutItem
    """What a server that takes over needs to know of them."""


class Written(NamedTuple):
    """Pages of a process that were written."""

    process: int
    """As in `Owed`."""
    address: int
    """Address in that process."""
    length: int
    """Length in bytes."""
    offset: int
    """Where the store has these bytes' place, in bytes."""


@dataclass(frozen=True)
class ServedError:
    """Bytes that could not be had and were given up; touching them is SIGBUS until they are healed."""

    offset: int
    """Where they begin in the store, in bytes."""
    length: int
    """Length in bytes."""
    errno: int
    """The store's error number."""
    message: str
    """What happened."""
    time: float
    """When they were given up, in seconds since 1970 as time.time() counts them."""


class Served(_native.Served):
    """Memory of other processes that this one serves; made by `userfault.serve`.

    Serving goes on until the processes have ended, or `close` is called; it does not end because nobody
    holds this object. It is a context manager that closes itself. A forked child of the server serves
    nobody.
    """

    @property
    def processes(self) -> dict[int, int | None]:
        """The living processes, by the numbers of `Owed` and `Written`; the pid of the one that was given."""
        return dict(self._processes())

    @property
    def owed(self) -> list[Owed]:
        """What the store still owes, process by process. What a process threw away is not owed any more."""
        return [
            Owed(process, LayoutItem(address, length, offset, page))
            for process, address, length, offset, page in self._owed()
        ]

    @property
    def errors(self) -> list[ServedError]:
        """What was given up and not healed, in the order of the store."""
        return sorted((ServedError(*error) for error in self._errors()), key=lambda error: error.offset)

    def take_written(self) -> list[Written]:
        """What may have been written since the last call, or since the beginning; needs ``track=True``.

        The pages are protected again before this returns: a later write is in the next answer. Read the
        bytes after it (process_vm_readv(2), /proc/PID/mem). Pages that were thrown away, or that somebody
        else filled, count as written; bytes that the store delivered do not.
        """
        return [Written(*written) for written in self._take_written()]

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until no process is left, at most `timeout` seconds; True if none is.

        Raises RuntimeError in a forked child of the server.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _SLICE if until is None else min(_SLICE, max(0.0, until - time.monotonic()))
            if self._wait(left):
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<userfault.Served {self.name!r}, {len(self.processes)} processes, {self.owed_bytes} bytes owed>"
        )


def serve(
    uffd: Userfaultfd | int,
    layout: Iterable[tuple[int, ...] | LayoutItem | Mapping[str, Any]],
    store: _native.Store,
    *,
    block: Size | Literal["auto"] = "auto",
    on_error: Literal["auto", "retry", "poison"] = "auto",
    retry_for: float = 30.0,
    pid: int | None = None,
    track: bool = False,
    name: str | None = None,
) -> Served:
    """Serves the memory of another process: its pages come from `store` when they are touched.

    That process made a userfaultfd, registered its memory, and handed over a copy of the descriptor (`send`
    and `receive`, or any other SCM_RIGHTS message). **It must keep a copy**: when the last one is closed,
    by the death of this process for instance, the kernel hands it zeros. With a copy its touches wait, and
    another server can take over.

    - `uffd`: the descriptor; this call makes a copy of its own. It becomes non-blocking for all who hold
      it. Ask for the events UFFD_FEATURE_EVENT_FORK, REMAP, REMOVE and UNMAP in its handshake, or what the
      process does to its memory goes unnoticed.
    - `layout`: where the bytes of the store lie there: `LayoutItem`, or plain tuples of address, length,
      offset in the store and, if need be, page size, all in bytes; or dictionaries with the keys that
      Firecracker sends. Nothing may be named twice. Memory that is registered and not named is zeros.
    - `block`: bytes that a touch brings in, a power of two from the page size to 64 MiB. "auto" is 64 KiB,
      or what the store prefers; never less than a page.
    - `on_error`, `retry_for` (seconds): as for `userfault.open`. What is given up is SIGBUS for whoever
      touches it, an entry in `Served.errors`, and `Served.heal` tries again.
    - `pid`: the process, if it is known: its end is noticed at once, not within a second, and which of its
      memory is shared need not be said.
    - `track`: notes what is written (`Served.take_written`). The memory must be registered for
      write-protection too, and the userfaultfd must not have UFFD_FEATURE_WP_ASYNC.
    - `name`: what messages call it.

    What the process throws away (madvise) is zeros from then on; what it unmaps is not filled; what it
    moves (mremap) follows; a forked child is served too, with what was owed at the fork. Several calls
    serve several processes, on the same threads.

    The memory belongs to that process: this one's memory limit does not cover it, and nothing of it is
    evicted.

    Raises ValueError for a layout or options that make no sense, OSError if the descriptor is no
    userfaultfd or this machine does not allow userfaultfd.
    """
    fd = uffd if isinstance(uffd, int) else uffd.fileno()
    items = [_item(item) for item in layout]
    return Served(
        fd,
        [(item.address, item.length, item.offset, item.page_size, item.shared) for item in items],
        store,
        name=name if name is not None else f"process {pid}" if pid is not None else "a served process",
        block=None if block == "auto" else parse_size(block, "block"),
        on_error=on_error,
        retry_for=retry_for,
        pid=pid,
        track=track,
    )


def _item(item: tuple[int, ...] | LayoutItem | Mapping[str, Any]) -> LayoutItem:
    if isinstance(item, Mapping):
        # Firecracker's older key says KiB and means bytes.
        page = item.get("page_size", item.get("page_size_kib", mmap.PAGESIZE))
        return LayoutItem(item["base_host_virt_addr"], item["size"], item["offset"], page, item.get("shared"))
    if not 3 <= len(item) <= 5:
        raise ValueError(f"a layout item is address, length, offset and perhaps page size, not {item!r}")
    return LayoutItem(*item)


def send(
    connection: socket.socket, uffd: Userfaultfd | int, layout: Iterable[LayoutItem | tuple[int, ...]]
) -> None:
    """Hands a userfaultfd and a layout to a page server, over a Unix socket, as Firecracker does.

    One message: the layout as JSON, with the descriptor beside it. **Keep the descriptor open here**: it is
    what makes touches wait, and not read zeros, when the server dies.

    `layout` is in bytes, as for `serve`. Raises OSError if the socket does not take it.
    """
    items = [_item(item) for item in layout]
    message = json.dumps(
        [
            {
                "base_host_virt_addr": item.address,
                "size": item.length,
                "offset": item.offset,
                "page_size": item.page_size,
                "page_size_kib": item.page_size,
                **({} if item.shared is None else {"shared": item.shared}),
            }
            for item in items
        ]
    )
    socket.send_fds(connection, [message.encode()], [uffd if isinstance(uffd, int) else uffd.fileno()])


def receive(connection: socket.socket) -> tuple[Userfaultfd, list[LayoutItem], int]:
    """Takes what `send`, or Firecracker, hands over: the userfaultfd, the layout, and the sender's pid.

    The pid is that of the process that connected (SO_PEERCRED); it is the owner of the memory unless it
    sends on behalf of somebody else. Raises ValueError if something else is sent, EOFError if the other
    side has closed.
    """
    message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 4)
    if not message:
        raise EOFError("the connection was closed before a userfaultfd was handed over")
    try:
        while True:
            try:
                items = [_item(item) for item in json.loads(message)]
                break
            except json.JSONDecodeError as error:
                more = connection.recv(1 << 20)
                if not more:
                    raise ValueError(f"what came is no layout: {error}") from error
                message += more
        if len(fds) != 1:
            raise ValueError(f"one descriptor should come with the layout, and {len(fds)} did")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return Userfaultfd.from_fd(fds[0]), items, int.from_bytes(credentials[:4], "little")
