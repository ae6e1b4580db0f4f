"""Writing the arrays of a point as files that other programs read: .npy, .npz, .safetensors, raw bytes.

Every block is checked on its way, and little of an array is in memory at a time. A file has its name when it
is whole, and until then another one beside it: an export that fails leaves what was there before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from userfault import _native
from userfault.npy_header import header_bytes
from userfault.saved_array import Shape

__all__ = ["KINDS", "Exported", "export"]

_PART = 16 << 20
"""Bytes of an array in memory at a time: a multiple of the elements' sizes wherever these matter."""

_LONGEST = 200
"""Bytes of a file's name that come from an array's: file systems allow 255."""


_parts = itertools.count()


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    """The point."""
    arrays: list[str]
    """Names of the arrays."""
    files: list[Path]
    """The files: one, or one for each array in their order."""


@dataclass(frozen=True)
class _Array:
    name: str
    shape: Shape
    store: _native.ArrayStore

    def parts(self) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Its bytes, checked."""
        buffer = np.empty(min(_PART, self.shape.nbytes), np.uint8)
        threads = len(os.sched_getaffinity(0))
        for start in range(0, self.shape.nbytes, _PART):
            part = buffer[: self.shape.nbytes - start]
            self.store.read_into(part, start, threads)
            yield part


def export(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    step: int | None = None,
    *,
    kind: str | None = None,
    names: Iterable[str] | None = None,
) -> Exported:
    """Writes a point, the latest or that of `step`, to `target`.

    `kind` is "npy", "npz", "safetensors" or "raw"; without it the name of the target says which, and a name
    that says nothing is a folder of .npy files. A target that ends in .npy or .raw is one file, of one array.

    Raises KeyError for a name that the point does not have, ValueError for what cannot be written in this
    form, StoreError for a block that is damaged, CorruptError for a damaged index, FileNotFoundError if there
    is no such point, OSError if the files cannot be written.
    """
    target = Path(target)
    kind = kind or {f".{each}": each for each in KINDS}.get(target.suffix, "npy")
    if kind not in KINDS:
        raise ValueError(f"the kind is {kind!r}: it must be one of {', '.join(KINDS)}")
    point = _native.OpenPoint(directory, step)
    known = {name: (description, data) for name, description, data in point.arrays()}
    wanted = list(known) if names is None else list(names)
    arrays = []
    for name in wanted:
        if name not in known:
            raise KeyError(f"the point of step {point.step} has no array {name!r}; it has {', '.join(known)}")
        description, data = known[name]
        store = point.store(data)
        arrays.append(_Array(name, Shape.of(name, json.loads(description), store.nbytes), store))
    with contextlib.ExitStack() as done:
        if kind in ("npz", "safetensors"):
            files = [target]
            KINDS[kind](done.enter_context(_whole(target)), arrays)
        else:
            files = _files(target, kind, arrays)
            for file, array in zip(files, arrays, strict=True):
                # All of them are whole before the first has its name.
                with contextlib.closing(done.enter_context(_whole(file))) as writing:
                    KINDS[kind](writing, [array])
    return Exported(point.step, wanted, files)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that has its name once it is whole."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    part = path.with_name(f".userfault-export-{os.getpid()}-{next(_parts)}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _files(target: Path, kind: str, arrays: list[_Array]) -> list[Path]:
    """One file for each array: the target itself, or in it."""
    suffix = f".{kind}"
    if target.suffix == suffix and not target.is_dir():
        if len(arrays) != 1:
            raise ValueError(
                f"{target} is one file, and there are {len(arrays)} arrays: choose one by its name, or name "
                "a folder"
            )
        return [target]
    target.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    files = []
    for array in arrays:
        stem = name = _file_name(array.name)
        number = 1
        while name in taken:
            number += 1
            name = f"{stem}~{number}"
        taken.add(name)
        files.append(target / f"{name}{suffix}")
    return files


def _file_name(name: str) -> str:
    """A file name that stays in its folder, whatever an array is called."""
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return safe.encode()[:_LONGEST].decode(errors="ignore").lstrip(".") or "_"


def _write_npy(file: IO[bytes], array: _Array) -> None:
    file.write(header_bytes(array.shape.dtype, array.shape.shape, False, None))
    for part in array.parts():
        file.write(part.data)


def _npy(file: IO[bytes], arrays: list[_Array]) -> None:
    _write_npy(file, arrays[0])


def _raw(file: IO[bytes], arrays: list[_Array]) -> None:
    for part in arrays[0].parts():
        file.write(part.data)


def _npz(file: IO[bytes], arrays: list[_Array]) -> None:
    # Not numpy.savez: it takes some names for its own arguments.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for array in arrays:
            if "\0" in array.name:
                raise ValueError(f"the name {array.name!r} has no form in .npz files")
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                _write_npy(member, array)


_SAFETENSORS = {
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
    "c8": "C64",
}
_SAFETENSORS_OF_TORCH = {
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


def _safetensors_type(array: _Array) -> str:
    shape = array.shape
    kind = (
        _SAFETENSORS_OF_TORCH.get(shape.original) if shape.original else _SAFETENSORS.get(shape.dtype.str[1:])
    )
    if kind is None:
        what = shape.original or shape.dtype
        raise ValueError(f"array {array.name!r} is of {what}, which .safetensors files do not have")
    return kind


def _safetensors(file: IO[bytes], arrays: list[_Array]) -> None:
    """A length, a JSON header and bytes: https://github.com/huggingface/safetensors#format."""
    header: dict[str, Any] = {}
    at = 0
    for array in arrays:
        if array.name == "__metadata__":
            raise ValueError("the name '__metadata__' means something else in .safetensors files")
        end = at + array.shape.nbytes
        header[array.name] = {
            "dtype": _safetensors_type(array),
            "shape": list(array.shape.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays:
        dtype = array.shape.dtype
        for part in array.parts():
            little = part.view(dtype).astype(dtype.newbyteorder("<"), copy=False)
            file.write(little.data)


KINDS: dict[str, Callable[[IO[bytes], list[_Array]], None]] = {
    "npy": _npy,
    "npz": _npz,
    "safetensors": _safetensors,
    "raw": _raw,
}
"""The forms, and who writes a file of each."""
