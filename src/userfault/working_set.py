"""The blocks that the first pass over a restored point touched, kept beside it for the next restore.

A lazy restore hands out arrays at once and brings their bytes in behind the program's back. What the program
touched before the background came to it is what it waited for; so that is noted as a *working set*, once, and
fetched first the next time. It is advice and nothing else: a set that is missing, damaged, of another point
or not to be written changes no byte that anybody reads.

The file is `working-set-NNNNNNNNNNNNNNNNNNNN` (the step in 20 digits): a JSON object and a line with its
CRC-32. Pruning removes it with its point.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Ranges", "read", "runs", "write"]

Ranges = list[tuple[int, int]]
"""Offset and length of each range, in bytes, in the memory of one of the point's data."""

_LARGEST = 64 << 20


def path_of(directory: str | os.PathLike[str], step: int) -> Path:
    """Where the set of a point is kept."""
    return Path(directory) / f"working-set-{step:020}"


def runs(touched: bytes, block: int, start: int = 0) -> Ranges:
    """The ranges of the blocks (of `block` bytes, from byte `start` on) that are not 0 in `touched`."""
    ranges: Ranges = []
    at = 0
    while at < len(touched):
        if not touched[at]:
            at += 1
            continue
        end = at
        while end < len(touched) and touched[end]:
            end += 1
        ranges.append((start + at * block, (end - at) * block))
        at = end
    return ranges


def read(directory: str | os.PathLike[str], step: int, time: float) -> dict[int, Ranges] | None:
    """The set of the point of that step and time, by number of its data; None if none can be trusted."""
    try:
        path = path_of(directory, step)
        if path.stat().st_size > _LARGEST:
            return None
        text, _, sum_line = path.read_bytes().rpartition(b"\n")
        if sum_line != b"crc32 %08x" % zlib.crc32(text):
            return None
        found = json.loads(text)
        if found["time"] != time:
            return None
        return {
            int(data): [(int(offset), int(length)) for offset, length in ranges]
            for data, ranges in found["data"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write(directory: str | os.PathLike[str], step: int, time: float, touched: Mapping[int, Ranges]) -> None:
    """Keeps a set. Nobody hears of it if that is not possible: a directory may be read-only."""
    text = json.dumps(
        {"time": time, "data": {str(data): ranges for data, ranges in touched.items()}}
    ).encode()
    path = path_of(directory, step)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with contextlib.suppress(OSError):
        try:
            new.write_bytes(text + b"\ncrc32 %08x" % zlib.crc32(text))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
