"""What a checkpoint has to know of an array: where its bytes are, and how to make an array of them again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from userfault.errors import CorruptError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Described", "Shape", "described"]

_NOTHING = np.zeros(1, np.uint8)
"""What is saved of an array without elements: a byte, so that everything that is saved has some."""


@dataclass(frozen=True)
class Described:
    """An array's memory. Addresses and lengths are in bytes."""

    address: int
    nbytes: int
    description: dict[str, Any]
    """Its kind, type and shape, for JSON."""
    owner: object
    """Keeps the memory where it is: a buffer export, or a tensor's storage."""


def described(name: str, array: Any) -> Described:
    """Finds an array's memory.

    Raises ValueError for one that is read-only, masked, not C-contiguous, or of Python objects, and TypeError
    for what has no memory of its own.
    """
    if type(array).__module__.partition(".")[0] == "torch":
        return _tensor(name, array)
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"array {name!r} is masked: save its .data and its .mask, each under its name")
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which cannot be saved as bytes")
        if not array.flags.c_contiguous:
            raise ValueError(f"array {name!r} is not C-contiguous; save its base, or its transpose")
        if not array.flags.writeable:
            raise ValueError(f"array {name!r} is read-only: it does not change, so save it once with numpy")
        try:
            descr = np.lib.format.dtype_to_descr(array.dtype)
        except ValueError as error:
            raise ValueError(
                f"array {name!r} is of a type that cannot be written down: {error}. "
                f'Save its bytes: array.view("V{array.itemsize}")'
            ) from None
        description = {"kind": "ndarray", "dtype": _to_json(descr), "shape": list(array.shape)}
        # An export keeps ndarray.resize() from moving the bytes.
        return _found(array.ctypes.data, array.nbytes, description, (array, _export(array)))
    try:
        view = memoryview(array)
    except TypeError:
        raise TypeError(f"array {name!r} is a {type(array).__name__}, which has no buffer") from None
    if view.readonly:
        raise ValueError(f"array {name!r} is read-only memory")
    if not view.c_contiguous:
        raise ValueError(f"array {name!r} is not C-contiguous")
    flat = np.frombuffer(view.cast("B"), np.uint8) if view.nbytes else np.zeros(0, np.uint8)
    description = {"kind": "buffer", "dtype": "|u1", "shape": [view.nbytes]}
    return _found(flat.ctypes.data, view.nbytes, description, (flat, view))


def _found(address: int, nbytes: int, description: dict[str, Any], owner: object) -> Described:
    if nbytes == 0:
        return Described(_NOTHING.ctypes.data, _NOTHING.nbytes, description, (owner, _NOTHING))
    return Described(address, nbytes, description, owner)


def _export(array: NDArray[Any]) -> object:
    try:
        return memoryview(cast("Buffer", array))
    except (ValueError, TypeError, BufferError):
        # Dates and some others have no form in the buffer protocol; their bytes do.
        return memoryview(cast("Buffer", array.view(f"V{array.itemsize}").reshape(-1).view(np.uint8)))


def _tensor(name: str, tensor: Any) -> Described:
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor {name!r} is on {tensor.device}: only memory of the CPU can be tracked")
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if layout != "torch.strided":
        raise ValueError(f"tensor {name!r} has the layout {layout}: save the dense tensors it is made of")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor {name!r} is not contiguous; save its base, or .contiguous() in its place")
    for lazily, what in (("is_conj", "conjugate"), ("is_neg", "negative")):
        if getattr(tensor, lazily, bool)():
            raise ValueError(f"tensor {name!r} is the {what} of what its memory holds; save its base")
    nbytes = tensor.numel() * tensor.element_size()
    dtype = str(tensor.dtype).removeprefix("torch.")
    description = {"kind": "tensor", "dtype": dtype, "shape": list(tensor.shape)}
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return _found(tensor.data_ptr(), nbytes, description, (tensor, storage))


def _to_json(descr: Any) -> Any:
    if isinstance(descr, list):
        return [[_to_json(part) for part in field] for field in descr]
    return list(descr) if isinstance(descr, tuple) else descr


def _from_json(descr: Any) -> Any:
    """Field lists have tuples in them, and shapes are tuples; JSON has lists only."""
    if isinstance(descr, str):
        return descr
    if isinstance(descr, list) and descr and isinstance(descr[0], list):
        return [_field(field) for field in descr]
    raise CorruptError(f"{descr!r} is no type")


def _field(field: list[Any]) -> tuple[Any, ...]:
    if not 2 <= len(field) <= 3:
        raise CorruptError(f"{field!r} is no field of a type")
    name = tuple(field[0]) if isinstance(field[0], list) else field[0]
    rest = tuple(tuple(part) for part in field[2:])
    return (name, _from_json(field[1]), *rest)


@dataclass(frozen=True)
class Shape:
    """What an array is made of again."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    kind: str
    original: str = ""
    """The name of a tensor's type that NumPy does not have, and whose bytes are something else to it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, description: Any, nbytes: int) -> Shape:
        """Reads a description that belongs to `nbytes` bytes.

        Raises CorruptError if it makes no sense.
        """
        try:
            kind, shape = description["kind"], tuple(description["shape"])
            text = description["dtype"]
            original = ""
            if kind == "tensor":
                try:
                    dtype = np.dtype(text)
                except TypeError:
                    # A type that NumPy does not have (bfloat16, float8 and others), by its bytes.
                    count = math.prod(shape)
                    dtype, original = _opaque(nbytes // count if count else 1), text
            else:
                dtype = np.lib.format.descr_to_dtype(_from_json(text))
            right = all(isinstance(size, int) and size >= 0 for size in shape)
            needed = math.prod(shape) * dtype.itemsize if right else -1
            if dtype.hasobject or (needed or _NOTHING.nbytes) != nbytes:
                raise CorruptError(f"array {name!r}: {description} does not describe {nbytes} bytes")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"array {name!r} is described as {description}: {error}") from error
        return cls(dtype, cast("tuple[int, ...]", shape), kind, original)


def _opaque(size: int) -> np.dtype[Any]:
    return np.dtype(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")
