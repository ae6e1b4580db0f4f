"""Writing .safetensors files: a length, a JSON header, and the bytes of each array.

The format is https://github.com/huggingface/safetensors#format; it needs no library to be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["write"]

_NAMES = {
    "b1": "BOOL",
    "i1": "I8",
    "u1": "U8",
    "i2": "I16",
    "u2": "U16",
    "f2": "F16",
    "i4": "I32",
    "u4": "U32",
    "f4": "F32",
    "i8": "I64",
    "u8": "U64",
    "f8": "F64",
}


def write(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes arrays of any shape.

    Raises ValueError for a type that the format does not have (complex numbers, dates, records).
    """
    header: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        kind = _NAMES.get(array.dtype.str[1:])
        if kind is None:
            raise ValueError(f"array {name!r} is of {array.dtype}, which .safetensors files do not have")
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            little = array.dtype.newbyteorder("<")
            np.ascontiguousarray(array, little).tofile(file)
