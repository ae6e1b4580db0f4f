"""Sizes as people write them: 268435456, "256MiB", "1.5 GB"."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import SupportsIndex, TypeAlias

Size: TypeAlias = SupportsIndex | str
"""A number of bytes, or text such as "256MiB" or "8 GB"."""

_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtTpP]?)(i?)([bB]?)\s*", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse_size(value: Size, name: str = "size") -> int:
    """Returns a size in bytes.

    ``KiB, MiB, GiB, TiB, PiB`` are powers of 1024 and ``kB, MB, GB, TB, PB`` powers of 1000, as IEC 80000-13
    has them. A unit without a B ("256M") is ambiguous and refused; a bare number means bytes.

    Raises ValueError for text that is no size, for a negative number, for a part of a byte, and from 2**63
    on; TypeError for anything that is neither text nor an integer. `name` is what the message calls it.
    """
    if isinstance(value, str):
        match = _FORM.fullmatch(value)
        if match is None:
            raise ValueError(
                f'{name} is {value!r}, which is no size: write for instance "256MiB" or 268435456'
            )
        number, prefix, binary, byte = match.groups()
        if (prefix and not byte) or (binary and not prefix):
            raise ValueError(f'{name} is {value!r}: name the unit, for instance "256MiB" or "256MB"')
        size = Fraction(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()]
        if size.denominator != 1:
            raise ValueError(f"{name} is {value!r}, which is no whole number of bytes")
        return _addressable(int(size), name)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f'{name} must be a number of bytes or text such as "256MiB", not {type(value).__name__}'
        )
    size_in_bytes = operator.index(value)
    if size_in_bytes < 0:
        raise ValueError(f"{name} is {size_in_bytes}: a size is never negative")
    return _addressable(size_in_bytes, name)


def _addressable(size: int, name: str) -> int:
    if size >= 1 << 63:
        raise ValueError(f"{name} is {size}: no machine has so many bytes")
    return size


def in_words(size: int) -> str:
    """A number of bytes for people to read, in the largest binary unit that keeps it at 1 or more."""
    for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB")):
        if size < 1024 ** (power + 1) or unit == "TiB":
            text = f"{size / 1024**power:.1f}".removesuffix(".0")
            return f"{text} {unit}"
    raise AssertionError("the loop ends with its last unit")
