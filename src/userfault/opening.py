"""`userfault.open`: a file as memory."""

from __future__ import annotations

import math
import mmap
import operator
import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Literal, SupportsIndex, TypeAlias, cast

from userfault import _native
from userfault.region import LARGEST_REGION, Region, at_exit
from userfault.sizes import Size, in_words, parse_size

__all__ = ["Options", "open", "private_region", "region_over"]

Mode: TypeAlias = Literal["r", "r+", "w", "w-", "x", "a", "c"]

_MODES = ("r", "r+", "w", "w-", "x", "a", "c")
_LARGEST_BLOCK = 64 << 20
_HUGE = 2 << 20
_LONGEST_RETRY = 1e9
"""Seconds; more do not fit into the clocks below."""


def open(
    path_or_store: str | os.PathLike[str] | _native.Store,
    mode: str = "r",
    *,
    offset: SupportsIndex = 0,
    length: Size | None = None,
    block: Size | Literal["auto"] = "auto",
    memory_limit: Size | None = None,
    fault: Literal["threads", "inline"] = "threads",
    pages: Literal["auto", "4KiB", "2MiB"] = "auto",
    on_error: Literal["auto", "retry", "poison"] = "auto",
    retry_for: float = 30.0,
    readahead: Literal["auto"] = "auto",
    locking: bool | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Region:
    """Opens a file or a store as memory that may be larger than the machine's.

    Its bytes are read when they are touched, a block at a time; blocks that have not been used for a while
    leave memory again, so that the memory limit holds.

    - `mode`: "r" read-only; "r+" reads and writes a file that exists; "w" creates or empties it and "w-" or
      "x" creates one that must not exist, both with `length` needed; "a" reads and writes, and creates or
      lengthens the file; "c" reads and writes, but what is written stays private and ends with the region:
      the file is never touched. A store that is no path takes "r", "r+" and "c".
    - `offset`, `length`: the bytes of the store; any numbers. No length means to the end. In mode "a" the
      file is made long enough, in the others ValueError says that it is too short.
    - `block`: bytes read and evicted at a time, any power of two from the page size to 64 MiB. "auto" is what
      the store prefers; for a file 2 MiB if the region and the limit are 64 MiB and more, because a huge page
      is then a block and costs a fraction of 512 small ones; else 64 KiB, from where on the copy costs more
      than the fault. Random access to small things wants 4 KiB.
    - `memory_limit`: bytes that this region may keep in memory, beside the limit of the process
      (`set_memory_limit`), which always holds. None: that one alone. At least four blocks are granted,
      because one instruction can need so many.
    - `pages`: "4KiB", "2MiB" (hugetlb pages where the pool has room, else a tmpfs of huge pages), or
      "auto": 2 MiB for blocks of 2 MiB and more where the machine has them, because a page is never larger
      than its block.
    - `on_error`: what happens when a block cannot be read. "retry" tries again for `retry_for` seconds and
      then gives it up, "poison" gives it up at once, "auto" retries for remote stores only. Giving up
      means: one line on stderr, SIGBUS for whoever touches it, an entry in `Region.errors`, and
      `Region.heal` to try again. A read that has not come back after `retry_for` seconds counts as failed.
    - `retry_for`: seconds, above 0. Also how long a write that flush, close, evict, pread or pwrite needs may
      take (2 s at least; a sync is given a second more for each 16 MiB that was written): then the call
      raises StoreError with errno ETIMEDOUT, and the data stays in memory, and dirty, until the store has
      answered.
    - `locking`: None refuses a second writer of a file with InUseError, in this process and in others
      (flock(2)). A reader may join a live writer: it sees each block as the file had it when the block was
      read. True makes a reader exclude writers too; False locks nothing.
    - `scratch`: the folder where private changes of mode "c" go when memory is short, in a file without a
      name; the temporary folder by default. While it is full, nothing that was changed leaves memory, and a
      touch that needs room waits for it: a line on stderr says so after a second, and after a minute and
      `retry_for` the touch ends with SIGBUS. No change is lost.
    - `fault`: who brings what is touched. "threads" are threads of the engine. "inline" is the thread that
      touches, in a handler of SIGBUS: a fault takes a fraction of the time, but system calls on memory that
      is absent fail with EFAULT (use `Region.pin`, `pread`, `pwrite` and `readinto`), a thread that blocks
      SIGBUS is killed by its touch, and faulthandler.enable() or signal.signal(SIGBUS, ...) afterwards take
      the handler away until the next `open`, `prefetch` or `stats`. ValueError if SIGBUS is blocked here.
    - `readahead`: "auto" is the only one so far.

    Sizes are integers or text such as "256MiB". Raises ValueError for arguments that make no sense,
    FileNotFoundError, FileExistsError and other OSErrors as open() does, InUseError, and OSError with
    advice if this machine does not allow userfaultfd (`userfault doctor` says more).
    """
    if readahead != "auto":
        raise ValueError(f'readahead is {readahead!r}: "auto" is the only policy so far')
    wanted = None if length is None else parse_size(length, "length")
    mode = _checked_mode(mode)
    begin = operator.index(offset)
    if begin < 0:
        raise ValueError(f"offset is {begin}: it is a number of bytes from the beginning")
    if wanted == 0:
        raise ValueError("length is 0: an empty region has no memory")
    if begin + (wanted or 0) > LARGEST_REGION:
        raise ValueError(f"{wanted} bytes at {begin} do not fit into the address space")
    options = Options(
        block=None if block == "auto" else checked_block(block),
        memory_limit=None if memory_limit is None else parse_size(memory_limit, "memory_limit"),
        pages=_one_of("pages", pages, ("auto", "4KiB", "2MiB")),
        fault=_one_of("fault", fault, ("threads", "inline")),
        on_error=_one_of("on_error", on_error, ("auto", "retry", "poison")),
        retry_for=_checked_seconds(retry_for),
        locking=locking,
    )
    if scratch is not None and mode != "c":
        raise ValueError(f"scratch is for private changes, in mode 'c'; mode is {mode!r}")
    if options.pages == "2MiB" and options.block is not None and options.block < _HUGE:
        # Before the file: what is refused must not have emptied it.
        raise ValueError(
            f'pages="2MiB" with a block of {in_words(options.block)}: a page is never larger than its block; '
            'ask for a block of at least 2 MiB or for pages="4KiB"'
        )
    store, owned = _store(path_or_store, mode, begin, wanted, locking)
    if mode == "c":
        return private_region(store, begin, wanted, options, scratch)
    return region_over(store, mode, begin, wanted, options, owned=owned)


@dataclass(frozen=True)
class Options:
    """What a region should be, checked; the fields are `userfault.open`'s arguments."""

    block: int | None = None
    memory_limit: int | None = None
    pages: str = "auto"
    fault: str = "threads"
    on_error: str = "auto"
    retry_for: float = 30.0
    locking: bool | None = None


def region_over(
    store: _native.Store, mode: str, offset: int, length: int | None, options: Options, *, owned: bool
) -> Region:
    """A region over an open store; `offset` and `length` in bytes.

    `owned` says that nobody else has the store: its lock is given up with the region. Raises ValueError if
    the store is too short.
    """
    length = _length_in(store, offset, length)
    region = Region(
        store,
        name=store.name,
        writable=mode != "r",
        private=mode == "c",
        offset=offset,
        length=length,
        block=options.block,
        pages=options.pages,
        fault=options.fault,
        memory_limit=options.memory_limit,
        on_error=options.on_error,
        retry_for=options.retry_for,
        locking=options.locking is not False,
        owns_lock=owned,
    )
    region._mode = mode
    region._reopen = {
        "offset": offset,
        "length": length,
        **asdict(options),
        "block": options.block or "auto",
    }
    at_exit(region)
    return region


def private_region(
    store: _native.Store | None,
    offset: int,
    length: int | None,
    options: Options,
    scratch: str | os.PathLike[str] | None,
    *,
    name: str | None = None,
) -> Region:
    """A region whose changes are private: over bytes of a store, or over `length` zeros without one.

    `offset` and `length` are bytes of the store; changes that leave memory go to a file without a name in the
    folder `scratch`. Raises ValueError if the store is too short, OSError if the folder takes no file.
    """
    if store is not None:
        length = _length_in(store, offset, length)
    overlay = _native.OverlayStore(
        store,
        offset=offset,
        length=length or 0,
        folder=os.fsdecode(scratch) if scratch is not None else tempfile.gettempdir(),
        name=name or (store.name if store is not None else "array"),
    )
    region = region_over(overlay, "c", 0, length, options, owned=False)
    region._reopen["offset"] = offset
    region._reopen["scratch"] = scratch
    region._below = store
    return region


def _length_in(store: _native.Store, offset: int, length: int | None) -> int:
    """The length, to the store's end without one. Raises ValueError if the store is too short."""
    end = len(store)
    if length is None:
        length = end - offset
        if length <= 0:
            what = "is empty" if end == 0 else f"has {end} bytes, none of them at offset {offset}"
            raise ValueError(f"{store.name} {what}; give a length, and mode 'a' to make it longer")
    elif offset + length > end:
        raise ValueError(
            f"{store.name} has {end} bytes, not the {offset + length} that offset and length ask for; "
            "mode 'a' makes a file longer"
        )
    return length


def _store(
    path_or_store: str | os.PathLike[str] | _native.Store,
    mode: Mode,
    offset: int,
    length: int | None,
    locking: bool | None,
) -> tuple[_native.Store, bool]:
    """The store, and True if it was opened here and is nobody else's."""
    if isinstance(path_or_store, _native.Store):
        if mode not in ("r", "r+", "c"):
            raise ValueError(
                f"mode is {mode!r}: a store exists already, so it is opened with 'r', 'r+' or 'c'"
            )
        return path_or_store, False
    if not isinstance(path_or_store, str | os.PathLike):
        raise TypeError(f"a path or a store is needed, not {type(path_or_store).__name__}")
    grows = mode in ("w", "w-", "x", "a")
    if length is None and mode in ("w", "w-", "x"):
        raise ValueError(f"mode {mode!r} creates the file anew: give its length")
    minimum = offset + length if grows and length is not None else None
    file_mode = "r" if mode == "c" else mode
    return _native.FileStore(path_or_store, file_mode, length=minimum, locking=locking), True


def _checked_mode(mode: str) -> Mode:
    if mode not in _MODES:
        raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(_MODES)}")
    return cast(Mode, mode)


def checked_block(block: Size) -> int:
    """The size of a block in bytes. Raises ValueError if it is none that a block may have."""
    size = parse_size(block, "block")
    if size & (size - 1) or not mmap.PAGESIZE <= size <= _LARGEST_BLOCK:
        raise ValueError(
            f"block is {size} bytes: it must be a power of two from {in_words(mmap.PAGESIZE)} to "
            f"{in_words(_LARGEST_BLOCK)}"
        )
    return size


def _checked_seconds(retry_for: float) -> float:
    if not (math.isfinite(retry_for) and 0 < retry_for <= _LONGEST_RETRY):
        raise ValueError(f"retry_for is {retry_for}: it is a number of seconds above 0, and at most 1e9")
    return float(retry_for)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(allowed)}")
    return value
