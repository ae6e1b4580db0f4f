"""The header of an .npy file, read without trusting it (numpy.lib.format describes the format).

A file begins with ``\\x93NUMPY``, two bytes of version, the length of the text that follows (two bytes in
version 1, four since 2), and a Python dictionary of `descr`, `fortran_order` and `shape` as text: latin-1,
and UTF-8 since version 3.
"""

from __future__ import annotations

import ast
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from userfault.errors import CorruptError

MAGIC = b"\x93NUMPY"
VERSIONS = ((1, 0), (2, 0), (3, 0))

LONGEST = 1 << 20
"""A header longer than this many bytes is taken for a broken file: NumPy itself refuses 10,000 of them."""

ALIGNMENT = 4096
"""The data of a file that we create begin at a multiple of this, so that direct I/O and pages fit it."""


@dataclass(frozen=True)
class Header:
    """What an .npy file says about its array, and where the data begin in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    version: tuple[int, int]
    offset: int

    @property
    def nbytes(self) -> int:
        """How many bytes the data take."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def read_header(read: Callable[[int, int], bytes], name: str) -> Header:
    """Reads the header of a file; ``read(offset, n)`` returns n of its bytes, fewer at its end.

    `name` is for messages. Raises CorruptError for anything that is not a whole and sensible header.
    """
    start = read(0, len(MAGIC) + 6)
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 2:
        raise CorruptError(f"{name} is no .npy file: {_looks_like(start)}")
    version = (start[len(MAGIC)], start[len(MAGIC) + 1])
    if version not in VERSIONS:
        raise CorruptError(
            f"{name} is of version {version[0]}.{version[1]} of the .npy format, which is unknown"
        )
    prefix = "<H" if version == (1, 0) else "<I"
    begin = len(MAGIC) + 2 + struct.calcsize(prefix)
    if len(start) < begin:
        raise CorruptError(f"{name} ends within its header")
    (length,) = struct.unpack_from(prefix, start, len(MAGIC) + 2)
    if length > LONGEST:
        raise CorruptError(f"{name} claims a header of {length} bytes; no array needs so many")
    text = read(begin, length)
    if len(text) < length:
        raise CorruptError(f"{name} ends within its header")
    try:
        return Header(*_parsed(text, version), version, begin + length)
    except _Nonsense as nonsense:
        raise CorruptError(f"{name} has a header that says nothing sensible: {nonsense}") from None


class _Nonsense(Exception):
    """What is wrong with a header, for the message."""


def _parsed(raw: bytes, version: tuple[int, int]) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    try:
        text = raw.decode("utf-8" if version >= (3, 0) else "latin-1")
        if version < (3, 0):
            # Python 2 wrote long integers as 3L.
            text = re.sub(r"(?<=\d)L\b(?=[,)\s])", "", text)
        fields = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise _Nonsense(f"it is no dictionary ({type(error).__name__})") from None
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise _Nonsense("it must name descr, fortran_order and shape, and nothing else")
    shape, fortran_order = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise _Nonsense(f"its shape is {shape!r}")
    if not isinstance(fortran_order, bool):
        raise _Nonsense(f"its fortran_order is {fortran_order!r}")
    try:
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
    except Exception as error:  # whatever NumPy makes of a description that nobody would write
        raise _Nonsense(f"its type is {fields['descr']!r} ({error})") from None
    return dtype, shape, fortran_order


def header_bytes(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    fortran_order: bool,
    version: tuple[int, int] | None,
) -> bytes:
    """The header for an array, padded so that the data begin at a multiple of ALIGNMENT bytes.

    No version means the oldest that can hold it. Raises ValueError for a version that does not exist or
    cannot.
    """
    if version is not None and tuple(version) not in VERSIONS:
        raise ValueError(
            f"version is {version!r}: it must be one of {', '.join(map(str, VERSIONS))}, or None"
        )
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran_order, "shape": shape}
    text = "{" + "".join(f"{key!r}: {fields[key]!r}, " for key in sorted(fields)) + "}"
    for candidate in VERSIONS if version is None else [tuple(version)]:
        try:
            encoded = text.encode("utf-8" if candidate == (3, 0) else "latin-1")
        except UnicodeEncodeError:
            continue
        prefix = "<H" if candidate == (1, 0) else "<I"
        fixed = len(MAGIC) + 2 + struct.calcsize(prefix)
        padding = -(fixed + len(encoded) + 1) % ALIGNMENT
        length = len(encoded) + padding + 1
        if candidate == (1, 0) and length > 0xFFFF:
            continue
        return MAGIC + bytes(candidate) + struct.pack(prefix, length) + encoded + b" " * padding + b"\n"
    raise ValueError(f"version {version} of the .npy format cannot hold the type {dtype}; leave version out")


def _looks_like(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "it looks like an .npz archive; unpack it, its arrays are .npy files"
    if not start:
        return "it is empty"
    if start.startswith(b"\x80"):
        return "it looks like a pickle, which cannot be mapped"
    return "it does not begin with \\x93NUMPY"
