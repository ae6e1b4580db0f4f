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

    Raises ValueError for one that is empty, read-only, not C-contiguous, or of Python objects, and TypeError
    for what has no memory of its own.
    """
    if type(array).__module__.partition(".")[0] == "torch":
        return _tensor(name, array)
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which cannot be saved as bytes")
        if not array.flags.c_contiguous:
            raise ValueError(f"array {name!r} is not C-contiguous; save its base, or its transpose")
        if not array.flags.writeable:
            raise ValueError(f"array {name!r} is read-only: it does not change, so save it once with numpy")
        _not_empty(name, array.nbytes)
        description = {
            "kind": "ndarray",
            "dtype": _to_json(np.lib.format.dtype_to_descr(array.dtype)),
            "shape": list(array.shape),
        }
        # An export keeps ndarray.resize() from moving the bytes.
        return Described(array.ctypes.data, array.nbytes, description, (array, _export(array)))
    try:
        view = memoryview(array)
    except TypeError:
        raise TypeError(f"array {name!r} is a {type(array).__name__}, which has no buffer") from None
    if view.readonly:
        raise ValueError(f"array {name!r} is read-only memory")
    if not view.c_contiguous:
        raise ValueError(f"array {name!r} is not C-contiguous")
    _not_empty(name, view.nbytes)
    flat = np.frombuffer(view.cast("B"), np.uint8)
    return Described(
        flat.ctypes.data,
        view.nbytes,
        {"kind": "buffer", "dtype": "|u1", "shape": [view.nbytes]},
        flat,
    )


def _export(array: NDArray[Any]) -> object:
    try:
        return memoryview(cast("Buffer", array))
    except (ValueError, TypeError, BufferError):
        # Dates and some others have no form in the buffer protocol; their bytes do.
        return memoryview(cast("Buffer", array.view(f"V{array.itemsize}").reshape(-1).view(np.uint8)))


def _not_empty(name: str, nbytes: int) -> None:
    if nbytes == 0:
        raise ValueError(f"array {name!r} is empty: there is nothing to save")


def _tensor(name: str, tensor: Any) -> Described:
    if tensor.device.type != "cpu":
        raise ValueError(f"tensor {name!r} is on {tensor.device}: only memory of the CPU can be tracked")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor {name!r} is not contiguous")
    nbytes = tensor.numel() * tensor.element_size()
    _not_empty(name, nbytes)
    dtype = str(tensor.dtype).removeprefix("torch.")
    description = {"kind": "tensor", "dtype": dtype, "shape": list(tensor.shape)}
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return Described(tensor.data_ptr(), nbytes, description, (tensor, storage))


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


_TENSORS = {
    "bfloat16": np.dtype(np.uint16),
    "bool": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Shape:
    """What an array is made of again."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, name: str, description: Any, nbytes: int) -> Shape:
        """Reads a description that belongs to `nbytes` bytes.

        Raises CorruptError if it makes no sense.
        """
        try:
            kind, shape = description["kind"], tuple(description["shape"])
            text = description["dtype"]
            if kind == "tensor":
                dtype = _TENSORS.get(text) or _tensor_type(text)
            else:
                dtype = np.lib.format.descr_to_dtype(_from_json(text))
            right = all(isinstance(size, int) and size >= 0 for size in shape)
            if not right or dtype.hasobject or math.prod(shape) * dtype.itemsize != nbytes:
                raise CorruptError(f"array {name!r}: {description} does not describe {nbytes} bytes")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"array {name!r} is described as {description}: {error}") from error
        return cls(dtype, cast("tuple[int, ...]", shape), kind)


def _tensor_type(text: str) -> np.dtype[Any]:
    try:
        return np.dtype(text)
    except TypeError:
        # A type that NumPy does not have, by its bytes: float8 and the like.
        return np.dtype(np.uint8)
